"""
Kill every stage, started in every supported manner, and compare every byte of what comes out with an undisturbed run.

A chain is one run that is disturbed several times and then ends in peace. Each disturbance is a real signal to a real process:
SIGKILL, SIGTERM, SIGINT, or SIGSTOP followed by SIGCONT. It comes at a random time, or at a random point: before or after a write,
fsync, rename, manifest, removal, link or lock (benchmarks/faults/points.py). The next attempt continues, with the same or another
number of processes. While a process is stopped, a second command tries the same stage. A chain is equal if all bytes of its
outputs are those of an undisturbed run and nothing unfinished is left.

Results go to WORK/chains.jsonl, one line per chain; the same command continues. All draws depend on the seed alone.

    python -m benchmarks.kills outputs/kills                      # 1,000 kills, more than an hour on one core
    python -m benchmarks.kills outputs/kills --kills 40 --only "04_train/torchrun"
"""

import argparse
import collections
import importlib.util
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.faults import forks
from benchmarks.faults.disturb import attempt, count_points, draw_disturbance
from benchmarks.faults.run_bytes import differences, leftovers, run_bytes
from benchmarks.faults.scenarios import (
    FILE_FLAGS,
    STAGES,
    Command,
    Scenario,
    all_scenarios,
    command,
    file_stage,
    of_file,
    use_inputs,
)
from benchmarks.provenance import provenance
from benchmarks.result_files import add_out, write
from lib import code_version, durable

KILLS_PER_CHAIN = 6
WAITS_FOR_ORPHANS = 30
MAX_ATTEMPTS = 14  # of a chain; an attempt that ends before its signal comes is not a kill
SLOW_SCENARIOS = {
    "executor processes",
    "executor ray",
    "make pipeline",
    "from a stream",
}  # they get a third of the kills of the others, as do
SLOW_STAGE = "02_generate_candidates (finqa)"  # all scenarios of this stage
CHAINS = "chains.jsonl"
BASES_FOLDER = "undisturbed"  # as deep as chains: manifests have a user's model relative to the run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="the folder of the undisturbed runs and of the results")
    parser.add_argument(
        "--kills", type=int, default=1000, help="kills over all scenarios; all scenarios get about as many"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="STAGE/SCENARIO",
        help="only this scenario; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=None, help="stop after this time; the same command continues"
    )
    add_out(parser)
    args = parser.parse_args()
    use_inputs(args.work / "inputs")
    scenarios = [
        scenario
        for scenario in all_scenarios(importlib.util.find_spec("ray") is not None)
        if not args.only or f"{scenario.stage}/{scenario.name}" in args.only
    ]
    if not scenarios:
        parser.error("--only names no scenario; the table of a run shows their names")
    forks.prepare()
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    args.work.mkdir(parents=True, exist_ok=True)
    made = Chains(
        args.work.absolute(), args.seed, sorted({scenario.base for scenario in scenarios}), scenarios
    )
    complete = made.run(scenarios, args.kills, end)
    chains = made.chains()
    print(table(scenarios, chains))
    bad = [chain for chain in chains if not chain["equal"] or chain["faults"]]
    for chain in bad:
        print(
            f"{chain['stage']}/{chain['scenario']} chain {chain['number']}: {chain['different'][:4]} {chain['faults']}"
        )
    if complete:
        write(args.out, "kills", figures(scenarios, chains), provenance())
    return 1 if bad else 0


class Chains:
    """The undisturbed runs, and the chains that were made so far.

    Attributes:
        work: their folder.
        points, seconds: (base, stage) -> what an undisturbed command passes and takes.
    """

    def __init__(self, work: Path, seed: int, bases: list[str], scenarios: list[Scenario]):
        self.work, self.seed = work, seed
        self.points: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, float] = {}
        self.wanted: dict[str, dict[str, str]] = {}
        for base in bases:
            self._make(base, [scenario for scenario in scenarios if scenario.base == base])

    def chains(self) -> list[dict[str, Any]]:
        file = self.work / CHAINS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def run(self, scenarios: list[Scenario], kills: int, end: float) -> bool:
        """Make chains until there are enough kills. False if the time is over before."""
        while True:
            done: collections.Counter[tuple[str, str]] = collections.Counter()
            numbers: collections.Counter[tuple[str, str]] = collections.Counter()
            for chain in self.chains():
                done[chain["stage"], chain["scenario"]] += len(chain["kills"])
                numbers[chain["stage"], chain["scenario"]] += 1
            if sum(done[w.stage, w.name] for w in scenarios) >= kills:
                return True
            if time.monotonic() > end:
                return False
            scenario = min(
                scenarios,
                key=lambda w: (
                    done[w.stage, w.name] * (3 if w.name in SLOW_SCENARIOS or w.stage == SLOW_STAGE else 1)
                ),
            )
            chain = self.chain(scenario, numbers[scenario.stage, scenario.name])
            with open(self.work / CHAINS, "a", encoding="utf-8") as file:
                file.write(json.dumps(chain) + "\n")
            total = sum(done.values()) + len(chain["kills"])
            state = (
                "equal"
                if chain["equal"] and not chain["faults"]
                else f"DIFFERENT {chain['different'][:3]} {chain['faults']}"
            )
            print(
                f"{total:5d} kills  {scenario.stage}/{scenario.name}: {len(chain['kills'])} in {chain['seconds']:.1f} s, {state}",
                flush=True,
            )

    def chain(self, scenario: Scenario, number: int) -> dict[str, Any]:
        """One run that is disturbed until it has had its kills or is complete, and then continued to its end."""
        draw = random.Random(f"{self.seed} {scenario.stage} {scenario.name} {number}")
        folder, begin = self.work / "chain", time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run = folder / "run"
        self.copy_start(scenario, run)
        kills: list[dict[str, Any]] = []
        faults: list[str] = []
        for _ in range(MAX_ATTEMPTS):
            crew = scenario.crew(draw, run)
            disturbance = draw_disturbance(
                draw, crew, self.points[_key(scenario)], self.seconds[_key(scenario)]
            )
            second = crew[0] if crew[0].size == 1 and len(crew) == 1 else None
            outcome = attempt(scenario, crew, disturbance, folder, second)
            if outcome.fault:
                faults.append(outcome.fault)
            if outcome.landed:
                kills.append(outcome.record())
            elif not any(outcome.codes):
                break
            if len(kills) == KILLS_PER_CHAIN:
                break
        faults += self.finish(scenario, run, draw, folder)
        try:
            different = differences(self._bytes(run, scenario), self.wanted[scenario.base])
        except (OSError, ValueError) as error:
            different = [f"{stage}/ {error}" for stage in scenario.makes]
        different = [
            name for name in different if name.startswith(tuple(f"{stage}/" for stage in scenario.makes))
        ]
        left = [name for stage in scenario.makes for name in leftovers(run / stage)]
        left += [p.name for p in run.iterdir() if p.suffix in (".tmp", ".new", ".old")]
        if different or left or faults:
            kept = (
                self.work
                / "kept"
                / f"{scenario.stage}_{scenario.name}_{number}".replace(" ", "_").replace("/", "_")
            )
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            shutil.copytree(folder, kept)
        return {
            "stage": scenario.stage, "scenario": scenario.name, "number": number, "seconds": round(time.monotonic() - begin, 1),
            "kills": kills, "equal": not different and not left, "different": different + left, "faults": faults,
        }  # fmt: skip

    def finish(self, scenario: Scenario, run: Path, draw: random.Random, folder: Path) -> list[str]:
        """Run the scenario once more without a disturbance, and whatever completes it. Returns what went wrong."""
        crews = [scenario.crew(draw, run), *([one] for one in scenario.last(run))]
        faults = []
        for crew in crews:
            for _ in range(WAITS_FOR_ORPHANS):
                outcome = attempt(scenario, crew, None, folder)
                if 75 not in outcome.codes:
                    break
                time.sleep(1)  # what a killed process left behind is still at work
            if outcome.fault or any(outcome.codes):
                said = (folder / "log.txt").read_text(errors="replace")[-1500:]
                faults.append(f"the last attempt: {outcome.fault} {outcome.codes} {said}")
        return faults

    def _bytes(self, run: Path, scenario: Scenario) -> dict[str, str]:
        return {
            f"{stage}/{name}": digest
            for stage in scenario.makes
            for name, digest in run_bytes(run / stage).items()
        }

    def copy_start(self, scenario: Scenario, run: Path) -> None:
        """A run with the stages that are there at the start of the scenario."""
        run.mkdir(exist_ok=True)
        for stage in scenario.begins:
            shutil.copytree(self.work / BASES_FOLDER / scenario.base / stage, run / stage)
        if scenario.begins:
            shutil.copy(self.work / BASES_FOLDER / scenario.base / "config.json", run / "config.json")

    def _make(self, base: str, scenarios: list[Scenario]) -> None:
        """The undisturbed run of a base, with the number of points and the seconds of each of its stages."""
        run, note = self.work / BASES_FOLDER / base, self.work / f"{base}.json"
        code = code_version.digest(
            {
                f"{stage} {file}": sha
                for stage in STAGES
                for file, sha in code_version.code_files(stage, "text").items()
            }
        )
        if not note.exists() or json.loads(note.read_text()).pop("code", None) != code:
            shutil.rmtree(run, ignore_errors=True)
            figures: dict[str, Any] = {}
            for stage, words in undisturbed(base, run):
                begin = time.monotonic()
                if base == "stream" and stage == "04_train":
                    self._stream(run)
                    figures[stage] = {
                        "points": figures["03_build_rewards"]["points"],
                        "seconds": time.monotonic() - begin,
                    }
                    break
                points = count_points(words.argv, self.work)
                figures[stage] = {"points": points, "seconds": time.monotonic() - begin}
                print(
                    f"undisturbed {base} {stage}: {sum(points.values())} points, {figures[stage]['seconds']:.1f} s",
                    flush=True,
                )
            durable.write_json(note, figures | {"code": code})
        found = {name: figure for name, figure in json.loads(note.read_text()).items() if name != "code"}
        for stage, figure in found.items():
            self.points[f"{base} {stage}"], self.seconds[f"{base} {stage}"] = (
                figure["points"],
                figure["seconds"],
            )
        self.points[f"{base} all"] = max(
            (figure["points"] for figure in found.values()), key=lambda counts: sum(counts.values())
        )
        self.seconds[f"{base} all"] = sum(figure["seconds"] for figure in found.values())
        self.wanted[base] = {
            f"{stage}/{name}": digest for stage in found for name, digest in run_bytes(run / stage).items()
        }

    def _stream(self, run: Path) -> None:
        """Stage 04 beside the stage that makes its shards."""
        scenario = next(scenario for scenario in all_scenarios(False) if scenario.name == "from a stream")
        outcome = attempt(scenario, scenario.crew(random.Random(0), run), None, self.work)
        if any(outcome.codes):
            raise RuntimeError((self.work / "log.txt").read_text()[-3000:])


def undisturbed(base: str, run: Path) -> list[tuple[str, Command]]:
    """(folder that it makes, command) of all that makes the undisturbed run of a base."""
    of_files = [
        (file_stage(flag, name), of_file(base, flag, name, run)) for flag, name in FILE_FLAGS.get(base, ())
    ]
    return [*((stage, command(base, stage, run)) for stage in STAGES), *of_files]


def _key(scenario: Scenario) -> str:
    return f"{scenario.base} {scenario.makes[0] if len(scenario.makes) == 1 else 'all'}"


def figures(scenarios: list[Scenario], chains: list[dict[str, Any]]) -> dict[str, Any]:
    """What the results page shows."""
    rows = []
    for scenario in scenarios:
        own = [c for c in chains if (c["stage"], c["scenario"]) == (scenario.stage, scenario.name)]
        kills = [kill for chain in own for kill in chain["kills"]]
        rows.append(
            {
                "stage": scenario.stage,
                "scenario": scenario.name,
                "kills": len(kills),
                "chains": len(own),
                "equal": sum(len(c["kills"]) for c in own if c["equal"]),
                "faults": sum(len(c["faults"]) for c in own),
            }
        )
    kills = [kill for chain in chains for kill in chain["kills"]]
    landed = collections.Counter(
        kill["landed"] if not kill["landed"].startswith("at ") else "random time" for kill in kills
    )
    return {
        "rows": rows,
        "kills": len(kills),
        "equal": sum(len(c["kills"]) for c in chains if c["equal"]),
        "faults": sum(len(c["faults"]) for c in chains),
        "signals": dict(collections.Counter(kill["signal"] for kill in kills)),
        "landed": dict(sorted(landed.items())),
    }


def table(scenarios: list[Scenario], chains: list[dict[str, Any]]) -> str:
    """The table for the screen."""
    found = figures(scenarios, chains)
    lines = [f"{'stage':<34} {'scenario':<20} {'kills':>6} {'equal':>6} {'faults':>7}"]
    lines += [
        f"{row['stage']:<34} {row['scenario']:<20} {row['kills']:6d} {row['equal']:6d} {row['faults']:7d}"
        for row in found["rows"]
    ]
    lines += [f"{'all':<34} {'':<20} {found['kills']:6d} {found['equal']:6d}", f"signals: {found['signals']}"]
    lines += [f"points: {found['landed']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
