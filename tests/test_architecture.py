"""docs/architecture.md: every file, folder and name that it mentions exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lib.config import ROOT

PAGE = ROOT / "docs" / "architecture.md"
TEXT = re.sub(r"^```.*?^```", "", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)  # without code blocks
REFERENCE = re.compile(
    r"((?:lib|tests|docs|configs|benchmarks)/[\w./-]*|[0-9]{2}_\w+\.py)(?::([A-Za-z_][\w.]*))?"
)
REFERENCES = sorted(
    {m.groups(default="") for t in re.findall(r"`([^`]+)`", TEXT) if (m := REFERENCE.fullmatch(t))}
)
LINKS = sorted(set(re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXT)))


@cache
def names_in(path: Path) -> frozenset[str]:
    """The functions, classes, methods, fields and variables of a module: `name` and `Class.name`."""
    return frozenset(_names(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def _names(body: list[ast.stmt], prefix: str):
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _names(node.body, f"{node.name}.")
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            for name in ast.walk(target) if target is not None else ():
                if isinstance(name, ast.Name):
                    yield prefix + name.id


def test_the_page_has_references():
    assert len(REFERENCES) > 100 and len([name for _, name in REFERENCES if name]) > 60


@pytest.mark.parametrize(("path", "name"), REFERENCES, ids=[":".join(r).strip(":") for r in REFERENCES])
def test_a_reference_exists(path, name):
    assert (ROOT / path).exists(), f"{PAGE.name} names {path}, which does not exist"
    assert (ROOT / path).is_dir() == path.endswith("/"), f"{path}: folders end in a slash, files do not"
    if name:
        assert name in names_in(ROOT / path), f"{PAGE.name} names {path}:{name}, which does not exist"


@pytest.mark.parametrize("link", LINKS)
def test_a_link_leads_to_a_file(link):
    assert "://" in link or (PAGE.parent / link).exists(), f"{PAGE.name} links {link}, which does not exist"
