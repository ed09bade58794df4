"""Score a text token by token with the critic, the inspector and the reference model, and as a whole with the judge.

A text is read in consecutive windows of the models' context; no model sees beyond its window. Windows of equal length
are scored together, so that no padding is needed.

Legend: B windows, T tokens.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lib import metrics, randomness
from lib.detection import JOINS, Calibration, Windows, log_odds
from lib.diffusion.policies import POLICIES
from lib.diffusion.samples import MaskedTexts
from lib.errors import BadData
from lib.evaluation.quality import sequence_scores
from lib.evaluation.user_texts import UserTexts
from lib.examples import leaves_out_unknown, without_unknown
from lib.log import say
from lib.tokenization import decode_batch, encode_batch
from lib.training.objectives.base import chunks, forward
from lib.training.objectives.next_token import causal_nll

BATCH = 64
HELD_OUT, REWRITTEN = "(held-out text of this run)", "(the same text, half of it rewritten)"

NO_VERDICT = {"synthetic_probability": None, "alarm_at": None, "known_rate": None}


def measured_rates(
    documents: list[dict],
    synthetic: Mapping[str, bool],
    figures: Mapping[str, Any],
    groups: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The judge's rates on labelled documents at each threshold: {"target", "fpr", "tpr", "originals", "synthetic"}.

    Args:
        documents: rows of `documents_of`.
        synthetic: document id -> its label; documents without one do not count.
        figures: of the judge, see `documents_of`. A rate of no documents is None.
        groups: document id -> its group; intervals resample groups. A document without one is a group of its own.
    """
    known = [d for d in documents if d["document_id"] in synthetic]
    truth = np.array([synthetic[d["document_id"]] for d in known], bool)
    names = [d["document_id"] for d in known]
    group = np.array([f"group {groups[n]}" if groups and n in groups else f"document {n}" for n in names])
    found = []
    for target in (rates["target"] for rates in figures["thresholds"]):
        alarm = np.array([(at := d["alarm_at"]) is not None and at <= target for d in known], bool)
        rates: dict[str, Any] = {"fpr": None, "tpr": None}
        for name, of in (("fpr", ~truth), ("tpr", truth)):
            if of.any():
                flagged, count = metrics.sum_by(group[of], alarm[of], np.ones(int(of.sum())))
                rates[name] = metrics.ratio(flagged, count, limits=metrics.SHARE)._asdict()
        found.append(
            {"target": target, "originals": int((~truth).sum()), "synthetic": int(truth.sum()), **rates}
        )
    return found


@dataclass(frozen=True)
class Window:
    document_id: str
    number: int
    ids: np.ndarray  # (T,)


def windows(
    documents: Iterable[tuple[str, str]],
    tokenizer: Any,
    context: int,
    unknown: str,
    characters: int | None = None,
) -> Iterator[Window]:
    """The windows of (document id, text) pairs, document by document.

    Args:
        context: most tokens of a window.
        unknown: as in `encode_batch`.
        characters: windows have equal lengths of about this many characters at most, as those that the judge learned from.
            None: they have `context` tokens.
    """
    for document_id, text in documents:
        ids = np.asarray(encode_batch(tokenizer, [text], unknown)[0], np.int64)
        starts = list(range(0, len(ids), context))
        if characters is not None:
            count = max(len(starts), -(-len(text) // characters)) if len(ids) else 0
            starts = [len(ids) * i // count for i in range(count)]
        for number, (start, end) in enumerate(itertools.pairwise([*starts, len(ids)])):
            yield Window(document_id, number, ids[start:end])


def windows_for(texts: Sequence[tuple[str, str]], evaluator: Any) -> tuple[list[Window], int]:
    """(the windows of (document id, text) pairs, as long as the models of the run read them; words left out).

    Words are left out as in training, see `leaves_out_unknown`. A text of such words alone keeps them, as [UNK].
    """
    config, tokenizer = evaluator.config, evaluator.tokenizer
    characters = config.data.passage_characters if config.data.has_labels else None
    left_out = 0
    if leaves_out_unknown(config):
        names, contents = [name for name, _ in texts], [text for _, text in texts]
        known, ids, left_out = without_unknown(tokenizer, contents, encode_batch(tokenizer, contents, "unk"))
        kept = [text if len(i) else whole for whole, text, i in zip(contents, known, ids, strict=True)]
        texts = list(zip(names, kept, strict=True))
    return list(
        windows(texts, tokenizer, evaluator.min_context, config.tokenizer.unknown, characters)
    ), left_out


def say_left_out(words: int) -> None:
    if words:
        say(f"words that the tokenizer does not know: {words:,}; they are left out, as in training")


def cut(user: UserTexts, evaluator: Any) -> list[Window]:
    """The windows of a user's texts. Says what the user must know about them."""
    parts, left_out = windows_for(user.texts, evaluator)
    say_left_out(left_out)
    scored = {part.document_id for part in parts}
    if empty := [name for name, _ in user.texts if name not in scored]:
        say(
            f"texts without a token that the models can read: {len(empty):,}, the first one {empty[0]}; they have no scores"
        )
    if not parts:
        raise BadData("--score: no text has a token that the models can read")
    unknown = sum(int((part.ids == evaluator.tokenizer.unk_token_id).sum()) for part in parts)
    if unknown:
        say(f"tokens outside the run's vocabulary: {unknown:,}; the models read them as [UNK]")
    if said := about_windows(parts, len(user.texts), evaluator):
        say(said)
    return parts


def about_windows(parts: Sequence[Window], texts: int, evaluator: Any) -> str | None:
    """What a user must know about texts of several windows; None if there are none. `texts`: how many there are."""
    context, join = evaluator.min_context, evaluator.judge_figures.get("join", "mean")
    of_judge = None if evaluator.judge is None else evaluator.judge.config.max_position_embeddings - 1
    longer = sum(part.number == 1 for part in parts)
    if not longer:
        return None
    said = (
        f"texts of several windows: {longer:,} of {texts:,}; a window has at most {context} tokens, and a text's score is the mean "
        f"over its tokens; windows are joined for the judge by: {join}"
    )
    if of_judge is not None and of_judge > context:
        said += f"; the judge learned from up to {of_judge}, so its thresholds may not hold"
    return said


def score(parts: list[Window], evaluator: Any) -> list[dict]:
    """A row of schema.SCORES for every window, in their order."""
    rows: list[dict | None] = [None] * len(parts)
    lengths = np.array([len(w.ids) for w in parts])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        for chosen in chunks(len(same), BATCH):
            index = same[chosen]
            found = _score_equal(np.stack([parts[i].ids for i in index]), evaluator)
            for b, i in enumerate(index):
                rows[i] = _row(parts[i], evaluator, {name: v[b] for name, v in found.items()})
    return [row for row in rows if row is not None]


def known_texts(evaluator: Any, count: int = BATCH) -> list[Window]:
    """Texts to compare a score with: held-out text of the run, and the same text with half of it rewritten.

    Up to `count` windows of each. On average every second token is masked and sampled again by the generator. Nothing for a run
    without a generator.
    """
    if evaluator.sampler is None:
        return []
    real = evaluator.real_text(count)[:, : evaluator.min_context]
    rows = np.arange(len(real))
    free = (
        randomness.uniform(randomness.key(evaluator.config.seed, "half rewritten"), rows, real.shape[1]) < 0.5
    )
    masked = np.where(free, evaluator.tokenizer.mask_token_id, real)
    rewritten = (
        evaluator.sampler.sample(MaskedTexts(masked, free, rows), POLICIES["ancestral"], 1).ids
        if len(real)
        else real
    )
    named = ((HELD_OUT, real), (REWRITTEN, rewritten))
    return [Window(name, number, ids) for name, texts in named for number, ids in enumerate(texts)]


@torch.no_grad()
def _score_equal(ids: np.ndarray, evaluator: Any) -> dict[str, np.ndarray]:
    """Scores of (B, T) ids: (B, T) per token, (B,) of the judge. Models that the run lacks are skipped."""
    runtime, cls_id = evaluator.runtime, evaluator.tokenizer.cls_token_id
    valid = np.ones_like(ids, bool)
    found = {} if evaluator.sampler is None else {"critic_error": evaluator.sampler.critic_error(ids)}
    if evaluator.inspector is not None:
        probabilities = torch.softmax(forward(evaluator.inspector, runtime, ids, valid).logits.float(), -1)
        found["inspector_changed"] = (1 - probabilities[..., 0]).cpu().numpy()
    if evaluator.reference is not None:
        found["reference_nll"] = causal_nll(evaluator.reference, runtime, ids, valid, cls_id)[0].cpu().numpy()
    if evaluator.judge is not None:
        found["judge_score"] = sequence_scores(evaluator.judge, runtime, ids, cls_id)
        found["judge_suspicion"] = 1 - found["judge_score"]
        if (classes := evaluator.judge.config.num_labels) > 2:
            first = (1.0, *[0.0] * (classes - 1))
            found["judge_suspicion"] = 1 - sequence_scores(evaluator.judge, runtime, ids, cls_id, first)
    return found


def _row(window: Window, evaluator: Any, found: dict[str, np.ndarray]) -> dict:
    per_token = ("critic_error", "inspector_changed", "reference_nll")
    row: dict = {
        "document_id": window.document_id,
        "window": window.number,
        "text": decode_batch(evaluator.tokenizer, [window.ids])[0],
        "token_ids": window.ids.tolist(),
    }
    for name in ("judge_score", "judge_suspicion"):
        row[name] = float(found[name]) if name in found else None
    for name in per_token:
        row[name] = found[name].tolist() if name in found else None
        row[f"{name}_mean"] = float(found[name].mean()) if name in found else None
    return row


def documents_of(rows: list[dict], judge: Mapping[str, Any] | None = None) -> list[dict]:
    """One row per document: means over its windows, weighted by their tokens.

    Args:
        judge: held-out figures of the judge, which say how its windows are joined. With `detection`, rows have a
            `synthetic_probability`, and `alarm_at`: the lowest rate of false alarms at which the document is flagged, or None.
            `known_rate` is the same among the rates that the selection split has enough originals for, where there is one.
    """
    judge = judge or {}
    how, figures = judge.get("join", JOINS[0]), judge.get("detection")
    windows_of: dict[str, list[dict]] = {}
    for row in rows:
        windows_of.setdefault(row["document_id"], []).append(row)
    documents = []
    for name, these in windows_of.items():
        weights = np.array([len(row["token_ids"]) for row in these])
        document: dict = {"document_id": name, "tokens": int(weights.sum())}
        for key in ("critic_error_mean", "inspector_changed_mean", "reference_nll_mean"):
            values = [row[key] for row in these]
            document[key] = None if values[0] is None else float(np.average(values, weights=weights))
        document |= _judged(these, weights, how, figures)
        documents.append(document)
    return documents


def _judged(
    these: list[dict], weights: np.ndarray, how: str, figures: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the judge says of a document: its score and, with `figures`, a probability and the verdict at the thresholds."""
    if these[0]["judge_score"] is None:
        return {"judge_score": None, **NO_VERDICT}
    suspicion = np.array([row["judge_suspicion"] for row in these])
    of = Windows(np.zeros(len(these), np.int64), np.maximum(weights, 1))
    score = float(of.join(np.array([row["judge_score"] for row in these]), suspicion, how)[0])
    if figures is None:
        return {"judge_score": score, **NO_VERDICT}
    odds = float(log_odds(of.join(suspicion, suspicion, how))[0])
    alarms = [rates for rates in figures["thresholds"] if odds > rates["threshold"]]
    at, known = (
        [rates["target"] for rates in some] for some in (alarms, [r for r in alarms if r["enough_originals"]])
    )
    probability = float(Calibration(**figures["calibration"])(np.array(odds)))
    found = {
        "synthetic_probability": probability,
        "alarm_at": min(at, default=None),
        "known_rate": min(known, default=None),
    }
    return {"judge_score": score, **found}
