"""Exponential moving average (EMA) of the weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Ema:
    """EMA of named parameters.

    Early steps use the smaller decay (1 + step) / (10 + step), so that the initial weights are forgotten quickly.

    Args:
        parameters: those that learn; `swapped` exchanges their values in place.
        decay: in [0, 1). 0 turns the EMA off, and `params` is empty.

    Attributes:
        params: name -> averaged values.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.parameters, self.decay = parameters, decay
        self.params = {n: p.detach().clone() for n, p in parameters.items()} if decay else {}

    def update(self, step: int) -> None:
        """Include the weights after optimizer step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.params.items():
            average.lerp_(self.parameters[name].detach(), 1 - decay)

    def load(self, params: dict[str, Tensor]) -> None:
        """Take the averages from a checkpoint."""
        with torch.no_grad():
            for name, value in params.items():
                self.params[name].copy_(value)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """While active, the model holds the averaged weights. For evaluating and saving."""
        if not self.params:
            yield
            return
        with torch.no_grad():
            current = {n: self.parameters[n].detach().clone() for n in self.params}
            for name, value in self.params.items():
                self.parameters[name].copy_(value)
            try:
                yield
            finally:
                for name, value in current.items():
                    self.parameters[name].copy_(value)
