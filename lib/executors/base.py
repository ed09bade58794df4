"""What executors and works agree on, and what all kinds of workers share."""

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from lib.engine.allocator import release_free_memory
from lib.errors import ProcessLost, RemaskError

MAX_LOSSES = 5  # workers that may be lost while they make the same part
Make = Callable[[int], Any]


class Work(Protocol):
    """Makes parts. It is sent to every worker, so it has paths and settings, and neither models nor open files."""

    @property
    def uses_device(self) -> bool:
        """Whether it computes on a GPU if there is one."""
        ...

    @property
    def only_here(self) -> bool:
        """Whether its parts must be made in this process, since it cannot be sent to another one."""
        ...

    def open(self, threads: int | None) -> Make:
        """Load what all parts need. Returns a function that makes the part of a number and writes it.

        `threads`: of torch; None leaves them as they are.
        """
        ...


class Executor(Protocol):
    """Makes the parts of one work."""

    def make(self, numbers: Iterable[int]) -> Iterator[int]:
        """Make these parts, in any order. Yields each number when its part is complete.

        Raises the first error of a part, and ProcessLost if the workers of a part are lost again and again.
        """
        ...


def answer_of(make: Make, number: int) -> tuple[int, Exception | None]:
    """Make a part in a worker. Returns its number, and the error if it failed, as another process can receive it."""
    try:
        make(number)
        return number, None
    except Exception as error:
        return number, portable(error)
    finally:
        release_free_memory()


def portable(error: Exception) -> Exception:
    """The error as another process can receive it. Unless it is for a user, it has the traceback of the worker as text."""
    if isinstance(error, RemaskError):
        return error
    text = "in a worker:\n" + "".join(traceback.format_exception(error))
    if isinstance(error, OSError):  # its number decides about the message and the exit code
        error.add_note(text)
        return error
    return RuntimeError(text)


def lost(number: int | None) -> ProcessLost:
    """The error when workers are lost again and again."""
    what = "before it began" if number is None else f"while it made part {number}"
    return ProcessLost(
        f"a worker was ended from outside {MAX_LOSSES} times {what}, perhaps because memory ran out. Complete parts are kept: "
        "run the same command again, with fewer executor.workers if it happens again"
    )


def threads_of_each(workers: int) -> int:
    """Threads for each of the workers on this machine, so that together they use its cores once."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cores = min(cores, int(limit)) if limit.isdigit() and int(limit) else cores
    return max(1, cores // workers)
