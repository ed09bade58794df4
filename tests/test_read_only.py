"""A run on a disk that can only be read: it is inspected, its stages are up to date, and texts are scored into another folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lib.config import ROOT
from lib.errors import CannotCreate, UsageError

MOUNT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
CAN_MOUNT = (
    shutil.which("unshare") is not None
    and not subprocess.run(["unshare", "-r", "-m", "true"], check=False, capture_output=True).returncode
)


def inside(run: Path, text: Path, out: Path) -> None:
    """What is done with the run when it can only be read. Prints a JSON object of what came of it."""
    import importlib
    from dataclasses import replace

    from lib import doctor, runs
    from lib.config import load_config
    from tests.conftest import STAGES, run_stages

    config, found = load_config(quick_test=True), {}
    assert not os.access(run, os.W_OK)
    sys.argv = ["doctor", str(run)]
    found["doctor"], found["inspected"] = doctor.main(), len(runs.inspect(run).splitlines())
    run_stages(run, config, STAGES)
    args = runs.RunArgs(run_dir=run, quick_test=True, command=("06_sample.py",), score=text)
    sample = importlib.import_module("06_sample").main
    try:
        sample(config, args)
    except CannotCreate as error:
        found["refused"] = str(error)
    for _ in range(2):
        sample(config, replace(args, out_dir=out))
    print("FOUND " + json.dumps(found))


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="this user cannot mount in a namespace of their own")
def test_a_run_that_can_only_be_read_is_inspected_and_scored_from(quick_run, tmp_path):
    run, text, out = tmp_path / "run", tmp_path / "text.txt", tmp_path / "out"
    shutil.copytree(quick_run, run)
    text.write_text("The value of the name is the object. It returns the item.")
    script = f"from tests.test_read_only import *; inside(Path({str(run)!r}), Path({str(text)!r}), Path({str(out)!r}))"
    words = [
        "unshare",
        "-r",
        "-m",
        "sh",
        "-c",
        MOUNT,
        str(run),
        sys.executable,
        "-c",
        script,
    ]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND ")[2])
    assert found["doctor"] == 0 and found["inspected"] >= 7
    assert "Read-only file system; --out_dir DIR writes into another folder" in found["refused"]
    for stage in ("00_check_data", "03_build_rewards", "06_sample"):
        assert f"{stage} in {run} is up to date" in done.stderr
    (folder,) = out.glob("06_score_*")
    assert f"{folder.name} in " in done.stderr and "is up to date" in done.stderr.splitlines()[-1]
    (tokens,) = pq.read_table(folder / "scores.parquet")["token_ids"].to_pylist()
    assert len(tokens) == len(text.read_text()) and (folder / "scores.html").exists()


def test_another_folder_is_for_files_of_a_user_alone(monkeypatch, tmp_path, capsys):
    from lib.cli import run_stage

    monkeypatch.setattr(sys, "argv", ["06_sample.py", "--out_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        run_stage(lambda config, args: None, "", with_score=True)
    assert stop.value.code == UsageError.exit_code
    assert "--out_dir is for --score and --rank" in capsys.readouterr().err
