"""Make candidates in several processes, in the same order and with the same bits as in one process.

One process makes all candidates of a group of examples, from random draws that do not depend on the process. This is
useful where one process does not use all cores: small models on many cores.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import torch

from lib.config import Config
from lib.processes import map_in_order
from lib.runtime import Runtime
from lib.tasks import CandidateContext, Dropped, get_task

_context: CandidateContext | None = None  # in a worker process


def made_by_processes(
    config: Config, tokenizer: Path, engines: list[Path], groups: Iterable[pa.Table], processes: int
) -> Iterator[tuple[int, pa.Table, list[Dropped], Counter[str]]]:
    """(number of examples, candidates, examples left out, counts) of every group, in order."""
    threads = max(1, torch.get_num_threads() // processes)
    begin = (_begin, (config, tokenizer, engines, threads))
    for group, made in map_in_order(_make, groups, processes, begin=begin):
        yield group.num_rows, *made


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
