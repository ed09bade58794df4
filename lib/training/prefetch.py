"""The data of the next step is drawn in a thread while the device computes the current one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

from lib.training.objectives.base import Objective, StatefulObjective

Data = TypeVar("Data")


def may_draw_ahead(device: torch.device, objective: Objective) -> bool:
    """Whether a thread draws the data of the next step. On the CPU it would take time from the model.

    Data may depend on the state of an objective, and an evaluation between two steps may change it.
    """
    changes = isinstance(objective, StatefulObjective)
    return device.type == "cuda" and getattr(objective, "draws_ahead", False) and not changes


class Prefetcher(Generic[Data]):
    """Calls `draw(step)` for consecutive steps, one step ahead of its reader and in the order of the steps.

    What `draw` raises is raised by the `take` of the same step. Leaving the context waits for the thread to end.

    Args:
        draw: step -> its data. It is called in one thread only, but beside everything else, so the data must depend on
            nothing that a step changes.
        first, end: the first step, and the one after the last.
    """

    def __init__(self, draw: Callable[[int], Data], first: int, end: int):
        self._draw, self._end = draw, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._step = first
        self._next: Future[Data] | None = self._submit(first)

    def __enter__(self) -> "Prefetcher[Data]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> Data:
        """The data of a step. Steps must be taken in order. Raises what `draw` has raised for it."""
        assert step == self._step and self._next is not None, f"step {step} is not the next one"
        data = self._next.result()
        self._step += 1
        self._next = self._submit(self._step)
        return data

    def _submit(self, step: int) -> "Future[Data] | None":
        return self._thread.submit(self._draw, step) if step < self._end else None
