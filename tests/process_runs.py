"""Small runs whose trainings are done in several processes, and what of them must not depend on the processes."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lib.config import ROOT

PARTS = 4
SIZES = (1, 2, 4)
SMALL = [
    "--quick_test", "--set", f"training.parts={PARTS}", "--set", "training.steps=4", "--set", "training.evaluate_every=2",
    "--set", "training.checkpoint_every=1", "--set", "training.evaluation_examples=32",
]  # fmt: skip
LITTLE = "data.fractions={train: 0.36, held_out: 0.04, reference: 0.6}"  # held-out text is what takes the time here
TEXT = [*SMALL, "--set", LITTLE, "--set", "critic.training.steps=3", "--set", "generator.training.steps=20"]
for _model in ("generator", "reference_lm", "ar_baseline", "inspector", "judge", "ranker"):
    TEXT += ["--set", f"models.{_model}.training.steps=3"]
TEXT += [
    "--set", "models.generator.modifiers={label_smoothing: 0.1, entropy: {}, mask_ratio: {power: 0.3, min_weight: 0.1, "
    "max_weight: 5.0}}", "--set", "models.inspector.class_weighting=dynamic", "--set", "architecture.dropout=0.1",
]  # fmt: skip
FINQA = [
    "--config", "configs/finqa.yaml", *SMALL, "--set", "models.ranker.training.steps=3",
    "--set", "models.ranker_blind.training.steps=2", "--set", "critic.training.steps=4", "--set", "ranker.prompt_tokens=16",
    "--set", "ranker.candidate_tokens=24", "--set", "architecture.num_hidden_layers=1", "--set", "architecture.hidden_size=32",
    "--set", "finqa.pools.train_draws=2", "--set", "finqa.pools.bank=12",
]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


@functools.cache
def starter() -> subprocess.Popen:
    """The process that forks all others. It has imported torch."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.processes"],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def run_jobs(jobs: list[dict]) -> list[dict]:
    """The jobs one after the other: exit codes, seconds and messages of each (`tests/processes.py`)."""
    done, process = [], starter()
    assert process.stdin and process.stdout
    for job in jobs:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        done.append(json.loads(process.stdout.readline()))
    return done


def first_stages(folder: Path, flags: dict[str, list[str]]) -> dict[str, Path]:
    """name -> a run in `folder` with the stages 00 to 03, made with the flags of that name."""
    names = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards")
    jobs = [
        {"size": 1, "argv": [f"{name}.py", *given, "--run_dir", str(folder / run)]}
        for run, given in flags.items()
        for name in names
    ]
    for done in run_jobs(jobs):
        assert done["codes"] == [0], done["errors"]
    return {run: folder / run for run in flags}


def copy_of(run: Path, name: str) -> Path:
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    return copy


def results(run: Path, stages: tuple[str, ...] = ("04_train", "05_train_critic")) -> dict[str, bytes]:
    """What must not depend on the processes: weights, metrics, and the best steps and figures of the manifests."""
    found, tables = {}, ("metrics.jsonl", "training_manifest.json", "calibration.json")
    for stage in stages:
        manifest = json.loads((run / stage / "manifest.json").read_text(encoding="utf-8"))
        found[f"{stage} stats"] = json.dumps(manifest["stats"], sort_keys=True).encode()
        for path in sorted((run / stage).rglob("*")):
            if "checkpoint" not in path.parts and (path.suffix == ".safetensors" or path.name in tables):
                found[str(path.relative_to(run))] = path.read_bytes()
    return found


def assert_equal(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
