"""Watches a process from inside: what it opens, removes, runs and connects to, by the audit events of Python (PEP 578).

Libraries in C and Rust open files without such events. A watch of the kernel (inotify) on the folder of the secret sees these.
"""

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "os.mkdir",
}
NETWORK = {"socket.connect", "socket.sendto", "socket.bind", "socket.getaddrinfo", "urllib.Request"}
PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn"}
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000


def watch(note: Path, writable: Iterable[Path], hostile: Path) -> None:
    """Write a line to `note` for each thing that this process must not do, from now on.

    Args:
        writable: folders in which it may change files.
        hostile: a folder whose code may not run.
    """
    allowed = tuple(os.path.realpath(folder) for folder in writable)
    code_folder = os.path.realpath(hostile)
    descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def inside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor
        full = os.path.realpath(os.fsdecode(path))
        return full.startswith(("/dev/", "/proc/")) or any(
            full == folder or full.startswith(folder + os.sep) for folder in allowed
        )

    def note_it(text: str) -> None:
        os.write(descriptor, text.encode("utf-8", "backslashreplace")[:500] + b"\n")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and not inside(path):
                note_it(f"writes {path!r}")
        elif event in CHANGES and not all(
            inside(path) for path in arguments[:2] if isinstance(path, str | bytes)
        ):
            note_it(f"{event} {arguments[:2]!r}")
        elif event in NETWORK:
            note_it(f"{event} {arguments[1:]!r}")
        elif event in PROGRAMS and not str(arguments[0]).endswith("git"):
            note_it(f"runs {arguments[:2]!r}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(code_folder):
            note_it(f"runs code of {arguments[0].co_filename}")
        elif event == "pickle.find_class":
            note_it(f"unpickles {arguments!r}")

    sys.addaudithook(hook)


class SecretWatch:
    """Sees whether anybody opens a file of a folder, whatever library does it. Linux only; elsewhere it sees nothing."""

    def __init__(self, folder: Path):
        self._descriptor = -1
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            self._descriptor = libc.inotify_init1(IN_NONBLOCK)
            libc.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_OPEN)

    def was_opened(self) -> bool:
        """Whether a file was opened since the last call."""
        try:
            return bool(os.read(self._descriptor, 65536))
        except (BlockingIOError, OSError):
            return False
