"""Start the processes of one attempt, disturb one of them, and say what came of it."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import forks, points
from benchmarks.faults.scenarios import Command, Crew, Scenario

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
WEIGHTS = (6, 2, 2, 1)
GRACE_SECONDS = 1.0  # from the SIGTERM of a launcher to its SIGKILL
STOPPED_SECONDS = (0.1, 0.6)
SECONDS_BETWEEN_CONTS = 2.0
PAUSE_SECONDS = 30.0
ENDED_BY_SIGNAL = {signal.SIGTERM: (143, -signal.SIGTERM), signal.SIGINT: (130, -signal.SIGINT)}
REFUSED = (2, 65, 66, 73, 74, 75, 76, 78, 130, 143)  # exit codes that are documented, apart from 0 and 1


@dataclass(frozen=True)
class Disturbance:
    """A signal to one process of a crew: at the n-th point (`point` = n) of a kind, or after `seconds`.

    `kind`: such as `rename before`; empty for points of all kinds.
    """

    number: int  # of the signal
    victim: int
    point: int | None = None
    kind: str = ""
    seconds: float = 0.0


@dataclass
class Outcome:
    """What an attempt did.

    Attributes:
        landed: where the signal hit: `rename before`, or `at 0.53 s`; empty if the process had ended before.
        codes: exit codes of the processes; negative for signals.
        fault: what should not have happened; empty if all was well.
    """

    signal: str = ""
    landed: str = ""
    codes: tuple[int, ...] = ()
    fault: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


def draw_disturbance(
    draw: random.Random, crew: Crew, num_points: dict[str, int], seconds: float
) -> Disturbance:
    """A random one. `num_points`: how many of each kind an undisturbed command passes.

    Most come early, since an attempt continues an earlier one and has less to do, and commands beside each other share the work."""
    number = int(draw.choices(SIGNALS, WEIGHTS)[0])
    victim, share = draw.randrange(len(crew)), draw.choice((0.1, 0.25, 0.5, 1.0))
    if crew[victim].size == 1:
        share /= len(crew)
    if draw.random() < 0.6 and crew[victim].rank == 0:  # the other processes of a launcher write nothing
        kind = draw.choice(sorted(num_points))
        return Disturbance(number, victim, draw.randrange(max(1, int(num_points[kind] * share))), kind)
    return Disturbance(number, victim, seconds=draw.uniform(0.02, 1.0) * share * seconds)


def attempt(
    scenario: Scenario,
    crew: Crew,
    disturbance: Disturbance | None,
    work: Path,
    second: Command | None = None,
    setup: Callable[[], None] | None = None,
) -> Outcome:
    """Start a crew, disturb it, and wait for its end.

    Args:
        work: a folder for the log and the note of the point that was hit.
        second: started while a process is stopped; it must be refused or find the stage complete.
        setup: called in each process before its script.
    """
    log, note = work / "log.txt", work / "point.txt"
    log.unlink(missing_ok=True)
    note.unlink(missing_ok=True)
    port, pids, begin = _free_port(), [], time.monotonic()
    for place, one in enumerate(crew):
        armed = _armed(disturbance if disturbance and disturbance.victim == place else None, note, setup)
        pids.append(forks.start(one.argv, log, env=_environment(one, port), setup=armed))
    watch = _Watch(scenario, crew, pids, disturbance, note, begin)
    try:
        outcome = watch.until_all_ended(second, work)
    finally:
        for pid in pids:
            if not scenario.orphans or disturbance is None or disturbance.number != signal.SIGKILL:
                forks.end_session(pid)
    text = log.read_text(errors="replace") if log.exists() else ""
    if "Traceback (most recent call last)" in text and not outcome.fault:
        outcome.fault = "a traceback"
    if outcome.fault:
        outcome.fault += ": " + text[-1500:]
    return outcome


class _Watch:
    def __init__(
        self,
        scenario: Scenario,
        crew: Crew,
        pids: list[int],
        disturbance: Disturbance | None,
        note: Path,
        begin: float,
    ):
        self.scenario, self.crew, self.pids, self.disturbance, self.note = (
            scenario,
            crew,
            pids,
            disturbance,
            note,
        )
        self.begin, self.deadline = begin, begin + scenario.seconds
        self.codes: dict[int, int] = {}
        self.sent = False
        self.kill_at: float | None = None  # when a launcher kills what is left
        self.let_go_at: float | None = None  # when what was stopped gets its next SIGCONT
        self.looked_at = begin
        self.outcome = Outcome()

    def until_all_ended(self, second: Command | None, work: Path) -> Outcome:
        if self.disturbance is not None:
            self.outcome.signal = signal.Signals(self.disturbance.number).name
        while len(self.codes) < len(self.pids):
            self._forgive_pauses()
            self._look()
            if self._is_due():
                self._disturb(second, work)
            self._end_the_others()
            if (
                self.let_go_at is not None
                and time.monotonic() > self.let_go_at
                and len(self.codes) < len(self.pids)
            ):
                self._let_go_on()
            if time.monotonic() > self.deadline:
                self._end_all(f"stuck: no end within {self.scenario.seconds:.0f} s")
            time.sleep(forks.SECONDS_BETWEEN_LOOKS)
        if self.disturbance is not None and self.disturbance.point is not None and self.note.exists():
            self.outcome.landed = self.note.read_text().strip()
        self.outcome.codes = tuple(self.codes[pid] for pid in self.pids)
        self._judge()
        return self.outcome

    def _forgive_pauses(self) -> None:
        """If this process was stopped itself, as all others were, nobody has more time than before."""
        now = time.monotonic()
        if now - self.looked_at > PAUSE_SECONDS:
            self.deadline += now - self.looked_at
        self.looked_at = now

    def _look(self) -> None:
        for pid in set(self.pids) - set(self.codes):
            ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if ended and not os.WIFSTOPPED(status):
                self.codes[pid] = os.waitstatus_to_exitcode(status)

    def _is_due(self) -> bool:
        d = self.disturbance
        if d is None or self.sent:
            return False
        if d.point is not None:  # the process sends the signal to itself
            self.sent = d.number != signal.SIGSTOP and self.note.exists()
            return d.number == signal.SIGSTOP and self.note.exists()
        return time.monotonic() - self.begin > d.seconds

    def _disturb(self, second: Command | None, work: Path) -> None:
        assert self.disturbance is not None
        self.sent = True
        d, victim = self.disturbance, self.pids[self.disturbance.victim]
        targets = [victim, *forks.session_of(victim)[1:]]
        target = targets[int(d.seconds * 1e6) % len(targets)] if d.number == signal.SIGKILL else victim
        if d.point is None:
            if victim in self.codes or not forks.send(target, d.number):
                return
            who = "" if target == victim else " (a worker)"
            self.outcome.landed = f"at {time.monotonic() - self.begin:.2f} s{who}"
        if d.number == signal.SIGSTOP:
            self._while_stopped(second, work)
            self._let_go_on()

    def _let_go_on(self) -> None:
        """Continue what is stopped; of a pipeline, a script has stopped itself. A slow process stops itself only after that."""
        assert self.disturbance is not None
        victim = self.pids[self.disturbance.victim]
        for pid in {victim, *forks.session_of(victim)}:
            forks.send(pid, signal.SIGCONT)
        self.let_go_at = time.monotonic() + SECONDS_BETWEEN_CONTS

    def _while_stopped(self, second: Command | None, work: Path) -> None:
        """A second command on the same stage is refused while the first one is stopped; it waits for nothing."""
        time.sleep(STOPPED_SECONDS[0])
        if second is None:
            time.sleep(STOPPED_SECONDS[1] - STOPPED_SECONDS[0])
            return
        try:
            code = forks.wait(forks.start(second.argv, work / "second.txt"), 20)
        except TimeoutError:
            self.outcome.fault = "a second command was stuck while the first one was stopped"
            return
        if code not in (0, 75):
            said = (work / "second.txt").read_text(errors="replace")[-800:]
            self.outcome.fault = f"a second command ended with {code} while the first one was stopped: {said}"

    def _end_the_others(self) -> None:
        """As torchrun does: when one process has failed, the others get SIGTERM, and later SIGKILL."""
        if self.crew[0].size == 1 and self.scenario.name != "from a stream":
            return
        left = set(self.pids) - set(self.codes)
        if self.kill_at is None and any(self.codes.values()):
            self.kill_at = time.monotonic() + GRACE_SECONDS
            for pid in left:
                forks.send(pid, signal.SIGTERM)
        if self.kill_at is not None and time.monotonic() > self.kill_at:
            for pid in left:
                forks.send(pid, signal.SIGKILL)

    def _end_all(self, fault: str) -> None:
        self.outcome.fault = fault
        for pid in set(self.pids) - set(self.codes):
            forks.end_session(pid)
            forks.send(pid, signal.SIGKILL)
        self.deadline = float("inf")

    def _judge(self) -> None:
        """Whether the exit codes are those that the signal should give."""
        d = self.disturbance
        for place, code in enumerate(self.outcome.codes):
            fine = {0, *REFUSED}
            if self.kill_at is not None or (d is not None and place == d.victim):
                fine |= {-signal.SIGTERM, -signal.SIGKILL, 137, *([-d.number] if d is not None else [])}
            if code not in fine and not self.outcome.fault:
                self.outcome.fault = f"exit codes {self.outcome.codes}"
        if d is not None and self.outcome.landed and d.number in ENDED_BY_SIGNAL:
            code = self.outcome.codes[d.victim]
            if code not in (0, 75, *ENDED_BY_SIGNAL[signal.Signals(d.number)]) and not self.outcome.fault:
                self.outcome.fault = f"exit code {code} after {self.outcome.signal}"


def count_points(argv: tuple[str, ...], work: Path) -> dict[str, int]:
    """How many points of each kind an undisturbed command passes. It runs."""
    file = work / "count.txt"

    def setup() -> None:
        _no_fsync()
        found: dict[str, int] = {}

        def reached(kind: str, when: str, path: str) -> None:
            name = f"{kind} {when}"
            found[name] = found.get(name, 0) + 1
            with _QuietFile(file) as descriptor:
                os.write(descriptor, json.dumps(found).encode())

        points.install(reached)

    code = forks.wait(forks.start(argv, work / "count_log.txt", setup=setup), 300)
    if code:
        raise RuntimeError((work / "count_log.txt").read_text()[-3000:])
    return json.loads(file.read_text())


class _QuietFile:
    """A file that is opened without a point of its own."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> int:
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def _armed(
    disturbance: Disturbance | None, note: Path, before: Callable[[], None] | None = None
) -> Callable[[], None]:
    """What a fork does before its script: it counts points, and sends the signal to itself at the chosen one."""

    def setup() -> None:
        _no_fsync()
        if before is not None:
            before()
        if disturbance is None or disturbance.point is None:
            return
        chosen, left = disturbance, [disturbance.point]

        def reached(kind: str, when: str, path: str) -> None:
            left[0] -= chosen.kind in ("", f"{kind} {when}")
            if left[0] == -1:
                left[0] -= 1
                with _QuietFile(note) as descriptor:
                    os.write(descriptor, f"{kind} {when}".encode())
                os.kill(os.getpid(), chosen.number)

        points.install(reached)

    return setup


def _no_fsync() -> None:
    """A killed process loses nothing that it wrote, so that files need not reach the disk here."""
    os.fsync = os.fstat


def _environment(command: Command, port: int) -> dict[str, str]:
    if command.size == 1:
        return {}
    return {
        "RANK": str(command.rank), "LOCAL_RANK": str(command.rank), "WORLD_SIZE": str(command.size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
