"""Shared by the speed benchmarks: settings, random data, and a clock."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from lib.config import Config, load_config
from lib.sections.models import ArchitectureConfig, TrainingConfig
from lib.tokenization import train_tokenizer
from lib.training.data import Windows
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits

ROUNDS = 5


def settings(steps: int, **architecture) -> tuple[Config, ArchitectureConfig, TrainingConfig]:
    """The default config, a backbone of 6 layers x 192, and a training of that many steps."""
    config = load_config()
    shape = {
        "num_hidden_layers": 6,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "context": 128,
    } | architecture
    training = config.training.model_dump() | {
        "steps": steps, "batch_size": 32, "evaluate_every": steps, "checkpoint_every": steps, "evaluation_examples": 32,
    }  # fmt: skip
    return config, config.architecture.model_copy(update=shape), TrainingConfig.model_validate(training)


def random_windows(vocabulary: int, width: int) -> Windows:
    """Windows over documents of random tokens."""
    ids = np.random.default_rng(0).integers(4, vocabulary, 200_000).astype(np.int32)
    lists = pa.chunked_array([pa.array(ids.reshape(-1, 500).tolist(), pa.list_(pa.int32()))])
    return Windows(pa.table({"token_ids": lists, "continues": [i > 0 for i in range(400)]}), width, 0)


def objective_of(config: Config, vocabulary: int, width: int, context: TrainingContext) -> MaskedDiffusion:
    """The objective of masked diffusion on random tokens."""
    data = random_windows(vocabulary, width)
    tiles = data.tiled()
    splits = WindowSplits(data, tiles, tiles, tiles.owner)
    return MaskedDiffusion(context, splits, config.diffusion, MaskingTokens(mask_id=1))


def tokenizer_of_size(vocabulary: int):
    """A character tokenizer with that many ids."""
    return train_tokenizer("character", ["".join(chr(0x4E00 + i) for i in range(vocabulary - 4))], 0)


def median_seconds(work: Callable[[], object]) -> float:
    """Median time of nine calls, after one that does not count."""
    work()
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
