"""Room on the disk: said before work, enough for what is written, and refused before a training that could not be stored."""

import re
from collections import namedtuple
from pathlib import Path

import pytest

from lib import room
from lib.errors import CannotWrite
from lib.room import check_room, in_words, say_room
from lib.runs import STAGES
from tests.test_modifiers import model_of, objective_of
from tests.trainings import fingerprint, settings, train_tiny

SIZES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
Usage = namedtuple("Usage", "total used free")


def said(folder: Path) -> dict[str, float]:
    """What the logs of a stage and its models say: the work and its bytes."""
    text = "\n".join(path.read_text() for path in folder.rglob("log.txt"))
    found = re.findall(r"disk: (.+?) (?:will take up to|needs up to) ([\d.]+) (kB|MB|GB); .+ are free", text)
    return {what: float(number) * SIZES[unit] for what, number, unit in found}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_says_before_it_starts_what_it_will_take_and_takes_no_more(stage, quick_run):
    folder = quick_run / stage
    promised = said(folder)
    assert promised
    tables = sum(size(path.parent) for path in folder.glob("*/part_*.parquet"))
    trained = {path.parent for path in folder.rglob("metrics.jsonl")}
    assert sum(size(path) for path in trained) <= sum(v for k, v in promised.items() if "training" in k)
    assert tables <= sum(v for k, v in promised.items() if "training" not in k) or not tables
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    assert "WARNING: disk" not in log


def test_too_little_room_is_a_warning_or_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: Usage(10**9, 0, 5_000_000))
    say_room(tmp_path / "absent", 4_000_000, "rows")
    assert capsys.readouterr().err == "disk: rows will take up to 4.0 MB; 5.0 MB are free\n"
    say_room(tmp_path, 6_000_000, "rows")
    assert capsys.readouterr().err.startswith("WARNING: disk: rows")
    check_room(tmp_path, 5_000_000, "it")
    (tmp_path / "there").write_bytes(bytes(3000))
    with pytest.raises(
        CannotWrite, match=r"it needs 7\.0 MB of disk, but 5\.0 MB are free in .*Free some space"
    ):
        check_room(tmp_path, 7_003_000, "it")
    assert [in_words(count) for count in (10, 1_500_000, 2_340_000_000, 10**13)] == ["0.0 kB", "1.5 MB", "2.3 GB", "10.0 TB"]  # fmt: skip


def test_a_training_without_room_is_refused_before_its_first_step_and_continues_when_there_is_some(
    tmp_path, monkeypatch
):
    make = lambda folder, fault=None: train_tiny(model_of(), objective_of(None), settings(), folder, fault)  # noqa: E731
    make(tmp_path / "whole")
    with monkeypatch.context() as full:
        full.setattr(room.shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 1000))
        with pytest.raises(CannotWrite, match="the training of tiny needs"):
            make(tmp_path / "other", lambda step: pytest.fail("a step was done"))
        assert not (tmp_path / "other" / "metrics.jsonl").exists()
    make(tmp_path / "other")
    assert fingerprint(tmp_path / "other") == fingerprint(tmp_path / "whole")
