"""The parts are made in this process, one after the other."""

from collections.abc import Iterable, Iterator

from lib.engine.allocator import release_free_memory
from lib.executors.base import Make, Work


class LocalExecutor:
    """Makes parts in this process. What all parts need is loaded when the first part is made."""

    def __init__(self, work: Work):
        self._work = work
        self._make: Make | None = None

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *_) -> None:
        self._make = None

    def make(self, numbers: Iterable[int]) -> Iterator[int]:
        for number in numbers:
            self._make = self._make or self._work.open(None)
            self._make(number)
            release_free_memory()
            yield number
