"""Which Python code in model folders may run in this process: exactly the versions that `pretrained.code_sha256` names.

A version is the hash of the names and contents of all Python files of the folder that the code comes from.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lib.errors import BadData

_allowed: set[str] = set()


def allow(digest: str) -> None:
    """From now on this process may run this version. Only what the user wrote may be passed, never what a folder says."""
    _allowed.add(digest)


def hashes_of(folder: Path) -> dict[str, str]:
    """Name -> sha256 of all Python files of a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.py"))}


def version_of(files: Mapping[str, str]) -> str:
    """The value of `pretrained.code_sha256` that allows these files. `files`: name -> sha256."""
    listed = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(listed.encode()).hexdigest()


def require_allowed(
    folder: Path,
    files: Mapping[str, str],
    classes: Iterable[str],
    allowed: Collection[str | None] | None = None,
    where: str = "",
) -> None:
    """Raise BadData if the code of a folder may not run.

    Args:
        files: name -> sha256 of its code files.
        classes: `module.Class` of the classes that will be used, perhaps behind `repository--`.
        allowed: the versions that may run. None: those of `allow`.
        where: begins the message.
    """
    for name in classes:
        repository, _, reference = name.rpartition("--")
        if (module := f"{reference.partition('.')[0]}.py") not in files:
            source = f" Copy it from {repository}." if repository else ""
            raise BadData(f"{where}{folder} needs code of its own, and has no {module}.{source}")
    version = version_of(files)
    if version not in (_allowed if allowed is None else allowed):
        raise BadData(
            f"{where}{folder} runs code of its own ({', '.join(sorted(files))}), which is off. Read the code; to allow exactly this "
            f"version, set pretrained.code_sha256={version}"
        )
