"""The time of a training step, measured inside of a training."""

import time
from typing import Any


class StepClock:
    """When the steps of a training began. The first ones do not count: they compile code and fill caches."""

    FIRST = 3

    def __init__(self) -> None:
        self.begins: list[float] = []

    @classmethod
    def of(cls, objective: Any) -> "StepClock":
        """A clock that notes when the objective draws the data of a step, in a training of one process."""
        clock, part = cls(), objective.part

        def noted(model: Any, step: int, rows: range) -> Any:
            if step == len(clock.begins):  # the first part of a step
                clock.step_begins()
            return part(model, step, rows)

        objective.part = noted
        return clock

    def step_begins(self) -> None:
        self.begins.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """Mean of the steps that count. Raises ValueError if no such step has ended."""
        counted = len(self.begins) - 1 - self.FIRST
        if counted < 1:
            raise ValueError(f"{len(self.begins)} steps are too few; at least {self.FIRST + 2} are needed")
        return (self.begins[-1] - self.begins[self.FIRST]) / counted
