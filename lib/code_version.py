"""Which code a stage can import: a hash per file, so that results of other code are known and named.

Comments, docstrings and blank lines do not count, nor does anything outside the scripts and lib/. Imports are followed
as they are written, also those inside functions; of the tasks only the configured one. Imports nothing heavy.
"""

import hashlib
import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lib.config import ROOT

MAX_NAMED = 3  # files that a message names

_STRING = r'"""(?:[^"\\]|\\.|"(?!""))*"""|\'\'\'(?:[^\'\\]|\\.|\'(?!\'\'))*\'\'\'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\''
_STRING_OR_END_OF_LINE = re.compile(rf"({_STRING})|(?:[ \t]*(?:#[^\n]*)?\n)+", re.DOTALL)
_DOCSTRING = re.compile(r'(\A\s*|:\n[ \t]+)[rR]?"""(?:[^"\\]|\\.|"(?!""))*"""(?=\n)', re.DOTALL)
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))", re.MULTILINE
)


def code_files(script: str, task: str, root: Path = ROOT) -> dict[str, str]:
    """{path below `root`: hash of its code} of a stage's script and of all of lib/ that it can import.

    Args:
        script: a file below `root`, or the name of a stage; one without a file of its own, such as 02_stream, belongs
            to the numbered script with the same number.
        task: the configured task, which is imported by its name.
    """
    own = root / script
    if not (own.is_relative_to(root) and own.is_file()):
        own = root / f"{Path(script).stem}.py"
    if not own.exists():
        own = next(iter(sorted(root.glob(f"{Path(script).name[:2]}_*.py"))), own)
    waiting, found = [own, *_files_of(f"lib.tasks.{task}", root)], {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name in found or not path.exists():
            continue
        found[name], modules = _read(path, root)
        waiting += [file for module in modules for file in _files_of(module, root)]
    return dict(sorted(found.items()))


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The paths that differ, are new or are gone."""
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))


def name_files(files: Iterable[str]) -> str:
    """`lib/a.py, lib/b.py and 3 more`."""
    files = list(files)
    more = f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else ""
    return ", ".join(files[:MAX_NAMED]) + more


def digest(files: Mapping[str, str]) -> str:
    """One hash over `code_files`."""
    return hashlib.sha256(
        "".join(f"{path} {sha}\n" for path, sha in sorted(files.items())).encode()
    ).hexdigest()


def code_only(source: str) -> str:
    """The source without comments, docstrings in triple quotes, blank lines and blanks at the ends of lines."""
    text = _STRING_OR_END_OF_LINE.sub(lambda match: match[1] or "\n", source + "\n")
    return _DOCSTRING.sub(r'\1""', text)


@cache
def _read(path: Path, root: Path) -> tuple[str, tuple[str, ...]]:
    """(hash of a file's code, the modules it may import); once per process, which runs what it read at first."""
    text = code_only(path.read_text(encoding="utf-8"))
    package = path.parent.relative_to(root).parts
    return hashlib.sha256(text.encode()).hexdigest(), tuple(sorted(_imports(text, package)))


def _imports(text: str, package: tuple[str, ...]) -> set[str]:
    """Dotted names that the code imports, absolute; a name imported from a package may be a module of it."""
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


def _files_of(module: str, root: Path) -> list[Path]:
    """The files that importing a module runs: its own and its packages'."""
    parts = module.split(".")
    packages = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    return [path for path in [*packages, root.joinpath(*parts).with_suffix(".py")] if path.exists()]


def commit() -> dict[str, Any]:
    """The commit of the working tree, and whether there are changes on top of it; None where git cannot say."""
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
