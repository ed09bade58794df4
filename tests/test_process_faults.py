"""A training in several processes that is disturbed: killed, stopped, without a disk, a port or a lock.

It ends with one message, in every process, and continues to the bits of an undisturbed training.
"""

import fcntl
import os
import random
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.process_runs import SIZES, TEXT, assert_equal, copy_of, first_stages, results, run_jobs

pytestmark = pytest.mark.slow

STAGES = ("04_train",)
KILLS = int(os.environ.get("REMASK_KILLS", 10))
FEWER = [*TEXT, "--set", "precision=fp32"]  # one model per kind of objective
for _name in ("reference_lm", "ar_baseline", "ranker"):
    FEWER += ["--set", f"models.{_name}=null"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A run with the stages before training."""
    return first_stages(tmp_path_factory.mktemp("processes"), {"text": FEWER})["text"]


@pytest.fixture(scope="module")
def undisturbed(prepared) -> tuple[dict[str, bytes], float]:
    """The results of a training in one process, and its seconds."""
    run = copy_of(prepared, "undisturbed")
    [done] = run_jobs([{"size": 1, "argv": ["04_train.py", *FEWER, "--run_dir", str(run)]}])
    assert done["codes"] == [0], done["errors"]
    return results(run, STAGES), done["seconds"]


def test_a_killed_training_continues_in_any_number_of_processes(prepared, undisturbed):
    """Random processes are killed at random moments; each attempt has another number of processes."""
    draw = random.Random(5)
    argv, seconds = ["04_train.py", *FEWER, "--run_dir"], undisturbed[1]
    kills, attempts = 0, 0
    while kills < KILLS:
        attempts += 1
        assert attempts <= 20, f"only {kills} processes were killed in time"
        run = copy_of(prepared, f"killed_{attempts}")
        jobs: list[dict] = []
        for _ in range(7):
            size, after = draw.choice(SIZES), draw.uniform(0.05, 0.8) * seconds
            jobs.append(
                {
                    "size": size,
                    "argv": [*argv, str(run)],
                    "kill": {"rank": draw.randrange(size), "after": after},
                }
            )
        jobs.append({"size": draw.choice(SIZES), "argv": [*argv, str(run)]})
        done = run_jobs(jobs)
        killed = [job for job in done if -9 in job["codes"]]
        assert set(done[-1]["codes"]) == {0}, done[-1]["errors"]
        kills += len(killed)
        assert_equal(results(run, STAGES), undisturbed[0])
        shutil.rmtree(run)


@pytest.fixture
def argv(prepared, request) -> list[str]:
    run = copy_of(prepared, request.node.name.partition("[")[0])
    return ["04_train.py", *FEWER, "--run_dir", str(run)]


def said(done: dict) -> list[str]:
    """The error messages of a job. None of its processes may end without an error, or with a traceback."""
    assert 0 not in done["codes"] and "Traceback" not in done["errors"], done["errors"]
    return [line for line in done["errors"].splitlines() if "error:" in line]


def test_processes_that_do_not_divide_the_parts_are_refused(argv):
    [done] = run_jobs([{"size": 3, "argv": argv}])
    messages = [line for line in said(done) if "cannot divide" in line]
    assert messages and 78 in done["codes"]
    assert all("start 2 processes (possible: 1, 2, 4)" in message for message in messages)


def test_a_process_that_is_lost_is_reported_and_ends_all(argv, undisturbed):
    run = Path(argv[-1])
    jobs = [
        {
            "size": 4,
            "argv": argv,
            "kill": {"rank": rank, "when": str(run / "04_train" / model / "metrics.jsonl")},
        }
        for rank, model in ((2, "generator"), (0, "inspector"))
    ]
    for done in run_jobs(jobs):
        messages = said(done)
        # A process notices the loss, or gets a signal
        ended = ("another process of this training has ended", "stopped by SIGTERM")
        assert messages and all(any(words in m for words in ended) for m in messages), messages
        assert -9 in done["codes"] and {75, 143} & set(done["codes"])
    run_jobs([{"size": 1, "argv": argv}])
    assert_equal(results(run, STAGES), undisturbed[0])


def test_one_process_that_is_told_to_stop_stops_all_at_the_same_step(argv, undisturbed):
    run = Path(argv[-1])
    begun = str(run / "04_train" / "generator" / "metrics.jsonl")
    [done] = run_jobs(
        [{"size": 2, "argv": argv, "kill": {"rank": 1, "when": begun, "signal": signal.SIGTERM}}]
    )
    # Within a training all stop at the same step; elsewhere the other process notices the loss
    assert any("run the same command again to continue" in message for message in said(done))
    assert 143 in done["codes"] and set(done["codes"]) <= {75, 143}
    run_jobs([{"size": 4, "argv": argv}])
    assert_equal(results(run, STAGES), undisturbed[0])


def test_a_full_disk_of_the_main_process_ends_all(argv, undisturbed):
    run = Path(argv[-1])
    [done] = run_jobs([{"size": 2, "argv": argv, "file_limit": 50_000, "patience": 0.5}])
    assert any("writing" in m or "disk is full" in m for m in said(done)) and done["codes"][0] == 74
    run_jobs([{"size": 2, "argv": argv}])
    assert_equal(results(run, STAGES), undisturbed[0])


def test_a_port_that_is_taken_is_named(argv):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        # The other process tries to connect, and ends by SIGKILL
        [done] = run_jobs([{"size": 2, "argv": argv, "env": {"MASTER_PORT": port}, "grace": 1}])
    [message] = [m for m in said(done) if "is taken" in m]
    assert f"port {port}" in message and "torchrun --standalone" in message and done["codes"][0] == 75


def test_a_second_training_in_the_same_folder_is_refused(argv):
    folder = Path(argv[-1]) / ".locks"
    folder.mkdir(exist_ok=True)
    with open(folder / "04_train", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        [done] = run_jobs([{"size": 2, "argv": argv, "patience": 0.5}])
    assert any("another process is at work on 04_train" in m for m in said(done)) and done["codes"][0] == 75


def test_other_scripts_run_in_one_process(argv):
    [done] = run_jobs([{"size": 2, "argv": ["02_generate_candidates.py", *argv[1:]]}])
    # The launcher stops the second process when the first has failed; both need not come to the message
    assert any("this script runs in one process" in m for m in said(done)) and 2 in done["codes"]
