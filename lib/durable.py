"""Files that are either whole or not there, also after a crash: write, fsync, rename, fsync the folder.

Knows paths and bytes only. A temporary name ends in `.tmp`; a crash may leave one behind, and nothing ever
reads it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEW, OLD = ".new", ".old"  # beside a folder: what is to take its place, and what stood there a moment ago


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on a clean exit it is synced and takes the place of `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
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


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder; on a clean exit it takes the place of `folder`, which stays until then."""
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
    """Sync every file in `new` and let it take the place of `folder`.

    An older `folder` goes away only after the new one is complete on the disk. Between the two renames the
    older one stands under `<name>.old`; `recover_folder` puts one of the two there if the process died right then.
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
    """Put back a folder whose replacement was cut off between its two renames."""
    old = beside(folder, OLD)
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def link_folder(source: Path, target: Path) -> None:
    """All files of `source` in `target`, as links where the file system has them; files here are never changed in place."""

    def link_or_copy(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)


def beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """The hash of a file or of a folder."""
    return sha256_folder(path) if path.is_dir() else sha256_file(path)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """Hash over the sorted relative names and hashes of all files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
