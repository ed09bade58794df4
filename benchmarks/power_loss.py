"""
Replay a loss of power at every write of a stage, with what a journaling file system may lose, and run the stage again.

A stage runs once while each change of a file or a name, and each fsync, is recorded. After every prefix of this record the power
is lost. What was synced is there. Of the rest, a file system with a journal may keep all, lose all, or keep names without data:

| state   | names that were not synced            | data that was not synced           |
|---------|---------------------------------------|------------------------------------|
| kept    | all are there                         | all is there                       |
| empty   | all are there                         | lost: the files are empty          |
| torn    | all are there                         | the first half is there            |
| zeros   | all are there                         | zeros in place of bytes            |
| lost    | none is there                         | lost                               |
| mixed   | each folder's first few, by chance    | each file's: all, none, or a half  |

The names of one folder appear in their order; folders are independent. The stage must complete with the bytes of an undisturbed
run, or refuse with a message that names what is damaged. It must not end with other bytes.

Equal states are tried once. So are states that differ only in files that the stage did not look into: neither opened, as the kernel
tells, nor asked for their size. A stage whose every draw depends on its seed does the same on both.

    python -m benchmarks.power_loss outputs/power_loss                # all stages and prefixes, about an hour on one core
    python -m benchmarks.power_loss outputs/power_loss --only 01_prepare_dataset --states 100
"""

import argparse
import collections
import functools
import hashlib
import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import forks
from benchmarks.faults.reads import ReadWatch
from benchmarks.faults.recorder import ROOT_ID, Recorder
from benchmarks.faults.run_bytes import differences, leftovers, run_bytes
from benchmarks.faults.scenarios import STAGES, command
from benchmarks.provenance import provenance
from benchmarks.result_files import add_out, write

KINDS = ("kept", "empty", "torn", "zeros", "lost", "mixed")
REFUSED = (65, 66, 78)
SECONDS = 120.0
BASE = "tiny"  # whose flags the runs have


@dataclass(frozen=True)
class Case:
    """A stage whose writes are replayed. `more`: flags; `begins`: the stages that are there."""

    name: str
    stage: str
    begins: tuple[str, ...]
    more: tuple[str, ...] = ()


CASES = [
    *(Case(stage, stage, STAGES[:number]) for number, stage in enumerate(STAGES)),
    Case("01_prepare_dataset --overwrite", "01_prepare_dataset", STAGES[:2], ("--overwrite",)),
    Case("04_train --overwrite", "04_train", STAGES[:5], ("--overwrite",)),
    Case("04_train --overwrite --only judge", "04_train", STAGES[:5], ("--overwrite", "--only", "judge")),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="CASE")
    parser.add_argument("--states", type=int, default=None, help="at most this many of each case, by chance")
    parser.add_argument(
        "--minutes", type=float, default=None, help="stop after this time; the same command continues"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser)
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    forks.prepare()
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    make_base(work)
    rows, complete = [], True
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        row, is_complete = replay(case, work, args.states, args.seed, end)
        rows.append(row)
        complete &= is_complete
        print(line_of(row), flush=True)
    failures = sum(row["wrong"] for row in rows)
    if complete and not args.only:
        write(
            args.out,
            "power_loss",
            {"rows": rows, "states": sum(r["states"] for r in rows), "wrong": failures},
            provenance(),
        )
    return int(failures > 0)


def make_base(work: Path) -> None:
    """The undisturbed run."""
    for stage in STAGES:
        if not (work / "base" / stage / "manifest.json").exists():
            code = forks.wait(forks.start(command(BASE, stage, work / "base").argv, work / "log.txt"), 300)
            if code:
                raise RuntimeError((work / "log.txt").read_text()[-3000:])


def replay(case: Case, work: Path, limit: int | None, seed: int, end: float) -> tuple[dict[str, Any], bool]:
    """(row of the table, whether all states were tried) of a case. Results are kept in `<work>/<case>.jsonl`."""
    name = case.name.replace(" ", "_")
    events = record(case, work, name)
    by_content = {
        state.digest_in(work / "contents"): state for state in reversed(list(states_of(events, seed)))
    }
    states = list(reversed(by_content.values()))
    if limit is not None and len(states) > limit:
        states = random.Random(seed).sample(states, limit)
    results = work / f"{name}.jsonl"
    done = Tried(work / "contents")
    if results.exists():
        for line in map(json.loads, results.read_text().splitlines()):
            done.add(line, by_content.get(line["state"]))
    wanted = run_bytes(work / "base" / case.stage)
    for number, state in enumerate(states):
        digest = state.digest_in(work / "contents")
        if digest not in done.lines and (same := done.like(state)):
            done.lines[digest] = same | {"state": digest, "run": False}
        if digest in done.lines:
            continue
        if time.monotonic() > end:
            break
        outcome = run_again(case, state, work, name, wanted)
        line = {"state": digest, "kind": state.kind, "at": state.at, "run": True} | outcome
        done.add(line, state)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if outcome["outcome"] == "wrong":
            print(
                f"{case.name}: {state.kind} after {state.at} of {len(events)}: {outcome['detail'][-900:]}",
                flush=True,
            )
        if not len(done.lines) % 50:
            print(f"{case.name}: {number + 1} of {len(states)} states", flush=True)
    found = (done.lines.get(state.digest_in(work / "contents")) for state in states)
    tried = [line for line in found if line is not None]
    counts = collections.Counter(line["outcome"] for line in tried)
    row = {
        "case": case.name, "events": sum(not event["first"] for event in events), "states": len(tried),
        "runs": sum(line["run"] for line in tried), "completed": counts["completed"], "refused": counts["refused"],
        "wrong": counts["wrong"],
    }  # fmt: skip
    return row, len(tried) == len(states)


class Tried:
    """The states of a case that were tried.

    Attributes:
        lines: digest of a state -> what came of it.
    """

    def __init__(self, contents: Path):
        self.lines: dict[str, dict[str, Any]] = {}
        self._contents = contents
        self._of_names: dict[frozenset[str], list[tuple[dict[str, str], dict[str, Any]]]] = {}

    def add(self, line: dict[str, Any], state: "State | None") -> None:
        """Note what came of a state, and what its run looked into (`reads`)."""
        self.lines[line["state"]] = line
        if state is not None:
            seen = {name: state.content_of(name, self._contents) for name in line["reads"]}
            self._of_names.setdefault(frozenset(state.files), []).append((seen, line))

    def like(self, state: "State") -> dict[str, Any] | None:
        """What came of a state with the same names, and the same contents wherever its run looked."""
        for seen, line in self._of_names.get(frozenset(state.files), []):
            if all(state.content_of(name, self._contents) == digest for name, digest in seen.items()):
                return line
        return None


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:<36} {row['events']:5d} events {row['states']:5d} states, {row['runs']:5d} runs: {row['completed']} completed, "
        f"{row['refused']} refused, {row['wrong']} wrong"
    )


def record(case: Case, work: Path, name: str) -> list[dict[str, Any]]:
    """The events of one undisturbed execution. They are recorded once."""
    log, contents = work / f"{name}.events", work / "contents"
    if not log.exists():
        contents.mkdir(exist_ok=True)
        run = _fresh(case, work)
        part = log.with_suffix(".part")
        part.unlink(missing_ok=True)
        argv = command(BASE, case.stage, run, *case.more).argv
        pid = forks.start(argv, work / "log.txt", setup=Recorder(run, part, contents).install)
        if forks.wait(pid, 300):
            raise RuntimeError((work / "log.txt").read_text()[-3000:])
        part.rename(log)
    return [json.loads(line) for line in log.read_text().splitlines()]


def _fresh(case: Case, work: Path) -> Path:
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for stage in case.begins:
        shutil.copytree(work / "base" / stage, run / stage)
    shutil.copy(work / "base" / "config.json", run / "config.json")
    return run


@dataclass(frozen=True)
class State:
    """A folder after a loss of power: path -> None for a folder, or (content that was synced, content written last, how)."""

    kind: str
    at: int
    files: dict[str, tuple[str, str, str] | None]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self.files.items(), key=str)).encode()).hexdigest()[:16]

    def content_of(self, name: str, contents: Path) -> str:
        """The hash of the bytes of a file; the empty text for a folder."""
        content = self.files[name]
        return "" if content is None else _digest(*content, contents)

    def digest_in(self, contents: Path) -> str:
        """The same for states with the same bytes."""
        found = [(name, self.content_of(name, contents)) for name in sorted(self.files)]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


Change = list[Any]  # [folder, name, id or None, whether it is a folder]


@dataclass
class Disk:
    """What a disk holds for certain, and what was done since.

    Attributes:
        synced, volatile: id -> content that was synced, and that was written last.
        durable: (folder, name) -> id, of names that were synced.
        pending: folder -> changes of its names that were not synced, in order.
        folders: ids of folders.
    """

    synced: dict[int, str] = field(default_factory=dict)
    volatile: dict[int, str] = field(default_factory=dict)
    durable: dict[tuple[int, str], int] = field(default_factory=dict)
    pending: dict[int, list[list[Change]]] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {ROOT_ID})

    def apply(self, event: dict[str, Any]) -> None:
        """Take an event. What was there before the record began is on the disk."""
        if event["is"] == "write":
            self.volatile[event["id"]] = event["content"]
            if event["first"]:
                self.synced[event["id"]] = event["content"]
        elif event["is"] == "names":
            self._names(event["changes"], event["first"])
        elif event["id"] in self.folders:
            for changes in self.pending.pop(event["id"], []):
                _take(self.durable, changes)
        else:
            self.synced[event["id"]] = self.volatile[event["id"]]

    def _names(self, changes: list[Change], first: bool) -> None:
        self.folders |= {number for _, _, number, is_folder in changes if is_folder and number is not None}
        if first:
            _take(self.durable, changes)
            return
        for folder in dict.fromkeys(change[0] for change in changes):
            self.pending.setdefault(folder, []).append([c for c in changes if c[0] == folder])

    def state(self, kind: str, at: int, draw: random.Random) -> State:
        """What is found after the power has come back."""
        names = dict(self.durable)
        for waiting in self.pending.values():
            count = {"lost": 0, "mixed": draw.randint(0, len(waiting))}.get(kind, len(waiting))
            for changes in waiting[:count]:
                _take(names, changes)
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), number in sorted(names.items()):
            inside.setdefault(folder, []).append((name, number))
        files: dict[str, tuple[str, str, str] | None] = {}
        folders = [("", ROOT_ID)]
        while folders:
            path, folder = folders.pop()
            for name, number in inside.get(folder, []):
                if number in self.folders:
                    files[path + name] = None
                    folders.append((f"{path}{name}/", number))
                else:
                    files[path + name] = self._content(number, kind, draw)
        return State(kind, at, files)

    def _content(self, number: int, kind: str, draw: random.Random) -> tuple[str, str, str]:
        old, new = self.synced.get(number, ""), self.volatile.get(number, "")
        how = draw.choice(("kept", "lost", "torn", "zeros")) if kind == "mixed" else kind
        if old == new or how == "kept":
            return new, new, "kept"
        return old, new, how if how in ("torn", "zeros") else "lost"


def _take(names: dict[tuple[int, str], int], changes: list[Change]) -> None:
    for folder, name, number, _ in changes:
        if number is None:
            names.pop((folder, name), None)
        else:
            names[folder, name] = number


def states_of(events: list[dict[str, Any]], seed: int) -> list[State]:
    """All different states after all prefixes of the events."""
    disk, found = Disk(), {}
    for at, event in enumerate(events):
        disk.apply(event)
        if event["first"]:
            continue
        for kind in KINDS:
            state = disk.state(kind, at + 1, random.Random(f"{seed} {at} {kind}"))
            found.setdefault(state.digest, state)
    return list(found.values())


def build(state: State, run: Path, contents: Path) -> None:
    """Put the files of a state into a folder."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for path, content in sorted(state.files.items()):
        if content is None:
            (run / path).mkdir(parents=True, exist_ok=True)
        else:
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            (run / path).write_bytes(bytes_of(*content, contents))


def bytes_of(old: str, new: str, how: str, contents: Path) -> bytes:
    """The bytes of a file. What was synced stays; of what was appended or replaced since, a half or zeros may be there."""
    synced, written = ((contents / digest).read_bytes() if digest else b"" for digest in (old, new))
    if how in ("kept", "lost"):
        return written if how == "kept" else synced
    kept = synced if written.startswith(synced) else b""
    rest = written[len(kept) :]
    return kept + (rest[: len(rest) // 2] if how == "torn" else bytes(len(rest)))


@functools.cache
def _digest(old: str, new: str, how: str, contents: Path) -> str:
    return hashlib.sha256(bytes_of(old, new, how, contents)).hexdigest()


def run_again(case: Case, state: State, work: Path, name: str, wanted: dict[str, str]) -> dict[str, Any]:
    """Run the stage on a state, and once more with --overwrite if it refuses. What came of it."""
    run = work / "run"
    build(state, run, work / "contents")
    files = [path for path, content in state.files.items() if content is not None]
    with ReadWatch(run, files, work / "reads.txt") as watch:
        outcome = _outcome(case, run, work / "log.txt", wanted, watch)
        return {"reads": watch.reads()} | outcome


def _outcome(case: Case, run: Path, log: Path, wanted: dict[str, str], watch: ReadWatch) -> dict[str, Any]:
    first = _start(case, run, log, case.more, watch)
    refusal = ""
    if first in REFUSED:
        refusal = log.read_text(errors="replace")[-600:]
        if "Traceback" in refusal or str(run.name) not in refusal:
            return {"outcome": "wrong", "detail": f"refused without the name of what is damaged: {refusal}"}
        more = ("--overwrite", *(w for w in case.more if w != "--overwrite"))
        first = _start(case, run, log, more, watch)
    if first:
        return {"outcome": "wrong", "detail": f"exit code {first}: {log.read_text(errors='replace')[-1500:]}"}
    reads = watch.reads()  # before the comparison reads all
    try:
        different = differences(run_bytes(run / case.stage), wanted)
    except (OSError, ValueError) as error:
        return {"outcome": "wrong", "detail": f"damaged afterwards: {error}"}
    left = leftovers(run / case.stage)
    if different or left:
        return {"outcome": "wrong", "detail": f"differs in {different[:5]}, left over {left[:5]}"}
    return {"outcome": "refused" if refusal else "completed", "detail": refusal[-200:], "reads": reads}


def _start(case: Case, run: Path, log: Path, more: tuple[str, ...], watch: ReadWatch) -> int:
    log.unlink(missing_ok=True)
    argv = command(BASE, case.stage, run, *more).argv

    def setup() -> None:
        _no_fsync()
        watch.install()

    try:
        return forks.wait(forks.start(argv, log, setup=setup), SECONDS)
    except TimeoutError:
        return -9


def _no_fsync() -> None:
    import os

    os.fsync = os.fstat


if __name__ == "__main__":
    raise SystemExit(main())
