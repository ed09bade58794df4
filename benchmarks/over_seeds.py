"""
The same config run with several seeds: every model's figure as mean and spread, beside its baseline in the same runs.

The interval (95 %, Student's t) is over seeds: training, sampling and whatever else the seed decides. The one that a
single run prints is over held-out text, with the model as it is.

for seed in 1 2 3; do make pipeline SET="seed=$seed" RUN=outputs/seed_$seed; done
python -m benchmarks.over_seeds outputs/seed_1 outputs/seed_2 outputs/seed_3
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.provenance import say_provenance
from lib.errors import MissingInput, RemaskError
from lib.report.table import aligned
from lib.runs import load_manifest


def rows_of(run: Path) -> dict[tuple[str, str], dict]:
    """(model, metric) -> its row of the results table, of a run's stage 04."""
    found = {}
    for file in sorted(run.glob("04_train/*/training_manifest.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["table"]:
            found[row["model"], row["metric"]] = row
    if not found:
        raise MissingInput(f"{run} has no model of stage 04; run the stages to 04 there first")
    return found


def seed_of(run: Path) -> int:
    manifest = load_manifest(run / "04_train")
    if manifest is None:
        raise MissingInput(f"stage 04 of {run} is not complete; run it to its end first")
    return int(manifest["config"]["seed"])


def interval(values: np.ndarray) -> str:
    """Mean and half width of the 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.3f} +- {half:.3f}"


def table(runs: list[Path]) -> str:
    """A line per model and metric that all runs have."""
    per_run = [rows_of(run) for run in runs]
    shared = [key for key in per_run[0] if all(key in rows for rows in per_run)]
    lines = [("model", "metric", "each seed", "mean", "baseline", "mean of it", "difference")]
    for key in shared:
        rows = [found[key] for found in per_run]
        values, baselines = (np.array([row[name] for row in rows]) for name in ("value", "baseline_value"))
        names = ", ".join(dict.fromkeys(row["baseline"] for row in rows))  # the best rival may differ
        each = " ".join(f"{v:.3f}" for v in values)
        lines.append((*key, each, interval(values), names, interval(baselines), interval(values - baselines)))
    return aligned(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="two or more run folders, of different seeds")
    runs = parser.parse_args().runs
    say_provenance()
    if len(runs) < 2:
        print("a spread needs two runs or more", file=sys.stderr)
        return 2
    try:
        seeds = [seed_of(run) for run in runs]
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if len(set(seeds)) < len(seeds):
        print(
            f"these runs have seeds {seeds}: the same seed twice says nothing about spread", file=sys.stderr
        )
        return 2
    print(f"seeds {', '.join(map(str, seeds))}")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
