"""The model files keep to the rules that transformers has for its own models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_OURS = {
    "TRF028": "the licence header of the transformers repository",
    "TRF057": "a decorator that makes pages of the transformers site; ours are written out",
}


def test_the_linter_of_transformers_finds_nothing(tmp_path):
    pytest.importorskip("mlinter", reason="needs transformers-mlinter")
    report = tmp_path / "findings.json"
    command = [
        sys.executable,
        "-m",
        "mlinter",
        "--no-progress",
        "--no-cache",
        "--output-json",
        str(report),
        "lib/models",
    ]
    subprocess.run(command, cwd=ROOT, capture_output=True)
    found = json.loads(report.read_text())
    assert set(NOT_OURS) <= set(found["rules"])  # it did run
    left = [
        f"{f['path']}:{f['line']}: {f['message']}" for f in found["findings"] if f["rule"] not in NOT_OURS
    ]
    assert not left, "\n".join(left)
