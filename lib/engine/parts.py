"""The parts of a global batch: which rows they have, which process computes them, and sums over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import add

import numpy as np
from torch import Tensor

from lib.engine.gradients import pairwise_sum
from lib.engine.processes import Processes
from lib.errors import BadConfig


@dataclass(frozen=True)
class Part:
    """Rows of a global batch that are one forward and backward pass. Their data is drawn, their loss is not computed.

    Attributes:
        weights: what the loss is divided by, summed over these rows: a number of tokens, rows, ... The same names in
            every part of a batch.
        losses: totals -> named scalars, the part's shares of the batch's. `totals` are the `weights` summed over all
            parts. The one called `loss` is minimised; all are logged.
    """

    weights: dict[str, float]
    losses: Callable[[Mapping[str, float]], dict[str, Tensor]]


class Parts:
    """The division of every step's rows into `count` equal parts, and of the parts among the processes.

    Args:
        batch_size: rows of the global batch.
        name: of the settings, such as `models.judge.training`, for messages.

    Raises BadConfig if the rows cannot be divided into the parts, or the parts among the processes.
    """

    def __init__(self, count: int, batch_size: int, processes: Processes, name: str):
        check_parts(count, batch_size, processes, name)
        self.count, self.batch_size, self.processes = count, batch_size, processes
        self.own = processes.run_of(count)  # the numbers of this process's parts

    def rows(self, step: int, part: int) -> range:
        """The global rows of a part of a step."""
        size = self.batch_size // self.count
        first = step * self.batch_size + part * size
        return range(first, first + size)

    def sum(self, values: list[dict[str, float]]) -> dict[str, float]:
        """Numbers of this process's parts, summed over the parts of all processes.

        The order of the sum does not depend on the number of processes. All parts have the same names.
        """
        names = list(values[0])
        own = np.array([[part[name] for name in names] for part in values], np.float64)  # (parts, names)
        every = self.processes.all_gather(own.reshape(-1)).reshape(self.count, len(names))
        return dict(zip(names, pairwise_sum(every, add).tolist(), strict=True))


def check_parts(parts: int, batch_size: int, processes: Processes, name: str) -> None:
    """Raises BadConfig if a batch cannot be divided into the parts, or the parts among the processes.

    `name` is the setting's, such as `models.judge.training`.
    """
    if batch_size % parts:
        near = sorted(
            (n for n in range(1, batch_size + 1) if batch_size % n == 0), key=lambda n: abs(n - parts)
        )
        raise BadConfig(
            f"{name}: batch_size {batch_size} cannot be divided into {parts} equal parts; set parts to "
            f"{' or '.join(str(n) for n in sorted(near[:2]))}, or change batch_size"
        )
    good = good_sizes(parts)
    if processes.size not in good:
        below = max(n for n in good if n < processes.size)
        raise BadConfig(
            f"{name}: {processes.size} processes cannot divide {parts} parts so that sums are the same as in one process; "
            f"start {below} processes (possible: {', '.join(map(str, good))}), or set parts to "
            f"{' or '.join(str(processes.size * n) for n in (1, 2))} for {processes.size} processes"
        )


def good_sizes(parts: int) -> list[int]:
    """The numbers of processes among which `parts` can be divided: each gets a power of two of them, or one gets all."""
    powers = {2**n for n in range(parts.bit_length())}
    return [n for n in range(1, parts + 1) if n == 1 or (parts % n == 0 and parts // n in powers)]
