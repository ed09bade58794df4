"""Run scripts in several processes without a launcher: torch is imported once, and the processes are forked.

    python -m tests.processes

reads one job per line of standard input. A job is {"size": processes, "argv": ["04_train.py", "--run_dir", ...]}. It may also have

    "kill"        {"rank": r, "after": seconds, "signal": number}: a signal to one process, by default SIGKILL;
                  with "when": PATH, the seconds (default 0) count from the moment at which PATH exists
    "module"      its `main()` runs instead of a script; the first word of "argv" has no meaning
    "env"         variables that replace those of the launcher
    "file_limit"  bytes: process 0 cannot write longer files, as on a full disk

The processes get the variables that torchrun sets. As with torchrun, the end of one process by an error or a signal ends
the others. Each job prints one line: its exit codes, its seconds, and what its processes wrote to standard error.
"""

import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

GRACE_SECONDS = 5  # from SIGTERM to SIGKILL
PRELOADED = (
    "jsonschema", "pyarrow.pandas_compat", "lib.artifacts", "lib.candidates.generators", "lib.candidates.table",
    "lib.cli", "lib.evaluation.sampling", "lib.report.table",
    "lib.tasks.finqa.candidates", "lib.training.critic_setup", "lib.training.policy", "lib.training.stage_inputs",
    "lib.training.train_model", "lib.training.trackers", "sklearn.ensemble", "torch.distributed.fsdp",
    "torch.distributed.tensor", "transformers.models.llama.modeling_llama",
)  # fmt: skip
FLAGS: dict[str, dict[str, bool]] = {
    "02_generate_candidates": {"with_stream": True},
    "04_train": {"with_mode": True, "with_processes": True},
    "05_train_critic": {"with_processes": True},
}


def fork(rank: int, job: dict, port: int, errors: int) -> int:
    """A process that runs the job's script as `rank`, with standard error in the file `errors`. Returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["size"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        } | job.get("env", {})  # fmt: skip
        if rank == 0 and "file_limit" in job:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        sys.argv = job["argv"]
        name = Path(job["argv"][0]).stem
        if "module" in job:
            importlib.import_module(job["module"]).main()
        else:
            from lib.cli import run_stage

            module = importlib.import_module(name)
            run_stage(module.main, module.__doc__, **FLAGS.get(name, {}))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(pids: list[int], kill: dict | None) -> list[int]:
    """The exit code of each process, in order of the ranks. If one fails, the others get SIGTERM."""
    codes: dict[int, int] = {}
    begin, deadline = time.monotonic(), None
    while len(codes) < len(pids):
        if kill is not None and not Path(kill.get("when", "/")).exists():
            begin = time.monotonic()
        elif kill is not None and time.monotonic() - begin > kill.get("after", 0):
            victim, number = pids[kill["rank"]], kill.get("signal", signal.SIGKILL)
            kill = None
            if victim not in codes:
                os.kill(victim, number)
        if deadline is not None and time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.005)
            continue
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


def run(job: dict) -> dict:
    """Exit codes, seconds and messages of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as errors:
        begin = time.monotonic()
        pids = [fork(rank, job, port, errors.fileno()) for rank in range(job["size"])]
        codes = wait_for(pids, job.get("kill"))
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    return {"codes": codes, "seconds": time.monotonic() - begin, "errors": text}


def main() -> int:
    import torch

    from lib.code_version import code_files
    from lib.runs import STAGES

    for name in PRELOADED:  # so that no fork has to import them
        importlib.import_module(name)
    for task in ("text", "finqa"):  # nor to hash the code again
        for stage in STAGES:
            code_files(stage, task)
    torch.set_num_threads(1)
    os.fsync = os.fstat  # as in conftest.py
    # Forks collect garbage after each model. They need not visit, and so copy, what was imported here
    gc.collect()
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(run(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
