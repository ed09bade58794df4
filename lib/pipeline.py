"""
Run all numbered scripts, one after another, each with the flags that this module is given. `make pipeline` calls it.

torch and transformers take four seconds to import. They are imported once, and each script runs in a process that is
forked afterwards. A script sees no difference from `python 04_train.py`. The first one that fails ends the pipeline,
with its exit code.

Without --run_dir, the run is chosen once, by the rule of script 00, and every script gets it as --run_dir. By their own
rule, the others would take the newest run, which may have another config.
"""

import importlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from lib.cli import with_run_dir
from lib.log import say
from lib.neighbours import share_with_neighbours

ROOT = Path(__file__).resolve().parent.parent
# What more than one script imports. None of these opens a device or starts threads of OpenMP, which would be missing in a
# fork. OpenBLAS and jemalloc start threads, and start them again after a fork
PRELOADED = (
    "pyarrow.parquet", "torch", "transformers", "lib.artifacts", "lib.models.build", "lib.synthetic", "lib.tasks",
    "lib.training.train_model",
)  # fmt: skip


def main() -> int:
    may_fork = sys.platform == "linux"  # elsewhere, system libraries may break in a forked process
    asks_for_help = "-h" in sys.argv or "--help" in sys.argv
    if not asks_for_help:
        sys.argv[1:] = with_run_dir(sys.argv[1:])
    if may_fork and not asks_for_help:
        if (line := share_with_neighbours()) is not None:
            say(line)
        for name in PRELOADED:
            importlib.import_module(name)
    for script in sorted(ROOT.glob("0[0-9]_*.py")):
        code = _forked(script) if may_fork else _started(script)
        if code:
            return code
    return 0


def _started(script: Path) -> int:
    return subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=False).returncode


def _forked(script: Path) -> int:
    """The exit code of a script that runs in a forked process."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _run(script)
    # A signal that ends the script is the script's to handle; this process waits for it and ends with its exit code
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the script by itself
    on_term = signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_term)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _run(script: Path) -> None:
    """Run a script as `python SCRIPT ...` does, and end this process."""
    code = 1
    try:
        sys.path[0] = str(ROOT)
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
