"""Record what a process does to a folder: every change of a file or name, and every sync, in order.

The operations that change or sync something are wrapped. Before and after each of them the folder is compared with what it was.
So changes by libraries in C++ and Rust are seen, too, at the next operation.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "truncate", "symlink")
LEFT_OUT = (".locks", "log", "speed.jsonl")  # what no result depends on
ROOT_ID = 0
Names = dict[tuple[int, str], tuple[int, bool]]  # (folder, name) -> (file or folder, whether it is a folder)


@dataclass
class Recorder:
    """Writes one JSON line per event to `log`, and each content once to the folder `contents`, by its hash.

    Files and folders have ids that are never used again; the root has `ROOT_ID`. Events:

        {"is": "write", "id", "content"}               a file has this content
        {"is": "names", "changes": [[folder, name, id or null, whether it is a folder], ...]}     all at once, as a rename is
        {"is": "sync", "id"}                           a file or a folder was synced
    """

    root: Path
    log: Path
    contents: Path
    _names: Names = field(default_factory=dict)
    _ids: dict[int, int] = field(default_factory=dict)  # inode -> id
    _stamps: dict[int, tuple[int, int]] = field(default_factory=dict)
    _written: dict[int, str] = field(default_factory=dict)
    _next: int = ROOT_ID + 1

    def install(self) -> None:
        """Wrap the functions of this process. Meant for a fork."""
        self._log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._ids[os.stat(self.root).st_ino] = ROOT_ID
        self._first = True
        self.look()
        self._first = False
        for name in CHANGES:
            setattr(os, name, self._wrapped(getattr(os, name)))
        os.fsync = self._fsync

    def _fsync(self, descriptor: Any) -> None:
        """Note a sync. The machine that records does not lose its power, so nothing is synced."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self.look()
        inode = os.fstat(number).st_ino
        if inode in self._ids:
            self._note({"is": "sync", "id": self._ids[inode]})

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.look()
            result = real(*args, **kwargs)
            self.look()
            return result

        return call

    def look(self) -> None:
        """Note what has changed since the last look."""
        names = self._scan()
        changes = [[*key, None, self._names[key][1]] for key in self._names if key not in names]
        changes += [[*key, *names[key]] for key in names if self._names.get(key) != names[key]]
        self._names = names
        if changes:
            self._note({"is": "names", "changes": changes})

    def _scan(self) -> Names:
        found: Names = {}
        seen = {os.stat(self.root).st_ino}
        waiting = [(str(self.root), ROOT_ID)]
        while waiting:
            folder, number = waiting.pop()
            for entry in _entries(folder):
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                seen.add(status.st_ino)
                if status.st_ino not in self._ids:
                    self._ids[status.st_ino], self._next = self._next, self._next + 1
                own, is_folder = self._ids[status.st_ino], entry.is_dir(follow_symlinks=False)
                found[number, entry.name] = (own, is_folder)
                if is_folder:
                    waiting.append((entry.path, own))
                elif self._stamps.get(own) != (status.st_size, status.st_mtime_ns):
                    self._stamps[own] = (status.st_size, status.st_mtime_ns)
                    self._content(entry.path, own)
        self._ids = {inode: number for inode, number in self._ids.items() if inode in seen}
        return found

    def _content(self, path: str, own: int) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return
        with open(descriptor, "rb") as file:
            data = file.read()
        digest = hashlib.sha256(data).hexdigest()
        if self._written.get(own) == digest:
            return
        self._written[own] = digest
        if not (self.contents / digest).exists():
            (self.contents / digest).write_bytes(data)
        self._note({"is": "write", "id": own, "content": digest})

    def _note(self, event: dict[str, Any]) -> None:
        os.write(self._log, (json.dumps(event | {"first": self._first}) + "\n").encode())


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(LEFT_OUT)]
    except OSError:
        return []
