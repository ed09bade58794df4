"""Stages 00 and 01 from raw files to examples: what is refused, mended, counted and kept flat in memory."""

import importlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lib.config import Config, load_config
from lib.errors import BadData
from lib.runs import RunArgs, load_manifest
from lib.tasks.text import check
from lib.tokenization import decode_batch, load_tokenizer
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


def test_errors_leave_their_list_and_no_manifest_and_mended_data_starts_again(folder, capsys):
    (folder / "raw" / "bad.txt").write_bytes(b"caf\xe9 " * 20)
    (folder / "raw" / "worse.jsonl").write_text("{oops\n" * 7)
    with pytest.raises(BadData, match="8 problems"):
        run("00_check_data", folder)
    shown = capsys.readouterr().err
    assert "error: encoding (1)" in shown and "error: not JSON (7)" in shown and "... and 2 more" in shown
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
    examples = pq.read_table(stage / "examples.parquet")
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
    examples = pq.read_table(folder / "run" / "01_prepare_dataset" / "examples.parquet")
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
    examples = pq.read_table(tmp_path / "run" / "01_prepare_dataset" / "examples.parquet")
    assert "".join(examples["target"].to_pylist()) == data.read_text()
    assert stats["vocabulary"] == 65 + 4
    tokens = stats["tokens"]
    assert tokens["train"] + tokens["selection"] == pytest.approx(1_003_854, abs=128)
    assert tokens["selection"] == pytest.approx(0.05 * 1_003_854, abs=128)
    assert tokens["held_out"] == pytest.approx(111_540, abs=128)
    ids = np.concatenate(examples["token_ids"].to_numpy())
    assert ids.min() > 3 and len(np.unique(ids)) == 65
