"""The parts are made in several processes of this machine.

Each worker has a pipe of its own. It receives a number, makes the part, and answers. If its pipe closes without an answer,
the worker was ended from outside: a new one takes its place, and the part is made again.
"""

import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess, parent_process

from lib.config import ROOT
from lib.errors import ProcessLost
from lib.executors.base import MAX_LOSSES, Work, answer_of, lost, portable, threads_of_each
from lib.log import say, silence


class ProcessExecutor:
    """Makes parts in up to `workers` processes, which start when there is work and end with the block."""

    def __init__(self, work: Work, workers: int):
        self._work, self._workers = work, workers
        self._threads = threads_of_each(workers)
        self._crew: list[_Worker] = []
        self._losses: Counter[int | None] = Counter()

    def __enter__(self) -> "ProcessExecutor":
        return self

    def __exit__(self, *_) -> None:
        """End the workers. A part that one of them is making stays absent: parts appear when they are complete."""
        for worker in self._crew:
            worker.end()
        self._crew = []

    def make(self, numbers: Iterable[int]) -> Iterator[int]:
        waiting = deque(numbers)
        while waiting or any(worker.number is not None for worker in self._crew):
            self._assign(waiting)
            for pipe in wait([worker.pipe for worker in self._crew]):
                worker = next(w for w in self._crew if w.pipe is pipe)
                number = self._receive(worker, waiting)
                if number is not None:
                    yield number

    def _assign(self, waiting: deque[int]) -> None:
        idle = [worker for worker in self._crew if worker.number is None]
        while len(idle) < len(waiting) and len(self._crew) < self._workers:
            taken = {worker.gpu for worker in self._crew}  # a new worker takes that of a lost one
            gpu = next(n for n in range(self._workers) if n not in taken) if self._work.uses_device else None
            try:
                idle.append(_Worker(self._work, self._threads, gpu))
            except (ConnectionError, EOFError):  # it, or the server that forks workers, was ended meanwhile
                self._count_loss(None)
                continue
            self._crew.append(idle[-1])
        for worker in idle[: len(waiting)]:
            number = waiting.popleft()
            if not worker.send(number):
                waiting.appendleft(number)  # the worker is lost; `wait` sees it

    def _receive(self, worker: "_Worker", waiting: deque[int]) -> int | None:
        """The number of the part that a worker has completed; None if the worker was lost, and the part waits again."""
        try:
            number, error = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, waiting)
            return None
        if error is not None:
            raise error
        worker.number = None
        self._losses.pop(number, None)
        return number

    def _replace(self, worker: "_Worker", waiting: deque[int]) -> None:
        number = worker.number
        worker.end()
        self._crew.remove(worker)
        if number is not None:
            waiting.appendleft(number)
        self._count_loss(number)

    def _count_loss(self, number: int | None) -> None:
        self._losses[number] += 1
        if self._losses[number] >= MAX_LOSSES:
            raise lost(number)
        part = "" if number is None else f"; part {number} is made again"
        say(f"a worker process was ended from outside{part}")


class _Worker:
    """One process, and the number of the part that it makes; None if it is idle.

    `gpu`: the number that chooses its GPU; None if its work uses none.
    """

    def __init__(self, work: Work, threads: int, gpu: int | None):
        self.gpu = gpu
        context = _context(work)
        self.pipe, other = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(other, work, threads, gpu), daemon=True
        )
        self.process.start()
        other.close()  # so that the pipe closes when the process ends
        self.number: int | None = None

    def send(self, number: int) -> bool:
        """Whether the worker received the number of its next part."""
        try:
            self.pipe.send(number)
        except OSError:
            return False
        self.number = number
        return True

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _context(work: Work) -> ForkServerContext | SpawnContext:
    """How workers start: as forks of a server, which imports once what this process has imported until then.

    A worker that imports torch and transformers itself needs seconds, also one that replaces a lost worker. The server
    computes nothing, so its forks are safe; on a Mac the libraries of the system forbid them.
    """
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    loaded = [name for name in sys.modules if name.partition(".")[0] == "lib"]
    context.set_forkserver_preload([*loaded, type(work).__module__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))  # the server finds lib/
    try:
        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _serve(pipe: Connection, work: Work, threads: int, gpu: int | None) -> None:
    """The life of a worker: receive a number, make the part, answer."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the main one ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    silence()  # the main process speaks for all
    if gpu is not None:
        _choose_gpu(gpu)
    make = failed = None
    try:
        make = work.open(threads)
    except Exception as error:
        failed = portable(error)
    while True:
        try:
            number = pipe.recv()
            pipe.send(answer_of(make, number) if make is not None else (number, failed))
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    """End this process when the main process ends, however that ends."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(ProcessLost.exit_code)


def _choose_gpu(worker: int) -> None:
    """Give each worker one GPU, in turn. Before it uses CUDA."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not visible:
        import torch

        visible = [str(n) for n in range(torch.cuda.device_count())]
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[worker % len(visible)]
