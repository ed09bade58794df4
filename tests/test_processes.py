"""One training in several processes: the same bits as in one.

The processes are forked by `tests/processes.py`, which sets the variables of a launcher. One test uses torchrun itself.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.config import ROOT
from lib.runtime import has_native_bf16
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
from tests.test_ranker_files import saved_encoder

pytestmark = pytest.mark.slow

NATIVE = has_native_bf16(torch.device("cpu"))
HALF = "bf16" if NATIVE else "fp32"  # where the processor emulates bfloat16, a training would take minutes
# A frozen encoder that is divided among the processes, in bfloat16 where that is fast
LORA = [
    *FINQA, "--set", "ranker.adapter=lora", "--set", f"ranker.dtype={'bfloat16' if NATIVE else 'float32'}", "--set", "ranker.shard=true",
    "--set", "ranker.word_dropout=0.1", "--set", "training.activation_checkpointing=true",
]  # fmt: skip
DECOUPLED = [*TEXT, "--set", "critic.coupling=decoupled"]  # stage 05 differs, stage 04 does not
KINDS = {"text": TEXT, "finqa": FINQA, "lora": LORA, "decoupled": DECOUPLED}
SIZES_OF = {  # (kind, precision) -> numbers of processes: text in fp32 has all, and two are enough for the others
    ("text", "fp32"): SIZES,
    ("finqa", "fp32"): (1, 2),
    ("text", "bf16"): (1, 2),
    ("lora", HALF): (1, 2),
    ("decoupled", "fp32"): (1, 2),
}
MADE = {key: sizes for key, sizes in SIZES_OF.items() if NATIVE or key != ("text", "bf16")}


def flags_of(kind: str, precision: str, folder: Path) -> list[str]:
    """Arguments of a run of a kind, in `folder`."""
    encoder = ["--set", f"ranker.encoder={folder / 'encoder'}"] if kind == "lora" else []
    return [*KINDS[kind], *encoder, "--set", f"precision={precision}"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(kind, precision) -> a run with the stages before training."""
    keys = {f"{kind}_{precision}": (kind, precision) for kind, precision in MADE if kind != "decoupled"}
    folder = tmp_path_factory.mktemp("processes")
    saved_encoder(folder / "encoder", "llama")
    made = first_stages(folder, {run: flags_of(*key, folder) for run, key in keys.items()})
    runs = {keys[run]: path for run, path in made.items()}
    return runs | {("decoupled", "fp32"): runs["text", "fp32"]}


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> dict[tuple[str, str, int], Path]:
    """(kind, precision, number of processes) -> the run after the stages 04 and 05."""
    runs = {}
    for (kind, precision), sizes in MADE.items():
        for size in sizes:
            start, scripts = prepared[kind, precision], ["04_train.py", "05_train_critic.py"]
            if kind == "decoupled":
                start, scripts = runs["text", precision, size], scripts[1:]
            run = runs[kind, precision, size] = copy_of(start, f"{kind}_{precision}_{size}")
            if kind == "decoupled":
                shutil.rmtree(run / "05_train_critic")
            given = [*flags_of(kind, precision, run.parent), "--run_dir", str(run)]
            jobs = [{"size": size, "argv": [script, *given]} for script in scripts]
            for done in run_jobs(jobs):
                assert done["codes"] == [0] * size, done["errors"]
    return runs


@pytest.mark.parametrize(
    "kind, precision, size", [(*key, size) for key, sizes in SIZES_OF.items() for size in sizes[1:]]
)
def test_several_processes_give_the_bits_of_one(trained, kind, precision, size):
    if (kind, precision) not in MADE:
        pytest.skip("this processor emulates bfloat16, and a training would take minutes")
    assert_equal(results(trained[kind, precision, size]), results(trained[kind, precision, 1]))


def test_every_mode_was_trained(trained):
    names = results(trained["text", "fp32", 4]) | results(trained["finqa", "fp32", 2])
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


def test_a_divided_encoder_outlives_the_loss_of_a_process(trained, prepared):
    key = ("lora", HALF)
    run = copy_of(prepared[key], "lost")
    argv = ["04_train.py", *flags_of(*key, run.parent), "--run_dir", str(run)]
    begun = str(run / "04_train" / "ranker" / "metrics.jsonl")
    lost, continued = run_jobs(
        [
            {"size": 2, "argv": argv, "kill": {"rank": 1, "when": begun}},
            {"size": 4, "argv": argv},
        ]
    )
    assert lost["codes"][0] in (75, 143) and lost["codes"][1] == -9 and "Traceback" not in lost["errors"]
    assert continued["codes"] == [0] * 4, continued["errors"]
    assert_equal(results(run, ("04_train",)), results(trained[*key, 1], ("04_train",)))


def test_torchrun_starts_the_processes(trained, prepared):
    run = copy_of(prepared["text", "fp32"], "torchrun")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stage = ["04_train.py", *TEXT, "--only", "generator", "--set", "precision=fp32", "--run_dir", str(run)]
    command = launcher + stage
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("04_train/generator: starting") == 1  # one process speaks
    wanted = results(trained["text", "fp32", 1], ("04_train",))
    of_one = {name: wanted[name] for name in wanted if name.startswith("04_train/generator/")}
    assert len(of_one) > 2
    assert_equal({name: (run / name).read_bytes() for name in of_one}, of_one)
