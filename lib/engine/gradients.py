"""Gradients of the parts of a global batch, added in an order that does not depend on the number of processes.

The global batch is divided into `parts` equal parts. A part is one forward and backward pass. Floating-point sums
depend on their order, so the gradients are added in a fixed binary tree over the parts: neighbours first, then
neighbouring pairs, and so on. A process computes a run of consecutive parts. If the length of a run is a power of two,
its sum is a node of the tree, and the processes add these nodes in the same tree. So one process and many give the
same bits, for the same number of parts.

The exchange between processes is a reduce-scatter and an all-gather: each process sends and receives
2 (W - 1) / W of the gradient's bytes per step, for W processes. An all-reduce of the library would add in an order that
depends on W.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lib.engine.processes import ALL_GATHER, Processes, exchange

Node = TypeVar("Node")
_TORCH: Any = torch  # operations on lists of tensors have no type stubs
Gradients = list[Tensor | None]  # None: the parameter took no part in the loss


class PairwiseSum(Generic[Node]):
    """The sum of nodes that arrive one by one, in a fixed binary tree.

    It is held as the sums of complete subtrees, whose sizes are different powers of two. So N nodes need the memory of
    1 + log2(N) nodes.
    """

    def __init__(self, add: Callable[[Node, Node], Node]):
        self._add = add
        self._subtrees: list[tuple[int, Node]] = []  # (number of nodes, their sum), from left to right

    def push(self, node: Node) -> None:
        size = 1
        while self._subtrees and self._subtrees[-1][0] == size:
            node = self._add(self._subtrees.pop()[1], node)
            size *= 2
        self._subtrees.append((size, node))

    def total(self) -> Node:
        """The sum of all nodes. The incomplete subtrees on the right are added first."""
        assert self._subtrees, "there is nothing to add"
        node = self._subtrees.pop()[1]
        while self._subtrees:
            node = self._add(self._subtrees.pop()[1], node)
        return node


def pairwise_sum(nodes: Iterable[Node], add: Callable[[Node, Node], Node]) -> Node:
    """The sum of at least one node, in the tree of `PairwiseSum`."""
    found: PairwiseSum[Node] = PairwiseSum(add)
    for node in nodes:
        found.push(node)
    return found.total()


class GradientSum:
    """Adds the gradients of this process's parts, and then those of all processes.

    After `reduce`, `grad` of each parameter is the sum over the whole global batch. It stays None if the parameter took
    part in no loss. With one part in all, gradients stay where autograd put them.

    Args:
        parameters: in the same order in every process.
        parts: of the global batch, in all processes together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], parts: int, processes: Processes):
        self.parameters = list(parameters)
        self.parts, self.processes = parts, processes
        self._sum: PairwiseSum[Gradients] = PairwiseSum(_add)

    def push(self) -> None:
        """Take the gradients of a part, after its backward pass."""
        if self.parts == 1:
            return
        self._sum.push([p.grad for p in self.parameters])
        for p in self.parameters:
            p.grad = None

    def reduce(self, factor: float = 1.0) -> None:
        """Add the parts of this process, then those of all processes. `grad` of a parameter becomes `factor` x the sum."""
        if self.parts > 1:
            total = self._sum.total()
            if self.processes.size > 1:
                total = _across(total, self.parameters, self.processes)
            for p, gradient in zip(self.parameters, total, strict=True):
                p.grad = gradient
        if factor != 1.0:
            _TORCH._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)


def _add(left: Gradients, right: Gradients) -> Gradients:
    """left + right, into the memory of `left`."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        _TORCH._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


def _across(own: Gradients, parameters: list[nn.Parameter], processes: Processes) -> Gradients:
    """The sum of all processes' gradients, the same bits in each of them."""
    # 1. Parameters that have a gradient in some process. In the others theirs is 0, which changes no sum
    own_flags = np.array([g is not None for g in own], np.float64)
    present: list[bool] = [bool(flag) for flag in processes.all_gather(own_flags).max(0)]
    kept = [
        torch.zeros_like(p) if g is None else g
        for g, p, some in zip(own, parameters, present, strict=True)
        if some
    ]
    # 2. One flat tensor per type, since gradients are exchanged in equal pieces
    summed: dict[int, Tensor] = {}
    for dtype in sorted({g.dtype for g in kept}, key=str):
        of_type = [g for g in kept if g.dtype == dtype]
        flat = _sum_flat(torch.cat([g.reshape(-1) for g in of_type]), processes.size)
        pieces = flat.split([g.numel() for g in of_type])
        summed |= {id(g): piece.view_as(g) for g, piece in zip(of_type, pieces, strict=True)}
    result = iter(kept)
    return [summed[id(next(result))] if some else None for some in present]


def _sum_flat(own: Tensor, size: int) -> Tensor:
    """(N,) sum over the processes: process r adds the r-th piece of all, then each gets every piece."""
    count = len(own)
    padded = nn.functional.pad(own, (0, -count % size))
    received = torch.empty_like(padded)  # (size, N / size): everyone's part of this process's piece
    exchange("all_to_all_single", received, padded)
    piece = pairwise_sum(received.view(size, -1).unbind(), torch.Tensor.add_)
    found = torch.empty_like(padded)
    exchange(ALL_GATHER, found, piece.contiguous())
    return found[:count]
