"""Detectors of synthetic text besides the judge: a bag of words, the length, and likelihoods under autoregressive models.

| detector                | suspicion of a text                                                             | paper                    |
|-------------------------|---------------------------------------------------------------------------------|--------------------------|
| TF-IDF, words           | logistic regression on TF-IDF of words and pairs of words                       |                          |
| TF-IDF, characters      | the same on runs of 2 to 4 characters                                           |                          |
| length                  | number of characters                                                            |                          |
| log-likelihood          | mean log-probability of a token                                                 | Solaiman et al., 2019    |
| Fast-DetectGPT          | that, minus its expectation, in standard deviations of the model's own samples  | Bao et al., 2024         |
| Binoculars              | minus the ratio of perplexity and cross-perplexity of two models                | Hans et al., 2024        |

The likelihoods come from the run's own models of the same text. Their sign is chosen on the selection split, as that of the
length: small models and other ways to make text can turn it round.

Legend: D documents, W windows, B rows, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lib import metrics
from lib.detection import log_odds
from lib.evaluation.labelled_documents import LabelledDocuments
from lib.runtime import Runtime
from lib.training.objectives.base import chunks, evaluation_rows, forward, tensor, with_cls

BATCH = 64
STRENGTHS = (
    1.0,
    10.0,
    100.0,
)  # inverse strengths of the regularisation, of which the selection split chooses
MAX_FEATURES = 200_000


# ------------------------------------------------------------------------------------------ bag of words


def bag_of_words(
    train: LabelledDocuments, chosen: LabelledDocuments, reported: LabelledDocuments, analyzer: str
) -> tuple[np.ndarray, np.ndarray]:
    """((D,) log-odds of the documents `chosen`, (D,) of `reported`) by logistic regression on TF-IDF of `train`.

    `analyzer`: word, for words and pairs of words; char, for runs of 2 to 4 characters. `chosen` selects the regularisation.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    runs = (1, 2) if analyzer == "word" else (2, 4)
    pattern: Any = r"(?u)\w+|[^\w\s]" if analyzer == "word" else None
    vectors = TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=runs,
        sublinear_tf=True,
        max_features=MAX_FEATURES,
        token_pattern=pattern,
        lowercase=False,
    )
    features = vectors.fit_transform(train.whole_texts)
    on_chosen, on_reported = (vectors.transform(d.whole_texts) for d in (chosen, reported))
    best: tuple[float, Any] = (-1.0, None)
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(features, train.synthetic)
        auroc = metrics.auroc(model.decision_function(on_chosen), chosen.synthetic)
        if best[1] is None or auroc > best[0]:
            best = auroc, model
    return best[1].decision_function(on_chosen), best[1].decision_function(on_reported)


def lengths(documents: LabelledDocuments) -> np.ndarray:
    """(D,) characters."""
    return np.array([len(text) for text in documents.whole_texts], np.float64)


# ------------------------------------------------------------------------------------------ models of the run


def batches(
    windows: Sequence[np.ndarray], pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """((B,) numbers of windows, (B, T) their ids, (B, T) validity). Windows of similar length are together."""
    order = np.argsort([len(ids) for ids in windows], kind="stable")
    longest = max((len(ids) for ids in windows), default=1)
    for part in chunks(len(order), evaluation_rows(BATCH, longest)):
        rows = order[part]
        width = max(len(windows[w]) for w in rows)
        valid = np.arange(max(width, 1)) < np.array([len(windows[w]) for w in rows])[:, None]
        ids = np.full(valid.shape, pad_id, np.int64)
        ids[valid] = np.concatenate([windows[w] for w in rows])
        yield rows, ids, valid


@torch.no_grad()
def judge_suspicion(model: Any, runtime: Runtime, documents: LabelledDocuments, tokenizer: Any) -> np.ndarray:
    """(W,) in [0, 1]: one minus the judge's score, or one minus the probability of its first class."""
    found = np.zeros(len(documents.ids))
    for rows, ids, valid in batches(documents.ids, tokenizer.pad_token_id):
        logits = forward(model, runtime, *with_cls(ids, valid, tokenizer.cls_token_id)).logits.float()
        score = logits[:, 0] if logits.shape[-1] == 1 else torch.softmax(logits, -1)[:, 0]
        found[rows] = 1 - score.cpu().numpy()
    return found


@torch.no_grad()
def inspector_suspicion(
    model: Any, runtime: Runtime, documents: LabelledDocuments, tokenizer: Any
) -> list[np.ndarray]:
    """(W,) arrays of tokens: the probability of any class but 0."""
    found: list[np.ndarray] = [np.zeros(0)] * len(documents.ids)
    for rows, ids, valid in batches(documents.ids, tokenizer.pad_token_id):
        shares = torch.softmax(forward(model, runtime, ids, valid).logits.float(), -1)
        changed = (1 - shares[..., 0]).cpu().numpy()
        for row, window in enumerate(rows):
            found[window] = changed[row, : len(documents.ids[window])]
    return found


@dataclass(frozen=True)
class Likelihoods:
    """Likelihoods of windows under one or two autoregressive models.

    Attributes:
        sums: (W, 5) sums over the tokens of each window: log-probability, its expectation and its variance under the model,
            cross-entropy of the observer and the performer, and the number of tokens.
        nll: (W,) arrays of tokens: nats of each.
        has_observer: whether there are two models.
    """

    sums: np.ndarray
    nll: list[np.ndarray]
    has_observer: bool

    def detectors(self, documents: LabelledDocuments) -> dict[str, np.ndarray]:
        """Name -> (D,) suspicion of each zero-shot detector."""
        logs, expected, variance, cross, tokens = np.add.reduceat(
            self.sums, documents.windows.first, axis=0
        ).T
        found = {
            "log-likelihood": logs / tokens,
            "Fast-DetectGPT": (logs - expected) / np.sqrt(np.maximum(variance, 1e-9)),
        }
        return found | ({"Binoculars": logs / np.maximum(cross, 1e-9)} if self.has_observer else {})


@torch.no_grad()
def likelihoods(
    performer: Any, observer: Any | None, runtime: Runtime, documents: LabelledDocuments, tokenizer: Any
) -> Likelihoods:
    """Likelihoods under the performer; the observer gives the cross-entropy for Binoculars.

    Let p be the performer's distribution of a token, and q the observer's. The log-probability has the expectation `sum p log p`.
    The cross-entropy is `-sum q log p`. A window that is longer than a model's context is read in parts.
    """
    sums = np.zeros((len(documents.ids), 5))
    nll: list[list[np.ndarray]] = [[] for _ in documents.ids]
    models = [performer] if observer is None else [performer, observer]
    context = min(model.config.max_position_embeddings - 1 for model in models)
    parts = [
        (window, ids[start : start + context])
        for window, ids in enumerate(documents.ids)
        for start in range(0, max(len(ids), 1), context)
    ]
    window_of = np.array([window for window, _ in parts], np.int64)
    order: list[tuple[int, np.ndarray]] = []
    for rows, ids, valid in batches([ids for _, ids in parts], tokenizer.pad_token_id):
        inputs, seen = (found[:, :-1] for found in with_cls(ids, valid, tokenizer.cls_token_id))
        logs = _log_probabilities(performer, runtime, inputs, seen)  # (B, T, V)
        of_token = logs.gather(-1, tensor(ids, runtime)[..., None])[..., 0]  # (B, T)
        probability = logs.exp()
        expected = (probability * logs).sum(-1)
        variance = (probability * logs**2).sum(-1) - expected**2
        cross = torch.zeros_like(expected)
        if observer is not None:
            cross = -(_log_probabilities(observer, runtime, inputs, seen).exp() * logs).sum(-1)
        columns = torch.stack([of_token, expected, variance, cross, torch.ones_like(cross)], -1).double()
        np.add.at(sums, window_of[rows], (columns * tensor(valid, runtime)[..., None]).sum(1).cpu().numpy())
        nats = -of_token.cpu().numpy()
        order += [(part, nats[row, : len(parts[part][1])]) for row, part in enumerate(rows.tolist())]
    for part, nats in sorted(order, key=lambda found: found[0]):
        nll[window_of[part]].append(nats)
    return Likelihoods(sums, [np.concatenate(found) for found in nll], observer is not None)


def _log_probabilities(model: Any, runtime: Runtime, inputs: np.ndarray, seen: np.ndarray) -> torch.Tensor:
    return torch.log_softmax(forward(model, runtime, inputs, seen, use_cache=False).logits.float(), -1)


def with_sign(
    on_chosen: np.ndarray, on_reported: np.ndarray, synthetic: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both suspicions with the sign that has an AUROC of at least 0.5 on the chosen documents."""
    sign = -1.0 if metrics.auroc(on_chosen, synthetic) < 0.5 else 1.0
    return sign * on_chosen, sign * on_reported


def joined_judge(documents: LabelledDocuments, suspicion: np.ndarray, how: str) -> np.ndarray:
    """(D,) log-odds of documents, from (W,) suspicions of windows."""
    return log_odds(documents.windows.join(suspicion, suspicion, how))
