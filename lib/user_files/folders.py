"""Find the files of a folder."""

import os
import stat
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from lib.user_files.faults import Fault, kind_of


@dataclass
class FolderContents:
    """What a folder holds: files to read, other files, and everything else with the reason why it is not read."""

    files: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    faults: list[tuple[Path, Fault]] = field(default_factory=list)


def find_files(root: Path) -> FolderContents:
    """All files below a folder, sorted by path. Linked folders are entered, each folder once.

    Names that begin with a dot are not read. Whatever is not read has a fault.
    """
    contents = FolderContents()
    entered: dict[
        tuple[int, int], Path
    ] = {}  # (device, inode) of a folder -> the path by which it was entered
    pending = deque([root])
    linked: deque[Path] = deque()  # entered last, so that a file is named by its real path where it has one
    while pending or linked:
        folder = pending.popleft() if pending else linked.popleft()
        try:
            status = folder.stat()
            first = entered.setdefault((status.st_dev, status.st_ino), folder)
            if first is not folder:
                fault = Fault(
                    "repeated folder", f"a link to {first}", "another folder", "it is read once", "warning"
                )
                contents.faults.append((folder, fault))
                continue
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            contents.faults.append((folder, _access_fault(error, "a folder that can be read")))
            continue
        for name in names:
            path = folder / name
            if name.startswith("."):
                fault = Fault(
                    "hidden", "a name that begins with a dot", "another name", "it is not read", "warning"
                )
                contents.faults.append((path, fault))
            else:
                _add_path(path, contents, pending, linked)
    contents.files.sort()
    contents.others.sort()
    contents.faults.sort()
    return contents


def _add_path(path: Path, contents: FolderContents, pending: deque[Path], linked: deque[Path]) -> None:
    """Add a path to the contents or, if it is a folder, to the folders that are still to be read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        contents.faults.append((path, _access_fault(error, "a file or folder", path)))
        return
    if stat.S_ISDIR(mode):
        (linked if path.is_symlink() else pending).append(path)
    elif not stat.S_ISREG(mode):
        severity = "error" if kind_of(path) else "warning"
        found = "a socket, pipe or device"
        contents.faults.append(
            (path, Fault("no file", found, "a file", "remove it from the folder", severity))
        )
    else:
        (contents.files if kind_of(path) else contents.others).append(path)


def _access_fault(error: OSError, expected: str, path: Path | None = None) -> Fault:
    if path is not None and os.path.islink(path) and not os.path.exists(path):
        # A broken link is an error only if its name suggests a text or a folder
        severity = "error" if kind_of(path) or not path.suffix else "warning"
        advice = "fix the link, or remove it from the folder"
        return Fault("dead link", f"a link to {os.readlink(path)}", expected, advice, severity)
    advice = "check its permissions, or remove it from the folder"
    return Fault("unreadable", str(error.strerror or error), expected, advice)
