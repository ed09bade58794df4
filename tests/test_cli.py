"""The command line: frozen flags, documented exit codes, help at once."""

import importlib
import os
import resource
import runpy
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lib.cli import STOPPED, make_parser, run_stage
from lib.config import ROOT, load_config
from lib.errors import BadConfig, Busy, CannotWrite, Interrupted, NonFiniteLoss, UsageError
from lib.runs import RunArgs
from tests.process_runs import run_jobs

SCRIPTS = sorted(p.name for p in ROOT.glob("0[0-9]_*.py"))


COMMON = {
    "-h",
    "--help",
    "--version",
    "--config",
    "--run_dir",
    "--quick_test",
    "--set",
    "--overwrite",
    "--resume",
}
OWN = {
    "01_prepare_dataset.py": {"--part"},
    "02_generate_candidates.py": {"--stream", "--part"},
    "03_build_rewards.py": {"--part"},
    "04_train.py": {"--mode", "--only"},
    "06_sample.py": {"--score", "--rank", "--out_dir"},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_of_each_script_are_frozen(script, monkeypatch):
    made = []

    def catch(main, description, with_processes=False, **kinds):
        made.append(make_parser(description or "", **kinds))

    monkeypatch.setattr("lib.cli.run_stage", catch)
    runpy.run_path(str(ROOT / script), run_name="__main__")
    flags = {f for action in made[0]._actions for f in action.option_strings}
    assert flags == COMMON | OWN.get(script, set())


@pytest.mark.parametrize("with_processes", [False, True])
def test_a_wrong_number_of_processes_is_a_message(with_processes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["01_prepare_dataset.py"])
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(SystemExit) as ended:
        run_stage(lambda config, args: None, "test", with_processes=with_processes)
    assert ended.value.code == BadConfig.exit_code
    assert "WORLD_SIZE='' is no number of processes" in capsys.readouterr().err


def test_mode_reaches_the_stage_under_its_own_name_and_an_alias(monkeypatch):
    seen = []
    for word in ("sequence_scorer", "sequence_scoring"):
        monkeypatch.setattr(sys, "argv", ["04_train.py", "--mode", word])
        run_stage(lambda config, args: seen.append(args.only_mode), "test", with_mode=True)
    assert seen == ["sequence_scorer", "sequence_scorer"]


def test_the_first_script_names_settings_that_a_quick_test_replaces(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {path: mine.txt}\n")
    said = []
    for script, flag in (("00_check_data.py", ["--quick_test"]), ("01_prepare_dataset.py", ["--quick_test"]), ("00_check_data.py", [])):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [script, *flag, "--config", str(tmp_path / "mine.yaml")])
        run_stage(lambda config, args: None, "test")
        said.append("replaces data.path=mine.txt" in capsys.readouterr().err)
    assert said == [True, False, False]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("models.judge.start=inspecter", "models.judge.start is 'inspecter'"),
        ("models.generator=null", "models.inspector.start is 'generator', which is not scratch"),
    ],
)
def test_a_model_that_starts_from_an_unknown_one_is_refused_before_any_work(
    monkeypatch, capsys, setting, said
):
    monkeypatch.setattr(sys, "argv", ["00_check_data.py", "--set", setting])
    with pytest.raises(SystemExit) as ended:
        run_stage(lambda config, args: pytest.fail("it has begun"), "test")
    assert ended.value.code == BadConfig.exit_code and said in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ppo", "none"])
def test_a_run_that_only_ranks_cannot_score_a_text_and_leaves_no_folder(tmp_path, method):
    (tmp_path / "a.txt").write_text("a text")
    config = load_config(overrides=[f"critic.method={method}"])
    args = RunArgs(run_dir=tmp_path / "run", score=tmp_path / "a.txt")
    with pytest.raises(BadConfig, match=f"with {method}, no model reads single tokens; --rank FILE"):
        importlib.import_module("06_sample").main(config, args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["4/4", "1", "-1/4", "1/0", "a/b", "1/2/3"])
def test_a_share_of_the_parts_is_i_of_n(value):
    answer = shell("03_build_rewards.py", f"--part={value}")
    assert answer.returncode == 2 and f"'{value}' is not I/N with 0 <= I < N" in answer.stderr


def test_shares_cannot_replace_a_stage():
    answer = shell("03_build_rewards.py", "--part", "0/4", "--overwrite")
    assert answer.returncode == 2 and "--part cannot be used with --overwrite" in answer.stderr


def shell(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_without_torch_or_arrow(script):
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('HEAVY', [m for m in ('torch', 'pyarrow', 'pandas', 'transformers') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell("-c", code, script)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--quick_test" in done.stdout and "HEAVY []" in done.stdout
    # Seconds of the processor, which other processes hardly change: half a second
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_version_prints_the_version_and_the_commit_of_the_working_tree(script, monkeypatch, capsys):
    state = {"commit": "1a2b3c4d5e6f" + "0" * 28, "dirty": False}
    monkeypatch.setattr("lib.code_version.commit", lambda: state)
    monkeypatch.setattr(sys, "argv", [script, "--version"])
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for changes, expected in [
        ({}, f"Remask {declared} (commit 1a2b3c4d5e6f)\n"),
        ({"dirty": True}, f"Remask {declared} (commit 1a2b3c4d5e6f, with local changes)\n"),
        ({"commit": None}, f"Remask {declared}\n"),
    ]:
        state.update(changes)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not ended.value.code and capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--quick_tset"], 2, "did you mean '--quick_test'?"),
        (["--overwrite", "--resume"], 2, "contradict"),
        (["--set", "training.stepz=1"], 78, "did you mean 'steps'?"),
        (["--set", "data.path=nowhere.txt"], 66, "nowhere.txt does not exist"),
        (["--config", "nowhere.yaml"], 66, "nowhere.yaml does not exist"),
        (["--config", "."], 78, "cannot be read"),
        (["--config"], 2, "expected one argument"),
        (["extra"], 2, "unknown argument extra"),
        (["--set", "seed"], 2, "KEY=VALUE"),
        (["--set", "task=txt"], 78, "did you mean 'text'?"),
        (["--resume"], 2, "nothing unfinished"),
    ],
)
def test_mistakes_end_with_one_line_and_their_code(tmp_path, arguments, code, words):
    done = shell("00_check_data.py", "--run_dir", str(tmp_path / "run"), *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_bad_data_ends_with_65_and_fixed_data_continues(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"good words " * 3000 + b"\xff\xfe bad")
    command = ["00_check_data.py", "--run_dir", str(tmp_path / "run"), "--set", f"data.path={text}"]
    done = shell(*command)
    assert done.returncode == 65 and "encoding" in done.stderr and "byte 33000" in done.stderr
    assert (tmp_path / "run" / "00_check_data" / "problems.parquet").exists()
    text.write_bytes(b"good words, each one of them. \n\n" * 3000)
    assert shell(*command).returncode == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2), (Busy("x"), 75), (NonFiniteLoss("x"), 76), (CannotWrite("x"), 74),
        (Interrupted("x", 143), 143), (KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 74),
        (PermissionError(13, "Permission denied", "f"), 73),
    ],
)  # fmt: skip
def test_errors_become_exit_codes(monkeypatch, capsys, error, code):
    monkeypatch.setattr(sys, "argv", ["stage.py"])

    def main(config, args):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_stage(main, "test")
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith("stage.py: error: ")


def test_a_signal_while_another_error_is_said_ends_with_one_line(monkeypatch, capsys):
    """A launcher stops the other processes of a training at the moment when they notice the loss of one."""

    class Lost(UsageError):
        def __str__(self) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            return "another process has ended"

    def main(config, args):
        raise Lost("x")

    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as caught:
        run_stage(main, "test")
    assert caught.value.code == 143
    assert capsys.readouterr().err == f"stage.py: error: {STOPPED}\n"


STAGE = """
import os, resource, signal, sys, time
from pathlib import Path
from lib import schema
from lib.artifacts import Stage
from lib.cli import run_stage
import pyarrow as pa
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored

def main(config, args):
    with Stage("00_check_data.py", config, args, uses=("seed",)) as stage:
        ACT
        text = os.urandom(400_000).hex()
        rows = {"document_id": ["a"], "content": [text], "source": ["s"], "piece": [0]}
        stage.write("documents", pa.table(rows), schema.DOCUMENTS)

run_stage(main, "test")
"""


def act(tmp_path, what: str, run: str = "run") -> subprocess.CompletedProcess:
    """A stage in another process that runs `what` before it writes."""
    argv = ["-c", "--run_dir", str(tmp_path / run)]
    [done] = run_jobs([{"size": 1, "code": STAGE.replace("ACT", what), "argv": argv}])
    return subprocess.CompletedProcess(argv, done["codes"][0], done["output"], done["errors"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "run the same command again"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, "run the same command again"),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))", 74, "File too large"),
        ("from lib.errors import NonFiniteLoss; raise NonFiniteLoss('loss is nan in step 7')", 76, "step 7"),
    ],
)
def test_what_ends_a_stage_from_outside_leaves_no_manifest_and_a_rerun_goes_on(tmp_path, what, code, words):
    done = act(tmp_path, what)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    folder = tmp_path / "run" / "00_check_data"
    assert not (folder / "manifest.json").exists() and not list(folder.glob("*.parquet*"))
    assert act(tmp_path, "pass").returncode == 0 and (folder / "manifest.json").exists()


@pytest.mark.slow
def test_the_same_stage_in_a_second_process_ends_with_75_and_disturbs_nothing(tmp_path):
    what = "print('inside', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", STAGE.replace("ACT", what), "--run_dir", str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as first:
        assert first.stdout is not None and first.stdout.readline() == "inside\n"
        second = act(tmp_path, "pass")
        assert second.returncode == 75 and "another process is at work" in second.stderr
        first.communicate("go on\n")
    assert first.returncode == 0 and (tmp_path / "run" / "00_check_data" / "manifest.json").exists()


@pytest.mark.slow
def test_killed_outright_it_leaves_nothing_that_the_next_run_takes_for_whole(tmp_path):
    done = act(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -9 and not (tmp_path / "run" / "00_check_data" / "manifest.json").exists()
    again = act(tmp_path, "assert stage.resuming")
    assert again.returncode == 0, again.stderr


def test_a_run_folder_that_cannot_be_made_ends_with_73(tmp_path):
    (tmp_path / "run").write_text("a file")
    done = act(tmp_path, "pass", run="run/inside")
    assert done.returncode == 73 and "Traceback" not in done.stderr, done.stderr


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py"])

    def main(config, args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_stage(main, "test")


def test_every_script_opens_with_what_it_does_and_a_command_that_names_it():
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        assert text.startswith(f'"""\n{script[:2]}: ')
        head = text.split('"""')[1]
        assert "reads   " in head and "writes  " in head and f"python {script}" in head
        assert len(text.splitlines()) <= 280, f"{script} is too long to be a story"
    assert Path(ROOT / "Makefile").exists()


def test_paths_of_flags_may_begin_at_the_home_and_files_with_a_dash(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = make_parser("", with_score=True)
    options = parser.parse(["--score=~/my text (v1).txt", "--run_dir=~/run"])
    assert (options.score, options.run_dir) == (Path("/home/me/my text (v1).txt"), Path("/home/me/run"))
    assert parser.parse(["--score=-dash.txt"]).score == Path("-dash.txt")


IGNORED = """
import os, signal, sys, time
from lib.cli import run_stage
from lib.errors import BadData

class Removed:
    def __del__(self):
        os.kill(os.getpid(), getattr(signal, SIGNAL))
        time.sleep(0.01)  # the handler raises here, where nothing can catch it

def main(config, args):
    if PLACE == "removed":
        Removed()
        time.sleep(20)
    try:
        os.kill(os.getpid(), getattr(signal, SIGNAL))
        time.sleep(20)
    except Exception as error:  # as around a library that raises errors of many kinds
        raise BadData(f"cannot be loaded: {error}")

SIGNAL, PLACE = sys.argv.pop(), sys.argv.pop()
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell inherit that it is ignored
run_stage(main, "")
"""


@pytest.mark.parametrize("place", ["removed", "library"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_comes_while_an_object_is_removed_or_a_library_works_ends_the_script(name, code, place):
    done = subprocess.run(
        [sys.executable, "-c", IGNORED, place, name],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=15,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "run the same command again to continue" in done.stderr
