"""`python -m lib.pipeline`: every script in order, with the flags, as a process of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lib import cli, pipeline
from lib.config import ROOT
from lib.pipeline import PRELOADED


@pytest.fixture
def tree(tmp_path):
    """A folder with the driver, and a function that adds a script to it and that runs the pipeline."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "cli.py").write_text("def with_run_dir(words): return words", encoding="utf-8")
    (tmp_path / "lib" / "log.py").write_text("say = print", encoding="utf-8")
    (tmp_path / "lib" / "neighbours.py").write_text("def share_with_neighbours(): pass", encoding="utf-8")
    text = (
        (ROOT / "lib" / "pipeline.py")
        .read_text(encoding="utf-8")
        .replace('"pyarrow.parquet", "torch"', '"json"')
    )
    for name in PRELOADED:  # these scripts need none of them
        text = text.replace(f'"{name}"', '"json"')
    (tmp_path / "lib" / "pipeline.py").write_text(text, encoding="utf-8")
    return tmp_path


def add(tree, name: str, code: str) -> None:
    lines = ["import os, sys, signal, time", "said = open('said', 'a')", code, "said.flush()"]
    (tree / name).write_text("\n".join(lines), encoding="utf-8")


def start(tree, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lib.pipeline", *flags]
    return subprocess.Popen(command, cwd=tree, stderr=subprocess.PIPE, text=True)


def said(tree) -> list[str]:
    return (tree / "said").read_text(encoding="utf-8").splitlines()


REPORT = (
    "print([os.path.basename(sys.argv[0]), *sys.argv[1:]], __name__, os.getpid() != os.getppid(), file=said)"
)


def test_scripts_run_in_order_with_the_flags_as_main_modules(tree):
    for name in ("06_last.py", "00_first.py", "other.py"):
        add(tree, name, REPORT + "\nimport lib")
    assert start(tree, "--set", "a=b c").wait(30) == 0
    assert said(tree) == [
        f"{[name, '--set', 'a=b c']} __main__ True" for name in ("00_first.py", "06_last.py")
    ]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(78)", 78),
        ("sys.exit('text')", 1),
        ("raise ValueError('oh')", 1),
        ("os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_first_failure_ends_the_pipeline_with_its_code(tree, end, code):
    add(tree, "00_first.py", REPORT + "; said.flush()\n" + end)
    add(tree, "01_second.py", REPORT)
    process = start(tree)
    printed = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert len(said(tree)) == 1
    assert ("ValueError: oh" in printed) == ("oh" in end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_script_which_decides_how_to_end(tree, number):
    code = f"""signal.signal({int(number)}, lambda *_: sys.exit(130))
print('ready', file=said, flush=True)
time.sleep(60)"""
    add(tree, "00_first.py", code)
    add(tree, "01_second.py", REPORT)
    process = subprocess.Popen([sys.executable, "-m", "lib.pipeline"], cwd=tree, start_new_session=True)
    while not (tree / "said").exists() or said(tree) != ["ready"]:
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal does
    else:
        process.send_signal(number)
    assert process.wait(30) == 130
    assert said(tree) == ["ready"]


def test_help_prints_the_flags_of_the_scripts(tree):
    shutil.copy(ROOT / "lib" / "pipeline.py", tree / "lib" / "pipeline.py")
    add(tree, "00_first.py", "print('torch' in sys.modules, file=said)")
    assert start(tree, "--help").wait(30) == 0
    assert said(tree) == ["False"], "help waits for no import"


@pytest.fixture
def runs_of_stages(tmp_path, monkeypatch):
    """Run the pipeline with words, without its scripts: words -> the name of each script's run."""
    (tmp_path / "outputs").mkdir()
    for name in ("00_check_data.py", "01_prepare_dataset.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    monkeypatch.setattr(pipeline, "PRELOADED", ())
    monkeypatch.setattr(pipeline, "share_with_neighbours", lambda: None)

    def run(*words: str) -> list[str]:
        found = []

        def note(script) -> int:
            options = cli.make_parser("").parse(sys.argv[1:])
            found.append(options.run_dir.name if options.run_dir else "none")
            return 0

        monkeypatch.setattr(pipeline, "_forked", note)
        monkeypatch.setattr(pipeline, "_started", note)
        monkeypatch.setattr(sys, "argv", ["pipeline", *words])
        assert pipeline.main() == 0
        return found

    return run


def test_all_scripts_of_a_pipeline_work_on_the_run_with_its_config(runs_of_stages):
    assert runs_of_stages() == ["run_001"] * 2
    assert runs_of_stages("--set", "seed=2") == ["run_002"] * 2
    assert runs_of_stages() == ["run_001"] * 2, "not the newest run, which has another seed"
    assert runs_of_stages("--run_dir", "outputs/mine") == ["mine"] * 2
    assert runs_of_stages("--set", "seed=wrong") == ["none"] * 2, "script 00 says what is wrong"
