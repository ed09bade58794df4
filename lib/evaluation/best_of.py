"""Best of N: draw N samples from every start, keep the one that a scorer likes best, and measure the gain.

The scorers choose. The reference model only measures: it learned from its own split. Two rows frame the scorers: a
random choice, and the choice of the reference model itself, which is the upper bound.

Legend: N texts per sample, B samples, T tokens.
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
    """The texts generated from one start, and the score of each text by each scorer."""

    texts: np.ndarray  # (N, B, T)
    counted: np.ndarray  # (B, T) bool: the measured part, from the first gap on
    nats: np.ndarray | None  # (N, B) of the counted tokens under the reference model
    scores: dict[str, np.ndarray]  # scorer -> (N, B)

    def chosen(self, scorer: str) -> tuple[np.ndarray, np.ndarray]:
        """((B,) index of the chosen text, (B, T) the chosen texts)."""
        best = self.scores[scorer].argmax(0)
        return best, self.texts[best, np.arange(len(best))]


@torch.no_grad()
def best_of(
    evaluator: Any, starts: list[Start], policy: str, nfe: int, n: int
) -> tuple[list[dict], list[dict[str, np.ndarray]]]:
    """Draw `n` samples from every start and let every scorer choose.

    Returns:
        A row per scorer over all starts, and for each start a dict: scorer -> (B, T) the texts that it chose.

        A row has the keys policy, nfe, n, scorer, nll, gain and fourgram_entropy. nll and gain are estimates in nats
        per token, over samples. The gain is over the first of the N texts. Both are None without a reference model.
        The entropy is that of the chosen texts from their first gap on: a gain that costs entropy is worth less.
    """
    total = sum(
        len(start.ids) for start in starts
    )  # distance between the sample numbers of one sample's N texts
    pools = [_generate(evaluator, start, policy, nfe, n, total) for start in starts]
    rows, texts = [], [{} for _ in pools]
    for scorer in pools[0].scores:
        gains, nats, counts, generated = [], [], [], []
        for pool, kept in zip(pools, texts, strict=True):
            best, chosen = pool.chosen(scorer)
            generated += [row[counted] for row, counted in zip(chosen, pool.counted, strict=True)]
            if pool.nats is not None:
                nats.append(pool.nats[best, np.arange(len(best))])
                gains.append(pool.nats[0] - nats[-1])
                counts.append(pool.counted.sum(1))
            if scorer not in (CHANCE, CEILING):
                kept[scorer] = chosen
        rows.append({
            "policy": policy, "nfe": nfe, "n": n, "scorer": scorer,
            "nll": metrics.ratio(np.concatenate(nats), np.concatenate(counts))._asdict() if nats else None,
            "gain": metrics.ratio(np.concatenate(gains), np.concatenate(counts))._asdict() if gains else None,
            "fourgram_entropy": metrics.ngram_entropy(characters(decode_batch(evaluator.tokenizer, generated)), 4),
        })  # fmt: skip
    return rows, texts


def _generate(evaluator: Any, start: Start, policy: str, nfe: int, n: int, stride: int) -> _Pool:
    """Draw `n` samples from one start. `stride`: distance between the sample numbers, which key the noise."""
    texts = np.stack([
        evaluator.sampler.sample(MaskedTexts(start.ids, start.free, start.number + k * stride), POLICIES[policy], nfe).ids
        for k in range(n)
    ])  # fmt: skip
    counted = from_first_gap(start.free)
    scores, nats = {CHANCE: np.zeros(texts.shape[:2])} | _scores(evaluator, texts, start), None
    if evaluator.reference is not None:
        cls_id = evaluator.tokenizer.cls_token_id
        sums = [reference_nll(evaluator.reference, evaluator.runtime, t, counted, cls_id) for t in texts]
        nats = np.stack(sums)  # comparable within a sample: the same tokens count in all N texts
        scores[CEILING] = -nats
    return _Pool(texts, counted, nats, scores)


def _scores(evaluator: Any, texts: np.ndarray, start: Start) -> dict[str, np.ndarray]:
    """Scorer -> (N, B) score of each text of `texts` (N, B, T); higher is better.

    Critic and generator score a text by the mean over its generated tokens.
    """
    cls_id, rows = evaluator.tokenizer.cls_token_id, start.number
    weight = start.free / np.maximum(start.free.sum(1, keepdims=True), 1)
    found = {
        "critic": np.stack([-(evaluator.sampler.critic_error(t) * weight).sum(1) for t in texts]),
        "generator": np.stack([(evaluator.pseudo_likelihood(t, rows) * weight).sum(1) for t in texts]),
    }
    for name, model in (("judge", evaluator.judge), ("ranker", evaluator.ranker)):
        if model is not None:
            found[name] = np.stack([sequence_scores(model, evaluator.runtime, t, cls_id) for t in texts])
    return found
