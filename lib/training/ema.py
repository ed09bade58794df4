"""Exponential moving average (EMA) of the weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Ema:
    """EMA of named parameters.

    Early steps use the smaller decay (1 + step) / (10 + step), so that the initial weights are forgotten quickly.

    Args:
        parameters: those that learn; `swapped` exchanges their values in place.
        decay: in [0, 1). 0 turns the EMA off, and `params` is empty.

    Attributes:
        params: name -> averaged values, in float32 at least: in bfloat16 an average would ignore small changes.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.parameters, self.decay = parameters, decay
        self.params = {n: _exact(p).clone() for n, p in parameters.items()} if decay else {}

    def update(self, step: int) -> None:
        """Include the weights after optimizer step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.params.items():
            average.lerp_(_exact(self.parameters[name]), 1 - decay)

    def load(self, params: Mapping[str, Tensor]) -> None:
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


def _exact(parameter: Tensor) -> Tensor:
    """The values of a parameter, in float32 at least."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
