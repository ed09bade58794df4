"""Device, precision and threads: detected once per stage and recorded in the manifest.

On a GPU only deterministic kernels are used. torch raises an error for an operation that has none.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Each number of masked tokens is a new shape, and oneDNN caches compiled kernels for the last 1,024 shapes: more than
# a gigabyte in a long run. A smaller cache costs no measurable time. Both variables are read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

# cuBLAS is deterministic only with a workspace of fixed size. It reads this variable when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from lib.config import Config
from lib.engine.processes import Processes, current
from lib.errors import BadConfig
from lib.runs import versions

FIXED_WORKSPACES = (":4096:8", ":16:8")  # of CUBLAS_WORKSPACE_CONFIG


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    precision: str  # fp32 | bf16
    code: Mapping[str, str] = field(default_factory=dict, compare=False)  # hashes; see lib.code_version
    processes: Processes = field(default_factory=Processes, compare=False)  # that train together

    @classmethod
    def detect(cls, config: Config, code: Mapping[str, str] | None = None) -> "Runtime":
        """Resolve `device: auto` and `precision: auto`, and choose the GPU of this process.

        Raises BadConfig for a device that this machine does not have.
        """
        cuda = torch.cuda.is_available()
        if config.device == "cuda" and not cuda:
            raise BadConfig("device is cuda, but torch sees no CUDA device here; set device: cpu or auto")
        processes = current()
        device = (
            torch.device("cuda", processes.local_rank)
            if cuda and config.device != "cpu"
            else torch.device("cpu")
        )
        if device.type == "cuda":
            _choose_gpu(processes)
        native = has_native_bf16(device)
        precision = config.precision if config.precision != "auto" else "bf16" if native else "fp32"
        torch.set_flush_denormal(True)  # denormals are 40 times slower and do not matter here
        if device.type == "cuda":
            _make_deterministic()
        _keep_imports()
        return cls(device, precision, code or {}, processes)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products run in bf16 if the precision is bf16. Weights, sums and losses stay in fp32."""
        if self.precision == "bf16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    @property
    def matrix_dtype(self) -> torch.dtype:
        """For products that need no more than bf16, outside of autocast."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def fingerprint(self) -> dict[str, Any]:
        """Everything except the code that must be the same for a resumed run to give the same bits."""
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

    def of_parts(self) -> dict[str, str]:
        """The fingerprint for the manifest of a part. Threads are left out: the executor chooses them, and the bytes are the same."""
        return {name: str(value) for name, value in self.fingerprint().items() if name != "threads"}


def release_memory() -> None:
    """Free the memory of models that nobody uses any more, before another one is loaded.

    Modules and hooks refer to each other in circles, so Python would free them at some later time. On a GPU the
    allocator also keeps what was freed in blocks that may not fit.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def _keep_imports() -> None:
    """Once, before the first model is made. Modules live to the end, so `release_memory` need not visit them each time."""
    gc.freeze()


def _choose_gpu(processes: Processes) -> None:
    """Give this process the GPU of its number. Raises BadConfig if the machine has fewer."""
    count = torch.cuda.device_count()
    if processes.local_rank >= count:
        raise BadConfig(
            f"process {processes.local_rank} of this machine has no GPU: torch sees {count}; start at most {count} processes on "
            "each machine, or set device=cpu"
        )
    torch.cuda.set_device(processes.local_rank)


def _make_deterministic() -> None:
    """Allow only deterministic kernels. Raises BadConfig if an environment variable prevents that."""
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if workspace not in FIXED_WORKSPACES:
        raise BadConfig(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} in the environment makes results on a GPU non-deterministic; "
            f"unset it, or set it to {' or '.join(FIXED_WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False  # it would choose kernels by measured speed, which varies


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16. Emulated bf16 is more than twice as slow as fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
