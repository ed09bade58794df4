"""The parts are made by actors of Ray: on this machine, or on a cluster that RAY_ADDRESS names.

Ray restarts an actor that is lost, and gives it its part again. All machines of a cluster see the run's folder and this
project at the same paths. Ray is optional: requirements-cluster.txt has its version.
"""

import contextlib
import importlib
import importlib.metadata
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lib.errors import BadConfig, Interrupted, MissingInput, ProcessLost
from lib.executors.base import MAX_LOSSES, Make, Work, answer_of, lost, portable, threads_of_each
from lib.log import say, silence

VERSION = "2.60.0"  # as in requirements-cluster.txt
SERVERS = {"gcs_server", "raylet"}  # of a Ray of our own; without them nothing goes on
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_OF_ABSENCE = 45  # of a cluster's server, which may restart; after 60, Ray ends the process
ADVICE = "run `pip install -r requirements-cluster.txt`, or set executor.type to local or processes"


class RayExecutor:
    """Makes parts in `workers` actors. They start with the first part, and end with the block.

    A Ray that runs already in this process is used, and stays. One that is started here listens on the loopback address only,
    and ends with the block.
    """

    def __init__(self, work: Work, workers: int):
        self._work, self._workers = work, workers
        self._actors: list[Any] = []
        self._owns_ray = False
        self._watch: _ServerWatch | None = None

    def __enter__(self) -> "RayExecutor":
        self._ray = _import_ray()
        return self

    def __exit__(self, *_) -> None:
        if self._watch is not None:
            self._watch.over.set()
        for actor in self._actors:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.kill(actor)
        self._actors = []
        if self._owns_ray:
            self._ray.shutdown()
            self._owns_ray = False

    def make(self, numbers: Iterable[int]) -> Iterator[int]:
        waiting = deque(numbers)
        if waiting and not self._actors:
            self._start(min(self._workers, len(waiting)))
        running: dict[Any, tuple[Any, int]] = {}  # future -> actor and part
        idle = list(self._actors)
        while waiting or running:
            while waiting and idle:
                actor, number = idle.pop(), waiting.popleft()
                running[actor.make.remote(number)] = (actor, number)
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            actor, number = running.pop(done)
            idle.append(actor)
            try:
                _, error = self._ray.get(done)
            except self._ray.exceptions.RayActorError:
                raise lost(number) from None
            if error is not None:
                raise error
            yield number

    def _start(self, count: int) -> None:
        """Join or start Ray, and start the actors."""
        ray = self._ray
        if not ray.is_initialized():
            self._watch = _ServerWatch(ray)
            self._watch.start()
            _init(ray, self._workers)
            self._owns_ray = True
        resources = ray.cluster_resources()
        cores, gpus = int(resources.get("CPU", 1)), resources.get("GPU", 0)
        if "RAY_ADDRESS" in os.environ:
            threads = max(1, cores // self._workers)
        else:
            threads = threads_of_each(self._workers)
        if count * threads > cores:  # an actor without a core would wait, and a part with it
            count = max(1, cores // threads)
            say(
                f"executor.workers is {self._workers}, but Ray has {cores} cores; {count} workers are started"
            )
        share = math.floor(min(1.0, gpus / self._workers) * 1e4) / 1e4 if self._work.uses_device else 0
        options = {
            "num_cpus": threads,
            "num_gpus": share,
            "max_restarts": -1,
            "max_task_retries": MAX_LOSSES - 1,
        }
        actor_class = ray.remote(**options)(_Actor)
        self._actors = [actor_class.remote(self._work, threads) for _ in range(count)]


class _Actor:
    """A worker. It loads what all parts need when the first part is made."""

    def __init__(self, work: Work, threads: int):
        silence()  # the main process speaks for all
        self._work, self._threads = work, threads
        self._make: Make | None = None

    def make(self, number: int) -> tuple[int, Exception | None]:
        try:
            self._make = self._make or self._work.open(self._threads)
        except Exception as error:
            return number, portable(error)
        return answer_of(self._make, number)


class _ServerWatch(threading.Thread):
    """Ends this process with a message and the code of ProcessLost when the server of Ray is gone.

    The main thread waits in Ray's own code then, where no exception reaches it; after a minute, Ray would end the process with
    code 1. Parts are complete or absent at each moment, so that nothing is lost. While Ray starts, no other thread
    runs for about a second. A server that is killed then ends the process after that minute, with a message of Ray.
    """

    def __init__(self, ray: Any):
        super().__init__(daemon=True)
        self.over = threading.Event()
        self._worker = ray._private.worker
        self._seen = time.monotonic()  # when the server of a cluster answered last

    def run(self) -> None:
        while not self.over.wait(SECONDS_BETWEEN_LOOKS):
            node = self._worker._global_node  # there as soon as Ray has started
            if node is not None and self._is_lost(node) and not self.over.is_set():
                script = Path(sys.argv[0]).name
                print(
                    f"{script}: error: the server of Ray was ended from outside. Complete parts are kept: run the same command again",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(ProcessLost.exit_code)

    def _is_lost(self, node: Any) -> bool:
        if node.is_head():
            return any(name in SERVERS for name, _ in node.dead_processes())
        host, _, port = node.gcs_address.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            self._seen = time.monotonic()
        return time.monotonic() - self._seen > SECONDS_OF_ABSENCE


def _import_ray() -> Any:
    """The library. Raises MissingInput if it is absent, BadConfig if it has another version."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise MissingInput(f"executor.type is ray, but Ray is not installed; {ADVICE}") from None
    if found != VERSION:
        raise BadConfig(
            f"executor.type is ray, and Ray {found} is installed, but {VERSION} is needed; {ADVICE}"
        )
    return importlib.import_module("ray")


def _init(ray: Any, workers: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine, without a dashboard."""
    from lib.config import ROOT

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "include_dashboard": None,
        "runtime_env": {"env_vars": {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}},
    }
    address = os.environ.get("RAY_ADDRESS")
    with _own_signals():
        _join_or_start(ray, address, workers, common)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that ends with code 15. Ours returns as soon as Ray has started."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:
            raise
        raise Interrupted("stopped by SIGTERM; run the same command again to continue", 143) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _join_or_start(ray: Any, address: str | None, workers: int, common: dict[str, Any]) -> None:
    if address and address != "local":
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MissingInput(
                f"no Ray cluster answers at RAY_ADDRESS={address}: {text}; start one with `ray start --head`, or unset "
                "RAY_ADDRESS to start Ray on this machine"
            ) from None
        return
    say("starting Ray on this machine")
    cores = max(workers * threads_of_each(workers), os.cpu_count() or 1)
    try:
        ray.init(
            address="local",
            num_cpus=cores,
            _node_ip_address="127.0.0.1",
            # The default is 15: on a busy machine, an actor would take minutes to start
            _system_config={"worker_niceness": 0},
            **(common | {"include_dashboard": False}),
        )
    except RuntimeError as error:  # of a machine that is too busy
        reason = str(error).partition("\n")[0]
        raise ProcessLost(
            f"Ray did not start on this machine: {reason}; run the same command again"
        ) from None
