"""Best of N: write every sample N times, keep the one that a scorer likes best, and ask an independent model what it gained.

The scorers choose; the reference model, which learned from a split of its own, only measures. A choice by chance and
the reference model's own choice (the ceiling) stand beside them. Knows the bench of stage 06 and no file.
"""

from typing import Any

import numpy as np
import torch

from lib import metrics
from lib.diffusion.policies import POLICIES
from lib.report.quality import from_first_gap, reference_nll, sequence_scores

CHANCE, CEILING = "chance", "reference model itself"


@torch.no_grad()
def best_of(
    bench: Any, ids: np.ndarray, free: np.ndarray, number: np.ndarray, policy: str, nfe: int, n: int
) -> list[dict]:
    """A row per scorer: {"policy", "nfe", "n", "scorer", "nll" and "gain" as estimates, nats per token}.

    Args:
        ids, free: (B, T) what all samples start from; number: (B,) the samples' numbers.
    """
    count, counted = len(ids), from_first_gap(free)
    pool = [bench.sampler.sample(ids, free, number + k * count, POLICIES[policy], nfe).ids for k in range(n)]
    nll = np.stack([
        reference_nll(bench.reference, bench.runtime, texts, counted, bench.tokenizer.cls_token_id)
        / np.maximum(counted.sum(1), 1)
        for texts in pool
    ])  # (n, B)  # fmt: skip
    rows = []
    likings = {CHANCE: np.zeros_like(nll), **_scorers(bench, pool, free), CEILING: -nll}
    for name, liking in likings.items():
        chosen = np.take_along_axis(nll, liking.argmax(0)[None], 0)[0]  # (B,)
        rows.append(
            {
                "policy": policy, "nfe": nfe, "n": n, "scorer": name, "nll": metrics.ratio(chosen)._asdict(),
                "gain": metrics.ratio(nll[0] - chosen)._asdict(),
            }
        )  # fmt: skip
    return rows


def _scorers(bench: Any, pool: list[np.ndarray], free: np.ndarray) -> dict[str, np.ndarray]:
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
