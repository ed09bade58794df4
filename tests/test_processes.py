"""One training in several processes: the same bits as in one.

The processes are forked by `tests/processes.py`, which sets the variables of a launcher. One test uses torchrun itself.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import ROOT
from tests.process_runs import (
    FINQA,
    SIZES,
    TEXT,
    assert_equal,
    copy_of,
    environment,
    first_stages,
    results,
    run_jobs,
)

pytestmark = pytest.mark.slow

KINDS = {"text": TEXT, "finqa": FINQA, "decoupled": [*TEXT, "--set", "critic.coupling=decoupled"]}
SIZES_OF = {  # (kind, precision) -> numbers of processes
    ("text", "fp32"): SIZES,
    ("finqa", "fp32"): SIZES,
    ("text", "bf16"): (1, 4),
    ("finqa", "bf16"): (1, 4),
    ("decoupled", "fp32"): (1, 4),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(kind, precision) -> a run with the stages before training."""
    keys = {f"{kind}_{precision}": (kind, precision) for kind, precision in SIZES_OF if kind != "decoupled"}
    flags = {
        run: [*KINDS[kind], "--set", f"precision={precision}"] for run, (kind, precision) in keys.items()
    }
    made = first_stages(tmp_path_factory.mktemp("processes"), flags)
    runs = {keys[run]: path for run, path in made.items()}
    return runs | {("decoupled", "fp32"): runs["text", "fp32"]}


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> dict[tuple[str, str, int], Path]:
    """(kind, precision, number of processes) -> the run after the stages 04 and 05."""
    jobs, runs = [], {}
    for (kind, precision), sizes in SIZES_OF.items():
        for size in sizes:
            run = runs[kind, precision, size] = copy_of(
                prepared[kind, precision], f"{kind}_{precision}_{size}"
            )
            given = [*KINDS[kind], "--set", f"precision={precision}", "--run_dir", str(run)]
            scripts = ("04_train.py", "05_train_critic.py")
            jobs += [{"size": size, "argv": [script, *given]} for script in scripts]
    for job, done in zip(jobs, run_jobs(jobs), strict=True):
        assert done["codes"] == [0] * job["size"], done["errors"]
    return runs


@pytest.mark.parametrize(
    "kind, precision, size", [(*key, size) for key, sizes in SIZES_OF.items() for size in sizes[1:]]
)
def test_several_processes_give_the_bits_of_one(trained, kind, precision, size):
    assert_equal(results(trained[kind, precision, size]), results(trained[kind, precision, 1]))


def test_every_mode_was_trained(trained):
    names = results(trained["text", "fp32", 4]) | results(trained["finqa", "fp32", 4])
    models = {Path(name).parts[1] for name in names if name.startswith("04_train/")}
    assert {
        "generator",
        "ar_baseline",
        "reference_lm",
        "inspector",
        "judge",
        "ranker",
        "ranker_blind",
    } <= models
    assert {"05_train_critic/ppo/metrics.jsonl", "05_train_critic/exact/metrics.jsonl"} <= set(names)
    assert "05_train_critic/calibration.json" in names


def test_torchrun_starts_the_processes(trained, prepared):
    run = copy_of(prepared["text", "fp32"], "torchrun")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "04_train.py", *TEXT, "--set", "precision=fp32", "--run_dir", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("04_train/generator: starting") == 1  # one process speaks
    assert_equal(results(run, ("04_train",)), results(trained["text", "fp32", 1], ("04_train",)))
