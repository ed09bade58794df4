"""Muon (Jordan et al., 2024) for many small matrices, and NorMuon (Li et al., 2025), whose updates have rows of equal size."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr

BETA2 = 0.95  # decay of the second moment
EPS = 1e-8
MAX_STACKED = 2**23  # elements of the matrices that are orthogonalised together


class Muon(torch.optim.Muon):
    """torch's Muon, which orthogonalises many matrices at once, in a precision of choice.

    Args:
        dtype: of the orthogonalisation. torch uses bfloat16. Where the hardware lacks it, float32 is about twenty times faster.
        settings: those of torch's Muon.

    State of a parameter (M, N): `momentum_buffer` (M, N).
    """

    def __init__(self, params: Any, *, dtype: torch.dtype = torch.bfloat16, **settings: Any):
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of all parameters that have a gradient."""
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            iteration = group["ns_coefficients"], group["ns_steps"], group["eps"], self.dtype
            for params in _stacks(p for p in group["params"] if p.grad is not None):
                updates = orthogonalised([self._momentum(p, group) for p in params], *iteration)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
                    p.add_(self._scaled(p, update.to(p.dtype)), alpha=-rate)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov momentum."""
        state, grad = self.state[p], p.grad
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _scaled(self, p: Tensor, update: Tensor) -> Tensor:
        return update


class NorMuon(Muon):
    """Muon with a second moment for each row of a matrix.

    Newton-Schulz makes all singular values of an update about equal. Its rows still differ in size, and some neurons
    would learn faster than others. Here each row is divided by the root of the moving average of its squares. Then the whole
    update gets its norm back, so learning rates are those of Muon.

    A row holds the weights of one output in `nn.Linear`, and of one input in GPT-2's transposed `Conv1D`.

    State of a parameter (M, N): `momentum_buffer` (M, N) and `row_moment` (M, 1).
    """

    def _scaled(self, p: Tensor, update: Tensor) -> Tensor:
        state = self.state[p]
        if "row_moment" not in state:
            state["row_moment"] = p.new_zeros(p.shape[0], 1)
        moment = state["row_moment"].lerp_(update.square().mean(1, keepdim=True), 1 - BETA2)
        equal = update * moment.add(EPS).rsqrt()
        return equal.mul_(update.norm() / equal.norm().add(EPS))


def _stacks(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in groups whose matrices have one shape, up to transposition, and fit into the limit together."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for p in params:
        by_shape[tuple(sorted(p.shape))].append(p)
    for (short, long), same in by_shape.items():
        size = max(1, MAX_STACKED // (short * long))
        for start in range(0, len(same), size):
            yield same[start : start + size]


def orthogonalised(
    matrices: list[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Each matrix with all singular values about 1, in `dtype`: the quintic Newton-Schulz iteration of Muon.

    It is that of torch.optim.Muon, for all matrices at once: the products of one small matrix leave a processor half idle.

    Args:
        matrices: all (M, N) or (N, M).
    """
    a, b, c = coefficients
    flat = torch.stack(
        [(m.T if m.shape[0] > m.shape[1] else m).to(dtype) for m in matrices]
    )  # (G, M, N), M <= N
    flat /= flat.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # the largest singular value is at most 1
    for _ in range(steps):
        gram = torch.bmm(flat, flat.transpose(1, 2))  # (G, M, M)
        flat = torch.baddbmm(flat, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), flat, beta=a)
    return [x.T if m.shape[0] > m.shape[1] else x for m, x in zip(matrices, flat, strict=True)]
