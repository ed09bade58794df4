"""
How well do the rankers of finished FinQA runs choose among programs that other systems wrote? Beside votes, and beside pools without shortcuts.

The programs are those of four simulated systems, for the held-out questions (`lib.tasks.finqa.simulated_systems`). The weights of scores
and votes are fitted on the split selection. The systems learn from the candidates of the run itself. So runs of another seed or of
other settings of `finqa.pools` are tested on other programs: compare methods within a run. Intervals are 95 % intervals; pages are resampled.

python -m benchmarks.finqa_programs outputs/seed_1 outputs/seed_2
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib.errors import MissingInput
from lib.evaluation.finqa_programs import SELECTION, FinqaRun, fitted_weights, scored, simulated
from lib.evaluation.rank import Ranker
from lib.report.table import aligned, interval_text
from lib.runs import load_manifest
from lib.tasks.finqa.votes import BOTH, MAJORITY, RANDOM, RANKER, measure_choices

METHODS = (RANKER, BOTH, MAJORITY, RANDOM)


def row_of(folder: Path) -> dict[str, Any]:
    """The figures of one run."""
    run, ranker = FinqaRun.read(folder), Ranker.load(folder)
    trained, pools = (
        load_manifest(folder / "04_train" / "ranker"),
        load_manifest(folder / "02_generate_candidates"),
    )
    if trained is None or pools is None:
        raise MissingInput(f"{folder}: stages 02 and 04 are not complete; run them first")
    development, held_out = simulated(run, SELECTION, "held_out")
    weights = fitted_weights(development, run.prompts, ranker)
    figures = measure_choices(scored(held_out, run.prompts, ranker), weights, run.seed)
    return {
        "run": folder.name,
        "near_misses": pools["config"]["finqa.pools"].get("near_misses", 0.0),
        "seed": run.seed,
        "pools": trained["stats"]["held_out"]["accuracy"],
        "questions": figures["questions"],
        "differ": figures["differ"],
        "weights": figures["weights"],
        "methods": {row["method"]: {"all": row["all"], "differ": row["differ"]} for row in figures["rows"]},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of all runs as text."""

    def cell(estimate: dict[str, float] | None) -> str:
        return (
            "-"
            if estimate is None
            else f"{estimate['value']:.1%} ({interval_text(estimate, percent=True, between=' to ')})"
        )

    lines: list[tuple[str, ...]] = [("run", "near misses", "method", "all questions", "where answers differ")]
    for row in rows:
        start = row["run"], f"{row['near_misses']:.2f}"
        lines.append((*start, "ranker, pools without shortcuts", cell(row["pools"]), ""))
        lines += [
            (*start, m, cell(row["methods"][m]["all"]), cell(row["methods"][m]["differ"])) for m in METHODS
        ]
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a finished run of configs/finqa.yaml"
    )
    add_out(parser)
    args = parser.parse_args()
    say_provenance()
    rows = [row_of(run) for run in args.runs]
    print(table(rows))
    write(args.out, "finqa_programs", {"runs": rows})


if __name__ == "__main__":
    main()
