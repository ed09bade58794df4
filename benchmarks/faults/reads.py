"""Which files a process has looked into: opened, by whatever library, or asked for their size.

The kernel tells of each file that is opened (inotify), also by another name, and that it changed at once if it was emptied by that.
Python tells how it opens files (an audit hook). Sizes are asked for through `os.stat`, which is wrapped. What a process did not
look into cannot have changed what it did. Whether a name is there, and is a file or a folder, does not count as a look.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

IN_ACCESS, IN_MODIFY, IN_CLOSE_NOWRITE, IN_OPEN, IN_Q_OVERFLOW = 0x1, 0x2, 0x10, 0x20, 0x4000
IN_NONBLOCK = 0x800
EMPTIED = [IN_OPEN, IN_MODIFY]  # the first events of a file that was opened to be replaced
KINDS_ASKED: dict[Any, tuple[str, ...]] = {
    Path: ("exists", "is_file", "is_dir", "is_symlink"),
    os.path: ("exists", "lexists", "isfile", "isdir", "islink"),
}
EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name


class ReadWatch:
    """Watches files that are there now.

    with ReadWatch(folder, ["a.txt"], note) as watch:
        ...                       # a fork calls watch.install() first
        print(watch.reads())
    """

    def __init__(self, folder: Path, names: Iterable[str], note: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._folder, self._names, self._note = folder, list(names), note

    def __enter__(self) -> "ReadWatch":
        self._descriptor = self._libc.inotify_init1(IN_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._by_watch: dict[int, str] = {}
        self._by_inode: dict[int, str] = {}
        self._first: dict[int, list[int]] = {}  # watch -> its first two events
        for name in self._names:
            path = self._folder / name
            watch = self._libc.inotify_add_watch(
                self._descriptor, os.fsencode(path), IN_ACCESS | IN_MODIFY | IN_CLOSE_NOWRITE | IN_OPEN
            )
            if watch < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path))
            self._by_watch[watch] = name
            self._by_inode[path.stat().st_ino] = name
        self._note.write_bytes(b"")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def install(self) -> None:
        """In a fork: note whose size is asked for, and what Python opens without emptying it."""
        left = set(self._by_inode)
        output = os.open(self._note, os.O_WRONLY | os.O_APPEND)
        stat, kinds_asked = os.stat, [0]

        def note(inode: int, emptied: bool = False) -> None:
            if inode in left:
                left.discard(inode)
                if not emptied:
                    os.write(output, f"{inode}\n".encode())

        def noting(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
            def call(*args: Any, **kwargs: Any) -> os.stat_result:
                found = real(*args, **kwargs)
                if not kinds_asked[0]:
                    note(found.st_ino)
                return found

            return call

        def asking(real: Callable[..., bool]) -> Callable[..., bool]:
            def call(*args: Any, **kwargs: Any) -> bool:
                kinds_asked[0] += 1
                try:
                    return real(*args, **kwargs)
                finally:
                    kinds_asked[0] -= 1

            return call

        def heard(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and not isinstance(args[0], int):
                try:
                    note(stat(args[0]).st_ino, bool((args[2] or 0) & os.O_TRUNC))
                except (OSError, TypeError, ValueError):
                    return

        os.stat, os.lstat = noting(os.stat), noting(os.lstat)
        for owner, names in KINDS_ASKED.items():
            for name in names:
                setattr(owner, name, asking(getattr(owner, name)))
        sys.addaudithook(heard)

    def reads(self) -> list[str]:
        """The names of what was looked into so far."""
        self._take_events()
        asked = {self._by_inode[int(line)] for line in self._note.read_text().split()}
        opened = {self._by_watch[watch] for watch, events in self._first.items() if events != EMPTIED}
        return sorted(asked | opened)

    def _take_events(self) -> None:
        while True:
            try:
                data = os.read(self._descriptor, 1 << 20)
            except BlockingIOError:
                return
            while data:
                watch, mask, _, length = EVENT.unpack_from(data)
                if mask & IN_Q_OVERFLOW:  # events are lost: all may have been opened
                    self._first = {watch: [IN_OPEN] for watch in self._by_watch}
                elif kind := mask & (IN_ACCESS | IN_MODIFY | IN_CLOSE_NOWRITE | IN_OPEN):
                    self._first[watch] = [*self._first.get(watch, []), kind][:2]
                data = data[EVENT.size + length :]
