"""Start several processes of one training without a launcher: torch is imported once, and the processes are forked.

    python -m tests.processes SIZE PORT 04_train.py --run_dir ...

They get the variables that torchrun sets. As with torchrun, the end of one process by an error or a signal ends the
others. The exit code is that of the first process that failed.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path


def start(rank: int, size: int, port: int, argv: list[str]) -> int:
    """Fork a process that runs a script with the variables of a launcher. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        sys.argv = argv
        module = importlib.import_module(Path(argv[0]).stem)
        from lib.cli import run_stage

        run_stage(module.main, module.__doc__, **FLAGS[module.__name__])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


FLAGS: dict[str, dict[str, bool]] = {
    "04_train": {"with_mode": True, "with_processes": True},
    "05_train_critic": {"with_processes": True},
}


def wait_for(pids: list[int]) -> int:
    """The exit code of the first process that failed, 0 if none did. The others are then told to stop."""
    failed, left = 0, set(pids)
    deadline = None
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.005)
            if deadline is not None and time.monotonic() > deadline:
                for other in left:
                    os.kill(other, signal.SIGKILL)
                deadline = None
            continue
        left.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed, deadline = code, time.monotonic() + 30
            for other in left:
                os.kill(other, signal.SIGTERM)
    return failed


def main() -> int:
    size, port, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    import torch

    torch.set_num_threads(1)
    pids = [start(rank, size, port, argv) for rank in range(size)]
    print("pids", *pids, flush=True)
    return wait_for(pids)


if __name__ == "__main__":
    raise SystemExit(main())
