"""lib.doctor: the state of a machine and of a run, and the command that continues it."""

import fcntl
import json
import os
import shutil
import sys
import threading

import pytest

from lib import doctor, durable, machine
from lib.doctor import examine_run, next_command
from lib.log import printable_line
from lib.runs import STAGES
from tests.test_artifacts import finish, stage

FIRST = STAGES[:2]


@pytest.fixture
def run(tmp_path):
    """A run with stage 00 complete, made by a command with settings."""
    command = (
        "00_check_data.py",
        "--config",
        "my file.yaml",
        "--set",
        "seed=3",
        "--overwrite",
        "--run_dir",
        "x",
    )
    finish(tmp_path, command=command)
    return tmp_path / "run"


def words(run) -> dict[str, str]:
    return {state.name: state.word for state in examine_run(run)}


def test_the_next_command_has_the_settings_of_the_stage_before(run):
    states = examine_run(run)
    assert words(run)["00_check_data"] == "complete" and words(run)["01_prepare_dataset"] == "absent"
    assert next_command(run, states) == (
        f"python 01_prepare_dataset.py --config 'my file.yaml' --set seed=3 --run_dir {run}"
    )


def test_damage_is_found_by_hash_and_named(run):
    path = run / "00_check_data" / "rewards.parquet"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(bytes(data))
    [state] = [s for s in examine_run(run) if s.name == "00_check_data"]
    assert state.word == "damaged" and "rewards.parquet" in state.detail
    assert next(s.word for s in examine_run(run, hashes=False)) == "complete"  # the size is the same
    assert next_command(run, [state, *examine_run(run)[1:]]).endswith("--overwrite")
    path.unlink()
    assert words(run)["00_check_data"] == "damaged"
    (run / "00_check_data" / "manifest.json").write_text("[")
    assert words(run)["00_check_data"] == "damaged"


def test_unfinished_work_and_a_stage_that_is_being_made(run, tmp_path):
    with pytest.raises(RuntimeError), stage(tmp_path, "01_prepare_dataset", reads=FIRST[:1]):
        raise RuntimeError
    assert words(run)["01_prepare_dataset"] == "unfinished"
    with open(run / ".locks" / "01_prepare_dataset", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        states = examine_run(run)
        assert {s.name: s.word for s in states}["01_prepare_dataset"] == "busy"
        assert next_command(run, states) == ""  # it is being made
    os.replace(run / "00_check_data", run / "00_check_data.old")  # as a kill between two renames leaves it
    assert words(run)["00_check_data"] == "unfinished"


def test_a_stage_whose_parts_other_commands_make_is_busy(run, tmp_path):
    with stage(tmp_path, "01_prepare_dataset", reads=FIRST[:1], part=(0, 2)) as s:
        states = examine_run(run)
        assert {s.name: s.word for s in states}["01_prepare_dataset"] == "busy"
        assert next_command(run, states) == "", "the stage itself could not be locked"
        s.leave_incomplete("the other half is missing")
    assert words(run)["01_prepare_dataset"] == "unfinished"


def test_a_stage_begins_although_the_doctor_tries_its_lock(run):
    with open(run / ".locks" / "00_check_data") as tried:
        fcntl.flock(tried, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, lambda: fcntl.flock(tried, fcntl.LOCK_UN))
        timer.start()
        finish(run.parent, name="01_prepare_dataset", reads=FIRST[:1])
        timer.join()
    assert words(run)["01_prepare_dataset"] == "complete"


def test_a_ranked_file_is_examined_and_is_no_stage_to_continue(run, tmp_path):
    command = ("06_sample.py", "--rank", "my pools.jsonl", "--out_dir=beside", "--quick_test")
    assert doctor._kept(list(command)) == ["06_sample.py", "--quick_test"]
    finish(tmp_path, name="06_rank_pools_01234567")
    (run / "06_rank_pools_01234567" / "rewards.parquet").unlink()
    states = examine_run(run)
    assert {s.name: s.word for s in states}["06_rank_pools_01234567"] == "damaged"
    assert next_command(run, states).startswith("python 01_prepare_dataset.py"), (
        "the file is ranked again by hand"
    )


def test_a_model_of_stage_04_is_made_again_by_name(run):
    folder = run / "04_train" / "judge"
    shutil.copytree(run / "00_check_data", folder)
    content = json.loads((folder / "manifest.json").read_text())
    durable.write_json(folder / "manifest.json", content | {"stage": "04_train/judge"})
    assert words(run)["04_train/judge"] == "complete"
    (folder / "rewards.parquet").unlink()
    assert next_command(run, examine_run(run)).endswith(f"--run_dir {run} --overwrite --only judge")


def test_a_run_that_is_only_read_is_not_changed(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    examine_run(run)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_the_command_line(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor", str(run)])
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert "continue with: python 01_prepare_dataset.py" in said and "torch" in said and "disk" in said
    (run / "00_check_data" / "rewards.parquet").write_bytes(b"")
    assert doctor.main() == 65
    monkeypatch.setattr(sys, "argv", ["doctor", str(run / "no")])
    assert doctor.main() == 66


def test_an_old_library_and_a_network_file_system_are_named(tmp_path, monkeypatch):
    versions = {"torch": "2.9.1", "transformers": "5.5.0", "pyarrow": "26.0", "ray": "2.60.0"}
    monkeypatch.setattr(machine.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(machine, "file_system", lambda folder: "nfs4")
    found = {finding.name: finding for finding in machine.examine_machine(tmp_path)}
    assert found["torch"].is_fault and "at least 2.10" in found["torch"].text
    assert not found["transformers"].is_fault and "one machine" in found["file system"].text


def test_a_line_for_the_terminal_has_no_character_that_it_obeys():
    assert printable_line("a\x1b[31mb\x07\x9b\u202ec\td\ne") == "a\\x1b[31mb\\x07\\x9b\\u202ec\td\ne"
    assert printable_line("é日本 [MASK]") == "é日本 [MASK]"
    assert printable_line("caf\udce9") == "caf\\udce9"
