"""Runs stages 00, 01 and a training on generated text in this process, and prints the peak memory of each.

The limits that keep memory flat are lowered, so that a few megabytes of text exceed them all.

python -m tests.memory_of_stages FOLDER MEGABYTES
"""

import json
import sys
from pathlib import Path

from benchmarks import memory

SETTINGS = (
    "data.fractions={train: 0.9, held_out: 0.05, reference: 0.05}",
    "models.generator.training.steps=2",
    "models.generator.training.evaluate_every=2",
    "training.batch_size=4",
    "training.evaluation_examples=16",
)


def lower_limits() -> None:
    import importlib

    from lib import digest_table, table_writer, token_store
    from lib.tasks.text import raw
    from lib.training import data
    from lib.training.objectives import language_model
    from lib.user_files import decoding, long_text

    check, prepare = (importlib.import_module(name) for name in memory.STAGES[:2])
    check.CHARACTERS_PER_GROUP = long_text.PIECE_CHARACTERS = raw.PIECE_CHARACTERS = 2**16
    decoding.PIECE_BYTES = 2**14
    digest_table.CACHE_BYTES = 2**18
    prepare.ROWS_PER_GROUP = 256
    table_writer.KeyHashes.AT_A_TIME = 2**10
    token_store.SCAN = data.SCAN = 2**10
    language_model.MAX_REPORTED_WINDOWS = 64


def reset_peak() -> None:
    """Let the peak of this process begin anew, where Linux allows it."""
    Path("/proc/self/clear_refs").write_text("5")


def main(folder: Path, megabytes: float) -> None:
    import torch

    torch.set_num_threads(1)
    memory.make_text(folder / "text", megabytes)
    lower_limits()
    overrides = [f"data.path={folder / 'text'}", *memory.SETTINGS, *memory.TRAINING, *SETTINGS]
    peaks = {}
    for stage in memory.STAGES:
        reset_peak()
        peaks[stage] = memory.run_stage(stage, folder / "run", overrides)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
