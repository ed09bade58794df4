"""Room on the disk: said before work starts, and refused before hours of work that could not be stored."""

import shutil
from pathlib import Path

from lib.errors import CannotWrite
from lib.log import say


def say_room(folder: Path, needed: int, what: str) -> None:
    """Say how many bytes some work will write, and warn if the disk has less. `needed` is an estimate from above."""
    free = free_bytes(folder)
    line = f"disk: {what} will take up to {in_words(needed)}; {in_words(free)} are free"
    say(f"WARNING: {line}" if needed > free else line)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Like `say_room`, for bytes that will surely be written. Raises CannotWrite if the disk has less.

    What lies in `folder` already counts as written.
    """
    present = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
    free, left = free_bytes(folder), max(0, needed - present)
    if left > free:
        raise CannotWrite(
            f"{what} needs {in_words(left)} of disk, but {in_words(free)} are free in {folder}. Free some space and run the same "
            "command again"
        )
    say(f"disk: {what} needs up to {in_words(left)}; {in_words(free)} are free")


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds a folder, which may be absent yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def in_words(count: int) -> str:
    """A number of bytes, such as 1.4 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
