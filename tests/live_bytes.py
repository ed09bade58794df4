"""The bytes of tensors that are alive while code runs, on any device: what an allocator would hold, without its waste."""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def resident_bytes() -> int:
    """The memory of this process now. Its peak would be that of whatever ran before."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that operations make, until they are released.

    Storages from before count only if they are in `known`. Buffers inside one kernel are not seen.

    Attributes:
        now: bytes that are alive.
        peak: the most that were alive at a time since the beginning, or since `restart`.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: dict[int, int] = {}  # address of a storage -> its bytes
        for tensor in known:
            self._see(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def restart(self) -> None:
        self.peak = self.now

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)
