"""Candidates for text (stage 02) and their rewards (stage 03).

One of the K candidates of a passage is the original, at a random position. The others are rewritten: each draws its own
mask ratio, and only masked tokens change. The label of a token says where it came from.
"""

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from lib import randomness
from lib.config import Config
from lib.errors import BadConfig
from lib.label_values import Span
from lib.labels import Label, classes_of
from lib.sections.data import class_rewards
from lib.tasks import CandidateContext
from lib.tokenization import TEXTS_AT_A_TIME, decode_batch, forbidden_ids, num_ids

if TYPE_CHECKING:  # it imports torch, which the other stages of this task do not need
    from lib.tasks.text.other_tokenizer import Rewritten

ORIGINAL, RANDOM_REPLACEMENT, PREDICTED = 0, 1, 2


def candidates(examples: pa.Table, context: CandidateContext) -> pa.Table:
    """K candidates for each example; the rows of one example are adjacent.

    Every draw is keyed by the id of the example and the number of the candidate. A candidate therefore does not depend on
    the other examples of the table.
    """
    config, k = context.config.candidates, context.config.candidates.per_example
    count = examples.num_rows
    keys = pd.util.hash_array(np.asarray(examples["example_id"].to_pylist(), dtype=object)).astype(np.int64)
    rows = (keys[:, None] * 64 + np.arange(k)).reshape(-1)  # (N K,); K is at most 64
    example_of = np.repeat(np.arange(count), k)
    position = np.floor(randomness.uniform(context.key("original place"), keys, 1)[:, 0] * k).astype(np.int64)
    is_original = np.tile(np.arange(k), count) == np.repeat(position, k)
    low, high = config.mask_ratio
    ratio = low + (high - low) * randomness.uniform(context.key("mask ratio"), rows, 1)[:, 0]
    lists = examples["token_ids"].to_pylist()
    token_ids: list = [lists[e] for e in example_of]
    labels: list = [np.zeros(len(ids), np.int8) for ids in token_ids]
    texts = [examples["target"][int(e)].as_py() for e in example_of]
    differs: list = [np.zeros(len(ids), bool) for ids in token_ids]
    changed = np.flatnonzero(~is_original)
    if config.source != "original_only" and len(changed):
        new = _rewrite(examples.take(pa.array(example_of[changed])), ratio[changed], rows[changed], context)
        for i, one in zip(changed, new, strict=True):
            token_ids[i], labels[i], differs[i], texts[i] = one.token_ids, one.labels, one.differs, one.text
    if config.label_rule == "changed":
        labels = _only_changed(labels, differs, context)
    own = None
    if context.config.data.has_labels:
        own, spans = _own_labels(examples)
        if context.config.data.spans_key is not None:
            labels = _classes_of_tokens(texts, spans, token_ids, context)
    return pa.table(
        {
            "example_id": examples["example_id"].take(pa.array(example_of)),
            "candidate_id": np.tile(np.arange(k, dtype=np.int32), count),
            "split": examples["split"].take(pa.array(example_of)),
            "kind": np.where(is_original, "original", config.source),
            "text": texts,
            "mask_ratio": pa.array(ratio, mask=is_original | (config.source == "original_only")),
            "synthetic_fraction": [float((label > 0).mean()) if len(label) else 0.0 for label in labels],
            "changed_fraction": [float(d.mean()) if len(d) else 0.0 for d in differs],
            "token_confidence": _confidence(
                examples["split"].to_pylist(), example_of, token_ids, rows, context
            ),
            "token_ids": pa.array([np.asarray(t, np.int32) for t in token_ids], pa.list_(pa.int32())),
            "token_labels": pa.array(labels, pa.list_(pa.int8())),
            "label": pa.array(own if own is not None else [None] * len(texts), pa.float64()),
        }
    )


def _own_labels(examples: pa.Table) -> tuple[list[float | None], list[tuple[Span, ...]]]:
    """(label, spans) of each example: those of the user."""
    records = [json.loads(record) for record in examples["record"].to_pylist()]
    return [r["label"] for r in records], [tuple(map(tuple, r["spans"] or ())) for r in records]


def _classes_of_tokens(
    texts: list[str], spans: list[tuple[Span, ...]], token_ids: list, context: CandidateContext
) -> list[np.ndarray]:
    """The class of each token of each text: that of its first labelled character."""
    found = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        coded = context.tokenizer(
            texts[start : start + TEXTS_AT_A_TIME],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        for i, offsets in enumerate(coded["offset_mapping"], start):
            assert len(offsets) == len(token_ids[i]), "the tokenizer gives other tokens than in stage 01"
            found.append(classes_of(texts[i], offsets, Label(None, spans[i]), texts[i][:20]))
    return found


def _confidence(
    splits: list[str], example_of, token_ids: list, rows: np.ndarray, context: CandidateContext
) -> pa.Array:
    """Log-probabilities of the tokens of held-out candidates under the masked LM: a baseline for inspector and judge."""
    found: list = [None] * len(token_ids)
    held_out = [i for i, e in enumerate(example_of) if splits[e] == "held_out" and len(token_ids[i])]
    if held_out and context.engines and context.same_tokenizer:
        ids, valid = pad([token_ids[i] for i in held_out], context.tokenizer.pad_token_id)
        logs = context.engines[0].confidence(
            ids, valid, context.seed, rows[held_out], context.config.candidates.batch_size
        )
        for i, row, length in zip(held_out, logs, valid.sum(1), strict=True):
            found[i] = row[:length]
    return pa.array(found, pa.list_(pa.float32()))


def _only_changed(labels: list, differs: list, context: CandidateContext) -> list:
    """Labels in which a predicted token that equals the original token counts as original."""
    if context.engines and not context.same_tokenizer:
        raise BadConfig(
            "candidates.label_rule changed needs a generator.checkpoint with the run's tokenizer, and this one has "
            "another tokenizer: set candidates.label_rule to origin"
        )
    return [np.where(d, label, ORIGINAL).astype(np.int8) for label, d in zip(labels, differs, strict=True)]


def _rewrite(
    examples: pa.Table, ratio: np.ndarray, rows: np.ndarray, context: CandidateContext
) -> "list[Rewritten]":
    """One rewritten candidate for each row of `examples`, with its own mask ratio."""
    from lib.synthetic import MaskedRows
    from lib.tasks.text.other_tokenizer import Rewritten, rewrite_with_other_tokenizer

    config = context.config.candidates
    if config.source == "masked_lm" and not context.same_tokenizer:
        texts = examples["target"].to_pylist()
        return rewrite_with_other_tokenizer(texts, ratio, rows, context)
    ids, valid = pad(examples["token_ids"].to_pylist(), context.tokenizer.pad_token_id)
    masked = context.draw_mask(valid, ratio, rows, lambda: np.isin(ids, context.newline_ids))
    if config.source == "random_tokens":
        filled = np.where(masked, _random_ids(ids.shape[1], rows, context), ids)
        label = RANDOM_REPLACEMENT
    else:
        folds = context.fold_of(examples["group"].to_pylist(), examples["split"].to_pylist())
        filled = ids.copy()
        for fold in np.unique(folds):
            here = folds == fold
            engine = context.engines[fold]
            masked_rows = MaskedRows(ids[here], valid[here], masked[here], rows[here])
            filled[here] = engine.fill(masked_rows, config, context.seed)
        label = PREDICTED
    lengths = valid.sum(1)
    kept = [filled[r, :n].astype(np.int32) for r, n in enumerate(lengths)]
    labels = [np.where(masked[r, :n], label, ORIGINAL).astype(np.int8) for r, n in enumerate(lengths)]
    differs = [new != ids[r, : len(new)] for r, new in enumerate(kept)]
    parts = zip(kept, labels, differs, decode_batch(context.tokenizer, kept), strict=True)
    return [Rewritten(*part) for part in parts]


def review_candidates(context: CandidateContext) -> tuple[dict, None]:
    """What could and could not be rewritten with the tokenizer of another model."""
    from lib.tasks.text.other_tokenizer import review

    return ({"rewriting": review(context.counts)} if context.counts else {}), None


def _random_ids(width: int, rows: np.ndarray, context: CandidateContext) -> np.ndarray:
    """(B, T) ids of ordinary tokens, drawn independently and uniformly."""
    ordinary = np.setdiff1d(np.arange(num_ids(context.tokenizer)), forbidden_ids(context.tokenizer))
    noise = randomness.uniform(context.key("random token"), rows, width)
    return ordinary[np.floor(noise * len(ordinary)).astype(np.int64)]


def pad(sequences: list, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """((B, T) int64 ids, (B, T) bool valid) of ragged sequences."""
    lengths = np.array([len(s) for s in sequences])
    valid = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(valid.shape, pad_id, np.int64)
    ids[valid] = np.concatenate([np.asarray(s) for s in sequences])
    return ids, valid


def rewards(config: Config, table: pa.Table) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Authenticity of each candidate: rewards.curve at its fraction of synthetic tokens; 1 for untouched text.

    With data.label_key, the reward is the user's score, or that of the user's class; the term `class` has its number. With
    data.spans_key alone, labelled tokens count as synthetic.
    """
    if config.data.label_key is not None:
        label = table["label"].to_numpy()
        if config.data.label_classes is None:
            return label, {"label": label}
        by_class = np.asarray(class_rewards(len(config.data.label_classes)))
        return by_class[label.astype(np.int64)], {"class": label}
    fraction = table["synthetic_fraction"].to_numpy()
    points = np.asarray(config.rewards.curve)
    authenticity = np.interp(fraction, points[:, 0], points[:, 1])
    return authenticity, {"authenticity": authenticity, "untouched": (fraction == 0).astype(np.float64)}


def explain(row: dict) -> str:
    """The scores of one sample in a line."""
    parts = []
    if row["critic_error"] is not None:
        parts.append(f"the critic expects {row['critic_error']:.0%} wrong tokens")
    if row["judge_score"] is not None:
        parts.append(f"the judge rates it {row['judge_score']:.0%} authentic")
    if row["reference_nll"] is not None:
        parts.append(f"{row['reference_nll']:.2f} nats per token under the reference model")
    return "; ".join(parts)
