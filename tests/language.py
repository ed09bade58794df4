"""Check the language and the shape of the source tree.

`python -m tests.language` prints one line per offence and exits with 1 if there is any. `python -m tests.language PATH ...`
checks these files and folders only. `--kind words` shows one kind of offence:

- words: a word, name or module of the project's old vocabulary. docs/glossary.md gives the term that replaces it.
- sentences: a sentence of more than 30 words in a document or a docstring.
- readme: README.md is too long.
- files: a file of lib/ or a script has more than 400 lines.
- parameters: a constructor or a public function takes more than six parameters.

tests/vocabulary.py holds the words. The module imports the standard library only.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tests.vocabulary import ANOTHER_MEANING, LOCAL_NAMES, NAME_PARTS, NAMES, REFRAIN, REFRAIN_HOME, RULES

ROOT = Path(__file__).resolve().parents[1]

MAX_WORDS = 30  # per sentence
MAX_LINES = 400  # per file of lib/ and per script
MAX_PARAMETERS = 6
README_LINES, README_WORDS, README_WIDTH = 150, 1400, 110
KINDS = ("words", "sentences", "readme", "files", "parameters")

# Files that may use the old words: history, the glossary, and the check itself
HISTORY = {"CHANGELOG.md", "LOG.md", "docs/glossary.md", "tests/vocabulary.py", "tests/test_language.py"}
TEXT_FILES = {".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".txt", ".css", ".js", ".sh"}
TEXT_NAMES = {"Makefile", "run"}


@dataclass(frozen=True)
class Offence:
    path: str
    line: int
    kind: str
    message: str
    is_constructor: bool = False  # of kind `parameters`

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.message}"


# ------------------------------------------------------------------------------------------------ old words
def word_offences(path: str, text: str) -> Iterator[Offence]:
    """Old words of a file. Purposes of random draws are seeds, and keep their words."""
    if path in HISTORY or (path.startswith("docs/remasking/") and not path.endswith("README.md")):
        return
    lowered = text.lower()
    rules = [rule for rule in RULES if any(hint in lowered for hint in rule.hints)]
    lines = text.splitlines() if rules else []
    if path.endswith(".py") and rules:
        lines = _without_seeds(text, lines)
    for number, line in enumerate(lines, 1):
        lowered = line.lower()
        for rule in rules:
            if any(hint in lowered for hint in rule.hints):
                for match in rule.pattern.finditer(line):
                    yield Offence(path, number, "words", f"{match[0].strip()!r}: say {rule.term}")
    if path.endswith(".py"):
        yield from _name_offences(path, text)
    yield from _refrain_offences(path, text)


def _name_offences(path: str, text: str) -> Iterator[Offence]:
    for number, name in _identifiers(text):
        bare = name.strip("_")
        if ANOTHER_MEANING.search(bare):
            continue
        parts = [part for part in bare.split("_") if part in NAME_PARTS]
        term = NAMES.get(bare) or (NAME_PARTS[parts[0]] if parts else None)
        if term is None and bare in LOCAL_NAMES and re.match(LOCAL_NAMES[bare][1], path):
            term = LOCAL_NAMES[bare][0]
        if term:
            yield Offence(path, number, "words", f"name {name!r}: say {term}")


def _refrain_offences(path: str, text: str) -> Iterator[Offence]:
    if path.endswith(".py"):
        blocks = _docstrings(text)
    elif path.endswith(".md"):
        blocks = [(1, text)]
    else:
        return
    for line, block in blocks:
        for count, match in enumerate(REFRAIN.finditer(block)):
            if path != REFRAIN_HOME or count:
                at = line + block[: match.start()].count("\n")
                said = " ".join(match[0].split())
                yield Offence(path, at, "words", f"{said!r}: say what the module does")


def _identifiers(text: str) -> Iterator[tuple[int, str]]:
    """(line, identifier) of the code, those inside f-strings too."""
    for node in _nodes(text):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            yield line, node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, (node.asname or node.name).split(".")[-1]


@lru_cache(maxsize=4)
def _parsed(text: str) -> ast.Module:
    """The syntax tree of a Python file; an empty one where there are errors, which other tools report."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.Module([], [])


@lru_cache(maxsize=4)
def _nodes(text: str) -> list[ast.AST]:
    """All nodes of the syntax tree."""
    return list(ast.walk(_parsed(text)))


def _without_seeds(text: str, lines: list[str]) -> list[str]:
    """The lines with the purposes of random draws blanked: changing one would change the draw."""
    lines = list(lines)
    for node in _nodes(text):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        arguments = [k.value for k in node.keywords if k.arg in ("purpose", "draw")]
        if function.split(".")[0] == "randomness" or function.split(".")[-1] in ("stratified", "keyed"):
            arguments += node.args
        for argument in arguments:
            for inner in ast.walk(argument):
                if (isinstance(inner, ast.Constant) and isinstance(inner.value, str)) or isinstance(
                    inner, ast.JoinedStr
                ):
                    _blank(lines, inner)
    return lines


def _blank(lines: list[str], node: ast.expr) -> None:
    if node.end_lineno != node.lineno or node.end_col_offset is None:
        return
    row = lines[node.lineno - 1].encode()
    blank = b'""' + b" " * (node.end_col_offset - node.col_offset - 2)
    row = row[: node.col_offset] + blank + row[node.end_col_offset :]
    lines[node.lineno - 1] = row.decode(errors="replace")


# ------------------------------------------------------------------------------------------------ sentences
_ABBREVIATIONS = re.compile(
    r"\b(e\.g|i\.e|vs|cf|etc|et al|Fig|Eq|Sec|No|approx|resp|incl|p|pp|Dr|St|ca|Inc|Ltd)\.(?=\s|,)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\s·\s|(?<=[.!?…])[\"')\]*_”]*\s+(?=[\"'(\[*_`“]*[A-Z0-9`±])")
_SHAPE = re.compile(r"\((?:[A-Z0-9][A-Z0-9a-z_+*/ -]{0,11}(?:,\s*|(?=\))))+\)")
_STOP, _BLANK = "\x01", "\x02"  # full stops that end no sentence, and blanks that separate no words
_ITEM = re.compile(r"(?:[-*+•]|\d+[.)])\s+")
# `name: text`, `E1  text`: an entry of a list without bullets
_ENTRY = re.compile(
    r"[*`\w][\w.`*/|<>=\[\]-]*(?:, [\w`*.]+)*(?: \([^)]*\))?:(?:\s|$)|\S+(?: \S+){0,2}\s{2,}\S"
)


def sentence_offences(path: str, text: str) -> Iterator[Offence]:
    """Sentences that are too long, in a document or in the docstrings of a Python file."""
    if path == "LOG.md":
        return
    if path.endswith(".md"):
        blocks = [(1, text)]
    elif path.endswith(".py"):
        blocks = _docstrings(text)
    else:
        return
    for first, block in blocks:
        for line, paragraph in paragraphs(block, markdown=path.endswith(".md")):
            for sentence in sentences(paragraph):
                count = word_count(sentence)
                if count > MAX_WORDS:
                    opening = " ".join(sentence.split()[:12]).replace(_BLANK, " ")
                    yield Offence(path, first + line, "sentences", f"{count} words: {opening} ...")


def _docstrings(text: str) -> list[tuple[int, str]]:
    """(line where it begins, docstring) of a module, its classes and its functions."""
    found = []
    for node in _nodes(text):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[0] if node.body else None
            if (
                isinstance(body, ast.Expr)
                and isinstance(body.value, ast.Constant)
                and isinstance(body.value.value, str)
            ):
                raw = body.value.value
                found.append((body.lineno, raw))
    return found


def paragraphs(text: str, markdown: bool) -> Iterator[tuple[int, str]]:
    """(line from 0, prose) of each paragraph, list item, heading or entry; without code blocks, tables and comments."""
    text = re.sub(r"<!--.*?-->", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    start, indent, part = 0, 0, []  # of the paragraph that is being read
    in_block, continues = False, False  # between ```; a command that goes on in the next line
    for number, line in enumerate([*text.expandtabs(4).splitlines(), ""]):
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if bare.startswith(("```", "~~~")):
            in_block = not in_block
            bare = ""
        skipped = bool(bare) and (in_block or continues or _looks_like_code(bare) or _looks_like_table(bare))
        if markdown and not part and depth >= 4 and not _ITEM.match(bare):
            skipped = bool(bare)  # an indented block
        continues = skipped and bare.endswith("\\")
        single = bool(re.fullmatch(r"[A-Z]\w+:", bare)) or (
            markdown and bare.startswith("#")
        )  # Args:, a heading
        begins = (
            single
            or bool(_ITEM.match(bare))
            or (not markdown and depth <= indent and bool(_ENTRY.match(bare)))
        )
        if part and (begins or skipped or not bare or (not markdown and depth < indent)):
            yield start, " ".join(part)
            part = []
        if not bare or skipped:
            continue
        if not part:
            start, indent = number, depth
        part.append(_ITEM.sub("", bare.lstrip("#> "), count=1) if begins else bare)
        if single:
            yield start, " ".join(part)
            part = []


def _looks_like_table(line: str) -> bool:
    return line.startswith("|") or bool(re.fullmatch(r"[-=|+ :]{3,}", line))


def _looks_like_code(line: str) -> bool:
    return bool(
        re.match(r"(?:>>>|\.\.\. |\$ |(?:[A-Z_]+=\S+ )+\S|(?:\.venv/bin/)?python3? \S|make [a-z_-]+( [A-Z_]+=|$)|pip |git |torchrun )", line)
        or re.match(r"[\w.]+\([^)]*\)(?: ->.*)?$", line)
        or re.search(r"[─▶│└├┌]", line)
    )  # fmt: skip


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph. Inline code, links and shapes are replaced first: they are one word or none."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", paragraph)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"``?([^`]+)``?", _code_word, text)
    text = re.sub(r"<?https?://\S+>?", "URL", text)
    text = _SHAPE.sub("", text)
    text = _ABBREVIATIONS.sub(lambda m: m[1].replace(".", _STOP) + _STOP, text)
    return [part.replace(_STOP, ".") for part in _SENTENCE_END.split(text) if part.strip()]


def _code_word(match: re.Match[str]) -> str:
    """Inline code is one word, and a full stop inside it ends no sentence."""
    return "`" + re.sub(r"\s+", _BLANK, match[1].strip()).replace(".", _STOP) + "`"


def word_count(sentence: str) -> int:
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


# ------------------------------------------------------------------------------------------------ shape
def readme_offences(text: str, path: str = "README.md") -> Iterator[Offence]:
    lines = text.splitlines()
    if len(lines) > README_LINES:
        yield Offence(path, len(lines), "readme", f"{len(lines)} lines; at most {README_LINES}")
    if (words := len(text.split())) > README_WORDS:
        yield Offence(path, len(lines), "readme", f"{words:,} words; at most {README_WORDS:,}")
    for number, line in enumerate(lines, 1):
        if len(line) > README_WIDTH and not line.lstrip().startswith("|"):
            yield Offence(path, number, "readme", f"{len(line)} characters; at most {README_WIDTH}")


def file_offences(path: str, text: str) -> Iterator[Offence]:
    """Long files of lib/ and long scripts; the model files for Hugging Face stand alone, and may be long."""
    if not re.match(r"lib/.*\.py$|0\d_\w+\.py$", path) or re.search(r"/(?:modeling|modular)_\w+\.py$", path):
        return
    count = len(text.splitlines())
    if count > MAX_LINES:
        yield Offence(path, count, "files", f"{count} lines; at most {MAX_LINES}")


def parameter_offences(path: str, text: str) -> Iterator[Offence]:
    """Constructors and public functions with too many parameters, `self` and `cls` aside.

    Hugging Face decides the parameters of a configuration and of `forward`; dataclasses and pydantic models have no constructor of
    their own.
    """
    if not path.endswith(".py") or path.startswith("tests/") or re.search(r"/configuration_\w+\.py$", path):
        return
    tree = _parsed(text)
    for scope, name, node in _functions(tree):
        constructor = name == "__init__"
        if name == "forward" or (name.startswith("_") and not constructor):
            continue
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(a.arg not in ("self", "cls") for a in every)
        if count > MAX_PARAMETERS:
            label = f"{scope}{name}: {count} parameters; at most {MAX_PARAMETERS}"
            yield Offence(path, node.lineno, "parameters", label, is_constructor=constructor)


def _functions(tree: ast.Module) -> Iterator[tuple[str, str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(class and a dot or nothing, name, node) of the functions of a module and of its classes, not of those inside functions."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "", node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.", inner.name, inner


# ------------------------------------------------------------------------------------------------ all of it
def tree_files(paths: Iterable[Path] = ()) -> list[Path]:
    """The text files of the tree that git knows or would add, or those below `paths`."""
    chosen = [path.resolve() for path in paths]
    if not chosen or any(path.is_dir() for path in chosen):
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", *map(str, chosen)], cwd=ROOT,
                                capture_output=True, text=True)  # fmt: skip
        files = [ROOT / name for name in listed.stdout.splitlines()]
        if listed.returncode:  # no git repository
            folders = [path for path in chosen if path.is_dir()] or [ROOT]
            hidden = {".venv", ".git", "outputs", "__pycache__"}
            files = [f for folder in folders for f in folder.rglob("*") if not hidden & set(f.parts)]
        files += [path for path in chosen if path.is_file()]
    else:
        files = chosen
    kept = {f for f in files if f.is_file() and (f.suffix in TEXT_FILES or f.name in TEXT_NAMES)}
    return sorted(kept)


def offences(paths: Iterable[Path] = (), kinds: Iterable[str] = KINDS) -> list[Offence]:
    """All offences of these kinds in the tree, or in some files and folders."""
    found: list[Offence] = []
    for file in tree_files(paths):
        path = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        if "words" in kinds:
            found += word_offences(path, text)
        if "sentences" in kinds:
            found += sentence_offences(path, text)
        if "readme" in kinds and path == "README.md":
            found += readme_offences(text)
        if "files" in kinds:
            found += file_offences(path, text)
        if "parameters" in kinds:
            found += parameter_offences(path, text)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="files and folders (default: the whole tree)"
    )
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="show these offences only; may be repeated"
    )
    options = parser.parse_args()
    if missing := [str(path) for path in options.paths if not path.exists()]:
        parser.error(f"not found: {', '.join(missing)}")
    found = offences(options.paths, options.kind or KINDS)
    for offence in found:
        print(offence)
    print(f"{len(found):,} offences", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
