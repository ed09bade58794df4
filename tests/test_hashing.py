"""Hashes of folders and files: everything in them counts, and nothing but that."""

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.config import load_config
from lib.durable import folder_bytes, sha256_file, sha256_folder
from lib.shards import open_store


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "model"
    (root / "inner").mkdir(parents=True)
    for name, text in {"config.json": "{}", "weights": "abc", "inner/vocab": "xyz"}.items():
        (root / name).write_text(text)
    return root


def rewrite(root: Path) -> None:
    (root / "weights").write_text("abd")


def rewrite_inside(root: Path) -> None:
    (root / "inner" / "vocab").write_text("xyy")


def rename(root: Path) -> None:
    (root / "weights").rename(root / "weight")


def swap(root: Path) -> None:
    """Two files of the same size exchange what they hold."""
    (root / "weights").write_text("xyz")
    (root / "inner" / "vocab").write_text("abc")


def move_up(root: Path) -> None:
    (root / "inner" / "vocab").rename(root / "vocab")


def add_empty(root: Path) -> None:
    (root / "inner" / "new").write_text("")


def remove(root: Path) -> None:
    (root / "inner" / "vocab").unlink()


def test_a_name_that_is_not_utf_8_is_hashed_and_names_in_utf_8_as_before(folder):
    (folder / "größe").write_text("1")
    lines = sorted(
        f"{path.relative_to(folder)} {sha256_file(path)}\n" for path in folder.rglob("*") if path.is_file()
    )
    assert sha256_folder(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()
    found = []
    for name in (b"w\xff", b"w\xfe"):
        (folder / os.fsdecode(name)).write_text("1")
        found.append(sha256_folder(folder))
        (folder / os.fsdecode(name)).unlink()
    assert len(set(found)) == 2


@pytest.mark.parametrize("change", [rewrite, rewrite_inside, rename, swap, move_up, add_empty, remove])
def test_every_name_place_and_byte_is_in_a_folder_s_hash(folder, change):
    before = sha256_folder(folder)
    change(folder)
    assert sha256_folder(folder) != before


def test_where_a_folder_lies_and_when_it_was_written_is_not(folder, tmp_path):
    copy = tmp_path / "elsewhere" / "other name"
    shutil.copytree(folder, copy)
    (copy / "weights").touch()
    assert sha256_folder(copy) == sha256_folder(folder) and folder_bytes(copy) == 8


def test_a_file_s_hash_is_that_of_its_bytes(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"abc")
    b.write_bytes(b"abc")
    assert (
        sha256_file(a) == sha256_file(b) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def stream_key(*overrides: str, checkpoint: Path | None = None, **hashes: str) -> str:
    """The key of a run's shards. `hashes`: of the outputs of earlier stages."""
    given = [f"generator.checkpoint={checkpoint}"] if checkpoint else []
    config = load_config(quick_test=True, overrides=[*overrides, *given])
    stage: Any = SimpleNamespace(run_dir=Path("run"), sha256_of=lambda name, output: hashes.get(output, "0"))
    return open_store(stage, config).key


def test_a_shard_s_key_holds_all_that_a_shard_depends_on_and_nothing_else(folder):
    keys = [
        stream_key(),
        stream_key("seed=7"),
        stream_key("candidates.temperature=0.5"),
        stream_key("rewards.curve=[[0, 1], [1, 0.5]]"),
        stream_key("stream.shard_examples=7"),
        stream_key("stream.ramp_epochs=9"),
        stream_key(generator="1"),
        stream_key(candidates="1"),
        stream_key(examples="1"),
        stream_key(checkpoint=folder),
    ]
    rewrite(folder)
    assert len({*keys, stream_key(checkpoint=folder)}) == len(keys) + 1
    assert stream_key("stream.timeout_seconds=9", "training.steps=3") == keys[0]
    folds = [
        stream_key("candidates.cross_fit_folds=2", checkpoint=None, **{f"generator_fold_{n}": "1"})
        for n in (0, 1)
    ]
    assert len({stream_key("candidates.cross_fit_folds=2"), *folds}) == 3
