"""The objective of each mode over a run's own tokens."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import BadConfig
from lib.log import say
from lib.models.build import load_model
from lib.sections.models import ModelSpec
from lib.tokenization import newline_ids
from lib.training.data import Sequences, Windows
from lib.training.lengths import WholeTexts
from lib.training.objectives.language_model import MaskedDiffusion, NextToken
from lib.training.objectives.modifiers import Modifiers, check_judge
from lib.training.objectives.ranker import BestCandidate, TokenPools
from lib.training.objectives.sequence_scorer import FreshTargets, SequenceClasses, SequenceScore
from lib.training.objectives.staged import StagedUnmasking
from lib.training.objectives.token_classifier import FreshLabels, TokenClasses
from lib.training.pool_table import decided_pools, terms_of
from lib.training.stage_inputs import SELECTION, StageInputs, explained
from lib.training.streaming_dataset import StreamingDataset


def make_objective(name: str, spec: ModelSpec, stage_inputs: StageInputs, context: int):
    """The objective of a mode over the stage_inputs' splits. `context`: longest input in tokens, [CLS] aside."""
    if spec.mode == "language_model":
        return _language_objective(name, spec, stage_inputs, context)
    if spec.mode == "ranker":
        return _ranker_objective(name, spec, stage_inputs, context)
    tables = [stage_inputs.candidates(split) for split in (spec.split, SELECTION, "held_out")]
    train, held_out = tables[0], tables[2]
    read = whole_sequences(name, context, stage_inputs)
    sequences = [read(table) for table in tables]
    groups = np.asarray(held_out["group"].to_pylist())
    common = {
        "confidence": confidence_of(held_out["token_confidence"]),
        "groups": groups,
        "runtime": stage_inputs.runtime,
        "seed": stage_inputs.config.seed,
        "num_evaluated": spec.training.evaluation_examples,
    }
    fresh = stage_inputs.fresh_rows(name) if spec.split == "train" else None
    if spec.mode == "token_classifier":
        labels = [Sequences(t["token_labels"], context, 0) for t in tables]
        highest = max(int(s.ids.max()) for s in labels if len(s.ids))
        if highest >= spec.num_classes:
            raise BadConfig(
                f"models.{name}.num_classes is {spec.num_classes}, but the token labels go up to {highest}; "
                f"set it to at least {highest + 1}"
            )
        return TokenClasses(name, *_beside(sequences, labels), num_classes=spec.num_classes,
                            class_weighting=spec.class_weighting, fresh=fresh and _fresh_labels(fresh, read, context), **common)  # fmt: skip
    as_target = _as_is
    if spec.target_type == "classification":
        as_target = functools.partial(_classes, num_classes=spec.num_classes)
    common["fresh"] = fresh and _fresh_targets(fresh, read, as_target)
    arguments = (name, *_beside(sequences, [as_target(t["reward"].to_numpy()) for t in tables]))
    cls_id = stage_inputs.tokenizer.cls_token_id
    if spec.target_type == "classification":
        return SequenceClasses(*arguments, cls_id=cls_id, num_classes=spec.num_classes, **common)
    changed = [t["changed_fraction"] for t in (train, held_out)]
    known = stage_inputs.config.labels.path is None and not any(column.null_count for column in changed)
    pair = (changed[0].to_numpy(), changed[1].to_numpy()) if known else None
    return SequenceScore(*arguments, cls_id=cls_id, changed=pair, **common)


def _beside(first: list, second: list) -> list:
    """Of each split what it has of the first kind, then of the second."""
    return [part for pair in zip(first, second, strict=True) for part in pair]


def _classes(rewards: np.ndarray, num_classes: int) -> np.ndarray:
    """Rewards as classes: N equal bands of [0, 1], the top one including 1."""
    return np.minimum((rewards * num_classes).astype(np.int64), num_classes - 1)


def _as_is(rewards: np.ndarray) -> np.ndarray:
    return rewards


def whole_sequences(name: str, context: int, stage_inputs: StageInputs) -> Callable[[pa.Table], Sequences]:
    """Candidates of a table -> their sequences; raises BadData when model `name` would read only a part of one."""

    def sequences(table: pa.Table) -> Sequences:
        WholeTexts(name, context, stage_inputs.config).add(table).refuse()
        return Sequences(table["token_ids"], context, stage_inputs.tokenizer.pad_token_id)

    return sequences


def _fresh_labels(fresh: StreamingDataset, read: Callable[[pa.Table], Sequences], width: int) -> FreshLabels:
    def batch(rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = fresh.rows(rows)
        every = np.arange(table.num_rows)
        ids, valid = read(table).batch(every)
        return ids, valid, Sequences(table["token_labels"], width, 0).batch(every)[0]

    return batch


def _fresh_targets(
    fresh: StreamingDataset,
    read: Callable[[pa.Table], Sequences],
    as_target: Callable[[np.ndarray], np.ndarray],
) -> FreshTargets:
    def batch(rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = fresh.rows(rows)
        ids, valid = read(table).batch(np.arange(table.num_rows))
        return ids, valid, as_target(table["reward"].to_numpy())

    return batch


def _language_objective(name: str, spec: ModelSpec, stage_inputs: StageInputs, context: int):
    tokenizer, config = stage_inputs.tokenizer, stage_inputs.config
    tables = [stage_inputs.examples(split) for split in (spec.split, SELECTION, "held_out")]
    train, selection, held_out = (Windows(table, context, tokenizer.pad_token_id) for table in tables)
    characters = pc.sum(pc.utf8_length(tables[2]["target"])).as_py()
    tiles = held_out.tiled()
    common = {
        "label": name,
        "train": train,
        "selection": selection.tiled(),
        "held_out": tiles,
        "groups": np.asarray(tables[2]["group"].to_pylist())[tiles.owner],
        "runtime": stage_inputs.runtime,
        "seed": config.seed,
        "batch_size": spec.training.batch_size,
        "num_evaluated": spec.training.evaluation_examples,
        "characters_per_token": characters / max(len(held_out.ids), 1),
    }
    if spec.effective_attention == "causal":
        return NextToken(tokenizer.cls_token_id, **common)
    objective = StagedUnmasking if config.diffusion.stages else MaskedDiffusion
    text_ids = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    return objective(
        config.diffusion, tokenizer.mask_token_id, newline_ids=newline_ids(tokenizer), text_ids=text_ids,
        modifiers=_modifiers(name, spec, stage_inputs, context, text_ids), **common,
    )  # fmt: skip


def _modifiers(
    name: str, spec: ModelSpec, stage_inputs: StageInputs, context: int, text_ids: np.ndarray
) -> Modifiers | None:
    if not spec.modifiers.any:
        return None
    tokenizer, judge = stage_inputs.tokenizer, None
    if spec.modifiers.judge is not None:
        folder = Path(spec.modifiers.judge.model)
        judge = load_model(folder)
        check_judge(judge, len(tokenizer), context, f"models.{name}.modifiers.judge.model: {folder}")
    return Modifiers(
        spec.modifiers,
        text_ids,
        stage_inputs.runtime,
        stage_inputs.config.seed,
        name,
        judge,
        tokenizer.cls_token_id,
    )


def _ranker_objective(name: str, spec: ModelSpec, stage_inputs: StageInputs, context: int):
    """Pools of the three splits over one list of sequences."""
    pools, columns, first_row = [], [], 0
    for split in (spec.split, SELECTION, "held_out"):
        table = stage_inputs.candidates(split)
        WholeTexts(name, context, stage_inputs.config).add(table).refuse()
        with explained(split):
            rows, skipped = decided_pools(table)  # (N, K)
        say_skipped(name, split, skipped)
        terms = {term: table[f"term_{term}"].to_numpy()[rows] for term in terms_of(table)}
        groups = np.asarray(table["group"].to_pylist())[rows[:, 0]]
        numbers = np.where(rows >= 0, rows + first_row, -1)
        pools.append(TokenPools(numbers, table["reward"].to_numpy()[rows], terms, groups, skipped))
        columns.append(table["token_ids"])
        first_row += table.num_rows
    together = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    tokenizer = stage_inputs.tokenizer
    train, selection, held_out = pools
    return BestCandidate(
        name, Sequences(together, context, tokenizer.pad_token_id), train, selection, held_out, tokenizer.cls_token_id,
        stage_inputs.runtime, stage_inputs.config.seed, spec.training.evaluation_examples,
    )  # fmt: skip


def say_skipped(name: str, split: str, skipped: int) -> None:
    """Says how many pools have nothing to choose between."""
    if skipped:
        say(f"{name}: {skipped:,} pools in {split} have equal rewards; they are skipped")


def confidence_of(column: pa.ChunkedArray) -> list[np.ndarray] | None:
    """The masked LM's log-probabilities of each held-out sequence's tokens; None if not known."""
    if column.null_count or not len(column):
        return None
    return [np.asarray(row, np.float32) for row in column.to_pylist()]
