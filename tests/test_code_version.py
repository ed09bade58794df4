"""The hash of a stage's code: what counts, what does not, and which files a stage can import."""

import ast
from pathlib import Path

import pytest

from lib.code_version import _read, changed_files, code_files, code_only, digest, name_files
from lib.config import ROOT
from lib.runs import STAGES

BEFORE = '''"""A module."""

import os  # for paths


def double(x):
    """Twice x."""
    text = """a # b

    c"""
    return 2 * x, text, "it's # here", 'a "quoted" word'
'''


def sources() -> list[Path]:
    return [*sorted((ROOT / "lib").rglob("*.py")), *(ROOT / f"{name}.py" for name in STAGES)]


def without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            node.body[0].value.value = ""  # pyright: ignore[reportAttributeAccessIssue]
    return tree


def test_what_is_hashed_is_the_code_and_nothing_else():
    """Against Python's own parser, over every file of the project: no code is lost, no docstring stays."""
    for path in sources():
        source = path.read_text(encoding="utf-8")
        stripped = code_only(source)
        assert ast.dump(ast.parse(stripped)) == ast.dump(without_docstrings(source)), path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# for paths", "# something else"),
        ('"""A module."""', '"""A module, well described\n\nover lines: it\'s "good"."""'),
        ('    """Twice x."""\n', '    """Twice x, # that is x + x."""\n'),
        ("\n\n\ndef", "\n\n\n\n# a remark\n    # another\n\ndef"),
        ("word'\n", "word'   \n"),
        ("def double(x):\n", "def double(x):  # doubles\n"),
    ],
)
def test_words_for_people_change_no_hash(old, new):
    assert old in BEFORE and code_only(BEFORE.replace(old, new)) == code_only(BEFORE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ("# b", "# B"),  # within a text
        ("b\n\n    c", "b\n    c"),
        ("# here", "# there"),
        ('a "quoted" word', 'a "quoted" world'),
        ("def double(x)", "def double(x, y)"),
        ("import os", "import sys"),
        ("    return", "  return"),
    ],
)
def test_a_change_of_code_changes_the_hash(old, new):
    assert old in BEFORE and code_only(BEFORE.replace(old, new)) != code_only(BEFORE)


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def project(tmp_path):
    write(
        tmp_path,
        **{
            "04_train": "from lib.a import f\nimport json\n",
            "lib/__init__": "",
            "lib/a": "def f():\n    from lib import (\n        b,  # a module\n        no_module,\n    )\n",
            "lib/b": "import lib.models.one as m, os\n",
            "lib/models/__init__": "from .two import x\n",
            "lib/models/one": "if TYPE_CHECKING:\n    from ..c import y\n",
            "lib/models/two": "x = 1\n",
            "lib/c": "",
            "lib/tasks/__init__": "",
            "lib/tasks/text/__init__": "from lib.tasks.text import words\n",
            "lib/tasks/text/words": "",
            "lib/tasks/other": "",
            "lib/unused": "'''from lib import nothing'''\n",
            "benchmarks/speed": "import lib.unused",
            "tests/test_a": "import lib.unused",
        },
    )
    return tmp_path


REACHED = [
    "04_train.py", "lib/__init__.py", "lib/a.py", "lib/b.py", "lib/c.py", "lib/models/__init__.py", "lib/models/one.py",
    "lib/models/two.py", "lib/tasks/__init__.py", "lib/tasks/text/__init__.py", "lib/tasks/text/words.py",
]  # fmt: skip


def test_what_a_stage_can_import_counts_and_nothing_else_does(project):
    found = code_files("/somewhere/04_train.py", "text", project)
    assert list(found) == REACHED
    assert "lib/tasks/other.py" in code_files("04_train", "other", project)
    assert (
        list(code_files("04_more_of_it.py", "text", project)) == REACHED
    )  # no file of its own: the script of 04
    for path in REACHED:
        (project / path).write_text((project / path).read_text() + "z = 1\n")
        _read.cache_clear()
        assert changed_files(found, code_files("04_train", "text", project)) == [path]
        (project / path).write_text((project / path).read_text().removesuffix("z = 1\n"))
    for path in ("lib/unused.py", "benchmarks/speed.py", "tests/test_a.py", "lib/tasks/other.py"):
        (project / path).write_text("changed = 1\n")
    _read.cache_clear()
    assert code_files("04_train", "text", project) == found


def test_imports_are_those_that_python_sees():
    """The closure over the project's own imports, found by Python's parser."""

    def modules(path: Path) -> set[str]:
        package, found = path.relative_to(ROOT).parts[:-1], set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                parents = package[: len(package) - node.level + 1] if node.level else ()
                origin = ".".join([*parents, *([node.module] if node.module else [])])
                found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        return {name for name in found if name.split(".")[0] == "lib"}

    def files(module: str) -> set[Path]:
        parts = module.split(".")
        packages = {ROOT.joinpath(*parts[:n]) / "__init__.py" for n in range(1, len(parts) + 1)}
        return {p for p in packages | {ROOT.joinpath(*parts).with_suffix(".py")} if p.exists()}

    imported = {path: set().union(*map(files, modules(path))) for path in sources()}
    for name in STAGES:
        reached = {ROOT / f"{name}.py", *files("lib.tasks.finqa")}
        while more := set().union(*(imported[p] for p in reached)) - reached:
            reached |= more
        assert {ROOT / p for p in code_files(name, "finqa")} == reached, name


def test_files_are_named_a_few_and_the_rest_counted():
    assert name_files(["a", "b"]) == "a, b"
    assert name_files([*"abcde"]) == "a, b, c and 2 more"
    assert changed_files({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "3", "d": "4"}) == ["b", "c", "d"]
    assert digest({"a": "1"}) == digest({"a": "1"}) != digest({"a": "2"}) != digest({"b": "2"})
