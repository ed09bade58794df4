"""Linear layers in 8 bits on the CPU, for inference: a quarter of the memory.

Weights have one scale per output, inputs one scale per row (LLM.int8(), Dettmers et al. 2022, without its outliers).
The sums are of integers. So a row's result does not depend on other rows or on the number of threads. With
torch's dynamic quantisation, which has one scale per batch, it would.

It saves memory. `python -m benchmarks.speed int8` measures whether it saves time; with native bf16 it does not.
"""

import torch
from torch import nn

MAX_INT8 = 127
ROWS = 128  # at a time, so that intermediate results stay in the cache: twice as fast
MIN_SCALE = 1e-12  # of a row of zeros


class Int8Linear(nn.Module):
    """A linear layer, exact to about 1 % of its largest output. It cannot be trained."""

    weight_q: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        scale = (weight.abs().amax(1) / MAX_INT8).clamp(min=MIN_SCALE)
        # Stored by outputs and read transposed, because this product is the fastest.
        self.register_buffer("weight_q", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        rows = x.flatten(0, -2)  # (N, in)
        y = rows.new_empty(len(rows), len(self.scale), dtype=torch.float32)
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS].float()
            scale = torch.linalg.vector_norm(some, float("inf"), 1, keepdim=True) / MAX_INT8
            scale.clamp_(min=MIN_SCALE)
            whole = torch._int_mm((some / scale).round_().to(torch.int8), self.weight_q.t())  # pyright: ignore[reportPrivateImportUsage]
            part = y[start : start + ROWS].copy_(whole).mul_(scale).mul_(self.scale)
            if self.bias is not None:
                part += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def to_int8(model: nn.Module) -> nn.Module:
    """The model with all linear layers in 8 bits except the one for the logits. It is changed in place."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, Int8Linear(child))
    return model
