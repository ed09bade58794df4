"""NorMuon (Li et al., 2025): Muon whose updates have rows of equal size."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

BETA2 = 0.95  # decay of the second moment
EPS = 1e-8


class NorMuon(torch.optim.Muon):
    """Muon with a second moment for each row of a matrix.

    Newton-Schulz makes all singular values of an update about equal. Its rows still differ in size, and some neurons
    would learn faster than others. Here each row is divided by the root of the moving average of its squares. Then the whole
    update gets its norm back, so learning rates are those of Muon.

    A row holds the weights of one output in `nn.Linear`, and of one input in GPT-2's transposed `Conv1D`.

    State of a parameter (M, N): `momentum_buffer` (M, N) and `row_moment` (M, 1).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of all parameters that have a gradient."""
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[p], p.grad
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
            state["row_moment"] = p.new_zeros(p.shape[0], 1)
        # 1. Nesterov momentum, orthogonalised: as in Muon
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        mixed = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = _zeropower_via_newtonschulz(mixed, group["ns_coefficients"], group["ns_steps"], group["eps"])
        update = update.to(p.dtype)
        # 2. Rows of equal size, and the norm of before
        moment = state["row_moment"].lerp_(update.square().mean(1, keepdim=True), 1 - BETA2)
        equal = update * moment.add(EPS).rsqrt()
        equal *= update.norm() / equal.norm().add(EPS)
        # 3. Weight decay and the update
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(equal, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape))
