"""A training step of every mode, alone and beside a program that keeps one core busy."""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.prepared import RESULTS
from lib.config import ROOT
from lib.report.table import aligned

MODELS = ("generator", "reference_lm", "inspector", "judge", "ranker")  # of stage 04, with one mode each
NEIGHBOURS: dict[str, int | None] = {"alone": None, "nice 10": 10, "nice 0": 0}
ROUNDS = 3
LIMIT = 2.5  # of the time of a step alone, beside a program of lower priority
SETTINGS = ("data.path=builtin_small", "generator.training.steps=20")


@contextlib.contextmanager
def busy(nice: int | None) -> Iterator[None]:
    """A program that computes all the time, at a priority; None: no program."""
    if nice is None:
        yield
        return
    code = f"import os; os.nice({nice})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            time.sleep(0.5)
            yield
        finally:
            process.kill()


def compare_neighbours(steps: int) -> dict[str, Any]:
    """Seconds of a step of each mode beside each neighbour, and the ratios to a step alone. Medians of rounds, in turns."""
    run = RESULTS / "neighbours"
    sizes = [f"training.steps={steps}", f"training.evaluate_every={steps}", f"training.checkpoint_every={steps}",
             f"critic.training.steps={steps}", *(f"models.{name}.training.steps={steps}" for name in MODELS)]  # fmt: skip
    flags = ["--run_dir", str(run), *(word for s in (*SETTINGS, *sizes) for word in ("--set", s))]
    stages = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train")
    for stage in stages:
        _script(stage, [*flags, "--overwrite"])
    seconds: dict[str, dict[str, list[float]]] = {
        model: {name: [] for name in NEIGHBOURS} for model in (*MODELS, "critic")
    }
    for number in range(ROUNDS):
        for model in seconds:
            for name, nice in NEIGHBOURS.items():
                with busy(nice):
                    folder = _train(model, run, flags)
                speed = json.loads((folder / "speed.jsonl").read_text().splitlines()[-1])
                seconds[model][name].append(speed["seconds"] / speed["step"])  # made in one process
        print(f"round {number + 1} of {ROUNDS} is measured", file=sys.stderr, flush=True)
    found: dict[str, Any] = {"steps": steps, "rounds": ROUNDS, "modes": {}}
    for model, times in seconds.items():
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {name: medians[name] / medians["alone"] for name in NEIGHBOURS if name != "alone"}
        found["modes"][model] = {"seconds": medians, "ratios": ratios}
    found["worst"] = max(figures["ratios"]["nice 10"] for figures in found["modes"].values())
    _say(found)
    return found


def _say(found: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [
        ("model", *(f"{name}, ms" for name in NEIGHBOURS), "nice 10, ratio", "nice 0, ratio")
    ]
    for model, figures in found["modes"].items():
        milliseconds = [f"{1e3 * value:.0f}" for value in figures["seconds"].values()]
        rows.append((str(model), *milliseconds, *(f"{value:.2f}" for value in figures["ratios"].values())))
    print(aligned(rows))
    print(f"worst ratio beside a program of lower priority: {found['worst']:.2f}; the limit is {LIMIT}")


def _train(model: str, run: Path, flags: list[str]) -> Path:
    """Train a model again. Returns the folder of its logs."""
    if model == "critic":
        _script("05_train_critic", [*flags, "--overwrite"])
        return run / "05_train_critic"
    _script("04_train", [*flags, "--only", model, "--overwrite"])
    return run / "04_train" / model


def _script(name: str, flags: list[str]) -> None:
    """Run a stage in a process of its own, as a user does: it looks at the cores when it starts."""
    done = subprocess.run([sys.executable, f"{name}.py", *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}.py failed:\n{done.stderr[-2000:]}")
