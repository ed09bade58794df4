"""
Give hostile and broken files to every command that reads files, and see that each is refused without harm.

A case passes if the command ends within ten seconds and one gigabyte, with one message and a documented exit code. It must not
write outside its run, open a secret file beside the run, run code or another program, unpickle anything, or ask the network.
Terminal escapes of a file must not reach the terminal.

    python -m benchmarks.hostile outputs/hostile                      # all cases, some minutes
    python -m benchmarks.hostile outputs/hostile --only safetensors
"""

import argparse
import collections
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import forks, guard
from benchmarks.faults.corpus import Case, Place
from benchmarks.faults.corpus_models import make_bert, model_cases
from benchmarks.faults.corpus_runs import run_cases
from benchmarks.faults.corpus_tables import finqa_cases, label_cases, parquet_cases
from benchmarks.faults.corpus_text import config_cases, text_cases
from benchmarks.faults.disturb import Disturbance, attempt
from benchmarks.faults.scenarios import STAGES, Command, Scenario, command
from benchmarks.provenance import provenance
from benchmarks.result_files import add_out, write

SECONDS, MEGABYTES = 10.0, 1024
SECRET = "the text of the secret file"


@dataclass
class Result:
    """What a command did with a hostile file."""

    case: Case
    code: int
    seconds: float
    megabytes: float
    message: str
    harms: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What is wrong with it; empty if the file was refused as it should be."""
        found = list(self.harms)
        if self.code not in self.case.codes:
            found.append(f"exit code {self.code}, expected {' or '.join(map(str, self.case.codes))}")
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.1f} s")
        if self.megabytes > MEGABYTES:
            found.append(f"{self.megabytes:.0f} MB")
        if self.code and self.message.count("error: ") < 1:
            found.append("no message")
        if "Traceback" in self.message:
            found.append("a traceback")
        return found


def all_cases() -> list[Case]:
    return [
        *config_cases(), *text_cases(), *parquet_cases(), *label_cases(), *finqa_cases(), *model_cases(), *run_cases()
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="a folder for the runs that are damaged")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose group and name contain this text")
    parser.add_argument("--verbose", action="store_true", help="show the message of every case")
    add_out(parser)
    args = parser.parse_args()
    work = args.work.absolute()
    forks.prepare()
    make_bases(work)
    results = []
    for case in all_cases():
        if args.only and args.only not in f"{case.group}: {case.name}":
            continue
        result = run_case(case, work)
        results.append(result)
        if result.problems or args.verbose:
            print(f"{case.group}: {case.name}: {'; '.join(result.problems) or 'refused'}", flush=True)
            print(
                "    " + result.message.strip()[-(3000 if args.verbose else 600) :].replace("\n", "\n    "),
                flush=True,
            )
    print(summary(results))
    if not args.only:
        write(args.out, "hostile", figures(results), provenance())
    return int(any(result.problems for result in results))


def make_bases(work: Path) -> None:
    """Complete runs of both tasks, a stopped training, and a masked LM of transformers."""
    work.mkdir(parents=True, exist_ok=True)
    for base, stages in {"text": STAGES[:6], "finqa": STAGES[:1]}.items():
        for stage in stages:
            if not (work / base / stage / "manifest.json").exists():
                code = forks.wait(forks.start(command(base, stage, work / base).argv, work / "log.txt"), 300)
                if code:
                    raise RuntimeError((work / "log.txt").read_text()[-3000:])
    if not (work / "bert").exists():
        make_bert(work / "bert")
    if not (work / "stopped").exists():
        shutil.copytree(work / "text", work / "stopped.tmp", ignore=shutil.ignore_patterns("0[4-6]*"))
        _stop_after_a_checkpoint(work)
        (work / "stopped.tmp").rename(work / "stopped")


def _stop_after_a_checkpoint(work: Path) -> None:
    """The training of `ar_baseline`, ended as soon as it has a checkpoint."""
    run = work / "stopped.tmp"
    train = command("text", "04_train", run, "--only", "ar_baseline")
    scenario = Scenario("04_train", "one process", "text", (), lambda draw, run: [train], ())
    for point in range(40, 4000, 5):
        shutil.rmtree(run / "04_train", ignore_errors=True)
        attempt(scenario, [Command(train.argv)], Disturbance(signal.SIGKILL, 0, point=point), work)
        if (run / "04_train" / "ar_baseline" / "checkpoint" / "hashes.json").exists():
            return
    raise RuntimeError("the training has no checkpoint")


def run_case(case: Case, work: Path) -> Result:
    """Make the files of a case, run its command, and see what it does."""
    folder = work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    place = Place(folder / "files", folder / "run", work, folder / "secret" / "secret.txt", folder / "canary")
    place.folder.mkdir(parents=True)
    place.secret.parent.mkdir()
    place.secret.write_text(SECRET)
    argv = _made(case, place)
    notes, log = folder / "notes.txt", folder / "log.txt"
    before = _contents(folder)
    secret = guard.SecretWatch(place.secret.parent)
    begin = time.monotonic()
    pid = forks.start(argv, log, setup=lambda: _guarded(place, notes))
    code, megabytes = _wait(pid)
    seconds = time.monotonic() - begin
    harms = sorted(set(notes.read_text().splitlines())) if notes.exists() else []
    if place.canary.exists():
        harms.append("code of the file ran")
    if secret.was_opened():
        harms.append("the secret was opened")
    harms += [f"changed {name}" for name in sorted(before ^ _contents(folder))]
    data = log.read_bytes() if log.exists() else b""
    if re.search(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", data):
        harms.append("control characters reached the terminal")
    if SECRET.encode() in data:
        harms.append("the secret was shown")
    return Result(case, code, seconds, megabytes, data.decode(errors="replace"), harms)


def _made(case: Case, place: Place) -> list[str]:
    """The command of a case, after its files were made in a process of its own, whose memory is given back."""
    note = place.folder.parent / "command.json"
    pid = os.fork()
    if not pid:
        try:
            note.write_text(json.dumps(case.make(place)), encoding="utf-8", errors="surrogateescape")
            os._exit(0)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{case.group}: {case.name} cannot be made")
    return json.loads(note.read_text(encoding="utf-8", errors="surrogateescape"))


def _guarded(place: Place, notes: Path) -> None:
    os.fsync = os.fstat  # nothing here has to outlive a loss of power
    guard.watch(
        notes, [place.run, place.folder / "out", Path(os.environ.get("TMPDIR", "/tmp"))], place.folder
    )
    os.environ["HF_HUB_OFFLINE"] = "0"  # a request would be seen
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _contents(folder: Path) -> set[str]:
    """All names outside of the run."""
    found = set()
    for name in ("files", "secret"):
        for root, folders, files in os.walk(folder / name):
            found |= {os.fsencode(os.path.join(root, n)).decode("latin1") for n in (*folders, *files)}
    return found


def _wait(pid: int) -> tuple[int, float]:
    """(exit code, megabytes that it held at most). A command that takes far too long or too much is ended."""
    deadline, peak = time.monotonic() + 1.5 * SECONDS, 0.0
    while True:
        peak = max(peak, _peak_megabytes(pid))
        ended, status, _ = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), peak
        if time.monotonic() > deadline or peak > 3 * MEGABYTES:
            forks.end_session(pid)
            forks.send(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL, peak
        time.sleep(0.01)


def _peak_megabytes(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def figures(results: list[Result]) -> dict[str, Any]:
    rows = []
    for group in dict.fromkeys(result.case.group for result in results):
        own = [result for result in results if result.case.group == group]
        rows.append({
            "group": group, "cases": len(own), "refused": sum(not r.problems for r in own if r.code),
            "harmless": sum(not r.problems for r in own if not r.code),
            "seconds": max(r.seconds for r in own), "megabytes": max(r.megabytes for r in own),
        })  # fmt: skip
    return {
        "rows": rows,
        "cases": len(results),
        "refused": sum(not r.problems for r in results if r.code),
        "failures": sum(bool(r.problems) for r in results),
        "codes": dict(collections.Counter(str(r.code) for r in results)),
    }


def summary(results: list[Result]) -> str:
    found = figures(results)
    lines = [f"{'files':<32} {'cases':>6} {'refused':>8} {'harmless':>9} {'longest':>9} {'most memory':>12}"]
    lines += [
        f"{row['group']:<32} {row['cases']:6d} {row['refused']:8d} {row['harmless']:9d} {row['seconds']:7.1f} s "
        f"{row['megabytes']:9.0f} MB"
        for row in found["rows"]
    ]
    lines.append(f"{found['cases']} cases, {found['refused']} refused, {found['failures']} failures")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
