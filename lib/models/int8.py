"""Linear layers in 8 bits on the CPU, for models that only read: a quarter of the bytes.

Weights have a scale per output, inputs one per row, found as they come (LLM.int8(), Dettmers et al. 2022, without its
outliers). torch's own dynamic quantisation has one scale for the whole batch, with which the result of a row would
depend on the rows beside it; here the sums are whole numbers, so that it depends on nothing else, not even on threads.

It saves memory. Whether it saves time is for `python -m benchmarks.speed int8` to say: where bf16 is native it does not.
"""

import torch
from torch import nn

LARGEST = 127
ROWS = 128  # at a time: what is in between stays in the cache, which is worth a factor of two
SMALLEST_SCALE = 1e-12  # of a row of zeros


class Int8Linear(nn.Module):
    """What a linear layer computes, to about 1 % of its largest output; cannot be trained."""

    weight_q: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        scale = (weight.abs().amax(1) / LARGEST).clamp(min=SMALLEST_SCALE)
        # Stored by outputs and read as its transpose, the order in which the product is fastest.
        self.register_buffer("weight_q", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        rows = x.flatten(0, -2)  # (N, in)
        y = rows.new_empty(len(rows), len(self.scale), dtype=torch.float32)
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS].float()
            scale = torch.linalg.vector_norm(some, float("inf"), 1, keepdim=True) / LARGEST
            scale.clamp_(min=SMALLEST_SCALE)
            whole = torch._int_mm((some / scale).round_().to(torch.int8), self.weight_q.t())  # pyright: ignore[reportPrivateImportUsage]
            part = y[start : start + ROWS].copy_(whole).mul_(scale).mul_(self.scale)
            if self.bias is not None:
                part += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def to_int8(model: nn.Module) -> nn.Module:
    """The model, changed in place: every linear layer of it in 8 bits but the one that makes the logits."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, Int8Linear(child))
    return model
