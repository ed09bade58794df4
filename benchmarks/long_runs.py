"""
Measure memory, open files and disk over long runs: thousands of steps, evaluations and parts.

Each case is a script of the pipeline with a tiny model in a process of its own. At regular steps of its progress bar, these are
noted: the resident memory of the process and its workers, its open files, and the size of its folder. The first fifth is left out:
libraries still load, and caches fill. The rest is cut into 20 blocks. A line through the means of the blocks has a slope, with a 95 %
interval by Student's t with 18 degrees of freedom. Neighbouring samples are not independent, but means of blocks nearly are. A case
passes if its memory grows by less than 5 % over the whole run, with 95 % confidence. It must also have no more open files at the end.

    python -m benchmarks.long_runs outputs/long_runs                         # 20,000 steps, 2,000 parts, 500 evaluations
    python -m benchmarks.long_runs outputs/long_runs --share 0.01
"""

import argparse
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.forks import session_of
from benchmarks.provenance import provenance
from benchmarks.result_files import add_out, write
from lib.config import ROOT
from lib.runs import STAGES

STEPS, PARTS, EVALUATIONS = 20_000, 2_000, 500
SAMPLES = 400  # of each case
BLOCKS = 20
WARM_UP = 0.2
MAX_GROWTH = 0.05
T_95 = 2.101  # of Student's t with BLOCKS - 2 degrees of freedom
PAGE = os.sysconf("SC_PAGE_SIZE")
WORDS = (
    "the quick brown fox jumps over a lazy dog while seven old wizards brew potion near stone river and sing"
)

BASE = (
    "tokenizer.examples_per_part=1", "candidates.per_example=2", "candidates.rows_per_group=2", "data.passage_characters=64",
    "data.deduplicate=none", "data.block_characters=512", "data.fractions={train: 0.8, held_out: 0.1, reference: 0.1}", "architecture.num_hidden_layers=1",
    "architecture.hidden_size=32", "generator.training.steps=5", "training.batch_size=4", "training.evaluation_examples=8",
    "training.evaluate_every=1000", "training.checkpoint_every=500",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command, and the progress bar of it that is measured.

    Attributes:
        makes: the folder of the run whose size is noted.
        count: steps of the progress bar.
    """

    name: str
    unit: str
    stage: str
    bar: str
    makes: str
    count: int
    more: tuple[str, ...] = ()


def argv_of(stage: str, run: Path, text: Path, more: tuple[str, ...] = ()) -> list[str]:
    """The command of a stage."""
    words = [f"{stage}.py", "--quick_test", "--run_dir", str(run), "--set", f"data.path={text}"]
    return [*words, *(word for setting in BASE for word in ("--set", setting)), *more]


def cases(share: float) -> list[Case]:
    """All cases, with a share of their steps."""
    steps, parts, evaluations = (max(60, int(share * count)) for count in (STEPS, PARTS, EVALUATIONS))

    def training(name: str, unit: str, count: int, evaluate_every: int) -> Case:
        spec = f"models.{name}.training."
        more = (
            "--only",
            name,
            "--set",
            f"{spec}steps={count}",
            "--set",
            f"{spec}evaluate_every={evaluate_every}",
        )
        return Case(f"04_train, {unit}", unit, "04_train", name, f"04_train/{name}", count, more)

    workers = ("--overwrite", "--set", "executor={type: processes, workers: 1}")
    return [
        Case("01_prepare_dataset", "parts", "01_prepare_dataset", "examples", "01_prepare_dataset", parts),
        Case("02_generate_candidates", "parts", "02_generate_candidates", "candidates", "02_generate_candidates", parts),
        Case("03_build_rewards", "parts", "03_build_rewards", "rewards", "03_build_rewards", parts),
        Case("03_build_rewards, a worker process", "parts", "03_build_rewards", "rewards", "03_build_rewards.new", parts, workers),
        training("generator", "steps", steps, 1000),
        training("reference_lm", "evaluations", evaluations, 1),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, nargs="?", default=Path("outputs/long_runs"))
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, parts and evaluations")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="only these stages")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help="in a process that is measured")
    add_out(parser)
    args = parser.parse_args()
    if args.measure:
        file, what, *argv = args.measure
        return measure(Path(file), json.loads(what), argv)
    work = args.work.absolute()
    run, text = work / "run", work / "text.txt"
    shutil.rmtree(run, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    make_text(text, max(300, *(case.count for case in cases(args.share) if case.unit == "parts")))
    subprocess.run([sys.executable, *argv_of("00_check_data", run, text)], cwd=ROOT, check=True)
    rows = []
    for case in cases(args.share):
        if args.only and case.stage not in args.only:
            make_unmeasured(case, run, text)
            continue
        rows.append(run_case(case, run, text, work / "samples.jsonl"))
        print(line_of(rows[-1]), flush=True)
    if args.share == 1 and not args.only:
        write(args.out, "long_runs", {"rows": rows}, provenance())
    return int(any(not row["flat"] for row in rows))


def make_unmeasured(case: Case, run: Path, text: Path) -> None:
    """What a later case reads."""
    if case.stage in STAGES[:4] and not case.more:
        subprocess.run([sys.executable, *argv_of(case.stage, run, text)], cwd=ROOT, check=True)


def make_text(file: Path, passages: int) -> None:
    """A text of some more passages than there are parts."""
    draw, words = random.Random(0), WORDS.split()
    lines = ("".join(f"{word} " for word in draw.choices(words, k=15))[:64] for _ in range(passages + 20))
    file.write_text("\n".join(lines))


def run_case(case: Case, run: Path, text: Path, samples: Path) -> dict[str, Any]:
    """The row of a case."""
    samples.unlink(missing_ok=True)
    what = {"bar": case.bar, "every": max(1, case.count // SAMPLES), "folder": str(run / case.makes)}
    words = [sys.executable, "-m", "benchmarks.long_runs", "--measure", str(samples), json.dumps(what)]
    begin = time.monotonic()
    done = subprocess.run(
        [*words, *argv_of(case.stage, run, text, case.more)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = np.array([json.loads(line) for line in samples.read_text().splitlines()], dtype=float)
    return {"case": case.name, "unit": case.unit, "seconds": round(time.monotonic() - begin, 1)} | row_of(
        found
    )


def row_of(samples: np.ndarray) -> dict[str, Any]:
    """Slopes of samples with columns step, bytes of memory, open files, bytes on the disk."""
    steps, memory, files, disk = samples.T
    late = steps >= steps[0] + WARM_UP * (steps[-1] - steps[0])
    slope, half = slope_of(steps[late], memory[late])
    passed = steps[-1] - steps[late][0]
    level = float(memory[late].mean())
    return {
        "count": int(steps[-1]), "samples": len(steps), "megabytes": level / 1e6, "bytes_per_unit": slope,
        "low": slope - half, "high": slope + half, "growth": slope * passed / level, "growth_high": (slope + half) * passed / level,
        "files_first": int(files[late][0]), "files_last": int(files[-1]), "files_most": int(files.max()),
        "disk_most": float(disk.max()),
        "flat": bool((slope + half) * passed < MAX_GROWTH * level and files[-1] <= files[late][0]),
    }  # fmt: skip


def slope_of(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, half of its 95 % interval) of a line through the means of `BLOCKS` blocks of equal size."""
    xs, ys = (np.array([block.mean() for block in np.array_split(values, BLOCKS)]) for values in (x, y))
    centred = xs - xs.mean()
    spread = float(centred @ centred)
    slope = float(centred @ ys) / spread
    rest = ys - ys.mean() - slope * centred
    return slope, T_95 * float(np.sqrt(rest @ rest / (BLOCKS - 2) / spread))


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:<36} {row['count']:6,d} {row['unit']:<12} {row['megabytes']:6.0f} MB, {row['bytes_per_unit']:+9.1f} bytes each "
        f"[{row['low']:+.1f}, {row['high']:+.1f}], {100 * row['growth']:+.2f} % in all; open files {row['files_first']} -> "
        f"{row['files_last']}; disk {row['disk_most'] / 1e6:.1f} MB at most{'' if row['flat'] else '   GROWS'}"
    )


# ------------------------------------------------------------------------------------------- in the process that is measured


def measure(file: Path, what: dict[str, Any], argv: list[str]) -> int:
    """Run a script, and note what its process holds whenever a progress bar moves on."""
    from lib.log import Progress

    real, folder = Progress.update, Path(what["folder"])
    due = [0]

    def update(self: Progress, step: int, **values: str) -> None:
        real(self, step, **values)
        if self.label == what["bar"] and step >= due[0]:
            due[0] = step + what["every"]
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps([step, resident(), open_files(), size_of(folder)]) + "\n")

    Progress.update = update
    os.setsid()
    sys.argv = argv
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    return 0


def resident() -> int:
    """Bytes of memory of this process and of those that it has started."""
    found = 0
    for pid in session_of(os.getpid()):
        try:
            found += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        except OSError:  # it has ended
            continue
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def size_of(folder: Path) -> int:
    found = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.stat(os.path.join(path, name)).st_size
            except OSError:  # it was replaced
                continue
    return found


if __name__ == "__main__":
    raise SystemExit(main())
