"""Write files atomically: after a crash a file is either complete or absent.

The steps are: write under a temporary name, fsync, rename, fsync the folder. Temporary names end in `.tmp`. A crash may
leave such a file behind; nothing reads it, and `remove_temporaries` removes it.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

MAX_JSON_BYTES = 2**28
NEW, OLD = ".new", ".old"  # suffixes of a folder's successor, and of the folder that was just replaced


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. If the block ends without an error, the file is synced and replaces `path`."""
    # Two processes may write the same file, also on two machines, where their numbers may be the same
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError also for pipes, devices and sockets, which may never end or never begin."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a file, but a folder, pipe or device", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file. Raises OSError, and ValueError if it is not JSON, too large or nested too deeply."""
    with open_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder. If the block ends without an error, it replaces `folder`, which stays until then."""
    temporary = beside(folder, ".tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(folder, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(folder: Path, new: Path) -> None:
    """Sync every file in `new`, then replace `folder` by it.

    The old folder is removed only after the new one is complete on the disk. Between the two renames the old one is called
    `<name>.old`. If the process dies at that moment, `recover_folder` restores it.
    """
    old = beside(folder, OLD)
    for path in sorted(new.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    fsync_folder(new)
    remove(old)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    fsync_folder(folder.parent)
    remove(old)


def recover_folder(folder: Path) -> None:
    """End a replacement that was interrupted: between its two renames the old folder returns, afterwards it is removed."""
    old = beside(folder, OLD)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    remove(old)


def link_folder(source: Path, target: Path) -> None:
    """Put all files of `source` into `target`: as hard links if the file system has them, otherwise as copies.

    Links are safe because no file is ever changed in place.
    """

    def link_or_copy(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)

    shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)


def beside(folder: Path, suffix: str) -> Path:
    """The path with `suffix` appended to its name."""
    return folder.with_name(folder.name + suffix)


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it exists."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def remove_temporaries(folder: Path, pattern: str = "**/*.tmp") -> None:
    """Remove what killed processes left below `folder`. The caller has a lock: nobody else writes there now."""
    for path in sorted(folder.glob(pattern), reverse=True):
        if path.is_dir():
            remove(path)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The hash of a file or of a folder."""
    return sha256_folder(path) if path.is_dir() else sha256_file(path)


def sha256_file(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """The hash of the relative names and hashes of all files below `folder`, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = os.fsencode(path.relative_to(folder).as_posix())  # it need not be UTF-8
        digest.update(name + f" {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
