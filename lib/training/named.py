"""Train one named model of the config: its data, its objective, its start, its record.

Stage 04 calls this for every model of `models:`, stage 02 for the generator it needs. Knows tables and modes, and
no task.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from lib import durable
from lib.artifacts import plain
from lib.config import Config
from lib.errors import BadConfig, BadData
from lib.log import say
from lib.models.build import heads_of, load_model, save_model, start_model
from lib.models.ranker import SequenceRanker
from lib.runtime import Runtime
from lib.sections import ModelSpec
from lib.tokenization import newline_ids
from lib.training.data import Sequences, Windows, pools
from lib.training.loop import train
from lib.training.objectives.language_model import MaskedDiffusion, NextToken
from lib.training.objectives.ranker import BestCandidate
from lib.training.objectives.sequence_scorer import SequenceClasses, SequenceScore
from lib.training.objectives.token_classifier import TokenClasses

RECORD = "training_manifest.json"


@dataclass
class Materials:
    """What models learn from, read when first asked for.

    Attributes:
        read_examples: split -> table of schema.EXAMPLES.
        read_candidates: split -> candidates joined with their rewards and their example's group.
    """

    config: Config
    tokenizer: Any
    runtime: Runtime
    read_examples: Callable[[str], pa.Table]
    read_candidates: Callable[[str], pa.Table]
    _kept: dict[tuple[str, str], pa.Table] = field(default_factory=dict)

    def examples(self, split: str) -> pa.Table:
        return self._get("examples", split, self.read_examples)

    def candidates(self, split: str) -> pa.Table:
        return self._get("candidates", split, self.read_candidates)

    def _get(self, kind: str, split: str, read: Callable[[str], pa.Table]) -> pa.Table:
        if (kind, split) not in self._kept:
            self._kept[kind, split] = read(split)
            if not self._kept[kind, split].num_rows:
                raise BadData(f"there are no {kind} in split '{split}'; check data.fractions")
        return self._kept[kind, split]


def train_named(
    name: str, spec: ModelSpec, materials: Materials, folder: Path, start: Path | None
) -> dict[str, Any]:
    """Train a model, or return the record of one already trained.

    Returns the record, also in `folder/training_manifest.json`: settings, which tensors came from the start,
    best step, held-out metrics, rows for the results table.
    """
    record_file = folder / RECORD
    if record_file.exists():
        say(f"{name}: already trained")
        return json.loads(record_file.read_text(encoding="utf-8"))
    config, tokenizer, runtime = materials.config, materials.tokenizer, materials.runtime
    if spec.attention != spec.effective_attention:
        say(f"{name}: {spec.mode} reads both ways; attention is bidirectional, not {spec.attention}")
    model, transfer = start_model(
        spec.mode,
        spec.architecture,
        spec.effective_attention,
        len(tokenizer),
        config.seed,
        name,
        start,
        **heads_of(spec.mode, spec.target_type, spec.num_classes),
    )
    if start is not None:
        say(f"{name}: {len(transfer.loaded)} tensors from {os.path.relpath(start)}; "
            f"left out: {transfer.dropped or 'none'}; new: {transfer.created or 'none'}")  # fmt: skip
    objective = make_objective(name, spec, materials, context=_context_of(model))
    result = train(
        model,
        objective,
        spec.training,
        runtime,
        folder,
        seed=config.seed,
        label=name,
        save=lambda m, path: save_model(m, path, tokenizer),
    )
    best = load_model(folder / "best_model")
    best = (SequenceRanker(best) if spec.mode == "ranker" else best).to(runtime.device).eval()
    with torch.no_grad():
        values, rows = objective.report(best)
    record = {
        "name": name,
        "mode": spec.mode,
        "attention": spec.effective_attention,
        "parameters": sum(p.numel() for p in best.parameters()),
        "transfer": transfer.as_dict() | {"start": _relative(transfer.start, folder)},
        "steps": result.steps,
        "best_step": result.best_step,
        "selection": objective.selection,
        "held_out": values,
        "table": [row.as_dict() for row in rows],
    }
    durable.write_json(record_file, plain(record))
    return record


def _relative(start: str, folder: Path) -> str:
    """The start as seen from the run's folder, so that a record does not depend on where the run lies."""
    return start if start == "scratch" else os.path.relpath(start, folder.parent.parent)


def _context_of(model: nn.Module) -> int:
    inner: Any = model.encoder if isinstance(model, SequenceRanker) else model
    return inner.config.max_position_embeddings - 1


def make_objective(name: str, spec: ModelSpec, materials: Materials, context: int):
    """The objective of a mode over the materials' splits. `context`: longest input in tokens, [CLS] aside."""
    if spec.mode == "language_model":
        return _language_objective(name, spec, materials, context)
    if spec.mode == "ranker":
        return _ranker_objective(name, spec, materials, context)
    train, held_out = materials.candidates(spec.split), materials.candidates("held_out")
    pad_id = materials.tokenizer.pad_token_id
    sequences = [Sequences(t["token_ids"], context, pad_id) for t in (train, held_out)]
    groups = np.asarray(held_out["group"].to_pylist())
    common = {
        "groups": groups,
        "runtime": materials.runtime,
        "seed": materials.config.seed,
        "num_evaluated": spec.training.evaluation_examples,
    }
    if spec.mode == "token_classifier":
        labels = [Sequences(t["token_labels"], context, 0) for t in (train, held_out)]
        highest = max(int(s.ids.max()) for s in labels if len(s.ids))
        if highest >= spec.num_classes:
            raise BadConfig(
                f"models.{name}.num_classes is {spec.num_classes}, but the token labels go up to {highest}; "
                f"set it to at least {highest + 1}"
            )
        return TokenClasses(name, sequences[0], labels[0], sequences[1], labels[1],
                            num_classes=spec.num_classes, class_weighting=spec.class_weighting, **common)  # fmt: skip
    targets = [t["reward"].to_numpy() for t in (train, held_out)]
    arguments = (name, sequences[0], targets[0], sequences[1], targets[1])
    cls_id = materials.tokenizer.cls_token_id
    if spec.target_type == "classification":
        targets = [_classes(t, spec.num_classes) for t in targets]
        arguments = (name, sequences[0], targets[0], sequences[1], targets[1])
        return SequenceClasses(*arguments, cls_id=cls_id, num_classes=spec.num_classes, **common)
    return SequenceScore(*arguments, cls_id=cls_id, **common)


def _classes(rewards: np.ndarray, num_classes: int) -> np.ndarray:
    """Rewards as classes: N equal bands of [0, 1], the top one including 1."""
    return np.minimum((rewards * num_classes).astype(np.int64), num_classes - 1)


def _language_objective(name: str, spec: ModelSpec, materials: Materials, context: int):
    tokenizer, config = materials.tokenizer, materials.config
    train, held_out = (
        Windows(materials.examples(split), context, tokenizer.pad_token_id)
        for split in (spec.split, "held_out")
    )
    held_out = held_out.tiled()
    common = {
        "label": name,
        "train": train,
        "held_out": held_out,
        "runtime": materials.runtime,
        "seed": config.seed,
        "batch_size": spec.training.batch_size,
        "num_evaluated": spec.training.evaluation_examples,
    }
    if spec.effective_attention == "causal":
        return NextToken(tokenizer.cls_token_id, **common)
    return MaskedDiffusion(
        config.diffusion, tokenizer.mask_token_id, newline_ids=newline_ids(tokenizer), **common
    )


def _ranker_objective(name: str, spec: ModelSpec, materials: Materials, context: int):
    parts, rewards, sequences_of, groups = [], [], [], np.empty(0)
    terms: dict[str, list[np.ndarray]] = {}
    first_row = 0
    for split in (spec.split, "held_out"):
        table = materials.candidates(split)
        rows = pools(np.asarray(table["example_id"].to_pylist()))
        reward = table["reward"].to_numpy()
        value = np.where(rows >= 0, reward[rows], np.nan)
        decided = np.nanmax(value, 1) > np.nanmin(value, 1)
        if not decided.all():
            say(
                f"{name}: {int((~decided).sum())} of {len(rows)} pools in {split} have equal rewards; they are skipped"
            )
        if not decided.any():
            raise BadData(
                f"{name}: no pool in split '{split}' has candidates of different reward to choose from"
            )
        groups = np.asarray(table["group"].to_pylist())[rows[decided][:, 0]]
        parts.append(np.where(rows >= 0, rows + first_row, -1)[decided])
        rewards.append(reward)
        for name_of_term in (c for c in table.column_names if c.startswith("term_")):
            terms.setdefault(name_of_term.removeprefix("term_"), []).append(table[name_of_term].to_numpy())
        sequences_of.append(table["token_ids"])
        first_row += table.num_rows
    together = pa.chunked_array([c for column in sequences_of for c in column.chunks])
    sequences = Sequences(together, context, materials.tokenizer.pad_token_id)
    return BestCandidate(name, sequences, np.concatenate(rewards), parts[0], parts[1], groups,
                         cls_id=materials.tokenizer.cls_token_id, runtime=materials.runtime,
                         seed=materials.config.seed, num_evaluated=spec.training.evaluation_examples,
                         terms={n: np.concatenate(v) for n, v in terms.items()})  # fmt: skip
