"""Cross-entropy per row, without a float32 copy of the logits.

`F.cross_entropy(logits.float(), ...)` writes three float32 tensors of the logits' size: a copy, its log-softmax and its
gradient. With a vocabulary of thousands this costs more than the matrix product that made the logits. The function here
casts a slice of rows at a time, stores one number per row, and recomputes the slices in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS_IN_CACHE = 2**18  # logits per slice: 1 MB in float32


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) cross-entropies in nats of integer targets (N,) under logits (N, V).

    Equal to `F.cross_entropy(logits.float(), targets, reduction="none")` up to rounding. Computed in float32 or better;
    the gradient has the dtype of the logits. A target outside the vocabulary raises torch's IndexError.
    """
    if logits.device.type != "cpu":  # one large kernel is faster there
        return F.cross_entropy(logits.float(), targets, reduction="none")
    return _CrossEntropies.apply(logits, targets)  # pyright: ignore[reportReturnType]


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        log_sums = logits.new_empty(len(logits), dtype=exact)
        for rows in _slices(logits):
            torch.logsumexp(logits[rows].to(exact), -1, out=log_sums[rows])
        ctx.save_for_backward(logits, targets, log_sums)
        return log_sums - logits.gather(1, targets[:, None]).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sums = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        minus_one = log_sums.new_full((len(logits), 1), -1.0)
        for rows in _slices(logits):
            part = torch.sub(logits[rows], log_sums[rows, None]).exp_()  # softmax, in the dtype of log_sums
            part.scatter_add_(1, targets[rows, None], minus_one[rows])
            grad_logits[rows] = part.mul_(grads[0][rows, None])
        return grad_logits, None


def _slices(logits: Tensor) -> list[slice]:
    step = max(1, ELEMENTS_IN_CACHE // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]
