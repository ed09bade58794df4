"""Run scripts in several processes without a launcher: torch is imported once, and the processes are forked.

    python -m tests.processes

reads one job per line of standard input. A job is {"size": processes, "argv": ["04_train.py", "--run_dir", ...]}. It may also have

    "kill"        {"rank": r, "after": seconds, "signal": number}: a signal to one process, by default SIGKILL;
                  with "when": PATH, the seconds (default 0) count from the moment at which PATH exists
    "module"      its `main()` runs instead of a script; the first word of "argv" has no meaning
    "code"        Python code that runs instead of a script
    "env"         variables that replace those of the launcher
    "grace"       seconds from the SIGTERM of a launcher to its SIGKILL
    "patience"    seconds for which a process that reports an error waits for the others (`lib.cli.SECONDS_FOR_OTHERS`)
    "file_limit"  bytes: process 0 cannot write longer files, as on a full disk

The processes get the variables that torchrun sets. As with torchrun, the end of one process by an error or a signal ends
the others. Each job prints one line: its exit codes, its seconds, and what its processes wrote to standard error and output.

A job with "beside": NAME runs beside those that follow, and prints an empty line of JSON when it has begun; {"wait": NAME}
prints its result. It cannot have "kill".
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

GRACE_SECONDS = 5
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


def fork(rank: int, job: dict, port: int, errors: int, output: int) -> int:
    """A process that runs the job's script as `rank` and writes what it says to two files. Returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(errors, 2)
        os.dup2(output, 1)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["size"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        } | job.get("env", {})  # fmt: skip
        if rank == 0 and "file_limit" in job:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        if "patience" in job:
            importlib.import_module("lib.cli").SECONDS_FOR_OTHERS = job["patience"]
        sys.argv = job["argv"]
        name = Path(job["argv"][0]).stem
        if "code" in job:
            exec(job["code"], {"__name__": "__main__"})
        elif "module" in job:
            raise SystemExit(importlib.import_module(job["module"]).main() or 0)
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
        sys.stdout.flush()
        os._exit(code)


class Running:
    """The processes of a job. If one of them fails, the others get SIGTERM."""

    def __init__(self, job: dict):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.kill, self.codes = job.get("kill"), {}
        self.grace = job.get("grace", GRACE_SECONDS)
        self.begin, self.deadline = time.monotonic(), None
        self.armed = self.begin  # from when on the seconds of the kill count
        self.said = {name: tempfile.TemporaryFile() for name in ("errors", "output")}  # noqa: SIM115 (`result` closes)
        files = [file.fileno() for file in self.said.values()]
        self.pids = [fork(rank, job, port, *files) for rank in range(job["size"])]

    def step(self) -> bool:
        """Send what signals are due. Returns whether all processes have ended."""
        self._disturb()
        for pid in set(self.pids) - set(self.codes):
            if self.deadline is not None and time.monotonic() > self.deadline:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()) and self.deadline is None:
            self.deadline = time.monotonic() + self.grace
            for pid in set(self.pids) - set(self.codes):
                os.kill(pid, signal.SIGTERM)
        return len(self.codes) == len(self.pids)

    def _disturb(self) -> None:
        if self.kill is None:
            return
        if not Path(self.kill.get("when", "/")).exists():
            self.armed = time.monotonic()
        elif time.monotonic() - self.armed > self.kill.get("after", 0):
            victim, number = self.pids[self.kill["rank"]], self.kill.get("signal", signal.SIGKILL)
            self.kill = None
            if victim not in self.codes:
                os.kill(victim, number)

    def result(self) -> dict:
        """Exit codes in the order of the ranks, seconds and messages, when all processes have ended."""
        while not self.step():
            time.sleep(0.005)
        seconds, texts = time.monotonic() - self.begin, {}
        for name, file in self.said.items():
            file.seek(0)
            texts[name] = file.read().decode(errors="replace")
            file.close()
        return {"codes": [self.codes[pid] for pid in self.pids], "seconds": seconds, **texts}


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
    beside: dict[str, Running] = {}
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        running = beside.pop(job["wait"]) if "wait" in job else Running(job)
        if "beside" in job:
            beside[job["beside"]] = running
        print(json.dumps({} if "beside" in job else running.result()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
