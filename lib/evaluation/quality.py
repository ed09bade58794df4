"""How good samples are, measured: likelihood under a causal model that saw other text, diversity, real words.

A likelihood alone can be gamed by dull text, so the entropies stand beside it (Zheng et al., 2024).
"""

import re
from typing import Any

import numpy as np
import torch
from torch import nn

from lib import metrics
from lib.runtime import Runtime
from lib.training.objectives.base import chunks, forward, with_cls
from lib.training.objectives.next_token import causal_nll

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@torch.no_grad()
def reference_nll(
    model: nn.Module, runtime: Runtime, ids: np.ndarray, counted: np.ndarray, cls_id: int
) -> np.ndarray:
    """(B,) nats of the counted tokens of each text under a causal model, every token given all before it.

    A text longer than the model's context is read in consecutive windows, and nothing crosses a window.
    """
    sums = np.zeros(len(ids))
    for part in chunks(len(ids), 64):
        for seen in _windows(model, ids):
            here, valid = ids[part, seen], np.ones_like(counted[part, seen])
            nll, _ = causal_nll(model, runtime, here, valid, cls_id)
            sums[part] += (nll.cpu().numpy() * counted[part, seen]).sum(1)
    return sums


def from_first_gap(free: np.ndarray) -> np.ndarray:
    """(B, T) bool: the written tokens (B, T) and all behind the first of them.

    What a fill is judged by: a causal model's likelihood of the written tokens alone would not mind whether they join up
    with the given text behind them.
    """
    return np.logical_or.accumulate(free, axis=1)


@torch.no_grad()
def sequence_scores(model: nn.Module, runtime: Runtime, ids: np.ndarray, cls_id: int) -> np.ndarray:
    """(B,) what a judge or ranker gives each whole text, [CLS] in front; the mean over windows of a longer one."""
    scores = np.zeros(len(ids))
    for part in chunks(len(ids), 64):
        for seen in _windows(model, ids):
            here = ids[part, seen]
            front = with_cls(here, np.ones_like(here, bool), cls_id)
            found = forward(model, runtime, *front).logits.float().squeeze(-1).cpu().numpy()
            scores[part] += found * (here.shape[1] / ids.shape[1])
    return scores


def _windows(model: Any, ids: np.ndarray) -> list[slice]:
    width = model.config.max_position_embeddings - 1  # [CLS] stands in front
    return [slice(start, start + width) for start in range(0, ids.shape[1], width)]


def lexicon(texts) -> set[str]:
    """Lower-case words of texts."""
    return {word for text in texts for word in _WORD.findall(text.lower())}


def valid_words(texts: list[str], known: set[str]) -> metrics.Estimate | None:
    """Share of words that are in the lexicon. A text's first and last word are left out: they may be cut."""
    pairs = []
    for text in texts:
        words = _WORD.findall(text.lower())[1:-1]
        pairs.append((sum(w in known for w in words), len(words)))
    valid, total = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return metrics.ratio(valid, total, limits=metrics.SHARE) if total.sum() else None


def characters(texts: list[str]) -> list[np.ndarray]:
    """Code points of each text."""
    return [np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) for text in texts]


def describe(policy: str, nfe: int, passes: float, seconds: float, texts: list[str], known: set[str],
             nll: np.ndarray | None) -> dict:  # fmt: skip
    """One row of the sampling table. `texts`: what was written, from the first gap on; `nll`: nats of each."""
    codes = characters(texts)
    words = valid_words(texts, known)
    likelihood = (
        None if nll is None else metrics.ratio(nll, np.array([len(t) for t in texts], float))._asdict()
    )
    return {
        "policy": policy,
        "nfe": nfe,
        "passes": passes,
        "samples": len(texts),
        "seconds": seconds,
        "reference_nll": likelihood,
        "character_entropy": metrics.ngram_entropy(codes, 1),
        "fourgram_entropy": metrics.ngram_entropy(codes, 4),
        "valid_words": None if words is None else words._asdict(),
        "judge_score": None,
        "critic_error": None,
    }
