"""How fast a training is, beside what the device could do: model FLOPs utilisation (MFU), peak memory, data wait.

MFU divides the FLOPs that the model needs per second by those of a large matrix product (Chowdhery et al., PaLM, 2022,
appendix B). The product is measured on the same device in the same precision. Operations that a training repeats, such as
recomputed activations, do not count.
"""

import resource
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

SIZES = {"cpu": 1024, "cuda": 8192}  # of the square matrices
REPEATS = 5
MAX_SECONDS = 1.0  # a CPU that emulates bfloat16 takes seconds for one product


@cache
def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOPs per second of a product of two large square matrices: the fastest of a few."""
    size = SIZES.get(device.type, 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        if len(seconds) > 1 and sum(seconds) > MAX_SECONDS:
            break
    return 2 * size**3 / min(seconds[1:])


def flops_per_token(model: nn.Module, length: int) -> float:
    """FLOPs of the forward and backward pass for one token in a row of `length` tokens.

    6 per trained weight of a matrix and 4 per frozen one (no gradient of the weight), and 12 x layers x hidden size x
    length for attention. An embedding counts if it is also the output layer.
    """
    config: Any = getattr(model, "config", None)
    matrices: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            matrices[id(module.weight)] = module.weight
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is not None:
        matrices[id(embeddings.weight)] = embeddings.weight
    flops = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices.values())
    layers, width = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    return flops + 12 * layers * width * length


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class SpeedMeter:
    """Adds up the steps of a training in this process.

    Attributes:
        flops_per_token: of the model.
        tokens_per_step: of the global batch.
        peak: FLOPs per second of all processes' devices together.
    """

    device: torch.device
    tokens_per_step: int
    flops_per_token: float
    peak: float
    seconds: float = 0.0  # in training steps
    data_seconds: float = 0.0  # of these, waiting for the data of a batch
    steps: int = 0
    _begin: float = field(default=0.0, repr=False)

    def begin(self) -> None:
        self._begin = time.perf_counter()

    def data_is_there(self) -> None:
        """The data of the step that began last are drawn."""
        self.data_seconds += time.perf_counter() - self._begin

    def end(self) -> None:
        self.seconds += time.perf_counter() - self._begin
        self.steps += 1

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def figures(self) -> dict[str, float]:
        """What speed.jsonl and trackers get."""
        return {
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.tokens_per_second * self.flops_per_token / self.peak,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "data_wait": self.data_seconds / self.seconds if self.seconds else 0.0,
        }

    def line(self) -> str:
        """The figures in words."""
        found = self.figures()
        return (
            f"{found['tokens_per_second']:,.0f} tokens/s; MFU {found['mfu']:.1%} of {self.peak / 1e12:.2f} TFLOP/s; peak memory "
            f"{found['peak_memory_bytes'] / 2**20:,.0f} MB; waiting for data {found['data_wait']:.1%} of the time"
        )
