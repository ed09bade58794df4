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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import BadConfig, Interrupted, MissingInput, ProcessLost
from lib.executors.base import MAX_LOSSES, Make, Work, answer_of, lost, portable, threads_of_each
from lib.log import say, silence

VERSION = "2.60.0"  # as in requirements-cluster.txt
SERVERS = {"gcs_server", "raylet"}  # of a Ray of our own; without them nothing goes on
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_OF_SILENCE = 120  # without a complete part; then a line says why that may be
SECONDS_OF_ABSENCE = 45  # of a cluster's server, which may restart; after 60, Ray ends the process
ADVICE = "run `pip install -r requirements-cluster.txt`, or set executor.type to local or processes"


class Placement(NamedTuple):
    """What the actors are, and how many of them Ray can place at the same time."""

    count: int
    threads: int  # cores of each actor
    gpu: float  # share of a GPU of each actor


def place(nodes: Sequence[tuple[int, int]], workers: int, threads: int, uses_device: bool) -> Placement:
    """How Ray can place the workers. It divides an actor neither among machines nor among GPUs.

    Args:
        nodes: cores and GPUs of each machine.
        threads: that each worker should have; fewer if no machine has as many cores.
        uses_device: the workers share the GPUs, if there are any.

    Raises:
        BadConfig: no machine has a core.
    """
    gpus = sum(node_gpus for _, node_gpus in nodes) if uses_device else 0
    per_gpu = math.ceil(workers / gpus) if gpus else 0
    usable = [(cores, node_gpus) for cores, node_gpus in nodes if cores > 0 and (node_gpus or not gpus)]
    if not usable:
        raise BadConfig(
            "no machine of the Ray cluster has a core for a worker; set executor.type to local or processes"
        )
    threads = min(threads, max(cores for cores, _ in usable))
    room = sum(min(cores // threads, node_gpus * per_gpu if gpus else cores) for cores, node_gpus in usable)
    share = math.floor(1e4 / per_gpu) / 1e4 if gpus else 0.0  # Ray counts GPUs in steps of 1e-4
    return Placement(min(workers, room), threads, share)


class RayExecutor:
    """Makes parts in up to `workers` actors. They start when there is work, and end with the block.

    A Ray that runs already in this process is used, and stays. One that is started here listens on the loopback address only,
    and ends with the block.
    """

    def __init__(self, work: Work, workers: int):
        self._work, self._workers = work, workers
        self._actors: list[Any] = []
        self._placement: Placement | None = None
        self._has_said_silence = False
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
        self._add_actors(len(waiting))
        running: dict[Any, tuple[Any, int]] = {}  # future -> actor and part
        idle = list(self._actors)
        while waiting or running:
            while waiting and idle:
                actor, number = idle.pop(), waiting.popleft()
                running[actor.make.remote(number)] = (actor, number)
            done = self._first_done(list(running))
            actor, number = running.pop(done)
            idle.append(actor)
            try:
                _, error = self._ray.get(done)
            except self._ray.exceptions.RayActorError:
                raise lost(number) from None
            if error is not None:
                raise error
            yield number

    def _first_done(self, futures: list[Any]) -> Any:
        """The first part that is complete. Says once if none is for long: an actor that finds no room waits without an error."""
        timeout = None if self._has_said_silence else SECONDS_OF_SILENCE
        done, _ = self._ray.wait(futures, num_returns=1, timeout=timeout)
        if not done:
            assert self._placement is not None
            _, threads, gpu = self._placement
            share = f" and {gpu:g} of a GPU" if gpu else ""
            say(f"no part was completed for {SECONDS_OF_SILENCE} s. Either a part takes that long, or Ray has no room for a "
                f"worker, which needs {threads} cores{share}: `ray status` lists what other programs use")  # fmt: skip
            self._has_said_silence = True
            return self._first_done(futures)
        return done[0]

    def _add_actors(self, num_parts: int) -> None:
        """Start actors until there is one for each part, or as many as fit."""
        if num_parts == 0:
            return
        if self._placement is None:
            self._placement = self._join()
        count, threads, gpu = self._placement
        options = {
            "num_cpus": threads,
            "num_gpus": gpu,
            "max_restarts": -1,
            "max_task_retries": MAX_LOSSES - 1,
        }
        actor_class = self._ray.remote(**options)(_Actor)
        for _ in range(len(self._actors), min(count, num_parts)):
            self._actors.append(actor_class.remote(self._work, threads))

    def _join(self) -> Placement:
        """Join or start Ray, and find out how many actors fit."""
        ray = self._ray
        if not ray.is_initialized():
            self._watch = _ServerWatch(ray)
            self._watch.start()
            _init(ray, self._workers)
            self._owns_ray = True
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [(int(found.get("CPU", 0)), int(found.get("GPU", 0))) for found in resources]
        cores = sum(node_cores for node_cores, _ in nodes)
        on_cluster = "RAY_ADDRESS" in os.environ
        threads = max(1, cores // self._workers) if on_cluster else threads_of_each(self._workers)
        placement = place(nodes, self._workers, threads, self._work.uses_device)
        if placement.count < self._workers:
            say(
                f"executor.workers is {self._workers}, but Ray has {cores} cores on {len(nodes)} machines; at most "
                f"{placement.count} workers of {placement.threads} cores are started"
            )
        return placement


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
