"""Runs stages 00 to 03 and a training on generated texts of several sizes, and prints the peak memory of each, a line a size.

Each size has a fork of this process, so that all begin with the same memory and the libraries are imported once. The limits
that keep memory flat are lowered, so that half a megabyte of text exceeds them all.

python -m tests.memory_of_stages FOLDER MEGABYTES ...
"""

import json
import os
import sys
from pathlib import Path

from benchmarks import memory

SETTINGS = (
    "data.fractions={train: 0.9, held_out: 0.05, reference: 0.05}",
    "models.generator.training.steps=2",
    "models.generator.training.evaluate_every=2",
    "training.batch_size=4",
    "training.evaluation_examples=16",
    "tokenizer.examples_per_part=256",
    "candidates.source=random_tokens",
    "candidates.rows_per_group=256",
    "candidates.per_example=2",
)


def lower_limits() -> None:
    import importlib

    from lib import digest_table, table_writer, token_store
    from lib.tasks.text import raw
    from lib.training import data
    from lib.training.objectives import language_model
    from lib.user_files import decoding, long_text

    check = importlib.import_module(memory.STAGES[0])
    check.CHARACTERS_PER_GROUP = long_text.PIECE_CHARACTERS = raw.PIECE_CHARACTERS = 2**16
    decoding.PIECE_BYTES = 2**14
    digest_table.CACHE_BYTES = 2**18
    table_writer.KeyHashes.IN_MEMORY = 2**7
    token_store.SCAN = data.SCAN = 2**10
    language_model.MAX_REPORTED_WINDOWS = 64


def reset_peak() -> None:
    """Let the peak of this process begin anew, where Linux allows it."""
    Path("/proc/self/clear_refs").write_text("5")


def run(folder: Path, megabytes: float) -> None:
    memory.make_text(folder / "text", megabytes)
    overrides = [f"data.path={folder / 'text'}", *memory.SETTINGS, *memory.TRAINING, *SETTINGS]
    peaks = {}
    for stage in memory.STAGES:
        reset_peak()
        peaks[stage] = memory.run_stage(stage, folder / "run", overrides)
    print(json.dumps(peaks), flush=True)


def main(folder: Path, sizes: list[str]) -> int:
    import torch

    import lib.candidates.table
    import lib.tasks.text
    import lib.training.train_model  # noqa: F401

    torch.set_num_threads(1)
    lower_limits()
    for size in sizes:
        if not os.fork():
            run(folder / size, float(size))
            os._exit(0)
        if code := os.wait()[1]:
            return os.waitstatus_to_exitcode(code)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
