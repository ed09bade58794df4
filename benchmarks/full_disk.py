"""
Fill the disk at random moments of every stage, make room, continue, and compare every byte with an undisturbed run.

The run lies on a disk of its own in memory, which is mounted in a namespace of this process alone (`unshare`). It is made just
large enough for a random share of what the stage writes. So the kernel itself refuses a write, whoever writes: Python, Arrow,
safetensors, or a worker process. The stage must end with code 74 and one message. Then the disk grows, and the next attempt
continues. At the end it is large, and the outputs must have the bytes of an undisturbed run. With --overwrite, the old outputs
must be whole after each full disk.

    python -m benchmarks.full_disk outputs/full_disk                                # all stages, minutes
    python -m benchmarks.full_disk outputs/full_disk --only "03_build_rewards/--part"
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.faults import forks
from benchmarks.faults.disturb import attempt
from benchmarks.faults.run_bytes import differences, leftovers, run_bytes
from benchmarks.faults.scenarios import Scenario, all_scenarios, use_inputs
from benchmarks.kills import Chains
from benchmarks.provenance import provenance
from benchmarks.result_files import add_out, write

INSIDE = "REMASK_FULL_DISK"  # is set in the namespace
FULL = 74
MAX_FULL = 4  # full disks of one chain
LARGE = 2**30
PAGE = 4096
LEFT_OUT = (
    "executor ray",
    "make pipeline",
    "from a stream",
)  # Ray's own files, and stages that are tried alone


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--chains", type=int, default=4, help="of each scenario")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE/SCENARIO")
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser)
    args = parser.parse_args()
    if INSIDE not in os.environ:
        words = [
            "unshare",
            "-r",
            "-m",
            sys.executable,
            "-m",
            "benchmarks.full_disk",
        ]
        return subprocess.run([*words, *sys.argv[1:]], env=os.environ | {INSIDE: "1"}, check=False).returncode
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    use_inputs(work / "inputs")
    scenarios = [
        scenario
        for scenario in all_scenarios(False)
        if scenario.name not in LEFT_OUT
        and (not args.only or f"{scenario.stage}/{scenario.name}" in args.only)
    ]
    if not scenarios:
        parser.error("--only names no scenario; the table of a run shows their names")
    forks.prepare()
    made = Chains(work, args.seed, sorted({scenario.base for scenario in scenarios}), scenarios)
    rows, wrong = [], 0
    for scenario in scenarios:
        chains = [chain(made, scenario, number) for number in range(args.chains)]
        faults = [fault for one in chains for fault in one["faults"]]
        rows.append({
            "stage": scenario.stage, "scenario": scenario.name, "chains": len(chains), "full": sum(c["full"] for c in chains),
            "refused": sum(c["refused"] for c in chains), "equal": sum(c["equal"] for c in chains), "faults": len(faults),
        })  # fmt: skip
        wrong += len(faults) + sum(not one["equal"] for one in chains)
        print(
            line_of(rows[-1]),
            *faults[:2],
            *(one["different"] for one in chains if not one["equal"]),
            flush=True,
        )
    total = {key: sum(row[key] for row in rows) for key in ("chains", "full", "refused", "equal", "faults")}
    print(line_of({"stage": "all", "scenario": ""} | total))
    if not args.only:
        write(args.out, "full_disk", {"rows": rows} | total, provenance())
    return int(wrong > 0)


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['stage']:<36} {row['scenario']:<20} {row['full']:4d} times full in {row['chains']:3d} runs, {row['refused']:3d} of them "
        f"before the work; {row['equal']:3d} equal, {row['faults']} faults"
    )


def chain(made: Chains, scenario: Scenario, number: int) -> dict[str, Any]:
    """One run on a disk that is full again and again, and at last is not."""
    draw = random.Random(f"{made.seed} {scenario.stage} {scenario.name} {number}")
    folder = made.work / "chain"
    run = folder / "run"
    unmount(run)
    shutil.rmtree(folder, ignore_errors=True)
    run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(run)], check=True)
    try:
        return _on_the_disk(made, scenario, draw, folder, run)
    finally:
        unmount(run)


def _on_the_disk(
    made: Chains, scenario: Scenario, draw: random.Random, folder: Path, run: Path
) -> dict[str, Any]:
    made.copy_start(scenario, run)
    begin = used(run)
    written = sum(bytes_of(made.work / "undisturbed" / scenario.base / stage) for stage in scenario.makes)
    old = kept(scenario, run)
    full = refused = 0
    faults: list[str] = []
    for _ in range(MAX_FULL):
        # Half of the attempts do not know how much room there is, so that the disk is full in the middle of the work
        knows = draw.random() < 0.5
        resize(run, max(used(run) + PAGE, begin + int(draw.uniform(0, 1.2) * written)))
        crew = scenario.crew(draw, run)
        outcome = attempt(scenario, crew, None, folder, setup=None if knows else forget_the_room)
        if outcome.fault:
            faults.append(outcome.fault)
        if FULL not in outcome.codes:
            break
        said = (folder / "log.txt").read_text(errors="replace")
        full, refused = full + 1, refused + ("of disk, but" in said)
        if "error: " not in said:
            faults.append(f"no message: {said[-500:]}")
        if kept(scenario, run) != old:
            faults.append("--overwrite lost the old outputs")
    resize(run, LARGE)
    faults += made.finish(scenario, run, draw, folder)
    found = {
        f"{stage}/{name}": digest
        for stage in scenario.makes
        for name, digest in run_bytes(run / stage).items()
    }
    different = [
        name
        for name in differences(found, made.wanted[scenario.base])
        if name.startswith(tuple(f"{s}/" for s in scenario.makes))
    ]
    different += [name for stage in scenario.makes for name in leftovers(run / stage)]
    return {
        "full": full,
        "refused": refused,
        "faults": faults,
        "equal": not different,
        "different": different,
    }


def kept(scenario: Scenario, run: Path) -> dict[str, str]:
    """The outputs that were there before, of a scenario with --overwrite."""
    if scenario.name != "--overwrite":
        return {}
    return {
        f"{stage}/{name}": digest
        for stage in scenario.makes
        for name, digest in run_bytes(run / stage).items()
    }


def forget_the_room() -> None:
    """In a fork: the disk seems to be empty to whoever asks."""
    from lib import room

    room.free_bytes = lambda folder: 10**15


def used(run: Path) -> int:
    usage = shutil.disk_usage(run)
    return usage.used


def bytes_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def resize(run: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(run)], check=True)


def unmount(run: Path) -> None:
    if run.is_mount():
        for _ in range(50):  # a process of the last attempt may still end
            if not subprocess.run(["umount", str(run)], check=False, capture_output=True).returncode:
                return
            time.sleep(0.1)
        subprocess.run(["umount", "-l", str(run)], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
