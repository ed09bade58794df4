"""Works whose workers are killed by SIGKILL, at points that are drawn for each part: between and inside of its files."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lib.stage.parts import Parts

POINTS = 6  # calls of fsync and rename among which one is drawn; a part of one table has that many
CALLS = ("fsync", "replace")


@contextmanager
def killed(number: int, folder: Path, times: int) -> Iterator[None]:
    """While the block makes part `number`, this process may be killed, up to `times` times for each part.

    The files of `folder` count the kills of each part.
    """
    kill = len(list(folder.glob(f"{number}_*")))
    left = [random.Random(f"{number} {kill}").randrange(POINTS)]
    real = {name: getattr(os, name) for name in CALLS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if not left[0]:
                (folder / f"{number}_{kill}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real[name](*arguments)

        return call

    if kill < times:
        for name in CALLS:
            setattr(os, name, counted(name))
    try:
        yield
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


@dataclass(frozen=True)
class KilledWork:
    """Another work, whose workers are killed up to `times` times in every n-th part.

    Attributes:
        kills: a folder that counts them.
    """

    work: Any
    kills: Path
    times: int = 2
    every: int = 1

    @property
    def uses_device(self) -> bool:
        return self.work.uses_device

    @property
    def only_here(self) -> bool:
        return self.work.only_here

    def open(self, threads: int | None) -> Callable[[int], None]:
        make = self.work.open(threads)

        def make_or_die(number: int) -> None:
            with killed(number, self.kills, 0 if number % self.every else self.times):
                make(number)

        return make_or_die


@dataclass(frozen=True)
class NumbersWork:
    """Part n has the rows 10 n to 10 n + 9 of a small table.

    Attributes:
        fails: the part that raises `error`.
    """

    parts: Parts
    fails: int = -1
    error: type[Exception] = ValueError

    uses_device = False
    only_here = False

    def open(self, threads: int | None) -> Callable[[int], None]:
        return self._make

    def _make(self, number: int) -> None:
        if number == self.fails:
            raise self.error(f"part {number} is wrong")
        with self.parts.writing(number) as part:
            part.write("rewards", numbers(10 * number, 10))
            part.counters = {"rows": 10}


@dataclass(frozen=True)
class AlwaysKilled:
    """Every worker is killed in part 1."""

    parts: Parts

    uses_device = False
    only_here = False

    def open(self, threads: int | None) -> Callable[[int], None]:
        def make(number: int) -> None:
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            NumbersWork(self.parts).open(None)(number)

        return make


def numbers(start: int, count: int) -> pa.Table:
    """A table of schema.REWARDS."""
    return pa.table(
        {
            "example_id": [f"e{i}" for i in range(start, start + count)],
            "candidate_id": pa.array([0] * count, pa.int32()),
            "reward": [i % 7 / 7 for i in range(start, start + count)],
            "rank": pa.array([1] * count, pa.int32()),
            "best": [True] * count,
            "tied": [False] * count,
        }
    )


def run_killed(name: str, config: Any, args: Any, kills: Path, times: int = 2, every: int = 1) -> None:
    """Run a stage in this process, in which a worker is killed. In the local executor that is this process."""
    import importlib

    from lib.stage import making

    real = making.open_executor
    making.open_executor = lambda settings, work: real(settings, KilledWork(work, kills, times, every))
    try:
        importlib.import_module(name).main(config, args)
    finally:
        making.open_executor = real
