"""Make candidates in several processes, in the same order and with the same bits as in one process.

One process makes all candidates of a group of examples, from random draws that do not depend on the process. This is
useful where one process does not use all cores: small models on many cores.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import torch

from lib.config import Config
from lib.runtime import Runtime
from lib.tasks import CandidateContext, Dropped, get_task

MAX_PENDING = 2  # groups per process that are being made or wait to be written; it limits memory

_context: CandidateContext | None = None  # in a worker process


def made_by_processes(
    config: Config, tokenizer: Path, engines: list[Path], groups: Iterable[pa.Table], processes: int
) -> Iterator[tuple[int, pa.Table, list[Dropped], Counter[str]]]:
    """(number of examples, candidates, examples left out, counts) of every group, in order."""
    threads = max(1, torch.get_num_threads() // processes)
    arguments = (config, tokenizer, engines, threads)
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, arguments) as pool:
        waiting: deque = deque()
        for group in groups:
            waiting.append((group.num_rows, pool.submit(_make, group)))
            if len(waiting) >= MAX_PENDING * processes:
                count, future = waiting.popleft()
                yield count, *future.result()
        for count, future in waiting:
            yield count, *future.result()


def _begin(config: Config, tokenizer: Path, engines: list[Path], threads: int) -> None:
    from lib.synthetic import MaskedLMEngine
    from lib.tokenization import load_tokenizer

    global _context
    torch.set_num_threads(threads)
    runtime = Runtime.detect(config)
    loaded = [MaskedLMEngine.load(folder, runtime, int8=config.candidates.int8) for folder in engines]
    _context = CandidateContext(config, load_tokenizer(tokenizer), loaded)


def _make(group: pa.Table) -> tuple[pa.Table, list[Dropped], Counter[str]]:
    assert _context is not None
    _context.dropped.clear()
    _context.counts.clear()
    table = get_task(_context.config.task).candidates(group, _context)
    return table, list(_context.dropped), Counter(_context.counts)
