"""Stages 00 and 01 from raw files to examples: what is refused, corrected and counted, and that memory stays flat."""

import importlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lib.artifacts import Stage
from lib.config import Config, load_config
from lib.errors import BadData, MissingInput
from lib.runs import RunArgs, load_manifest
from lib.table_writer import KeyHashes
from lib.tasks import Dropped, Example
from lib.tasks.text import check
from lib.token_store import open_store
from lib.tokenization import decode_batch, load_tokenizer
from lib.training.stage_inputs import open_text
from tests.conftest import SHARED

PROSE = "A sentence that is long enough to stand on its own as a paragraph, number {}.\n\n"
NOVEL = "".join(PROSE.format(i) for i in range(2000))


def run(stage: str, folder: Path, *overrides: str, **flags) -> dict:
    """The manifest that the stage leaves in folder/run."""
    config = load_config(overrides=[f"data.path={folder / 'raw'}", *overrides])
    importlib.import_module(stage).main(config, RunArgs(run_dir=folder / "run", **flags))
    manifest = load_manifest(folder / "run" / stage)
    assert manifest is not None
    return manifest


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "novel.txt").write_text(NOVEL)
    return tmp_path


def test_errors_leave_their_list_and_no_manifest_and_fixed_data_starts_again(folder, capsys):
    (folder / "raw" / "bad.txt").write_bytes(b"caf\xe9 " * 20)
    (folder / "raw" / "worse.jsonl").write_text("{oops\n" * 7)
    with pytest.raises(BadData, match="8 errors"):
        run("00_check_data", folder)
    output = capsys.readouterr().err
    assert "error: encoding (1)" in output and "error: not JSON (7)" in output and "... and 2 more" in output
    stage = folder / "run" / "00_check_data"
    problems = pq.read_table(stage / "problems.parquet").to_pylist()
    assert len(problems) == 8 and load_manifest(stage) is None
    assert all(p["severity"] == "error" and p["advice"] for p in problems)

    for name in ("bad.txt", "worse.jsonl"):
        (folder / "raw" / name).unlink()
    manifest = run("00_check_data", folder)
    assert manifest["stats"]["documents"] == 1 and manifest["stats"]["characters"] == len(NOVEL.strip())
    assert pq.read_table(stage / "problems.parquet").num_rows == 0


def test_raw_data_that_changed_after_the_check_is_refused(folder):
    from lib.errors import BadConfig

    run("00_check_data", folder)
    (folder / "raw" / "novel.txt").write_text(NOVEL + "more")
    with pytest.raises(BadConfig, match=r"input novel\.txt: .* -> .*\n.*--overwrite"):
        run("00_check_data", folder)
    run("00_check_data", folder, overwrite=True)


def test_examples_are_the_text_and_the_figures_add_up(folder):
    run("00_check_data", folder)
    manifest = run("01_prepare_dataset", folder)
    stats, stage = manifest["stats"], folder / "run" / "01_prepare_dataset"
    examples = pq.read_table(stage / "examples")
    assert sum(stats["examples"].values()) == examples.num_rows
    assert sum(stats["tokens"].values()) == pc.sum(pc.list_value_length(examples["token_ids"])).as_py()
    assert set(stats["examples"]) == {"train", "selection", "held_out", "reference"}
    assert "".join(examples["target"].to_pylist()) == NOVEL.strip()
    tokenizer = load_tokenizer(stage / "tokenizer")
    assert len(tokenizer) == stats["vocabulary"] == len(set(NOVEL)) + 4
    assert decode_batch(tokenizer, examples["token_ids"].to_pylist()) == examples["target"].to_pylist()
    assert stats["unknown_share"] == 0 and stats["characters_per_token"] == 1


def test_byte_pairs_are_learned_from_the_train_split_alone(folder, monkeypatch):
    learned = []
    module = importlib.import_module("lib.tokenization")
    real = module.train_tokenizer

    def spy(kind, texts, vocab_size):
        learned.extend(texts)
        return real(kind, iter(learned), vocab_size)

    monkeypatch.setattr(module, "train_tokenizer", spy)
    run("00_check_data", folder)
    manifest = run("01_prepare_dataset", folder, "tokenizer.kind=bpe", "tokenizer.vocab_size=320")
    examples = pq.read_table(folder / "run" / "01_prepare_dataset" / "examples")
    train = examples.filter(pc.equal(examples["split"], "train"))["target"].to_pylist()
    assert learned == train and manifest["stats"]["characters_per_token"] > 2
    assert manifest["stats"]["vocabulary"] <= 320


def test_an_empty_split_is_refused_and_another_setting_then_starts_again(folder):
    text = "word " * 20_000 + "\n\n"
    (folder / "raw" / "novel.txt").write_text(text)
    settings = ["data.passages=paragraph", "data.deduplicate=none"]
    run("00_check_data", folder, *settings)
    with pytest.raises(BadData, match=r"no examples in split train, held_out .*1 x tail of a paragraph"):
        run("01_prepare_dataset", folder, *settings)
    assert load_manifest(folder / "run" / "01_prepare_dataset") is None
    with pytest.raises(
        BadData, match="no examples in split"
    ):  # not: this stage was begun with another config
        run("01_prepare_dataset", folder, *settings, "tokenizer.kind=bpe")


@pytest.mark.slow
def test_processes_that_tokenize_give_the_same_bytes(folder):
    settings = ["tokenizer.kind=bpe", "tokenizer.vocab_size=320", "tokenizer.examples_per_part=100"]
    run("00_check_data", folder, *settings)
    outputs = []
    for executor in ("local", "processes"):
        manifest = run("01_prepare_dataset", folder, *settings, f"executor.type={executor}", overwrite=True)
        outputs.append({name: record["sha256"] for name, record in manifest["outputs"].items()})
    assert outputs[0] == outputs[1] and {"examples", "tokens/train", "tokens/held_out"} <= set(outputs[0])


@pytest.mark.slow
def test_an_unknown_character_in_a_worker_process_is_the_same_error(folder, monkeypatch):
    tokenization = importlib.import_module("lib.tokenization")
    real = tokenization.train_tokenizer
    monkeypatch.setattr(
        tokenization,
        "train_tokenizer",
        lambda kind, texts, size: real(kind, (t.replace("7", "8") for t in texts), size),
    )
    settings = ["tokenizer.examples_per_part=100", "tokenizer.unknown=error"]
    run("00_check_data", folder, *settings)
    for executor in ("local", "processes"):
        with pytest.raises(BadData, match=r"1 characters are outside the vocabulary: '7' \(U\+0037\)"):
            run("01_prepare_dataset", folder, *settings, f"executor.type={executor}")
        stage = folder / "run" / "01_prepare_dataset"
        assert load_manifest(stage) is None and not (stage / "tokens").exists()


def test_byte_pairs_learn_from_a_sample_that_does_not_depend_on_the_order():
    module = importlib.import_module("01_prepare_dataset")
    config = load_config(overrides=["tokenizer.kind=bpe", "tokenizer.sample_characters=40000"])
    items: list[Example | Dropped] = [
        Example(f"d:{i}", "", f"{i:05d}" + "x" * 95, "train" if i % 2 else "held_out", "g")
        for i in range(4000)
    ]
    items.insert(7, Dropped("d@1", "why", "not this"))
    every = [e.target for e in items if isinstance(e, Example) and e.split == "train"]
    assert list(module.sampled_texts(config, items, 40_000)) == every  # at the limit: all, in order
    sample = list(module.sampled_texts(config, items, 400_000))
    assert set(sample) < set(every) and len(sample) == pytest.approx(0.1 * len(every), rel=0.25)
    assert set(module.sampled_texts(config, items[::-1], 400_000)) == set(sample)
    assert set(sample) < set(module.sampled_texts(config, items, 200_000))  # a larger sample has it all
    other = config.model_copy(update={"seed": 5})
    assert set(module.sampled_texts(other, items, 400_000)) != set(sample)


def test_the_token_store_has_the_tokens_of_the_examples(folder):
    run("00_check_data", folder, "data.block_characters=700")
    manifest = run("01_prepare_dataset", folder, "data.block_characters=700")
    stage = folder / "run" / "01_prepare_dataset"
    examples = pq.read_table(stage / "examples")
    for split, count in manifest["stats"]["tokens"].items():
        part = examples.filter(pc.equal(examples["split"], split))
        store, facts = open_store(stage / "tokens" / split), manifest["outputs"][f"tokens/{split}"]
        assert store.read(0, count).tolist() == np.concatenate(part["token_ids"].to_pylist()).tolist()
        assert np.diff(store.examples).tolist() == pc.list_value_length(part["token_ids"]).to_pylist()
        first = [i for i, goes_on in enumerate(part["continues"].to_pylist()) if not (goes_on and i)]
        assert store.document_starts.tolist() == store.examples[first].tolist() and len(first) > 1
        names = np.array(sorted(set(part["group"].to_pylist())))
        assert names[store.groups_at(store.examples[:-1])].tolist() == part["group"].to_pylist()
        assert store.characters == sum(map(len, part["target"].to_pylist()))
        assert facts["path"] == f"tokens/{split}" and facts["files"] == 8
        described = json.loads((stage / "tokens" / split / "store.json").read_text())
        assert described["tokenizer_sha256"] == manifest["outputs"]["tokenizer"]["sha256"]


def test_a_store_of_an_earlier_version_or_of_no_split_is_named(folder):
    run("00_check_data", folder)
    run("01_prepare_dataset", folder)
    config = load_config(overrides=[f"data.path={folder / 'raw'}"])
    with Stage("05_train_critic.py", config, RunArgs(run_dir=folder / "run"), uses=("seed",),
               reads=("01_prepare_dataset",)) as stage:  # fmt: skip
        assert open_text(stage, "train").num_tokens > 0
        with pytest.raises(BadData, match="there are no examples in split 'test'"):
            open_text(stage, "test")
        outputs = stage._upstream["01_prepare_dataset"]["outputs"]
        del outputs["tokens/train"]
        with pytest.raises(
            MissingInput, match=r"no token store of split 'train'.*01_prepare_dataset.py --overwrite"
        ):
            open_text(stage, "train")
        (folder / "run" / "01_prepare_dataset" / "tokens" / "held_out" / "counts.bin").write_bytes(b"x")
        with pytest.raises(BadData, match="is damaged or was changed: its sha256"):
            open_text(stage, "held_out")
        stage.leave_incomplete("a test")


def test_two_rows_of_one_key_are_found_in_tables_of_any_length(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    for bits, in_memory in ((6, 2**17), (6, 16), (1, 64), (1, 2**17)):
        monkeypatch.setattr(KeyHashes, "BITS", bits)
        monkeypatch.setattr(KeyHashes, "IN_MEMORY", in_memory)
        for repeated in (False, True):
            keys = KeyHashes()
            for part in np.array_split(hashes, 7):
                keys.add(part)
            keys.add(hashes[[123]] if repeated else hashes[:0])
            assert keys.are_repeated() == repeated
    assert not KeyHashes().are_repeated()


@pytest.mark.slow
def test_memory_stays_flat_as_records_grow_in_number(tmp_path):
    peaks = []
    for count in (100, 1000):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            for i in range(count):
                file.write(json.dumps({"text": f"{i} " + "words and more words " * 300}) + "\n")
        config: Config = load_config(overrides=[f"data.path={path}"])
        tracemalloc.start()
        for _ in check(config):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 6_000_000 and peaks[1] - peaks[0] < 2_000_000


@pytest.mark.data("tinyshakespeare/input.txt")
def test_real_text_is_split_for_comparisons_as_others_split_it(tmp_path):
    """tinyshakespeare, contiguous 90/10: every character once, in order, 65 of them distinct."""
    data = SHARED / "tinyshakespeare" / "input.txt"
    (tmp_path / "raw").symlink_to(data.parent)
    settings = ["data.split=contiguous", "data.fractions={train: 0.9, held_out: 0.1}", "models.reference_lm=null",
                "data.whitespace=keep", "data.deduplicate=none"]  # fmt: skip
    run("00_check_data", tmp_path, *settings)
    stats = run("01_prepare_dataset", tmp_path, *settings)["stats"]
    examples = pq.read_table(tmp_path / "run" / "01_prepare_dataset" / "examples")
    assert "".join(examples["target"].to_pylist()) == data.read_text()
    assert stats["vocabulary"] == 65 + 4
    tokens = stats["tokens"]
    assert tokens["train"] + tokens["selection"] == pytest.approx(1_003_854, abs=128)
    assert tokens["selection"] == pytest.approx(0.05 * 1_003_854, abs=128)
    assert tokens["held_out"] == pytest.approx(111_540, abs=128)
    ids = np.concatenate(examples["token_ids"].to_numpy())
    assert ids.min() > 3 and len(np.unique(ids)) == 65
