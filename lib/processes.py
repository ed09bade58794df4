"""Work in several processes: the results come in the order of the items, whatever the number of processes.

The items are read one after the other while others are being worked on, so memory does not grow with their number.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from lib.errors import RemaskError

Item = TypeVar("Item")
MAX_PENDING = 2  # items per process that are being worked on or wait for their turn; it limits memory


def map_in_order(
    work: Callable[[Any], Any],
    items: Iterable[Item],
    processes: int,
    argument: Callable[[Item], Any] = lambda item: item,
    begin: tuple[Callable[..., None], tuple] | None = None,
) -> Iterator[tuple[Item, Any]]:
    """Yield (item, work(argument(item))) for every item, in order.

    Args:
        work: a function of a module of lib, since each process imports it.
        argument: what of an item is sent to a process; a function of this process.
        begin: a function of lib and its arguments, called first in every process.

    Raises:
        RemaskError: a process was ended from outside. An error of `work` is raised as it is.
    """
    first, arguments = begin or (None, ())
    with ProcessPoolExecutor(processes, get_context("spawn"), first, arguments) as pool:
        waiting: deque[tuple[Item, Future]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, argument(item))))
                if len(waiting) >= MAX_PENDING * processes:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise RemaskError(
                f"one of {processes} worker processes was ended from outside, perhaps because memory ran out; run the "
                "same command again, with fewer processes if it happens again"
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()
