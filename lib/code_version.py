"""The version of the code that a stage can import: one hash per file.

Manifests record the hashes, so that results of different code can be recognised. Comments, docstrings and blank lines do
not count, nor does anything outside the scripts and lib/. Imports are read from the source text, also those inside
functions. Of the tasks, only the configured one is followed.
"""

import hashlib
import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lib.config import ROOT

MAX_NAMED = 3  # files in a message

_STRING = r'"""(?:[^"\\]|\\.|"(?!""))*"""|\'\'\'(?:[^\'\\]|\\.|\'(?!\'\'))*\'\'\'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\''
_STRING_OR_END_OF_LINE = re.compile(rf"({_STRING})|(?:[ \t]*(?:#[^\n]*)?\n)+", re.DOTALL)
_DOCSTRING = re.compile(r'(\A\s*|:\n[ \t]+)[rR]?"""(?:[^"\\]|\\.|"(?!""))*"""(?=\n)', re.DOTALL)
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))", re.MULTILINE
)


def code_files(script: str, task: str, root: Path = ROOT) -> dict[str, str]:
    """{path below `root`: hash of its code} for a stage's script and everything in lib/ that it can import.

    Args:
        script: a file below `root`, or the name of a stage. A stage without a file, such as 02_stream, belongs to the
            script with the same number.
        task: the configured task, which is imported by its name.
    """
    return dict(_own_code(script, task) if root == ROOT else _find_code(script, task, root))


@cache
def _own_code(script: str, task: str) -> dict[str, str]:
    """`code_files` of this project. Cached: a process runs the code that it read first."""
    return _find_code(script, task, ROOT)


def _find_code(script: str, task: str, root: Path) -> dict[str, str]:
    start = root / script
    if not (start.is_relative_to(root) and start.is_file()):
        start = root / f"{Path(script).stem}.py"
    if not start.exists():
        start = next(iter(sorted(root.glob(f"{Path(script).name[:2]}_*.py"))), start)
    waiting, found = [start, *_files_of(f"lib.tasks.{task}", root)], {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name in found or not path.exists():
            continue
        found[name], modules = _read(path, root)
        waiting += [file for module in modules for file in _files_of(module, root)]
    return dict(sorted(found.items()))


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The paths that differ, were added or were removed."""
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))


def name_files(files: Iterable[str]) -> str:
    """The files for a message: `lib/a.py, lib/b.py, lib/c.py and 3 more`."""
    files = list(files)
    more = f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else ""
    return ", ".join(files[:MAX_NAMED]) + more


def digest(files: Mapping[str, str]) -> str:
    """One hash of all files of `code_files`."""
    return hashlib.sha256(
        "".join(f"{path} {sha}\n" for path, sha in sorted(files.items())).encode()
    ).hexdigest()


def code_only(source: str) -> str:
    """The source without comments, docstrings in triple quotes, blank lines and trailing spaces."""
    text = _STRING_OR_END_OF_LINE.sub(lambda match: match[1] or "\n", source + "\n")
    return _DOCSTRING.sub(r'\1""', text)


@cache
def _read(path: Path, root: Path) -> tuple[str, tuple[str, ...]]:
    """(hash of a file's code, modules it may import), cached."""
    text = code_only(path.read_text(encoding="utf-8"))
    package = path.parent.relative_to(root).parts
    return hashlib.sha256(text.encode()).hexdigest(), tuple(sorted(_imports(text, package)))


def _imports(text: str, package: tuple[str, ...]) -> set[str]:
    """Absolute dotted names that the code imports. A name imported from a package may be a module of it."""
    found = set()
    for origin, names, plain in _IMPORT.findall(text):
        found.update(re.findall(r"[\w.]+", plain))
        if not origin:
            continue
        dots = len(origin) - len(origin.lstrip("."))
        parents = package[: len(package) - dots + 1] if dots else ()
        origin = ".".join([*parents, *filter(None, [origin.lstrip(".")])])
        found.add(origin)
        found.update(f"{origin}.{name}" for name in re.findall(r"\w+", names))
    return {name for name in found if name.split(".")[0] in ("lib", "benchmarks")}


@cache
def _files_of(module: str, root: Path) -> tuple[Path, ...]:
    """The files that run when a module is imported: its own and those of its packages. Cached as `_read` is."""
    parts = module.split(".")
    packages = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    return tuple(path for path in [*packages, root.joinpath(*parts).with_suffix(".py")] if path.exists())


@cache
def version() -> str:
    """The version of the project, as pyproject.toml states it; `unknown` without that file."""
    try:
        return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown"


def version_text() -> str:
    """`Remask 0.1.0 (commit 1a2b3c4d5e6f, with local changes)`; without the bracket where git cannot say."""
    state = commit()
    if not state["commit"]:
        return f"Remask {version()}"
    return f"Remask {version()} (commit {state['commit'][:12]}{', with local changes' if state['dirty'] else ''})"


def commit() -> dict[str, Any]:
    """The git commit of the working tree and whether there are uncommitted changes. None if git cannot tell."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True
        )
        return {"commit": head.stdout.strip(), "dirty": bool(status.stdout.strip())}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
