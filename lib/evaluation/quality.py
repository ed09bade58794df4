"""Measure the quality of samples: likelihood under a reference model, diversity, and the share of real words.

Low-diversity text has a high likelihood. Entropies are therefore reported beside it (Zheng et al., 2024).

Legend: B texts, T tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lib import metrics
from lib.runtime import Runtime
from lib.sections.data import class_rewards
from lib.training.objectives.base import chunks, forward, with_cls
from lib.training.objectives.next_token import causal_nll

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@torch.no_grad()
def reference_nll(
    model: nn.Module, runtime: Runtime, ids: np.ndarray, counted: np.ndarray, cls_id: int
) -> np.ndarray:
    """(B,) nats of the counted tokens of each text under a causal model.

    A text longer than the model's context is read in consecutive windows; the model does not see beyond a window.

    Args:
        ids: (B, T); counted: (B, T) bool, the tokens whose nats are added up.
    """
    sums = np.zeros(len(ids))
    for part in chunks(len(ids), 64):
        for window in _windows(model, ids):
            read, valid = ids[part, window], np.ones_like(counted[part, window])
            nll, _ = causal_nll(model, runtime, read, valid, cls_id)
            sums[part] += (nll.cpu().numpy() * counted[part, window]).sum(1)
    return sums


def from_first_gap(free: np.ndarray) -> np.ndarray:
    """(B, T) bool: the first generated token of each row, and all tokens after it. `free`: (B, T) bool, generated tokens.

    These tokens measure a fill. The likelihood of the generated tokens alone would ignore whether they fit the text
    that follows them.
    """
    return np.logical_or.accumulate(free, axis=1)


@torch.no_grad()
def sequence_scores(
    model: nn.Module,
    runtime: Runtime,
    ids: np.ndarray,
    cls_id: int,
    rewards: Sequence[float] | None = None,
) -> np.ndarray:
    """(B,) score of each text (B, T) by a judge or ranker, with [CLS] in front.

    The score of a judge of classes by name is the expected reward of the class; `rewards` replaces those of the config. The
    score of a text longer than the model's context is the mean over its windows, weighted by their tokens.
    """
    scores = np.zeros(len(ids))
    for part in chunks(len(ids), 64):
        for window in _windows(model, ids):
            read = ids[part, window]
            with_front = with_cls(read, np.ones_like(read, bool), cls_id)
            logits = forward(model, runtime, *with_front).logits.float()  # (B, 1) or (B, C)
            if logits.shape[-1] > 1:
                values = torch.tensor(rewards or class_rewards(logits.shape[-1]), device=logits.device)
                logits = (torch.softmax(logits, -1) * values).sum(-1, keepdim=True)
            found = logits.squeeze(-1).cpu().numpy()
            scores[part] += found * (read.shape[1] / ids.shape[1])
    return scores


def _windows(model: Any, ids: np.ndarray) -> list[slice]:
    context = model.config.max_position_embeddings - 1  # [CLS] takes one position
    return [slice(start, start + context) for start in range(0, ids.shape[1], context)]


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, in order."""
    return _WORD.findall(text.lower())


def lexicon(texts) -> set[str]:
    """The lower-case words of texts."""
    return {word for text in texts for word in words_of(text)}


def valid_words(texts: list[str], known: set[str]) -> metrics.Estimate | None:
    """Share of words that are in the lexicon `known`; None without words.

    The first and the last word of a text do not count, because they may be cut off.
    """
    pairs = []
    for text in texts:
        words = _WORD.findall(text.lower())[1:-1]
        pairs.append((sum(w in known for w in words), len(words)))
    valid, total = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return metrics.ratio(valid, total, limits=metrics.SHARE) if total.sum() else None


def characters(texts: list[str]) -> list[np.ndarray]:
    """The code points of each text."""
    return [np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) for text in texts]


@dataclass(frozen=True)
class SamplingCost:
    """How samples were made, and what they cost.

    Attributes:
        policy: the re-masking policy, or the name of a baseline.
        nfe: the budget of forward passes (NFE).
        passes: mean number of forward passes that a sample took.
        seconds: time for all samples.
    """

    policy: str
    nfe: int
    passes: float
    seconds: float


def describe(cost: SamplingCost, texts: list[str], known: set[str], nll: np.ndarray | None) -> dict:
    """One row of the table of policies.

    Args:
        texts: the samples from their first gap on.
        known: the lexicon for the share of real words.
        nll: (B,) nats of each text under the reference model; None without that model.
    """
    codes = characters(texts)
    words = valid_words(texts, known)
    likelihood = (
        None if nll is None else metrics.ratio(nll, np.array([len(t) for t in texts], float))._asdict()
    )
    return {
        "policy": cost.policy,
        "nfe": cost.nfe,
        "passes": cost.passes,
        "samples": len(texts),
        "seconds": cost.seconds,
        "reference_nll": likelihood,
        "character_entropy": metrics.ngram_entropy(codes, 1),
        "fourgram_entropy": metrics.ngram_entropy(codes, 4),
        "valid_words": None if words is None else words._asdict(),
        "judge_score": None,
        "critic_error": None,
    }
