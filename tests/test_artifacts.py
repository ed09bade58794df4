"""Stages are complete or absent, locked and hashed. Runs are found by the documented rules."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import durable, schema
from lib.artifacts import Stage
from lib.config import load_config
from lib.errors import BadConfig, BadData, Busy, CannotCreate, MissingInput, UsageError
from lib.runs import RunArgs, changes, existing_runs, load_manifest, plain

CONFIG = load_config(quick_test=True)


def rewards(count: int = 3) -> pa.Table:
    return pa.table(
        {"example_id": [f"e{i}" for i in range(count)], "candidate_id": pa.array([0] * count, pa.int32()),
         "reward": [0.5] * count, "rank": pa.array([1] * count, pa.int32()), "best": [True] * count, "tied": [False] * count}
    )  # fmt: skip


def stage(tmp_path, name="00_check_data", config=CONFIG, uses=("seed",), reads=(), **flags) -> Stage:
    return Stage(f"{name}.py", config, RunArgs(run_dir=tmp_path / "run", **flags), uses=uses, reads=reads)


def finish(tmp_path, **kwargs) -> dict:
    with stage(tmp_path, **kwargs) as s:
        s.write("rewards", rewards(), schema.REWARDS)
    manifest = load_manifest(s.folder)
    assert manifest is not None
    return manifest


def test_the_manifest_comes_last_and_an_error_leaves_none(tmp_path):
    with pytest.raises(RuntimeError), stage(tmp_path) as s:
        s.write("rewards", rewards(), schema.REWARDS)
        raise RuntimeError
    assert (s.folder / "rewards.parquet").exists() and load_manifest(s.folder) is None
    manifest = finish(tmp_path)
    assert manifest["outputs"]["rewards"]["sha256"] == durable.sha256_file(s.folder / "rewards.parquet")
    assert not (s.folder / "unfinished.json").exists() and not list(s.folder.glob("*.tmp"))


def test_a_finished_stage_is_a_no_op_and_a_changed_one_is_refused(tmp_path):
    finish(tmp_path)
    with stage(tmp_path) as s:
        assert s.finished
    other = load_config(quick_test=True, overrides=["seed=5"])
    with pytest.raises(BadConfig, match=r"seed: 1337 -> 5\n.*--overwrite"), stage(tmp_path, config=other):
        pass
    with stage(tmp_path, config=other, overwrite=True) as s:
        assert not s.finished
        s.write("rewards", rewards(), schema.REWARDS)


def test_unfinished_work_of_another_config_is_refused_too(tmp_path):
    with pytest.raises(RuntimeError), stage(tmp_path):
        raise RuntimeError
    with stage(tmp_path, resume=True) as s:
        assert s.resuming
    other = load_config(quick_test=True, overrides=["seed=5"])
    (s.folder / "manifest.json").unlink()
    durable.write_json(s.folder / "unfinished.json", {"config": {"seed": 1}, "inputs": {}})
    with pytest.raises(BadConfig, match="was begun with"), stage(tmp_path, config=other):
        pass


def test_resume_insists_on_unfinished_work(tmp_path):
    with pytest.raises(UsageError, match="nothing unfinished"), stage(tmp_path, resume=True):
        pass
    finish(tmp_path)
    with pytest.raises(UsageError, match="has finished"), stage(tmp_path, resume=True):
        pass


def test_a_second_process_is_refused_with_a_message(tmp_path):
    finish(tmp_path)
    with open(tmp_path / "run" / ".locks" / "00_check_data") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another process is at work on 00_check_data"), stage(tmp_path):
            pass
        with pytest.raises(Busy), stage(tmp_path, "01_prepare_dataset", reads=("00_check_data",)):
            pass


def test_inputs_are_hashed_checked_and_named(tmp_path):
    finish(tmp_path)
    with stage(tmp_path, "01_prepare_dataset", reads=("00_check_data",)) as s:
        assert s.read("00_check_data", "rewards", schema.REWARDS).num_rows == 3
        with pytest.raises(MissingInput, match="has no output 'nothing'"):
            s.read("00_check_data", "nothing", schema.REWARDS)
        with pytest.raises(BadData, match=r"columns .* are missing"):
            s.read("00_check_data", "rewards", schema.CANDIDATES)
    with open(tmp_path / "run" / "00_check_data" / "rewards.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(BadData, match=r"rewards\.parquet.*was changed"), stage(tmp_path):
        pass


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    finish(tmp_path)
    path = tmp_path / "run" / "00_check_data" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"]["rewards"]["path"] = "../../secret"
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadData, match="points outside"):
        load_manifest(path.parent)
    path.write_text("{")
    with pytest.raises(BadData, match="cannot be read"):
        load_manifest(path.parent)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    durable.write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_text(path, "new")
    assert path.read_text() == "old" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_any_write_of_a_stage_never_makes_it_complete(tmp_path, monkeypatch, call):
    """The n-th call fails, for every n: no manifest, or a whole one; the stage before is as it was."""
    finish(tmp_path)
    real, done = getattr(os, call), False
    for number in range(1, 30):
        countdown = iter(range(number, 0, -1))

        def full(*args, countdown=countdown):
            if next(countdown, 0) == 1:
                raise OSError(28, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                finish(tmp_path, name="01_prepare_dataset", reads=("00_check_data",), overwrite=True)
                done = next(countdown, 0) != 0  # fewer calls than that: every call has failed once
            except (OSError, CannotCreate):
                manifest = load_manifest(tmp_path / "run" / "01_prepare_dataset")
                assert manifest is None or set(manifest["outputs"]) == {"rewards"}
                assert not list((tmp_path / "run").rglob("*.tmp"))
            with stage(tmp_path) as s:
                assert s.finished
        if done:
            break
    assert done and number > 3


def test_two_machines_may_write_the_same_file_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # numbers of processes are unique on one machine only
    with durable.replacing(tmp_path / "a") as one, durable.replacing(tmp_path / "a") as other:
        one.write_text("the same")
        other.write_text("the same")
        assert one != other
        left = {path.name for path in tmp_path.glob("a.*.tmp")}
        assert left == {one.name, other.name}  # as the clean-up finds them
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_replaced_whole_and_recovered(tmp_path):
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with durable.replacing_folder(folder) as temporary:
            (temporary / "a").write_text(text)
    assert (folder / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(RuntimeError), durable.replacing_folder(folder) as temporary:
        raise RuntimeError
    assert (folder / "a").read_text() == "two"
    os.replace(folder, tmp_path / "model.old")  # as a crash between the two renames leaves it
    durable.recover_folder(folder)
    assert (folder / "a").read_text() == "two"
    shutil.copytree(folder, tmp_path / "model.old")  # as a crash after them leaves it
    durable.recover_folder(folder)
    assert (folder / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_whose_replacement_fails_at_either_rename_comes_back(tmp_path, monkeypatch, failing):
    folder, real, calls = tmp_path / "model", os.replace, []
    with durable.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("one")

    def replace(*args):
        calls.append(args)
        if len(calls) == failing:
            raise OSError(5, "no")
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "replace", replace)
        with durable.replacing_folder(folder) as temporary:
            (temporary / "a").write_text("two")
    durable.recover_folder(folder)
    assert (folder / "a").read_text() == "one"


def test_runs_are_found_by_the_rules(tmp_path):
    def run_of(name, config=CONFIG):
        with Stage(f"{name}.py", config, RunArgs(), uses=("seed",), outputs_root=tmp_path) as s:
            return s.run_dir.name

    with pytest.raises(MissingInput, match="no run in"):
        run_of("01_prepare_dataset")
    assert run_of("00_check_data") == "run_001"
    other = load_config(quick_test=True, overrides=["seed=5"])
    assert run_of("00_check_data", other) == "run_002"
    assert run_of("00_check_data") == "run_001"  # the newest run of this very config
    assert run_of("01_prepare_dataset", other) == "run_002"  # simply the newest
    assert [p.name for p in existing_runs(tmp_path)] == ["run_001", "run_002"]


def test_an_input_file_that_cannot_be_read_or_named_in_utf8(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.txt")
    odd.write_text("x")
    args = RunArgs(run_dir=tmp_path / "run")
    with Stage("00_check_data.py", CONFIG, args, uses=("seed",), files=[odd]) as s:
        pass
    manifest = load_manifest(s.folder)
    assert manifest is not None and list(manifest["inputs"]) == ["caf\\xe9.txt"]
    gone = [tmp_path / "gone.txt"]
    with (
        pytest.raises(MissingInput, match=r"gone\.txt cannot be read"),
        Stage("00_check_data.py", CONFIG, args, uses=("seed",), files=gone),
    ):
        pass


def test_unfinished_work_that_holds_nothing_worth_keeping_begins_again(tmp_path):
    args = RunArgs(run_dir=tmp_path / "run")
    with pytest.raises(RuntimeError), Stage("00_check_data.py", CONFIG, args, uses=("seed",)):
        raise RuntimeError
    other = load_config(quick_test=True, overrides=["seed=5"])
    with Stage("00_check_data.py", other, args, uses=("seed",), restarts=True) as s:
        assert not s.resuming and not s.finished
        s.write("rewards", rewards(), schema.REWARDS)
    manifest = load_manifest(s.folder)
    assert manifest is not None and manifest["config"] == {"seed": 5}


def test_what_a_check_refuses_is_not_overwritten(tmp_path):
    finish(tmp_path)

    def refuse(stage: Stage) -> None:
        raise BadConfig("no")

    args = RunArgs(run_dir=tmp_path / "run", overwrite=True)
    with pytest.raises(BadConfig), Stage("00_check_data.py", CONFIG, args, uses=("seed",), check=refuse):
        pass
    with stage(tmp_path) as s:
        assert s.finished and (s.folder / "rewards.parquet").exists()


def test_earlier_stages_may_differ_in_what_is_ignored(tmp_path):
    finish(tmp_path, uses=("data",))
    other = load_config(quick_test=True, overrides=["data.text_key=body"])
    args, reads = RunArgs(run_dir=tmp_path / "run"), ("00_check_data",)
    with (
        pytest.raises(BadConfig, match=r"data\.text_key: text -> body"),
        Stage("06_sample.py", other, args, uses=("seed",), reads=reads),
    ):
        pass
    with Stage("06_sample.py", other, args, uses=("seed",), reads=reads, ignores=("data.text_key",)) as s:
        assert not s.finished


def test_values_of_numpy_and_what_json_cannot_hold():
    given = {"a": np.float32(0.5), 2: [np.int64(3), float("nan")], "c": np.array([1, 2]), "d": float("inf")}
    assert plain(given) == {"a": 0.5, "2": [3, None], "c": [1, 2], "d": None}


def test_what_changed_is_said_leaf_by_leaf():
    old = {"a": {"b": 1, "gone": 2}, "c": "0" * 64}
    new = {"a": {"b": 3, "new": 4}, "c": "1" * 64}
    assert changes(old, new) == [
        "a.b: 1 -> 3", "a.gone: 2 -> (none)", "a.new: (none) -> 4", f"c: {'0' * 12}... -> {'1' * 12}..."
    ]  # fmt: skip


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CannotCreate, match="is a file"), stage(tmp_path):
        pass


def test_a_key_repeated_over_two_writes_is_found(tmp_path):
    with (
        pytest.raises(BadData, match="two rows have the same"),
        stage(tmp_path) as s,
        s.writer("rewards", schema.REWARDS) as w,
    ):
        w.write(rewards())
        w.write(rewards())


@pytest.mark.parametrize("counts", [[], [0], [0, 0], [0, 3], [3, 0], [2, 0, 3]])
def test_no_table_has_an_empty_row_group(tmp_path, counts):
    """Readers such as `datasets` refuse a row group of no rows."""
    with stage(tmp_path) as s, s.writer("rewards", schema.REWARDS) as writer:
        table = rewards(sum(counts))
        for start, count in zip(np.cumsum([0, *counts]), counts, strict=False):
            writer.write(table.slice(int(start), count))
    found = pq.ParquetFile(s.folder / "rewards.parquet")
    groups = [found.metadata.row_group(i).num_rows for i in range(found.metadata.num_row_groups)]
    assert groups == [count for count in counts if count]
    assert found.read().num_rows == sum(counts) and found.schema_arrow.names[0] == "example_id"
    manifest = load_manifest(s.folder)
    assert manifest is not None and manifest["outputs"]["rewards"]["rows"] == sum(counts)


def test_a_run_in_the_current_folder_and_a_command_that_is_not_utf8_are_written_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = RunArgs(run_dir=Path("."), command=("00", os.fsdecode(b"caf\xe9")))
    with Stage("00_check_data.py", CONFIG, args, uses=("seed",)) as s:
        pass
    manifest = load_manifest(s.folder)
    assert manifest is not None and manifest["run"] == tmp_path.name
    assert manifest["command"] == ["00", "caf\\xe9"]
