"""Best of N: write every sample N times, keep the one that a scorer likes best, and ask an independent model what it gained.

The scorers choose; the reference model, which learned from a split of its own, only measures. A choice by chance and
the reference model's own choice (the ceiling) stand beside them. Knows the bench of stage 06 and no file.
"""

from typing import Any

import numpy as np
import torch

from lib import metrics
from lib.diffusion.policies import POLICIES
from lib.report.quality import characters, from_first_gap, reference_nll, sequence_scores
from lib.tokenization import decode_batch

CHANCE, CEILING = "chance", "reference model itself"


@torch.no_grad()
def best_of(
    bench: Any, ids: np.ndarray, free: np.ndarray, number: np.ndarray, policy: str, nfe: int, n: int
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """(a row per scorer, scorer -> (B, T) the texts that it chose).

    A row is {"policy", "nfe", "n", "scorer", "fourgram_entropy" of the chosen texts, "nll" and "gain" over the first of the
    N as estimates in nats per token, None without a reference model}. A gain that costs entropy is worth less.

    Args:
        ids, free: (B, T) what all samples start from; number: (B,) the samples' numbers.
    """
    count = len(ids)
    pool = np.stack([
        bench.sampler.sample(ids, free, number + k * count, POLICIES[policy], nfe).ids for k in range(n)
    ])  # (n, B, T)  # fmt: skip
    nll = None if bench.reference is None else _nll(bench, pool, from_first_gap(free))
    likings = {CHANCE: np.zeros(pool.shape[:2]), **_scorers(bench, pool, free)}
    if nll is not None:
        likings[CEILING] = -nll
    rows, texts = [], {}
    for name, liking in likings.items():
        best = liking.argmax(0)  # (B,)
        chosen = pool[best, np.arange(count)]
        row: dict[str, Any] = {
            "policy": policy,
            "nfe": nfe,
            "n": n,
            "scorer": name,
            "nll": None,
            "gain": None,
        }
        if nll is not None:
            own = nll[best, np.arange(count)]
            row |= {"nll": metrics.ratio(own)._asdict(), "gain": metrics.ratio(nll[0] - own)._asdict()}
        entropy = metrics.ngram_entropy(characters(decode_batch(bench.tokenizer, chosen)), 4)
        rows.append(row | {"fourgram_entropy": entropy})
        if name not in (CHANCE, CEILING):
            texts[name] = chosen
    return rows, texts


def _nll(bench: Any, pool: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(n, B) nats per counted token under the reference model."""
    sums = [
        reference_nll(bench.reference, bench.runtime, t, counted, bench.tokenizer.cls_token_id) for t in pool
    ]
    return np.stack(sums) / np.maximum(counted.sum(1), 1)


def _scorers(bench: Any, pool: np.ndarray, free: np.ndarray) -> dict[str, np.ndarray]:
    """Scorer -> (n, B) how much it likes each text."""
    cls_id = bench.tokenizer.cls_token_id
    share = free / np.maximum(free.sum(1, keepdims=True), 1)
    found = {
        "critic": np.stack([-(bench.sampler.critic_error(texts) * share).sum(1) for texts in pool]),
        "generator": np.stack(
            [(np.log(bench.sampler.fresh_confidence(texts)) * share).sum(1) for texts in pool]
        ),
    }
    for name, model in (("judge", bench.judge), ("ranker", bench.ranker)):
        if model is not None:
            found[name] = np.stack([sequence_scores(model, bench.runtime, t, cls_id) for t in pool])
    return found
