"""One training in several processes: the same bits as in one, also when processes are killed.

The processes are forked by `tests/processes.py`, which sets the variables of a launcher. One test uses torchrun itself.
"""

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import ROOT

pytestmark = pytest.mark.slow

PARTS = 4
SIZES = (1, 2, 4)
SMALL = [
    "--quick_test", "--set", f"training.parts={PARTS}", "--set", "training.steps=4", "--set", "training.evaluate_every=2",
    "--set", "training.checkpoint_every=1", "--set", "training.evaluation_examples=32",
]  # fmt: skip
TEXT = [*SMALL, "--set", "critic.training.steps=3"]
for _model in ("generator", "reference_lm", "ar_baseline", "inspector", "judge", "ranker"):
    TEXT += ["--set", f"models.{_model}.training.steps=3"]
TEXT += [
    "--set", "models.generator.modifiers={label_smoothing: 0.1, entropy: {}, mask_ratio: {power: 0.3, min_weight: 0.1, "
    "max_weight: 5.0}}", "--set", "models.inspector.class_weighting=dynamic", "--set", "architecture.dropout=0.1",
]  # fmt: skip
FINQA = [
    "--config", "configs/finqa.yaml", *SMALL, "--set", "models.ranker.training.steps=3",
    "--set", "models.ranker_blind.training.steps=2", "--set", "critic.training.steps=4",
]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_jobs(folder: Path, jobs: list[dict]) -> list[dict]:
    """The jobs one after the other, in one process that has imported torch."""
    file = folder / f"jobs_{len(list(folder.glob('jobs_*')))}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "tests.processes", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def first_stages(run: Path, flags: list[str]) -> Path:
    """A run with the stages 00 to 03."""
    for name in ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards"):
        command = [sys.executable, f"{name}.py", *flags, "--run_dir", str(run)]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    return run


def copy_of(run: Path, name: str) -> Path:
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    return copy


def results(run: Path) -> dict[str, bytes]:
    """What must not depend on the processes: weights, metrics, and the best steps and figures of the manifests."""
    found = {}
    for path in sorted(run.rglob("*")):
        stage = path.relative_to(run).parts[0]
        if stage not in ("04_train", "05_train_critic") or "checkpoint" in path.parts:
            continue
        if (
            path.name in ("metrics.jsonl", "training_manifest.json", "calibration.json")
            or path.suffix == ".safetensors"
        ):
            found[str(path.relative_to(run))] = path.read_bytes()
    for name in ("04_train", "05_train_critic"):
        manifest = json.loads((run / name / "manifest.json").read_text(encoding="utf-8"))
        found[f"{name} stats"] = json.dumps(manifest["stats"], sort_keys=True).encode()
    return found


def assert_equal(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


KINDS = {"text": TEXT, "finqa": FINQA, "decoupled": [*TEXT, "--set", "critic.coupling=decoupled"]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(kind, precision) -> a run with the stages before training."""
    folder, runs = tmp_path_factory.mktemp("processes"), {}
    for precision in ("fp32", "bf16"):
        for kind in ("text", "finqa"):
            given = [*KINDS[kind], "--set", f"precision={precision}"]
            runs[kind, precision] = first_stages(folder / f"{kind}_{precision}", given)
        runs["decoupled", precision] = runs["text", precision]
    return runs


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> dict[tuple[str, str, int], Path]:
    """(kind, precision, number of processes) -> the run after the stages 04 and 05."""
    jobs, runs = [], {}
    for kind, flags in KINDS.items():
        for precision in ("fp32", "bf16") if kind != "decoupled" else ("fp32",):
            for size in SIZES:
                run = copy_of(prepared[kind, precision], f"{kind}_{precision}_{size}")
                runs[kind, precision, size] = run
                given = [*flags, "--set", f"precision={precision}", "--run_dir", str(run)]
                jobs += [
                    {"size": size, "argv": [script, *given]}
                    for script in ("04_train.py", "05_train_critic.py")
                ]
    for job, done in zip(jobs, run_jobs(tmp_path_factory.mktemp("jobs"), jobs), strict=True):
        assert done["codes"] == [0] * job["size"], done["errors"]
    return runs


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_give_the_bits_of_one(trained, kind, precision, size):
    if (kind, precision, size) not in trained:
        pytest.skip("the critic alone is trained in fp32")
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


def test_a_killed_training_continues_in_any_number_of_processes(trained, prepared, tmp_path):
    """Random processes are killed at random moments; each attempt has another number of processes."""
    draw = random.Random(5)
    argv = ["04_train.py", *TEXT, "--set", "precision=fp32", "--run_dir"]
    [plain] = run_jobs(
        tmp_path, [{"size": 1, "argv": [*argv, str(copy_of(prepared["text", "fp32"], "timed"))]}]
    )
    kills, attempts = 0, 0
    while kills < 20:
        attempts += 1
        assert attempts <= 20, f"only {kills} processes were killed in time"
        run = copy_of(prepared["text", "fp32"], f"killed_{attempts}")
        jobs: list[dict] = []
        for _ in range(4):
            size, after = draw.choice(SIZES), draw.uniform(0.05, 0.8) * plain["seconds"]
            jobs.append(
                {
                    "size": size,
                    "argv": [*argv, str(run)],
                    "kill": {"rank": draw.randrange(size), "after": after},
                }
            )
        jobs.append({"size": draw.choice(SIZES), "argv": [*argv, str(run)]})
        done = run_jobs(tmp_path, jobs)
        killed = [job for job in done if -9 in job["codes"]]
        assert all(0 not in job["codes"] for job in killed), (
            "some process did not notice that another was killed"
        )
        assert set(done[-1]["codes"]) == {0}, done[-1]["errors"]
        kills += len(killed)
        assert_equal(results_of_04(run), results_of_04(trained["text", "fp32", 1]))
        shutil.rmtree(run)


def test_torchrun_starts_the_processes(trained, prepared, tmp_path):
    run = copy_of(prepared["text", "fp32"], "torchrun")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "04_train.py", *TEXT, "--set", "precision=fp32", "--run_dir", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("04_train/generator: starting") == 1  # one process speaks
    assert_equal(results_of_04(run), results_of_04(trained["text", "fp32", 1]))


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def argv(prepared, request) -> list[str]:
    run = copy_of(prepared["text", "fp32"], request.node.name.partition("[")[0])
    return ["04_train.py", *TEXT, "--set", "precision=fp32", "--run_dir", str(run)]


def said(done: dict) -> list[str]:
    """The error messages of a job. None of its processes may end without an error, or with a traceback."""
    assert 0 not in done["codes"] and "Traceback" not in done["errors"], done["errors"]
    return [line for line in done["errors"].splitlines() if "error:" in line]


def test_processes_that_do_not_divide_the_parts_are_refused(argv, tmp_path):
    [done] = run_jobs(tmp_path, [{"size": 3, "argv": argv}])
    [message] = [line for line in said(done) if "cannot divide" in line]
    assert "start 2 processes (possible: 1, 2, 4)" in message and done["codes"][0] == 78


def test_a_process_that_is_lost_is_reported_and_ends_all(argv, trained, prepared, tmp_path):
    run = Path(argv[-1])
    jobs = [{"size": 4, "argv": argv, "kill": {"rank": rank, "after": 4.0}} for rank in (2, 0)]
    for done in run_jobs(tmp_path, jobs):
        messages = said(done)
        ended = ("another process of this training has ended", "stopped by SIGTERM")  # it notices, or is told
        assert messages and all(any(words in m for words in ended) for m in messages), messages
        assert -9 in done["codes"] and {75, 143} & set(done["codes"])
    run_jobs(tmp_path, [{"size": 1, "argv": argv}])
    assert_equal(results_of_04(run), results_of_04(trained["text", "fp32", 1]))


def test_one_process_that_is_told_to_stop_stops_all_at_the_same_step(argv, trained, tmp_path):
    run = Path(argv[-1])
    [done] = run_jobs(tmp_path, [{"size": 2, "argv": argv, "kill": {"rank": 1, "after": 4.0, "signal": 15}}])
    [message] = said(done)
    assert "run the same command again to continue" in message and set(done["codes"]) == {143}
    run_jobs(tmp_path, [{"size": 4, "argv": argv}])
    assert_equal(results_of_04(run), results_of_04(trained["text", "fp32", 1]))


def test_a_full_disk_of_the_main_process_ends_all(argv, trained, tmp_path):
    run = Path(argv[-1])
    [done] = run_jobs(tmp_path, [{"size": 2, "argv": argv, "file_limit": 50_000}])
    assert any("writing" in m or "disk is full" in m for m in said(done)) and done["codes"][0] == 74
    run_jobs(tmp_path, [{"size": 2, "argv": argv}])
    assert_equal(results_of_04(run), results_of_04(trained["text", "fp32", 1]))


def test_a_port_that_is_taken_is_named(argv, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        [done] = run_jobs(tmp_path, [{"size": 2, "argv": argv, "env": {"MASTER_PORT": port}}])
    [message] = [m for m in said(done) if "is taken" in m]
    assert f"port {port}" in message and "torchrun --standalone" in message and done["codes"][0] == 75


def test_a_second_training_in_the_same_folder_is_refused(argv, tmp_path):
    folder = Path(argv[-1]) / ".locks"
    folder.mkdir(exist_ok=True)
    with open(folder / "04_train", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        [done] = run_jobs(tmp_path, [{"size": 2, "argv": argv}])
    assert any("another process is at work on 04_train" in m for m in said(done)) and done["codes"][0] == 75


def test_other_scripts_run_in_one_process(argv, tmp_path):
    [done] = run_jobs(tmp_path, [{"size": 2, "argv": ["02_generate_candidates.py", *argv[1:]]}])
    assert all("this script runs in one process" in m for m in said(done)) and set(done["codes"]) == {2}


def results_of_04(run: Path) -> dict[str, bytes]:
    manifest = json.loads((run / "04_train" / "manifest.json").read_text(encoding="utf-8"))
    stats = {"stats": json.dumps(manifest["stats"], sort_keys=True).encode()}
    files = [p for p in sorted((run / "04_train").rglob("*")) if "checkpoint" not in p.parts]
    return stats | {
        str(p.relative_to(run)): p.read_bytes()
        for p in files
        if p.suffix == ".safetensors" or p.name in ("metrics.jsonl", "training_manifest.json")
    }
