"""The house keeps its order: imports go down the list of floors, and what is banned stays out."""

import ast

import pytest

from lib.config import ROOT

FLOORS = [
    {"errors"},
    {
        "strict_yaml",
        "randomness",
        "durable",
        "digest_table",
        "log",
        "machine",
        "room",
        "user_files",
        "own_code",
        "engine",
        "devices",
        "neighbours",
    },
    {"labels", "label_files", "label_values"},
    {"sections"},
    {"config_files"},
    {"config"},
    {
        "config_reference",
        "schema",
        "runs",
        "table_writer",
        "token_store",
        "code_version",
        "outside",
        "executors",
    },
    {
        "stage",
        "artifacts",
        "units",
        "units_summary",
        "cli",
        "doctor",
        "pipeline",
        "metrics",
        "detection",
        "runtime",
        "tokenization",
        "surfaces",
    },
    {"models"},
    {"diffusion", "synthetic", "ranking", "shards"},
    {"training"},
    {"tasks"},
    {"candidates", "examples"},
    {"report"},
    {"evaluation"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
NO_TORCH = {
    "errors",
    "strict_yaml",
    "randomness",
    "durable",
    "digest_table",
    "executors",
    "log",
    "user_files",
    "own_code",
    "labels",
    "label_files",
    "label_values",
    "sections",
    "config",
    "config_files",
    "config_reference",
    "schema",
    "runs",
    "table_writer",
    "token_store",
    "code_version",
    "outside",
    "stage",
    "artifacts",
    "units",
    "units_summary",
    "cli",
    "doctor",
    "machine",
    "room",
    "pipeline",
    "neighbours",
}
FILES = sorted((ROOT / "lib").rglob("*.py"))
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
LEGACY = ROOT / "lib" / "models" / "ltg_bert" / "legacy_import.py"


def room(path) -> str:
    return path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module] if node.module != "lib" else [f"lib.{a.name}" for a in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    if path.name == "__init__.py" and path.parent == ROOT / "lib":
        return
    here = room(path)
    assert here in FLOOR_OF, f"{here} has no floor yet: give it one"
    tree = ast.parse(path.read_text())
    for name in imports(tree):
        assert not name[:1].isdigit(), f"{path} imports a script"
        if name.startswith("lib."):
            other = name.split(".")[1]
            assert FLOOR_OF[other] <= FLOOR_OF[here], f"{path}: {here} must not import {other}"


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_the_ground_floor_imports_torch_nowhere_at_the_top(name):
    files = [path for path in FILES if room(path) == name]
    bodies = [node for path in files for node in ast.parse(path.read_text()).body]
    top = [n for n in bodies if isinstance(n, ast.Import | ast.ImportFrom)]
    assert files
    assert not [i for node in top for i in imports(node) if i.split(".")[0] in ("torch", "transformers")]


def test_the_processes_are_known_without_torch_and_numpy():
    """The command line asks who this process is, and must answer --help at once."""
    body = ast.parse((ROOT / "lib" / "engine" / "processes.py").read_text()).body
    top = {i for n in body if isinstance(n, ast.Import | ast.ImportFrom) for i in imports(n)}
    assert not {i.split(".")[0] for i in top} & {"torch", "numpy"}


@pytest.mark.parametrize(
    "path", [*FILES, *sorted(ROOT.glob("0*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_engine_alone_knows_torch_distributed(path):
    if room(path) != "engine" if path.is_relative_to(ROOT / "lib") else True:
        assert not [i for i in imports(ast.parse(path.read_text())) if i.startswith("torch.distributed")]


@pytest.mark.parametrize(
    "path", [*FILES, *sorted(ROOT.glob("0*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_unsafe_is_called(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in BANNED_CALLS, f"{path}:{node.lineno}"
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                called = f"{node.func.value.id}.{node.func.attr}"
                allowed = called == "torch.load" and path == LEGACY
                assert allowed or called not in ("torch.load", "yaml.load", "os.system", "joblib.load"), (
                    f"{path}:{node.lineno}"
                )
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (on and keyword.arg in ("shell", "allow_pickle", "trust_remote_code")), (
                    f"{path}:{node.lineno}"
                )
        for name in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else []:
            assert name.split(".")[0] not in ("pickle", "joblib", "dill", "shelve"), f"{path}:{node.lineno}"


def test_the_ignore_file_does_not_hide_the_library():
    assert "lib/" not in (ROOT / ".gitignore").read_text().split()
