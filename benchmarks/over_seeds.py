"""
Runs of one config with several seeds: mean and 95 % interval of every model's figure, beside its baseline.

The intervals (Student's t) are over seeds: they include training, sampling and every other random draw. The interval that a
single run prints is over held-out text, for one trained model.

for seed in 1 2 3; do make pipeline SET="seed=$seed" RUN=outputs/seed_$seed; done
python -m benchmarks.over_seeds outputs/seed_1 outputs/seed_2 outputs/seed_3
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib.errors import MissingInput, RemaskError
from lib.report.table import aligned
from lib.runs import load_manifest
from lib.stage.unfinished import config_changes


def rows_of(run: Path) -> dict[tuple[str, str], dict]:
    """(model, metric) -> row of the results table, from stage 04 of a run. Raises MissingInput without a model."""
    found = {}
    for file in sorted(run.glob("04_train/*/training_manifest.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["table"]:
            found[row["model"], row["metric"]] = row
    if not found:
        raise MissingInput(f"{run} has no model of stage 04; run the stages to 04 there first")
    return found


def seed_of(run: Path) -> int:
    """The seed of a run. Raises MissingInput when stage 04 is not complete."""
    manifest = load_manifest(run / "04_train")
    if manifest is None:
        raise MissingInput(f"stage 04 of {run} is not complete; run it to its end first")
    return int(manifest["config"]["seed"])


def differing_settings(runs: list[Path]) -> list[str]:
    """A line `key: old -> new` for settings of stage 04 in which runs differ from the first one, except the seed."""
    configs = [(load_manifest(run / "04_train") or {})["config"] | {"seed": None} for run in runs]
    return list(dict.fromkeys(line for config in configs[1:] for line in config_changes(configs[0], config)))


def left_out(runs: list[Path]) -> dict[tuple[str, str], list[str]]:
    """(model, metric) that some runs lack -> these runs."""
    per_run = {str(run): rows_of(run) for run in runs}
    keys = dict.fromkeys(key for rows in per_run.values() for key in rows)
    lacking = {key: [name for name, rows in per_run.items() if key not in rows] for key in keys}
    return {key: names for key, names in lacking.items() if names}


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and half-width of the 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return {"value": float(values.mean()), "half_width": float(half)}


def compare(runs: list[Path]) -> list[dict[str, Any]]:
    """An entry per model and metric that all runs have."""
    per_run = [rows_of(run) for run in runs]
    found = []
    for key in [key for key in per_run[0] if all(key in rows for rows in per_run)]:
        rows = [rows[key] for rows in per_run]
        values, baselines = (np.array([row[name] for row in rows]) for name in ("value", "baseline_value"))
        found.append({
            "model": key[0], "metric": key[1], "each": values.tolist(), "mean": interval(values),
            "baseline": ", ".join(dict.fromkeys(row["baseline"] for row in rows)),  # the best one may differ
            "baseline_each": baselines.tolist(), "baseline_mean": interval(baselines),
            "difference": interval(values - baselines), "percent": key[1] == "accuracy",
        })  # fmt: skip
    return found


def table(entries: list[dict[str, Any]]) -> str:
    """A line per entry, for the screen."""
    lines = [("model", "metric", "each seed", "mean", "baseline", "mean of it", "difference")]
    for entry in entries:
        means = (
            f"{entry[k]['value']:.3f} +- {entry[k]['half_width']:.3f}"
            for k in ("mean", "baseline_mean", "difference")
        )
        mean, baseline, difference = means
        each = " ".join(f"{value:.3f}" for value in entry["each"])
        lines.append((entry["model"], entry["metric"], each, mean, entry["baseline"], baseline, difference))
    return aligned(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="two or more run folders, of different seeds")
    add_out(parser)
    options = parser.parse_args()
    runs = options.runs
    say_provenance()
    if len(runs) < 2:
        print("an interval over seeds needs two runs or more", file=sys.stderr)
        return 2
    try:
        seeds = [seed_of(run) for run in runs]
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if len(set(seeds)) < len(seeds):
        print(f"these runs have the seeds {seeds}; give runs with different seeds", file=sys.stderr)
        return 2
    print(f"seeds {', '.join(map(str, seeds))}")
    for line in differing_settings(runs):
        print(f"these runs differ in more than their seed: {line}")
    for row, lacking in left_out(runs).items():
        print(f"left out: {' '.join(row)}; it is not in {', '.join(lacking)}")
    entries = compare(runs)
    print(table(entries))
    write(options.out, options.out.stem if options.out else "over_seeds", {"seeds": seeds, "rows": entries})
    return 0


if __name__ == "__main__":
    sys.exit(main())
