"""Kills, losses of power and hostile files: short versions of benchmarks.kills, power_loss and hostile.

Each runs in a process of its own, which imports torch once and forks a process for every stage.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import long_runs
from benchmarks.faults import corpus, points
from benchmarks.faults.reads import ReadWatch
from benchmarks.faults.run_bytes import differences, run_bytes
from benchmarks.hostile import all_cases
from benchmarks.power_loss import Disk, State, Tried, bytes_of, states_of
from lib import durable
from lib.config import ROOT

SHORT = ["01_prepare_dataset/one process", "03_build_rewards/--part", "04_train/torchrun"]  # fmt: skip
GROUPS = ("manifest", "safetensors", "checkpoint")  # of the hostile files that are tried here


def run(module: str, *words: str, seconds: float = 300) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, env=environment, timeout=seconds, text=True, capture_output=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
def test_killed_stages_continue_to_the_same_bytes(work):
    only = [word for name in SHORT for word in ("--only", name)]
    kills = os.environ.get("REMASK_KILLS", "8")
    done = run("benchmarks.kills", str(work), "--kills", kills, *only, "--out", str(work / "kills.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((work / "kills.json").read_text())["figures"]
    assert figures["kills"] >= int(kills) and figures["equal"] == figures["kills"]
    assert any(not name.startswith("random") for name in figures["landed"])


def test_there_are_at_least_120_hostile_files_of_every_kind():
    cases = all_cases()
    names = [f"{case.group}: {case.name}" for case in cases]
    assert len(set(names)) == len(names) >= 120
    assert sum(0 not in case.codes for case in cases) >= 120
    assert {"config", "text", "parquet", "labels", "FinQA", "safetensors", "config.json", "tokenizer", "manifest", "checkpoint",
            "file name"} <= {case.group for case in cases}  # fmt: skip


def test_two_runs_are_compared_by_every_byte_but_the_time(tmp_path):
    for name, seconds in (("one", 1.0), ("two", 2.0)):
        folder = tmp_path / name / "00_check_data"
        folder.mkdir(parents=True)
        (folder / "a.bin").write_bytes(b"same")
        outputs = {"a": {"path": "a.bin", "sha256": durable.sha256_file(folder / "a.bin"), "bytes": 4}}
        durable.write_json(
            folder / "manifest.json", {"seconds": seconds, "stats": {"rows": 3}, "outputs": outputs}
        )
    assert run_bytes(tmp_path / "one") == run_bytes(tmp_path / "two")
    (tmp_path / "two" / "00_check_data" / "a.bin").write_bytes(b"sane")
    with pytest.raises(ValueError, match="another hash"):
        run_bytes(tmp_path / "two")
    path = tmp_path / "one" / "00_check_data" / "manifest.json"
    before = run_bytes(tmp_path / "one")
    durable.write_json(path, json.loads(path.read_text()) | {"stats": {"rows": 4}})
    assert differences(run_bytes(tmp_path / "one"), before) == ["00_check_data/manifest.json"]


def event(is_: str, first: bool = False, **rest) -> dict:
    return {"is": is_, "first": first} | rest


def test_a_replayed_disk_loses_what_was_not_synced_and_keeps_what_was(tmp_path):
    """A file is written, synced and renamed, and the folder is synced: the states of a real disk in between."""
    events = [
        event("names", changes=[[0, "a.tmp", 1, False]]),
        event("write", id=1, content="new"),
        event("sync", id=1),
        event("names", changes=[[0, "a.tmp", None, False], [0, "a", 1, False]]),
        event("sync", id=0),
    ]
    found = [(state.kind, state.at, state.files) for state in states_of(events, 0)]
    assert ("empty", 2, {"a.tmp": ("", "new", "lost")}) in found  # a name without its data
    assert not any(
        (files.get("a") or ("new",))[0] != "new" for _, _, files in found
    )  # the rename comes after the data
    disk = Disk()
    for one in events:
        disk.apply(one)
    import random

    assert disk.state("lost", 5, random.Random(0)).files == {"a": ("new", "new", "kept")}
    (tmp_path / "old").write_bytes(b"1234")
    (tmp_path / "new").write_bytes(b"12345678")
    assert bytes_of("old", "new", "torn", tmp_path) == b"123456"
    assert bytes_of("old", "new", "zeros", tmp_path) == b"1234\0\0\0\0"
    assert bytes_of("old", "new", "lost", tmp_path) == b"1234"


def test_a_rename_before_its_data_is_found(tmp_path):
    """A writer that forgets to sync a file before its rename leaves a state in which the final file is empty."""
    events = [
        event("names", changes=[[0, "a.tmp", 1, False]]),
        event("write", id=1, content="new"),
        event("names", changes=[[0, "a.tmp", None, False], [0, "a", 1, False]]),
    ]
    assert any(state.files.get("a") == ("", "new", "lost") for state in states_of(events, 0))


def test_what_a_process_looked_into_is_known_whatever_opens_it(tmp_path):
    """By Python, by Arrow, by another name; not what it only removes or writes anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("read", "appended", "size", "linked", "there", "removed", "anew"):
        (tmp_path / name).write_text("text")
    for name in ("arrow", "arrow_anew"):
        pq.write_table(pa.table({"a": [1]}), tmp_path / name)
    names = [path.name for path in tmp_path.iterdir()]
    with ReadWatch(tmp_path, names, tmp_path / "note") as watch:
        pid = os.fork()
        if not pid:
            try:
                watch.install()
                pq.read_table(tmp_path / "arrow", memory_map=True)
                pq.write_table(pa.table({"a": [2]}), tmp_path / "arrow_anew")
                assert (tmp_path / "there").is_file() and (tmp_path / "size").stat().st_size
                (tmp_path / "read").read_text()
                (tmp_path / "removed").unlink()
                (tmp_path / "anew").write_text("other")
                os.link(tmp_path / "linked", tmp_path / "link")
                (tmp_path / "link").read_text()
                with open(tmp_path / "appended", "a") as file:
                    file.write("more")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert watch.reads() == ["appended", "arrow", "linked", "read", "size"]


def test_a_state_counts_as_tried_only_if_it_differs_where_nobody_looked(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)

    def state(**files: str) -> State:
        return State("kept", 1, {name: (content, content, "kept") for name, content in files.items()})

    tried, first = Tried(tmp_path), state(seen="one", other="one")
    line = {"state": first.digest_in(tmp_path), "reads": ["seen"], "outcome": "completed"}
    tried.add(line, first)
    assert tried.like(state(seen="one", other="two")) is line
    assert tried.like(state(seen="two", other="one")) is None
    assert tried.like(state(seen="one")) is None and tried.like(state(seen="one", new="one")) is None


def test_a_point_is_passed_before_and_after_each_call_that_matters(tmp_path):
    """In a fork: nothing takes the wrappers away again."""
    note = tmp_path / "points"
    pid = os.fork()
    if not pid:
        try:
            found: list[str] = []
            points.install(lambda kind, when, path: found.append(f"{kind} {when}"))
            durable.write_json(tmp_path / "manifest.json", {})
            descriptor = os.open(note, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(descriptor, "\n".join(found).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    passed = note.read_text().splitlines()
    for kind in ("write", "fsync", "manifest"):
        assert [p for p in passed if p.startswith(kind)][:2] == [
            f"{kind} before",
            f"{kind} after",
        ] or kind == "write"
        assert f"{kind} before" in passed and f"{kind} after" in passed


def test_growth_of_a_long_run_is_found_and_noise_is_not():
    draw = np.random.default_rng(0)
    steps = np.arange(0, 20_000, 50.0)
    noise = np.repeat(draw.normal(0, 1e6, 100), 4)  # neighbours are alike

    def row(memory: np.ndarray, files: np.ndarray | float = 9) -> dict:
        return long_runs.row_of(np.column_stack([steps, memory, steps * 0 + files, steps * 0 + 5]))

    flat = row(3e8 + noise)
    assert flat["flat"] and flat["low"] < 0 < flat["high"] and flat["files_last"] == 9
    assert row(3e8 + noise + 1e8 * (steps < 2000))["flat"]  # the warm-up is left out
    leak = row(3e8 + noise + 2000 * steps)
    assert not leak["flat"] and leak["low"] < 2000 < leak["high"] and leak["low"] > 1000
    assert not row(3e8 + noise, 9 + (steps > 15_000))["flat"]


@pytest.mark.long
def test_memory_and_open_files_of_a_short_run_stay_flat(tmp_path):
    """The short version of benchmarks.long_runs: 150 parts of stage 03."""
    done = run("benchmarks.long_runs", str(tmp_path), "--share", "0.075", "--only", "03_build_rewards")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "open files" in done.stdout


@pytest.mark.long
def test_a_full_disk_leaves_a_run_that_continues(tmp_path):
    if subprocess.run(["unshare", "-r", "-m", "true"], check=False).returncode:
        pytest.skip("this user cannot mount in a namespace of their own")
    only = ("--only", "03_build_rewards/--part", "--only", "01_prepare_dataset/--overwrite")
    done = run("benchmarks.full_disk", str(tmp_path), "--chains", "2", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 times full" not in done.stdout.splitlines()[-1]


def test_a_pickle_of_the_corpus_would_run_if_it_were_loaded(tmp_path):
    """The canary works: otherwise no case could fail by it."""
    import pickle

    place = corpus.Place(tmp_path, tmp_path / "run", tmp_path, tmp_path / "secret", tmp_path / "canary")
    pickle.loads(corpus.pickled(place))
    assert place.canary.read_text() == "hostile code ran"
