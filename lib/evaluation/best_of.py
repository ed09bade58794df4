"""Best of N: write every sample N times, keep the one that a scorer likes best, and ask an independent model what it gained.

The scorers choose; the reference model, which learned from a split of its own, only measures. A choice by chance and
the reference model's own choice (the ceiling) stand beside them. Knows the evaluator of stage 06 and no file.

Legend: N texts of each sample, B samples, T positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lib import metrics
from lib.diffusion.policies import POLICIES
from lib.diffusion.samples import MaskedTexts
from lib.evaluation.infilling import Start
from lib.evaluation.quality import characters, from_first_gap, reference_nll, sequence_scores
from lib.tokenization import decode_batch

CHANCE, CEILING = "chance", "reference model itself"


@dataclass
class _Pool:
    """The texts written from one start, and who likes which."""

    texts: np.ndarray  # (N, B, T)
    counted: np.ndarray  # (B, T) from the first gap on: the part that is measured
    nats: np.ndarray | None  # (N, B) of the counted tokens under the reference model
    likings: dict[str, np.ndarray]  # scorer -> (N, B)

    def chosen(self, scorer: str) -> tuple[np.ndarray, np.ndarray]:
        """((B,) which of the N, (B, T) those texts)."""
        best = self.likings[scorer].argmax(0)
        return best, self.texts[best, np.arange(len(best))]


@torch.no_grad()
def best_of(
    evaluator: Any, starts: list[Start], policy: str, nfe: int, n: int
) -> tuple[list[dict], list[dict[str, np.ndarray]]]:
    """(a row per scorer over all starts, for each start scorer -> (B, T) the texts that it chose).

    A row is {"policy", "nfe", "n", "scorer", "fourgram_entropy" of the chosen texts from their first gap on, "nll" and
    "gain" over the first of the N as estimates in nats per token over all samples, which are resampled; None without a
    reference model}. A gain that costs
    entropy is worth less.
    """
    total = sum(len(start.ids) for start in starts)  # how far apart the numbers of a sample's N texts are
    pools = [_written(evaluator, start, policy, nfe, n, total) for start in starts]
    rows, texts = [], [{} for _ in pools]
    for scorer in pools[0].likings:
        gains, own, counts, written = [], [], [], []
        for pool, kept in zip(pools, texts, strict=True):
            best, chosen = pool.chosen(scorer)
            written += [row[counted] for row, counted in zip(chosen, pool.counted, strict=True)]
            if pool.nats is not None:
                own.append(pool.nats[best, np.arange(len(best))])
                gains.append(pool.nats[0] - own[-1])
                counts.append(pool.counted.sum(1))
            if scorer not in (CHANCE, CEILING):
                kept[scorer] = chosen
        rows.append({
            "policy": policy, "nfe": nfe, "n": n, "scorer": scorer,
            "nll": metrics.ratio(np.concatenate(own), np.concatenate(counts))._asdict() if own else None,
            "gain": metrics.ratio(np.concatenate(gains), np.concatenate(counts))._asdict() if gains else None,
            "fourgram_entropy": metrics.ngram_entropy(characters(decode_batch(evaluator.tokenizer, written)), 4),
        })  # fmt: skip
    return rows, texts


def _written(evaluator: Any, start: Start, policy: str, nfe: int, n: int, apart: int) -> _Pool:
    pool = np.stack([
        evaluator.sampler.sample(MaskedTexts(start.ids, start.free, start.number + k * apart), POLICIES[policy], nfe).ids
        for k in range(n)
    ])  # fmt: skip
    counted = from_first_gap(start.free)
    likings, nats = {CHANCE: np.zeros(pool.shape[:2])} | _scorers(evaluator, pool, start), None
    if evaluator.reference is not None:
        cls_id = evaluator.tokenizer.cls_token_id
        sums = [reference_nll(evaluator.reference, evaluator.runtime, t, counted, cls_id) for t in pool]
        nats = np.stack(sums)  # of one sample's texts the same tokens count
        likings[CEILING] = -nats
    return _Pool(pool, counted, nats, likings)


def _scorers(evaluator: Any, pool: np.ndarray, start: Start) -> dict[str, np.ndarray]:
    """Scorer -> (N, B) how much it likes each text."""
    cls_id, rows = evaluator.tokenizer.cls_token_id, start.number
    share = start.free / np.maximum(start.free.sum(1, keepdims=True), 1)
    found = {
        "critic": np.stack([-(evaluator.sampler.critic_error(texts) * share).sum(1) for texts in pool]),
        "generator": np.stack([(evaluator.pseudo_likelihood(texts, rows) * share).sum(1) for texts in pool]),
    }
    for name, model in (("judge", evaluator.judge), ("ranker", evaluator.ranker)):
        if model is not None:
            found[name] = np.stack([sequence_scores(model, evaluator.runtime, t, cls_id) for t in pool])
    return found
