"""Judges from outside a run: a causal LM, a trigram model, MAUVE."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf

from lib.errors import BadConfig, BadData, MissingInput
from lib.evaluation import outside_judges
from lib.evaluation.outside_judges import (
    UNKNOWN_NATS,
    CausalJudge,
    frontier_area,
    halves,
    judge,
    mauve,
    pieces,
    table,
    texts_of_run,
    trigram_nats,
)
from tests.pretrained_folders import masked_lm_folder
from tests.test_foreign import make


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    size = max(make("byte_level").get_vocab().values()) + 1
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=1, bos_token_id=2, eos_token_id=3)
    )
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.5)
    model.save_pretrained(folder)
    make("byte_level").save_pretrained(folder)
    return folder


def test_nats_of_a_causal_lm_are_its_own_loss(causal):
    judged = CausalJudge.open(causal)
    texts = ["the quick brown fox", "dog"]
    for text, nats in zip(texts, judged.nats(texts), strict=True):
        ids = torch.tensor([judged.tokenizer(text, add_special_tokens=False)["input_ids"]])
        if (front := judged.tokenizer.bos_token_id or judged.tokenizer.eos_token_id) is not None:
            ids = torch.cat([torch.tensor([[front]]), ids], 1)
        loss = judged.model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        assert nats == pytest.approx(float(loss), rel=1e-4)


def test_a_bidirectional_model_is_no_judge(tmp_path):
    with pytest.raises((BadData, MissingInput)):
        CausalJudge.open(masked_lm_folder("distilbert", tmp_path))


def test_a_model_without_its_head_and_a_text_that_is_too_long_are_refused(causal, tmp_path):
    judged = CausalJudge.open(causal)
    with pytest.raises(BadData, match="reads 1,024 tokens at most"):
        judged.nats(["the quick brown fox " * 600])
    shutil.copytree(causal, tmp_path / "m")
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    hf.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    with pytest.raises(BadData, match=r"lacks 1 tensors of LlamaForCausalLM, such as lm_head\.weight"):
        CausalJudge.open(tmp_path / "m")


def test_the_trigram_model_knows_english_and_its_order():
    pytest.importorskip("pocketsphinx", reason="needs pocketsphinx")
    texts = [
        "one of the most important things in the world",
        "world the in things important most the of one",
        "zzxq",
    ]
    nats, words, unknown = trigram_nats(texts)
    assert list(words) == [9, 9, 1] and list(unknown) == [0, 0, 1]
    assert nats[0] < 0.75 * nats[1] and nats[2] == UNKNOWN_NATS
    assert 2 < nats[0] / 9 < 7  # nats per word of plain English


def test_mauve_tells_equal_from_different_sets():
    rng = np.random.default_rng(0)
    one, same, other = rng.normal(size=(300, 8)), rng.normal(size=(300, 8)), rng.normal(size=(300, 8)) + 4
    assert mauve(one, same) > 0.85 > 0.2 > mauve(one, other)
    half = np.concatenate([same[:150], other[:150]])
    assert mauve(one, other) < mauve(one, half) < mauve(one, same)
    p = np.array([0.5, 0.5])
    assert frontier_area(p, p) == pytest.approx(1, abs=1e-4)
    assert frontier_area(np.array([1.0, 0]), np.array([0, 1.0])) < 0.05


def test_a_finished_run_is_judged_beside_its_own_reference_model(quick_run, causal, tmp_path):
    rows = judge(quick_run, causal, False, masked_lm_folder("bert", tmp_path))
    samples, own, real = texts_of_run(quick_run)
    assert [row["name"] for row in rows] == [*samples, "real text"] and own["real text"] is not None
    for row in rows:
        assert row["reference_nll"] == own[row["name"]] and row["causal_nll"]["value"] > 0
        assert row["mauve"] is None  # eight samples are too few
        assert row["samples"] <= len(next(iter(samples.values())))
    assert "MAUVE" in table(rows) and "trigram" not in table(rows)
    assert "".join(pieces(real, 50)[0]) in " ".join(text for text, _ in real)
    with pytest.raises(MissingInput, match=r"run 06_sample\.py"):
        judge(tmp_path, causal, False, None)


def test_halves_share_no_document_and_each_piece_has_its_document():
    """A document of one half in the other would make held-out text seem closer to itself than it is."""
    texts = [("a" * 10, "d0"), ("b" * 7, "d1"), ("a" * 5, "d0"), ("c" * 8, "d2"), ("e" * 9, "d3")]
    one, other = halves(texts)
    assert {group for _, group in one} == {"d0", "d2"} and {group for _, group in other} == {"d1", "d3"}
    cut, documents = pieces(one, 4)
    assert cut == ["aaaa", "aaaa", "aa a", "aaaa", " ccc", "cccc"]
    assert documents.tolist() == ["d0", "d0", "d0", "d0", "d0", "d2"]
    assert pieces([], 4)[0] == [] and halves(texts[:1])[1] == []


def test_real_text_is_judged_by_documents_and_in_the_number_of_samples(monkeypatch):
    samples = {"critic, 4": ["abcd"] * 30}
    # Each document is a letter of its own, and its pieces are alike: they are one trial, not many
    real = [(chr(97 + d) * (4 * 40), f"d{d}") for d in range(8)]
    monkeypatch.setattr(outside_judges, "texts_of_run", lambda run: (samples, {}, real))
    nats = SimpleNamespace(nats=lambda texts: np.array([float(ord(text[-1])) for text in texts]))
    monkeypatch.setattr(outside_judges.CausalJudge, "open", lambda folder: nats)
    row = outside_judges.judge(Path("run"), Path("lm"), False, None)[-1]
    assert row["name"] == "real text" and row["samples"] == 30
    assert (
        row["causal_nll"]["high"] - row["causal_nll"]["low"] > 2
    )  # over four documents; 0.4 over thirty pieces
    alone = outside_judges.table([row | {"causal_nll": {"value": 1.0, "low": None, "high": None}}])
    assert alone.splitlines()[-1].split() == ["real", "text", "30", "-", "1.000"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", None)
    with pytest.raises(BadConfig, match="pip install pocketsphinx"):
        trigram_nats(["the fox"])
