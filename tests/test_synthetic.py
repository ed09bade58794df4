"""Synthetic text: only masked positions change, no special token is generated, a row does not depend on its batch."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib import randomness, schema
from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.models.build import make_model, model_config, save_model
from lib.runtime import Runtime
from lib.synthetic import MaskedLMEngine, MaskedRows
from lib.tasks import CandidateContext
from lib.tasks.text.rewriting import candidates, pad
from lib.tokenization import encode_batch, train_tokenizer
from tests.conftest import run_stages

CPU = Runtime(torch.device("cpu"), "fp32")
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("character", [TEXT], 0)


@pytest.fixture(scope="module")
def engine(tokenizer) -> MaskedLMEngine:
    config = model_config(load_config(quick_test=True).architecture, "bidirectional", len(tokenizer))
    model = make_model("language_model", config, 0, "engine")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return MaskedLMEngine(model, tokenizer, CPU, 64)


def context(tokenizer, engines, **changes) -> CandidateContext:
    config = load_config(quick_test=True)
    updated = config.candidates.model_copy(update=changes)
    return CandidateContext(config.model_copy(update={"candidates": updated}), tokenizer, engines)


def examples(tokenizer, count: int = 40) -> pa.Table:
    texts = [TEXT[i % 20 : i % 20 + 30 + i % 3] for i in range(count)]
    rows = [
        {"example_id": f"d:{i}", "prompt": "", "target": t, "split": "train", "group": f"g{i // 4}",
         "continues": False, "token_ids": ids.tolist()}
        for i, (t, ids) in enumerate(zip(texts, encode_batch(tokenizer, texts), strict=True))
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema.EXAMPLES.arrow)


# --------------------------------------------------------------------------------------------- engine


@pytest.mark.parametrize("passes", [1, 3])
def test_only_masked_positions_change_and_no_special_token_is_generated(tokenizer, engine, passes):
    rng = np.random.default_rng(0)
    ids = rng.integers(4, len(tokenizer), (30, 64))
    masked = rng.random(ids.shape) < 0.5
    config = context(tokenizer, [engine], fill_passes=passes).config.candidates
    filled = engine.fill(MaskedRows(ids, np.ones_like(masked), masked, np.arange(30)), config, 1)
    np.testing.assert_array_equal(filled[~masked], ids[~masked])
    assert (filled[masked] > 3).all()
    assert (filled[masked] != ids[masked]).mean() > 0.5  # an untrained model does not predict the original


def test_a_row_is_filled_the_same_way_in_any_batch_also_when_padded_or_long(tokenizer, engine):
    rng = np.random.default_rng(1)
    ids = rng.integers(4, len(tokenizer), (20, 100))  # longer than the engine's 64
    valid = np.arange(100) < rng.integers(40, 101, 20)[:, None]
    masked = (rng.random(ids.shape) < 0.5) & valid
    rows = np.arange(20) * 7
    config = context(tokenizer, [engine]).config.candidates
    whole = MaskedRows(ids, valid, masked, rows)
    together = engine.fill(whole, config, 1)
    for i in (0, 7, 19):
        alone = engine.fill(whole.select(np.array([i])), config, 1)
        np.testing.assert_array_equal(alone[0], together[i])


def test_more_passes_see_more_context(tokenizer):
    """A model that copies its left neighbour generates runs of equal letters when it goes token by token."""

    class CopyLeft(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, logits_at=None):
            left = torch.cat([input_ids[:, :1], input_ids[:, :-1]], 1).flatten()[logits_at]
            logits = torch.zeros(len(left), len(tokenizer))
            known = left > 3
            logits[known] = -30.0
            logits[known, left[known]] = 30.0
            from types import SimpleNamespace

            return SimpleNamespace(logits=logits)

    engine = MaskedLMEngine(CopyLeft(), tokenizer, CPU, 32)
    ids, masked = np.full((200, 32), 5), np.ones((200, 32), bool)
    masked[:, 0] = False
    same = {}
    for passes in (1, 31):
        config = context(tokenizer, [engine], fill_passes=passes).config.candidates
        filled = engine.fill(MaskedRows(ids, np.ones_like(masked), masked, np.arange(200)), config, 1)
        same[passes] = (filled[:, 1:] == filled[:, :-1]).mean()
    assert same[31] > same[1] + 0.3


def test_tokens_are_sampled_as_configured(tokenizer):
    """A model that slightly prefers one letter: at a low temperature, with top_k 1 or a low top_p it samples no other."""

    class Prefers(torch.nn.Module):
        config = type("C", (), {"max_position_embeddings": 33})()

        def forward(self, input_ids, attention_mask=None, logits_at=None):
            assert logits_at is not None
            logits = torch.zeros(len(logits_at), len(tokenizer))
            logits[:, 6], logits[:, 7], logits[:, 0] = 1.0, 0.9, 5.0  # and prefers [PAD] to both
            return type("Output", (), {"logits": logits})

    engine = MaskedLMEngine(Prefers(), tokenizer, CPU, 32)
    ids, valid = np.full((40, 32), 5), np.ones((40, 32), bool)

    def sampled(**changes) -> set[int]:
        plain: dict = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "fill_passes": 1}
        config = context(tokenizer, [engine], **plain | changes).config.candidates
        return set(engine.fill(MaskedRows(ids, valid, valid, np.arange(40)), config, 1).flatten().tolist())

    assert len(sampled()) > 15 and min(sampled()) > 3
    assert sampled(temperature=0.005) == sampled(top_k=1) == sampled(top_p=0.01) == {6}
    assert sampled(top_k=2) == {6, 7} and sampled(temperature=0.005, fill_passes=3) == {6}


def test_loading_checks_the_folder(tmp_path, tokenizer):
    with pytest.raises(MissingInput, match=r"no config\.json"):
        MaskedLMEngine.load(tmp_path, CPU)
    config = model_config(load_config(quick_test=True).architecture, "bidirectional", 10)
    save_model(make_model("language_model", config, 0, "m"), tmp_path / "small", tokenizer)
    with pytest.raises(BadData, match="do not belong together"):
        MaskedLMEngine.load(tmp_path / "small", CPU)


# ------------------------------------------------------------------------------------------ candidates


def test_one_original_at_a_uniform_place_and_the_fraction_is_counted(tokenizer, engine):
    table = candidates(examples(tokenizer, 400), context(tokenizer, [engine]))
    schema.conform(table, schema.CANDIDATES)
    rows = table.to_pylist()
    places = [r["candidate_id"] for r in rows if r["kind"] == "original"]
    assert len(places) == 400
    counts = np.bincount(places, minlength=4)
    assert ((counts - 100) ** 2 / 100).sum() < 16.3  # chi square, 3 degrees of freedom, p = 0.001
    truth = {r["example_id"]: r for r in rows if r["kind"] == "original"}
    for r in rows:
        labels, ids = np.array(r["token_labels"]), np.array(r["token_ids"])
        clean = np.array(truth[r["example_id"]]["token_ids"])
        assert r["synthetic_fraction"] == pytest.approx((labels == 2).mean())
        np.testing.assert_array_equal(ids[labels == 0], clean[labels == 0])
        if r["kind"] == "original":
            assert r["mask_ratio"] is None and r["synthetic_fraction"] == 0
        else:
            assert (labels == 2).sum() == max(1, round(r["mask_ratio"] * len(ids)))
            assert 0.1 <= r["mask_ratio"] <= 0.8


def test_a_candidate_does_not_depend_on_its_neighbours(tokenizer, engine):
    table = examples(tokenizer)
    whole = candidates(table, context(tokenizer, [engine])).to_pylist()
    part = candidates(table.slice(10, 3), context(tokenizer, [engine])).to_pylist()
    assert part == whole[40:52]


def test_random_tokens_are_each_drawn_on_their_own(tokenizer):
    table = candidates(
        examples(tokenizer), context(tokenizer, [], source="random_tokens", mask_ratio=(0.5, 0.5))
    )
    written = [
        t
        for r in table.to_pylist()
        for t, label in zip(r["token_ids"], r["token_labels"], strict=True)
        if label == 1
    ]
    assert min(written) > 3
    share = np.bincount(written, minlength=len(tokenizer))[4:] / len(written)
    assert np.abs(share - 1 / len(share)).max() < 0.02


def test_labels_by_change_call_a_token_original_that_came_out_as_it_was(tokenizer):
    common = {"source": "random_tokens", "mask_ratio": (0.5, 0.5)}
    by_origin = candidates(examples(tokenizer), context(tokenizer, [], **common)).to_pylist()
    by_change = candidates(
        examples(tokenizer), context(tokenizer, [], label_rule="changed", **common)
    ).to_pylist()
    original = {r["example_id"]: r["token_ids"] for r in by_origin if r["kind"] == "original"}
    kept = 0
    for one, other in zip(by_origin, by_change, strict=True):
        assert one["token_ids"] == other["token_ids"]
        differs = np.array(one["token_ids"]) != np.array(original[one["example_id"]])
        assert one["changed_fraction"] == other["changed_fraction"] == pytest.approx(differs.mean())
        assert other["token_labels"] == np.where(differs, one["token_labels"], 0).tolist()
        assert other["synthetic_fraction"] == pytest.approx(differs.mean())
        kept += sum(one["token_labels"]) - sum(other["token_labels"])
    assert kept > 0


def test_confidence_is_that_of_hidden_tokens(tokenizer, engine):
    rng = np.random.default_rng(0)
    ids = rng.integers(4, len(tokenizer), (6, 40))
    valid = np.arange(40) < np.array([40, 40, 31, 17, 40, 5])[:, None]
    ids = np.where(valid, ids, tokenizer.pad_token_id)
    rows = np.arange(6) + 100
    found = engine.confidence(ids, valid, 0, rows, 4)
    assert (found[valid] < 0).all() and (found[~valid] == 0).all()
    part_of = np.floor(randomness.uniform(randomness.key(0, "confidence part"), rows, 40) * 4)
    for b, number in ((0, 0), (2, 1), (3, 3)):
        hidden = valid[b] & (part_of[b] == number)
        inputs = torch.from_numpy(np.where(hidden, tokenizer.mask_token_id, ids[b])[None])
        with torch.no_grad():
            logs = torch.log_softmax(engine.model(inputs, torch.from_numpy(valid[b][None])).logits[0], -1)
        wanted = logs[np.arange(40), ids[b]].numpy()[hidden]
        assert np.allclose(found[b, hidden], wanted, atol=1e-4)
    assert np.allclose(engine.confidence(ids[2:4], valid[2:4], 0, rows[2:4], 4), found[2:4], atol=1e-6)
    short = MaskedLMEngine(engine.model, tokenizer, CPU, 16)
    pieces = short.confidence(ids, valid, 0, rows, 4)
    assert pieces.shape == ids.shape and (pieces[valid] < 0).all() and (pieces[~valid] == 0).all()


def test_held_out_candidates_carry_the_generators_confidence(tokenizer, engine):
    given = examples(tokenizer, 8)
    split = pa.array(["held_out" if i % 2 else "train" for i in range(8)])
    given = given.set_column(given.column_names.index("split"), "split", split)
    for row in candidates(given, context(tokenizer, [engine])).to_pylist():
        known = row["token_confidence"]
        assert (known is not None) == (row["split"] == "held_out")
        assert known is None or (len(known) == len(row["token_ids"]) and max(known) < 0)


def test_original_only_makes_one_untouched_candidate(tokenizer):
    table = candidates(examples(tokenizer, 5), context(tokenizer, [], source="original_only", per_example=1))
    assert table["text"].to_pylist() == examples(tokenizer, 5)["target"].to_pylist()
    assert set(table["kind"].to_pylist()) == {"original"} and table["mask_ratio"].null_count == 5


def test_cross_fitting_gives_a_passage_to_the_generator_that_did_not_see_it(tokenizer):
    c = context(tokenizer, [object(), object(), object()])
    from lib.tasks import cross_fit_fold

    groups = [f"g{i}" for i in range(300)]
    folds = c.fold_of(groups, ["train"] * 300)
    assert folds.tolist() == [cross_fit_fold(c.seed, g, 3) for g in groups]
    assert (np.bincount(folds, minlength=3) > 60).all()
    assert set(c.fold_of(groups, ["held_out"] * 300)) == {0}


def test_each_fold_s_engine_fills_the_passages_of_its_fold_only(tokenizer, engine, monkeypatch):
    """Each engine generates one letter, which identifies it."""
    from lib.tasks import cross_fit_fold

    letters = [5, 6, 7]

    class Writer:
        def __init__(self, letter: int):
            self.letter, self.tokenizer = letter, tokenizer

        def has_vocabulary_of(self, _):
            return True

        def fill(self, rows, config, seed):
            return np.where(rows.masked, self.letter, rows.ids)

        def confidence(self, ids, valid, *_):
            return np.zeros(ids.shape, np.float32)

    c = context(tokenizer, [Writer(letter) for letter in letters])
    table = examples(tokenizer, 40)
    group_of = dict(zip(table["example_id"].to_pylist(), table["group"].to_pylist(), strict=True))
    folds = set()
    for row in candidates(table, c).to_pylist():
        ids, labels = np.array(row["token_ids"]), np.array(row["token_labels"])
        fold = cross_fit_fold(c.config.seed, group_of[row["example_id"]], 3)
        assert set(ids[labels == 2]) <= {letters[fold]}
        folds.add(fold)
    assert folds == {0, 1, 2}


# --------------------------------------------------------------------------- another model's tokenizer


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    trained = BertWordPieceTokenizer(lowercase=False)
    trained.train_from_iterator([TEXT] * 3, vocab_size=60, min_frequency=1)
    wrapped = BertTokenizerFast(tokenizer_object=trained._tokenizer, do_lower_case=False)
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(vocab_size=len(wrapped), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=32, max_position_embeddings=64)
    )  # fmt: skip
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def test_a_foreign_masked_lm_changes_only_its_own_stretches(tokenizer, bert_folder):
    engine = MaskedLMEngine.load(bert_folder, CPU)
    table = candidates(examples(tokenizer, 12), context(tokenizer, [engine], mask_ratio=(0.2, 0.4)))
    schema.conform(table, schema.CANDIDATES)
    with pytest.raises(BadConfig, match="label_rule changed"):
        candidates(examples(tokenizer, 12), context(tokenizer, [engine], label_rule="changed"))
    originals = {r["example_id"]: r["text"] for r in table.to_pylist() if r["kind"] == "original"}
    changed = 0
    for r in table.to_pylist():
        if r["kind"] == "original":
            continue
        labels = np.array(r["token_labels"])
        assert len(labels) == len(r["token_ids"]) and 0 < (labels == 2).mean() < 1
        kept = "".join(c for c, label in zip(r["text"], labels, strict=True) if label == 0)
        rest = iter(originals[r["example_id"]])
        assert all(c in rest for c in kept)  # what is labelled original stands in the original in this order
        changed += r["text"] != originals[r["example_id"]]
    assert changed > 20


def test_a_foreign_masked_lm_with_the_runs_vocabulary_reads_rows_between_its_special_tokens(bert_folder):
    tokenizer = MaskedLMEngine.load(bert_folder, CPU).tokenizer
    engine = MaskedLMEngine.load(bert_folder, CPU, run_tokenizer=tokenizer)
    assert engine.width == 62
    texts = ["the first line", "and"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids, valid = pad(rows, tokenizer.pad_token_id)
    inputs = np.where(np.arange(ids.shape[1]) == 0, tokenizer.mask_token_id, ids)  # the first token of each
    found = engine._logits(inputs, valid, np.array([0, ids.shape[1]]))
    for text, logits in zip(texts, found, strict=True):
        framed = tokenizer(text)["input_ids"]
        assert framed[0] == tokenizer.cls_token_id and framed[-1] == tokenizer.sep_token_id
        framed[1] = tokenizer.mask_token_id
        expected = engine.model(input_ids=torch.tensor([framed])).logits[0, 1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    # Rows longer than the model are read in pieces, which keep room for the special tokens
    long = np.full((1, 70), rows[0][0])
    masked = MaskedRows(long, long > 0, np.arange(70)[None] % 7 == 0, np.arange(1))
    config = context(tokenizer, [engine]).config.candidates
    filled = engine.fill(masked, config, 0)
    assert (filled == long)[~masked.masked].all() and (filled != long).any()


def test_models_of_this_project_read_rows_as_they_are(tokenizer, engine, tmp_path):
    save_model(engine.model, tmp_path, tokenizer)
    own = MaskedLMEngine.load(tmp_path, CPU, run_tokenizer=tokenizer)
    assert own.framing.count == 0 and own.width == MaskedLMEngine.load(tmp_path, CPU).width


@pytest.mark.slow
def test_in_8_bits_a_row_is_still_filled_the_same_way_in_any_batch(tokenizer, bert_folder, engine, tmp_path):
    save_model(engine.model, tmp_path, tokenizer)
    for folder in (tmp_path, bert_folder):
        quick = MaskedLMEngine.load(folder, CPU, int8=True)
        tables = [
            candidates(examples(tokenizer), context(tokenizer, [quick], batch_size=size)) for size in (1, 64)
        ]
        assert tables[0].equals(tables[1])
    with pytest.raises(BadConfig, match=r"candidates\.int8 is for the CPU"):
        MaskedLMEngine.load(tmp_path, Runtime(torch.device("cuda"), "fp32"), int8=True)


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(quick_run, tmp_path):
    generator = quick_run / "02_generate_candidates" / "generator" / "best_model"
    files = []
    for executor in ("local", "processes"):
        run = tmp_path / executor
        for stage in ("00_check_data", "01_prepare_dataset"):
            shutil.copytree(quick_run / stage, run / stage)
        given = [f"generator.checkpoint={generator}", "candidates.rows_per_group=512"]
        config = load_config(quick_test=True, overrides=[*given, f"executor.type={executor}"])
        run_stages(run, config, ("02_generate_candidates",))
        files.append(sorted((run / "02_generate_candidates" / "candidates").iterdir()))
    assert len(files[0]) > 2
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
