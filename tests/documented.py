"""Commands, flags, config keys and links of the documents and messages, found by reading the tree.

Documents are README.md and its siblings, docs/, the heads of the shipped configs, and the docstrings of scripts, lib/ and benchmarks/.
Messages are the string literals of the scripts, lib/ and benchmarks/.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from lib.config import ROOT, Config

SCRIPTS = sorted(ROOT.glob("0[0-9]_*.py"))
HISTORY = {"LOG.md", "CHANGELOG.md"}  # what they name may be gone
DOCUMENTS = sorted([*(p for p in ROOT.glob("*.md") if p.name not in HISTORY), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SOURCES = sorted([*SCRIPTS, *(ROOT / "lib").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
LOG = ROOT / "LOG.md"
OWN_PACKAGES = ("lib", "tests", "benchmarks")

_START = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python \S|make \S|torchrun .*\.py)")
_IN_PROSE = ("make a ", "make the ", "make it ", "make them ", "make sure ")
_WORDS = re.compile(r"""[;&|]+|(?:"[^"]*"|'[^']*'|[^\s;&|"'])+""")  # with their quotes
_SEPARATORS = {"&", "&&", ";", "|", "||", "do", "done", "then"}


@dataclass(frozen=True)
class Command:
    """A command of a document; `words` are the words of the shell, in order."""

    where: str  # file and line
    text: str

    @property
    def words(self) -> list[str]:
        """With `torchrun OPTIONS SCRIPT` as `python SCRIPT`."""
        words = shlex.split(self.text)
        return ["python", *words[1 + len(self.launcher) :]] if self.launcher else words

    @property
    def launcher(self) -> list[str]:
        """The options of torchrun, if it starts the script."""
        words = shlex.split(self.text)
        if words[0] != "torchrun":
            return []
        return words[1 : next(n for n, word in enumerate(words) if word.endswith(".py"))]

    @property
    def kind(self) -> str:
        """`script`, `module`, `file` (another Python file) or `make`."""
        program, first = [w for w in self.words if not re.match(r"^[A-Z_]+=", w)][:2]
        if program == "make":
            return "make"
        if first == "-m":
            return "module"
        return "script" if re.match(r"0[0-9]_\w+\.py$", first) else "file"

    @property
    def arguments(self) -> list[str]:
        """What follows the script, the module or `make`."""
        words = (
            [w for w in self.words if not re.match(r"^[A-Z_]+=", w)] if self.kind != "make" else self.words
        )
        while words[0] not in ("make", "python", ".venv/bin/python"):
            words = words[1:]
        return words[{"make": 1, "module": 3}.get(self.kind, 2) :]

    @property
    def target(self) -> str:
        """The script's or module's name, or the target of `make`."""
        words = [w for w in self.words if not re.match(r"^[A-Z_]+=", w)]
        return words[2] if self.kind == "module" else words[1]


def commands() -> list[Command]:
    """Every command of documents, docstrings and configs, once each, in the order of reading."""
    found: dict[str, Command] = {}
    for where, line in _lines():
        for text in _commands_of(line):
            found.setdefault(text, Command(where, text))
    return list(found.values())


def expand_make(arguments: list[str], cwd: Path, folder: Path) -> list[list[str]]:
    """The commands that `make` with these arguments would run in the environment, each as program and arguments.

    The shell runs as usual. The programs of .venv/bin are replaced by a script in `folder` that records its arguments.
    The pipeline is replaced by the scripts that it runs.
    Raises CalledProcessError when make fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calls = folder / "calls"
    calls.write_text("", encoding="utf-8")
    for name in ("python", "ruff", "pyright"):
        lines = [f"#!{sys.executable} -SE", "import json, sys", f"with open({str(calls)!r}, 'a') as file:",
                 f"    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + chr(10))"]  # fmt: skip
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    subprocess.run(
        ["make", *arguments, f"BIN={folder}"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]
    return [call for whole in found for call in _scripts_of(whole, cwd)]


def _scripts_of(call: list[str], cwd: Path) -> list[list[str]]:
    if call[:3] != ["python", "-m", "lib.pipeline"]:
        return [call]
    return [["python", script.name, *call[3:]] for script in sorted(cwd.glob("0[0-9]_*.py"))]


def _commands_of(line: str) -> Iterator[str]:
    """The commands in a line of shell, those of a loop with each of its values; without comment and `&`."""
    line = re.split(r"\s{2,}|\s#\s|: ", line.strip())[0]
    if loop := re.match(r"for (\w+) in (.*?); do (.*?)(; done)?$", line):
        for value in loop[2].split():
            yield from _commands_of(loop[3].replace(f"${loop[1]}", value))
        return
    if not re.search(r"(^|[;&] |do )(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(python|make|torchrun) ", line):
        return
    try:
        shlex.split(line)
    except ValueError:  # an apostrophe: prose
        return
    part: list[str] = []
    for word in [*_WORDS.findall(line), ";"]:
        if word in _SEPARATORS:
            text = " ".join(part)
            module = re.search(r"python -m (\w+)", text)
            others = module is not None and module[1] not in OWN_PACKAGES  # pip, pytest
            if _START.match(text) and not text.startswith(_IN_PROSE) and not others:
                yield re.sub(r"\[(--[^]]*)\]", r"\1", text).removesuffix(
                    " ..."
                )  # what may be left out is given
            part = []
        else:
            part.append(word)


def _lines() -> Iterator[tuple[str, str]]:
    """(where, shell line) of everything that may hold commands."""
    for file in DOCUMENTS:
        text, name = file.read_text(encoding="utf-8"), file.relative_to(ROOT)
        for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
            at = text[: block.start()].count("\n") + 2
            for offset, line in _joined(block[2]) if block[1] in ("", "sh", "bash") else ():
                yield f"{name}:{at + offset}", line
        prose = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)
        for span in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose):
            yield f"{name}:{prose[: span.start()].count(chr(10)) + 1}", span[1].replace("\n", " ")
    for file in CONFIGS:
        head = "\n".join(
            re.sub(r"^#\s?", "", x)
            for x in file.read_text(encoding="utf-8").splitlines()
            if x.startswith("#")
        )
        for offset, line in _joined(head):
            yield f"{file.relative_to(ROOT)}:{offset + 1}", re.sub(r"^.*?: (?=python|make)", "", line.strip())
    for file in SOURCES:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        for offset, line in _joined(docstring):
            yield f"{file.relative_to(ROOT)}:{offset + 1}", line.strip()


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) with lines that end in a backslash, or in `do` of a loop, joined to the next."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        first, line = number, lines[number]
        while line.rstrip().endswith(("\\", "; do")) and number + 1 < len(lines):
            number += 1
            line = line.rstrip().removesuffix("\\").rstrip() + " " + lines[number].strip()
        yield first, line
        number += 1


# ----------------------------------------------------------------------------------------- flags and keys


@cache
def messages() -> list[tuple[str, str]]:
    """(where, text) of every string literal of the code; what an f-string fills in is `<x>`."""
    found = []
    for file in SOURCES:
        name = relative(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((f"{name}:{node.lineno}", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "<x>" for v in node.values]
                found.append((f"{name}:{node.lineno}", "".join(str(p) for p in parts)))
    return found


def documents() -> Iterator[tuple[str, str]]:
    """(where, line) of the documents, and the comments of the configs."""
    for file in DOCUMENTS:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{file.relative_to(ROOT)}:{number}", line
    for file in CONFIGS:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if "#" in line:
                yield f"{file.relative_to(ROOT)}:{number}", line.partition("#")[2]


_SECTIONS = "|".join(sorted(Config.model_fields, key=len, reverse=True))
_KEY = re.compile(
    rf"(?<![\w./<>{{}}-])((?:{_SECTIONS})(?:\.(?:[a-z][a-z0-9_]*|<\w+>|\w+\[\w+\]))+)(?![\w/(]|\.\w)"
)
_FILE = re.compile(
    r"^tokenizer\.(model|\w+_token(_id)?)$|\.(py|yaml|json|jsonl|parquet|md|txt|csv|safetensors|html|bin|svg|png|gz)$"
)


def config_keys(text: str) -> list[str]:
    """Dotted config keys that a text names, such as `training.steps` or `models.<x>.num_classes`."""
    return [key for key in _KEY.findall(text) if not _FILE.search(key)]


def key_exists(key: str) -> bool:
    """Whether the config has this key; `<x>` and the name of a model stand for any entry of a map."""
    return _has(Config, key.split("."))


@cache
def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, without Annotated, Optional and Union."""
    if get_origin(annotation) in (dict, list, tuple):
        return (annotation,)
    inner = [a for a in get_args(annotation) if isinstance(a, type) or get_origin(a) is not None]
    found = tuple(k for a in inner for k in _kinds(a))
    return found or (annotation,)


def _has(kind: Any, path: list[str]) -> bool:
    if not path:
        return True
    if get_origin(kind) is dict:
        return any(_has(k, path[1:]) for k in _kinds(get_args(kind)[1]))
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return False
    if path[0].startswith("<"):
        return any(_has(k, path[1:]) for f in kind.model_fields.values() for k in _kinds(f.annotation))
    field = kind.model_fields.get(path[0])
    return field is not None and any(_has(k, path[1:]) for k in _kinds(field.annotation))


def flags(text: str) -> list[str]:
    """Flags such as `--run_dir` in a text."""
    return re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ----------------------------------------------------------------------------------------- links


def links() -> Iterator[tuple[str, Path, str]]:
    """(where, file, heading or "") of every link of a document into the tree; code blocks are left out."""
    for file in DOCUMENTS:
        text = file.read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)
        for match in re.finditer(r"\]\(([^)\s]+)\)", prose):
            if not re.match(r"[a-z]+:", match[1]):  # https:, mailto:
                name, _, heading = match[1].partition("#")
                where = f"{file.relative_to(ROOT)}:{prose[: match.start()].count(chr(10)) + 1}"
                yield where, (file.parent / name).resolve() if name else file, heading


def anchors(file: Path) -> set[str]:
    """The names by which links find the headings of a document, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
