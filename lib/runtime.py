"""Where and how the arithmetic runs: device, precision, threads. Found out once, recorded in the manifest.

On a GPU every kernel is a deterministic one, as the promise of equal bits needs: torch refuses an operation that has none.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Every new number of masked tokens is a new shape, and oneDNN keeps what it compiled for the last 1,024 of them: more
# than a gigabyte in a long run. Fewer cost no measurable time. Both are read when the first product runs.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

# cuBLAS gives the same bits each time with a work space of fixed size only, and reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from lib.config import Config
from lib.errors import BadConfig
from lib.runs import versions

FIXED_WORKSPACES = (":4096:8", ":16:8")  # of CUBLAS_WORKSPACE_CONFIG


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    precision: str  # fp32 | bf16
    code: Mapping[str, str] = field(default_factory=dict, compare=False)  # of the stage: see lib.code_version

    @classmethod
    def detect(cls, config: Config, code: Mapping[str, str] | None = None) -> "Runtime":
        """Resolve `device: auto` and `precision: auto`. Raises BadConfig for what this machine has not got."""
        cuda = torch.cuda.is_available()
        if config.device == "cuda" and not cuda:
            raise BadConfig("device is cuda, but torch sees no CUDA device here; set device: cpu or auto")
        device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
        native = _has_native_bf16(device)
        precision = config.precision if config.precision != "auto" else "bf16" if native else "fp32"
        torch.set_flush_denormal(True)  # denormals are 40 times slower and mean nothing here
        if device.type == "cuda":
            _make_deterministic()
        return cls(device, precision, code or {})

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in bf16 where that is on; weights, sums and losses stay in fp32."""
        if self.precision == "bf16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run to give the same bits, beside the code."""
        device = str(self.device)
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            device = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        return versions() | {
            "torch": torch.__version__,
            "device": device,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
        }


def _make_deterministic() -> None:
    """Only kernels that give the same bits each time. Raises BadConfig where the environment rules that out."""
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if workspace not in FIXED_WORKSPACES:
        raise BadConfig(
            f"the environment sets CUBLAS_WORKSPACE_CONFIG={workspace}, with which a GPU does not give the same bits twice; "
            f"unset it, or set it to {' or '.join(FIXED_WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False  # it would choose kernels by their speed of the moment


def _has_native_bf16(device: torch.device) -> bool:
    """bf16 in hardware. Emulated bf16 is more than twice as slow as fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
