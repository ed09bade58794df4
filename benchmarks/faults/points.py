"""The points at which a stage may be killed: before and after each call that changes what the disk holds, or that locks.

| kind     | calls                                                                                  |
|----------|----------------------------------------------------------------------------------------|
| write    | a file is opened for writing; text, tensors or rows of a table are written             |
| fsync    | a file or a folder is synced                                                           |
| rename   | a file or a folder gets its final name                                                 |
| manifest | the rename that makes a stage, a model or a part complete                              |
| remove   | a file or a folder is removed                                                          |
| link     | a hard link or a folder is made                                                        |
| lock     | a lock is taken or given up                                                            |
"""

import builtins
import fcntl
import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

KINDS = ("write", "fsync", "rename", "manifest", "remove", "link", "lock")
WHEN = ("before", "after")
Reached = Callable[[str, str, str], None]  # (kind, before or after, path)


def install(reached: Reached) -> None:
    """From now on, call `reached` at each point of this process. This cannot be undone: it is meant for a fork."""
    import pyarrow.parquet as pq
    import safetensors.torch

    def around(owner: Any, name: str, kind: Callable[..., str | None], path: Callable[..., Any]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            what = kind(*args, **kwargs)
            if what is None:
                return real(*args, **kwargs)
            where = os.fsdecode(path(*args, **kwargs))
            reached(what, "before", where)
            result = real(*args, **kwargs)
            reached(what, "after", where)
            return result

        setattr(owner, name, call)

    def always(kind: str) -> Callable[..., str]:
        return lambda *_, **__: kind

    def first(path: Any, *_: Any, **__: Any) -> Any:
        return path if isinstance(path, str | bytes | os.PathLike) else f"descriptor {path}"

    around(os, "fsync", always("fsync"), _path_of_descriptor)
    for name in ("replace", "rename"):
        around(os, name, _kind_of_rename, lambda _, target, **__: target)
    for name in ("unlink", "remove", "rmdir"):
        around(os, name, always("remove"), first)
    around(os, "link", always("link"), lambda _, target, **__: target)
    around(os, "mkdir", always("link"), first)
    around(fcntl, "flock", always("lock"), lambda file, _: str(getattr(file, "name", file)))
    around(builtins, "open", _kind_of_open, first)
    around(io, "open", _kind_of_open, first)
    around(pathlib.Path, "write_text", always("write"), first)
    around(pq.ParquetWriter, "write_table", always("write"), lambda *_, **__: "table")
    around(pq.ParquetWriter, "close", always("write"), lambda *_, **__: "table")
    around(safetensors.torch, "serialize_file", always("write"), lambda _, path, *__, **___: path)


def _path_of_descriptor(descriptor: Any) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}")


def _kind_of_rename(_: Any, target: Any, **__: Any) -> str:
    path = pathlib.Path(os.fsdecode(target))
    return "manifest" if path.name == "manifest.json" or path.parent.name == "parts" else "rename"


def _kind_of_open(path: Any, mode: str = "r", *_: Any, **__: Any) -> str | None:
    writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    return "write" if writes and not isinstance(path, int) else None
