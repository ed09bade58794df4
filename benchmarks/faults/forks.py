"""Run scripts in forked processes. torch is imported once, so that a stage costs only its own work.

A process that is started here is the leader of a session of its own. All that it starts can be found and ended by that.
"""

import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lib.config import ROOT
from lib.pipeline import PRELOADED

MORE = (
    "jsonschema", "pyarrow.pandas_compat", "lib.cli", "lib.candidates.generators", "lib.candidates.table",
    "lib.evaluation.sampling", "lib.report.page", "lib.report.table", "lib.tasks.finqa.candidates",
    "lib.training.critic_setup", "lib.training.policy", "lib.training.stage_inputs", "matplotlib.pyplot",
    "sklearn.ensemble", "torch.distributed.tensor",
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_BETWEEN_LOOKS = 0.004


def prepare() -> None:
    """Import what stages import, and hash their code, so that no fork has to. Call it once, before the first `start`."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "REMASK_MAKE": "1"}
    for name in (*PRELOADED, *MORE):
        importlib.import_module(name)
    import torch

    from lib.code_version import code_files
    from lib.runs import STAGES

    torch.set_num_threads(1)
    for task in ("text", "finqa", "pools"):
        for stage in STAGES:
            code_files(stage, task)
    gc.collect()
    gc.freeze()


def start(
    argv: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    setup: Callable[[], None] | None = None,
) -> int:
    """Start `python ARGV` in a fork, and return its process id. `-m MODULE` runs a module.

    Args:
        log: the file that its standard output and standard error are appended to.
        env: variables of its environment besides those of this process.
        setup: called in the fork before the script.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the script begins
    pid = os.fork()
    if not pid:
        _run(argv, log, env or {}, setup)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return pid


def _run(
    argv: Sequence[str], log: Path, env: Mapping[str, str], setup: Callable[[], None] | None
) -> NoReturn:
    import runpy

    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        os.environ |= env
        sys.path[0] = str(ROOT)
        if setup is not None:
            setup()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if argv[0] == "-m":
            sys.argv = list(argv[1:])
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(argv)
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:  # before the script could handle it
        code = 130
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def session_of(pid: int) -> list[int]:
    """The living processes of the session that `pid` leads, without zombies."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(folder.name))
    return sorted(found)


def end_session(pid: int) -> None:
    """Kill all that a process has started and that outlived it."""
    for member in session_of(pid):
        if member != os.getpid():
            send(member, signal.SIGKILL)


def send(pid: int, number: int) -> bool:
    """Send a signal. False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def wait(pid: int, seconds: float) -> int:
    """The exit code of a process: negative for a signal. After `seconds` it is killed, and TimeoutError is raised."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            end_session(pid)
            send(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} did not end within {seconds:.0f} s")
        time.sleep(SECONDS_BETWEEN_LOOKS)
