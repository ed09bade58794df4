"""
What this machine has, and what of a run is complete, damaged, continuable or being made now, with the command to continue.

Nothing is changed: a run can be examined while stages work on it, and in a folder that can only be read.

python -m lib.doctor                  the machine, and the newest run in outputs/
python -m lib.doctor outputs/demo     the machine, and this run
python -m lib.doctor --fast           sizes of outputs are compared, not their hashes
"""

import argparse
import fcntl
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import durable, runs
from lib.errors import RemaskError
from lib.log import printable_line
from lib.machine import examine_machine
from lib.stage.outputs import check_sizes
from lib.stage.parts import file_name
from lib.stage.unfinished import MARKER

DROPPED = (
    "--overwrite",
    "--resume",
    "--stream",
)  # flags of a recorded command that do not belong to the next stage
DROPPED_WITH_VALUE = ("--part", "--mode", "--only", "--score", "--rank", "--out_dir", "--run_dir")
HEARTBEAT_SECONDS = 5.0  # between lines about long hashing


@dataclass(frozen=True)
class State:
    """The state of a stage or of a model.

    Attributes:
        name: such as `04_train` or `04_train/judge`.
        word: complete, unfinished, damaged, absent, or busy: another process is at work on it.
        detail: what is known of it, or what is wrong.
    """

    name: str
    word: str
    detail: str = ""

    def line(self) -> str:
        return f"  {self.name:<34} {self.word:<11} {self.detail}".rstrip()


def examine_run(run: Path, hashes: bool = True) -> list[State]:
    """The states of all stages of a run, of the models of stage 04, and of scored and ranked files.

    `hashes`: compare the hashes of all outputs with the manifests; otherwise only their sizes.
    """
    states = []
    for name in (*runs.STAGES, *runs.stages_of_files(run)):
        units = [_state(run, f"{name}/{unit}", hashes) for unit in _units_of(run / name)]
        whole = _state(run, name, hashes and not units)
        if any(unit.word == "busy" for unit in units):
            whole = _busy(name)
        states += [*units, whole]
    return states


def next_command(run: Path, states: list[State]) -> str:
    """The command that continues the run, with the flags that made its stages; empty if all stages are complete.

    What is damaged comes first: its stage is made again.
    """
    stages = {state.name: state for state in states if state.name in runs.STAGES}
    damaged = next((state for state in states if state.word == "damaged"), None)
    if damaged is not None and not damaged.name.startswith((runs.SCORE, runs.RANK)):
        stage, _, unit = damaged.name.partition("/")
        return _command(run, stage, ["--overwrite", *(["--only", unit] if unit else [])])
    for name in runs.STAGES:
        if stages[name].word != "complete":
            return "" if stages[name].word == "busy" else _command(run, name, [])
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="?", type=Path, help="the run's folder; default: the newest one in outputs/"
    )
    parser.add_argument("--fast", action="store_true", help="compare sizes, not hashes")
    args = parser.parse_args()
    found = runs.existing_runs(runs.OUTPUTS)
    run = args.run or (found[-1] if found else None)
    if args.run is not None and not args.run.is_dir():
        print(printable_line(f"{args.run} is no folder of a run"), file=sys.stderr)
        return 66
    findings = examine_machine(run or runs.OUTPUTS.parent)
    print("machine")
    _print([finding.line() for finding in findings])
    faults = sum(finding.is_fault for finding in findings)
    if run is None:
        print("no run in outputs/; `make pipeline` starts one")
        return 65 if faults else 0
    print(printable_line(f"run {runs.display_path(run)}"))
    states = examine_run(run, hashes=not args.fast)
    _print([state.line() for state in states])
    if command := next_command(run, states):
        print(printable_line(f"continue with: {command}"))
    return 65 if faults or any(state.word == "damaged" for state in states) else 0


def _print(lines: list[str]) -> None:
    for line in lines:
        print(printable_line(line))


def _units_of(folder: Path) -> list[str]:
    """The models in the folder of stage 04, complete or begun; of other stages none."""
    if folder.name != "04_train" or not folder.is_dir():
        return []
    names = ("manifest.json", MARKER)
    return sorted(p.name for p in folder.iterdir() if not p.suffix and any((p / n).exists() for n in names))


def _state(run: Path, name: str, hashes: bool) -> State:
    folder = run / name
    if _is_locked(run, name, fcntl.LOCK_SH):
        return _busy(name)
    try:
        manifest = runs.load_manifest(folder)
        if manifest is None:
            # Commands with --part, and those that train models, share the lock of the stage with each other
            return _busy(name) if _is_locked(run, name, fcntl.LOCK_EX) else _unfinished(run, name)
        if changed := _changed_unit(folder, manifest.get("units", {})):
            return State(name, "unfinished", changed)
        if problem := _damage(folder, manifest, hashes):
            return State(name, "damaged", problem)
    except RemaskError as error:
        return State(name, "damaged", str(error))
    except OSError as error:
        return State(name, "damaged", f"{folder} cannot be read: {error.strerror}")
    facts = [f"{manifest.get('seconds', 0):.1f} s", f"{_megabytes(manifest):.1f} MB"]
    rows = [f"{n} {o['rows']:,} rows" for n, o in manifest["outputs"].items() if "rows" in o]
    if durable.beside(folder, durable.NEW).exists():
        facts.append(f"--overwrite is unfinished in {name}{durable.NEW}")
    return State(name, "complete", ", ".join([*facts, *rows]))


def _busy(name: str) -> State:
    return State(name, "busy", "another process is at work on it")


def _unfinished(run: Path, name: str) -> State:
    folder = run / name
    places = (folder, durable.beside(folder, durable.NEW), durable.beside(folder, durable.OLD))
    if not any(place.exists() for place in places):
        return State(name, "absent")
    if places[2].exists() and not folder.exists():
        return State(name, "unfinished", "a replacement was interrupted; the next command ends it")
    begun = (folder / MARKER).exists() or _units_of(folder)
    if not begun and any(folder.glob("*")):
        return State(name, "damaged", f"files, but neither manifest.json nor {MARKER}")
    return State(name, "unfinished", _progress(folder))


def _progress(folder: Path) -> str:
    """What of an unfinished stage is there already."""
    parts = len(list((folder / "parts").glob("part_*.json"))) if (folder / "parts").is_dir() else 0
    found = [f"{parts} parts are complete"] if parts else []
    for state in sorted(folder.glob("**/checkpoint/state.json")):
        try:
            step = durable.read_json(state).get("step")
        except (OSError, ValueError, AttributeError, RecursionError):
            step = None
        found.append(f"checkpoint of step {step} in {state.parent.relative_to(folder)}")
    return "; ".join(found) or "nothing is complete yet"


def _damage(folder: Path, manifest: Mapping[str, Any], hashes: bool) -> str:
    """The first output that is missing or differs from its manifest; empty if all are as they should be."""
    if "units" in manifest:
        return ""  # it describes its units, each of which has a state of its own
    check_sizes(folder, dict(manifest))
    if not hashes:
        return ""
    for path, sha256 in _with_progress(_files(folder, manifest), folder.name):
        if durable.sha256(path) != sha256:
            return f"{path} was changed: its sha256 is not the one in manifest.json"
    return ""


def _changed_unit(folder: Path, units: Mapping[str, str]) -> str:
    """The first unit that was made after the manifest of its stage; empty if there is none."""
    for name, sha256 in units.items():
        path = folder / name / "manifest.json"
        if not path.exists() or durable.sha256_file(path) != sha256:
            return f"{path} is not the one that the manifest of the stage lists; the next command updates it"
    return ""


def _files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    for record in manifest["outputs"].values():
        path = folder / record["path"]
        if "parts" in record:
            yield from ((path / file_name(n), part["sha256"]) for n, part in enumerate(record["parts"]))
        else:
            yield path, record["sha256"]


def _with_progress(files: Iterator[tuple[Path, str]], name: str) -> Iterator[tuple[Path, str]]:
    last = time.monotonic()
    for path, sha256 in files:
        if time.monotonic() - last > HEARTBEAT_SECONDS:
            last = time.monotonic()
            print(printable_line(f"  {name}: comparing {path.name}"), file=sys.stderr, flush=True)
        yield path, sha256


def _megabytes(manifest: Mapping[str, Any]) -> float:
    return sum(record.get("bytes", 0) for record in manifest["outputs"].values()) / 1e6


def _is_locked(run: Path, name: str, kind: int) -> bool:
    """Whether another process forbids a lock of this kind on a stage or model. The lock is tried, and given up at once.

    LOCK_SH: the other one makes it, alone. LOCK_EX: it makes it, perhaps with others, or reads it.
    """
    file = run / ".locks" / name.replace("/", "--")
    try:
        with open(file, encoding="utf-8") as handle:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _command(run: Path, stage: str, more: list[str]) -> str:
    """The command of a stage with --config, --quick_test and --set as the stages before it were made."""
    where = runs.display_path(run)
    words = ["python", f"{stage}.py", *_flags(run, stage), "--run_dir", where, *more]
    return shlex.join(words)


def _flags(run: Path, stage: str) -> list[str]:
    """The flags of the newest recorded command of this stage or of one before it; none if there is no record."""
    earlier = runs.STAGES[: runs.STAGES.index(stage) + 1]
    for name in reversed(earlier):
        folders = [run / name, *(run / name / unit for unit in _units_of(run / name))]
        for folder in folders:
            try:
                manifest = runs.load_manifest(folder)
            except RemaskError:
                continue
            if manifest is not None and isinstance(manifest.get("command"), list):
                return _kept(manifest["command"][1:])
    return []


def _kept(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in DROPPED_WITH_VALUE:
            skip = True
        elif word not in DROPPED and not word.startswith(tuple(f"{f}=" for f in DROPPED_WITH_VALUE)):
            kept.append(word)
    return kept


if __name__ == "__main__":
    raise SystemExit(main())
