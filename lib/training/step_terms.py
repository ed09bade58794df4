"""Losses and gradient norms of steps, kept on the device until the program needs them.

A program that reads a number from a GPU waits until the GPU has computed it. A training on a GPU therefore reads the
numbers of many steps at once. They are summed on the CPU in the same order as one by one, so they have the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib.engine.parts import Parts
from lib.training.objectives.base import Objective, ScaledObjective

SETTLE_EVERY = 16  # steps, at most, whose numbers are read together


def may_read_later(device: torch.device, objective: Objective) -> bool:
    """Whether the losses of many steps may be read together, because the program would otherwise wait for a GPU."""
    scales = isinstance(objective, ScaledObjective) and getattr(objective, "scales", True)
    return device.type == "cuda" and not scales


@dataclass(frozen=True)
class StepNumbers:
    """What a step logs: the terms of the loss, summed over the global batch, and the norm of its gradients."""

    step: int
    terms: dict[str, float]
    norm: float


@dataclass
class UnreadSteps:
    """Steps that were computed, but whose numbers were not read."""

    device: torch.device
    steps: list[int] = field(default_factory=list)
    _names: list[list[str]] = field(default_factory=list)
    _values: list[Tensor] = field(default_factory=list)

    def add(self, step: int, parts: Sequence[Mapping[str, Tensor]], norm: Tensor) -> None:
        """Keep the terms of this process's parts of a step, and the norm of the whole gradient. Nothing waits."""
        names = list(parts[0])
        scalars = [part[name] for part in parts for name in names] + [norm]
        scalars = [scalar.detach().to(self.device, torch.float64, non_blocking=True) for scalar in scalars]
        self.steps.append(step)
        self._names.append(names)
        self._values.append(torch.stack(scalars))  # (parts x names + 1,)

    def read(self, parts: Parts) -> list[StepNumbers]:
        """The numbers of all steps since the last call; they are forgotten here. All processes call it together."""
        if not self.steps:
            return []
        found = []
        values = torch.cat(self._values).tolist()
        for step, names in zip(self.steps, self._names, strict=True):
            own = [{name: values.pop(0) for name in names} for _ in parts.own]
            found.append(StepNumbers(step, parts.sum(own), values.pop(0)))
        self.steps, self._names, self._values = [], [], []
        return found
