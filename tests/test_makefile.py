"""`make`: what it hands to the scripts, word by word."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lib.config import ROOT


@pytest.fixture
def make(tmp_path):
    """`make` in a folder with one stage, whose python writes down its arguments: words -> (lists of arguments)."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "00_first.py", "06_sample.py"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >> said\nprintf "\\n\\0" >> said\n'
    )
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()

    def call(*words: str, **environment: str) -> list[list[str]]:
        (tmp_path / "said").unlink(missing_ok=True)
        outer = {k: v for k, v in os.environ.items() if k not in ("SET", "RUN", "CONFIG", "MAKEFLAGS", "MAKELEVEL")}  # fmt: skip
        done = subprocess.run(
            ["make", *words],
            cwd=tmp_path,
            env=outer | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        calls = (tmp_path / "said").read_text().split("\0\n\0")[:-1]
        return [call.split("\0") for call in calls]

    return call


def test_settings_with_spaces_reach_the_scripts_whole(make, tmp_path):
    (tmp_path / "[critic]").touch()
    words = """SET=data.path="my data/a (1).txt" seed=3 sampler.prompt='To be; or $$HOME * not' sampler.policies=[critic]"""
    calls = make("pipeline", words, "RUN=my runs/run_1")
    settings = [
        "--set", "data.path=my data/a (1).txt", "--set", "seed=3", "--set", "sampler.prompt=To be; or $HOME * not",
        "--set", "sampler.policies=[critic]",
    ]  # fmt: skip
    start = ["-m", "lib.pipeline", "--config", "configs/default.yaml"]
    assert calls == [[*start, "--run_dir", "my runs/run_1", *settings]]
    (first,) = make("quick_test", words)
    assert first[4:-4] == settings and first[-4:-1] == ["--quick_test", "--overwrite", "--run_dir"]


def test_settings_come_from_the_environment_too_and_may_be_missing(make):
    assert make("pipeline", SET="seed=4 device=cpu")[0][4:] == ["--set", "seed=4", "--set", "device=cpu"]
    assert make("pipeline")[0][2:] == ["--config", "configs/default.yaml"]
    assert make("pipeline", "CONFIG=a.yaml b.yaml")[0][2:] == ["--config", "a.yaml", "--config", "b.yaml"]


def test_a_stage_that_fails_ends_make(make, tmp_path):
    python = Path(tmp_path / ".venv" / "bin" / "python")
    python.write_text("#!/bin/sh\nexit 65\n")
    with pytest.raises(AssertionError, match="65"):
        make("pipeline", "SET=seed=3")


def test_a_run_with_a_space_is_inspected(make):
    assert make("inspect", "RUN=my runs/run_1") == [["-m", "lib.runs", "my runs/run_1"]]
    assert make("inspect") == [["-m", "lib.runs"]]
    assert make("doctor", "RUN=my runs/run_1") == [["-m", "lib.doctor", "my runs/run_1"]]
