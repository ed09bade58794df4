"""The processes of a training, as a launcher such as `torchrun` starts them, and what they exchange.

A launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process. Without WORLD_SIZE there is one
process, and nothing here imports torch. Process 0 is the main process: it alone writes files and messages.

All processes run the same code on the same inputs. They exchange gradients (`gradients.py`), numbers (`all_gather`),
results of an evaluation (`share`) and decisions of the main process (`from_main`).
"""

import contextlib
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lib.engine.allocator import release_free_memory
from lib.errors import BadConfig, Busy, ProcessLost

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")
Arrays = tuple["np.ndarray", ...]

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ITEMS_PER_RELEASE = 8  # forward passes of an evaluation: more would let memory grow, fewer would cost time
ALL_GATHER = "all_gather_single"
OLDER_NAMES = {ALL_GATHER: "all_gather_into_tensor"}  # before torch 2.13
# In messages of torch: when another process has ended, and when this one has a fault of its own
SIGN_OF_LOSS = r"gloo/|NCCL|(closed|reset) by peer|Broken pipe|[Tt]imed? ?out|failed to recv"
SIGN_OF_FAULT = r"out of memory|ncclUnhandledCudaError|ncclInvalid|preamble\.length"
# Keys of the store that the processes share
_FAILED = "remask/failed"  # number of processes
_FAILURE = "remask/failure"  # the first message


class Processes:
    """One process among `size`, of number `rank`.

    Made by `start`. `Processes()` is the only process of a run that no launcher started.

    Attributes:
        passes_together: all processes call a model the same number of times, because its weights are divided among them
            (`sharding.py`).
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int | None = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.local_size = local_size or size
        self.passes_together = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the messages."""
        return self.rank == 0

    # ------------------------------------------------------------------ work that is divided

    def run_of(self, count: int) -> range:
        """The items of this process, of `count` items that are divided into contiguous runs."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, function: Callable[[Item], Arrays], items: Sequence[Item]) -> list[Arrays]:
        """`[function(item) for item in items]`, divided among the processes; each gets all results, in order.

        An item is the unit of a forward pass, so results do not depend on the number of processes.

        Args:
            function: gives a tuple of numpy arrays. It exchanges nothing with other processes, except by calling a model whose
                weights are divided among them, the same number of times for each item.
        """
        numbers, own = self.run_of(len(items)), []
        for i in numbers:
            with exchanging():
                own.append(function(items[i]))
            if len(own) % ITEMS_PER_RELEASE == 0:
                release_free_memory()
        if self.size == 1:
            return own
        if self.passes_together and len(numbers) < math.ceil(len(items) / self.size):
            with exchanging():
                function(items[0])  # another process has one item more; this result is not used
        found = [result for packed in self._gather_bytes(_pack(own)) for result in _unpack(packed)]
        assert len(found) == len(items), "the processes disagree about the number of items"
        return found

    # ------------------------------------------------------------------ exchange

    def all_gather(self, values: "np.ndarray") -> "np.ndarray":
        """(size, N) float64: the (N,) numbers of every process, in the order of their ranks."""
        import numpy as np

        values = np.ascontiguousarray(values, np.float64)
        if self.size == 1:
            return values[None]
        import torch

        found = torch.empty(self.size * len(values), dtype=torch.float64)
        exchange(ALL_GATHER, found, torch.from_numpy(values))
        return found.numpy().reshape(self.size, -1)

    def from_main(self, value: Any) -> Any:
        """The `value` of process 0, as JSON can hold it; what the other processes pass is ignored."""
        if self.size == 1:
            return value
        import torch

        data = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(data)])
        exchange("broadcast", length, 0)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        exchange("broadcast", buffer, 0)
        return json.loads(buffer.numpy().tobytes())

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the processes of each machine run the block one after another. All processes call it together."""
        import numpy as np

        turns = int(self.all_gather(np.array([self.local_size])).max())
        for _ in range(self.local_rank):
            self.barrier()
        yield
        for _ in range(self.local_rank, turns):
            self.barrier()

    def barrier(self) -> None:
        """Wait until every process is here, such as before files are read that process 0 wrote."""
        if self.size > 1:
            import numpy as np

            self.all_gather(np.zeros(1))

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        import numpy as np
        import torch

        lengths = self.all_gather(np.array([len(data)]))[:, 0].astype(np.int64)
        width = int(lengths.max())
        own = torch.zeros(width, dtype=torch.uint8)
        if data:
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = torch.empty(self.size * width, dtype=torch.uint8)
        exchange(ALL_GATHER, found, own)
        rows = found.numpy().reshape(self.size, width)
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    # ------------------------------------------------------------------ beginning and end

    def close(self) -> None:
        """Leave the group. Called when all processes have finished without an error."""
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def first_to_fail(self, message: str) -> bool:
        """Whether this process is the first that reports an error; it alone shows its message.

        The others fail soon after, for the same reason or because this process is lost to them.
        """
        if self.size == 1:
            return True
        import torch.distributed as dist

        own = f"{self.rank}: "
        try:
            store = dist.distributed_c10d._get_default_store()
            store.add(_FAILED, 1)
            return store.compare_set(_FAILURE, "", own + message).decode().startswith(own)
        except (
            RuntimeError,
            ValueError,
        ):  # process 0 held the store, and is gone; it may have been killed without a message
            return self.rank == 1

    def wait_for_failures(self, seconds: float) -> None:
        """Wait until all processes have failed, `seconds` at most, so that they learn which of them has reported it."""
        import torch.distributed as dist

        end = time.monotonic() + seconds
        try:
            store = dist.distributed_c10d._get_default_store()
            while time.monotonic() < end and store.add(_FAILED, 0) < self.size:
                time.sleep(0.05)
        except (RuntimeError, ValueError):  # process 0 held the store, and is gone
            return


_current = Processes()


def current() -> Processes:
    """The processes of this run, as `start` found them."""
    return _current


def start() -> Processes:
    """Join the other processes, if a launcher started this one. Returns what `current` returns from now on.

    Raises:
        BadConfig: the launcher's variables are incomplete or wrong.
        Busy: the port on which the processes meet is taken.
    """
    global _current
    _current = _join(os.environ)
    return _current


def world_size(environment: Mapping[str, str]) -> int:
    """How many processes a launcher has started; 1 without a launcher. Raises BadConfig if WORLD_SIZE is no such number."""
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise BadConfig(
            f"WORLD_SIZE={text!r} is no number of processes; start the script with torchrun, or unset it"
        )
    return int(text)


def _join(environment: Mapping[str, str]) -> Processes:
    size = world_size(environment)
    if "WORLD_SIZE" not in environment:
        return Processes()
    values = {name: environment.get(name, "") for name in VARIABLES}
    try:
        rank = int(values["RANK"])
        local_rank = int(environment.get("LOCAL_RANK", 0))
        local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
        if not 0 <= rank < size:
            raise ValueError
    except ValueError:
        raise BadConfig(
            f"WORLD_SIZE is set, so several processes are expected, but RANK={values['RANK']!r} and "
            f"WORLD_SIZE={values['WORLD_SIZE']!r} are no number below another; start the script with torchrun, or unset both"
        ) from None
    if size == 1:
        return Processes()
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise BadConfig(
            f"{', '.join(missing)} must be set for {size} processes; start the script with torchrun"
        )

    # When a process ends, torch would warn the others with a stack of C++ functions. Their error message says it better
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist

    if values["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's host name may have no address
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"{values['MASTER_ADDR']}:{values['MASTER_PORT']}"
        if "already in use" in str(error) or "EADDRINUSE" in str(error):
            raise Busy(
                f"port {values['MASTER_PORT']} is taken by another program, so the processes cannot meet at {where}; set "
                "another MASTER_PORT, or let `torchrun --standalone` choose one"
            ) from None
        raise ProcessLost(f"process {rank} of {size} cannot join the others at {where}: {text}") from None
    return Processes(rank, size, local_rank, local_size)


def exchange(name: str, *arguments: Any) -> Any:
    """A collective operation of torch.distributed. Raises ProcessLost if another process has ended."""
    import torch.distributed as dist

    operation = getattr(dist, name if hasattr(dist, name) else OLDER_NAMES[name])
    with exchanging():
        return operation(*arguments)


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """Around code that exchanges something with other processes. Raises ProcessLost if another process has ended.

    Other errors pass: too little memory, tensors of another shape, a bug.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not re.search(SIGN_OF_LOSS, text) or re.search(SIGN_OF_FAULT, text):
            raise
        reason = (
            "connection closed" if re.search("(closed|reset) by peer", text) else " ".join(text.split())[:200]
        )
        raise ProcessLost(
            "another process of this training has ended, so this one ends, too. Nothing is lost: run the same command "
            f"again to continue ({reason})"
        ) from None


def _pack(results: list[Arrays]) -> bytes:
    """Tuples of arrays as bytes. numpy's own format holds their types and shapes, and runs no code when read."""
    import numpy as np

    buffer = io.BytesIO()
    for arrays in results:
        buffer.write(len(arrays).to_bytes(4, "little"))
        for array in arrays:
            np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def _unpack(data: bytes) -> list[Arrays]:
    import numpy as np

    buffer, results = io.BytesIO(data), []
    while buffer.tell() < len(data):
        count = int.from_bytes(buffer.read(4), "little")
        results.append(tuple(np.lib.format.read_array(buffer, allow_pickle=False) for _ in range(count)))
    return results
