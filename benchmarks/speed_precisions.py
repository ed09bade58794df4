"""A generator in fp32, bf16 and int8 on the CPU: speed and loss."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from benchmarks.speed_setup import ROUNDS
from lib import randomness
from lib.diffusion.top_k import lowest_k
from lib.runtime import Runtime
from lib.synthetic import MaskedLMEngine


def compare_precisions(run: Path, texts: int = 256) -> dict[str, Any]:
    """A run's generator on its held-out text, half of it masked: tokens per second and nats per masked token."""
    table = pq.read_table(run / "01_prepare_dataset" / "examples", columns=["token_ids", "split"])
    held_out = table.filter(pc.equal(table["split"], "held_out"))["token_ids"].to_pylist()
    folder = run / "02_generate_candidates" / "generator" / "best_model"
    engines = {
        name: MaskedLMEngine.load(folder, Runtime(torch.device("cpu"), precision), int8=name.startswith("int8"))
        for name, precision in (("fp32", "fp32"), ("bf16", "bf16"), ("int8", "fp32"), ("int8, rest bf16", "bf16"))
    }  # fmt: skip
    width = engines["fp32"].width
    rows = [row[:width] for row in held_out if len(row) > 1][:texts]
    width = max(map(len, rows))
    valid = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    ids = np.full(valid.shape, engines["fp32"].tokenizer.pad_token_id)
    ids[valid] = np.concatenate(rows)
    masked = lowest_k(randomness.uniform(7, np.arange(len(ids)), width), valid, valid.sum(1) // 2)
    targets = torch.from_numpy(ids[masked])
    found: dict[str, tuple[list[float], float]] = {name: ([], 0.0) for name in engines}
    for number in range(ROUNDS + 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            with torch.no_grad():
                logits = torch.cat([_read(engine, ids[i : i + 64], valid[i : i + 64], masked[i : i + 64]) for i in range(0, len(ids), 64)])  # fmt: skip
            times = found[name][0]
            if number:
                times.append(time.perf_counter() - begin)
            found[name] = (times, float(F.cross_entropy(logits.float(), targets)))
    print(f"{folder}: {valid.sum():,} held-out tokens in {len(ids)} texts, half of them masked")
    precisions = {}
    for name, (times, nats) in found.items():
        speed = int(valid.sum()) / statistics.median(times)
        print(f"{name:16}{speed:9,.0f} tokens/s   {nats:.4f} nats per masked token")
        precisions[name] = {"tokens_per_second": speed, "nats": nats}
    return {"precisions": precisions}


def _read(engine: MaskedLMEngine, ids: np.ndarray, valid: np.ndarray, masked: np.ndarray) -> torch.Tensor:
    """(N, V) logits at the masked positions."""
    inputs = np.where(masked, engine.tokenizer.mask_token_id, ids)
    return engine._logits(inputs, valid, np.flatnonzero(masked))
