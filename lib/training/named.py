"""Train one named model of the config: its data, its objective, its start, its record.

Stage 04 calls this for every model of `models:`, stage 02 for the generator it needs. Knows tables and modes, and
no task.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
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
from lib.models.build import fresh_trunk, heads_of, load_model, save_model, start_model
from lib.models.ranker import CandidateRanker, SequenceRanker
from lib.models.ranker_files import RANKER_FILE, load_ranker, open_encoder, save_ranker, with_lora
from lib.runtime import Runtime
from lib.sections import ModelSpec
from lib.tokenization import newline_ids
from lib.training.data import Sequences, Windows, pools
from lib.training.loop import train
from lib.training.objectives.language_model import MaskedDiffusion, NextToken
from lib.training.objectives.pool_choice import PoolChoice, PoolReader
from lib.training.objectives.ranker import BestCandidate
from lib.training.objectives.sequence_scorer import SequenceClasses, SequenceScore
from lib.training.objectives.token_classifier import TokenClasses
from lib.training.pool_table import PoolTable

RECORD = "training_manifest.json"


@dataclass
class Materials:
    """What models learn from, read when first asked for.

    Attributes:
        read_examples: split -> table of schema.EXAMPLES.
        read_candidates: split -> candidates joined with their rewards and their example's group.
        read_baselines: table of schema.BASELINES, None where stage 02 wrote none.
    """

    config: Config
    tokenizer: Any
    runtime: Runtime
    read_examples: Callable[[str], pa.Table]
    read_candidates: Callable[[str], pa.Table]
    read_baselines: Callable[[], pa.Table | None] = lambda: None
    _kept: dict[tuple[str, str], pa.Table] = field(default_factory=dict)

    def examples(self, split: str) -> pa.Table:
        return self._get("examples", split, self.read_examples)

    def candidates(self, split: str) -> pa.Table:
        return self._get("candidates", split, self.read_candidates)

    @cached_property
    def have_prompts(self) -> bool:
        """Whether there is something to read before the candidates."""
        return any(self.examples("held_out")["prompt"].to_pylist())

    def pools(self, split: str) -> PoolTable:
        """The candidates of a split as pools. Raises BadData when there are none to choose between."""
        return PoolTable.of(self.candidates(split), self.examples(split), self.read_baselines())

    def pools_for_selection(self) -> PoolTable:
        """Those of the split `selection`; without one, the held-out ones."""
        try:
            return self.pools("selection")
        except BadData:
            return self.pools("held_out")

    def _get(self, kind: str, split: str, read: Callable[[str], pa.Table]) -> pa.Table:
        if (kind, split) not in self._kept:
            self._kept[kind, split] = read(split)
            if not self._kept[kind, split].num_rows:
                raise BadData(f"there are no {kind} in split '{split}'; check data.fractions")
        return self._kept[kind, split]


@dataclass
class Recipe:
    """A model on its way to being trained.

    Attributes:
        save: (model, folder) writes what `load` reads.
        load: folder -> the trained model.
        transfer: which tensors came from where.
        facts: what else its record says.
    """

    model: nn.Module
    objective: Any
    save: Callable[[Any, Path], None]
    load: Callable[[Path], nn.Module]
    transfer: dict[str, Any]
    facts: dict[str, Any]


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
    with_prompts = spec.mode == "ranker" and materials.have_prompts
    recipe = (ranker_recipe if with_prompts else model_recipe)(name, spec, materials, folder, start)
    result = train(
        recipe.model,
        recipe.objective,
        spec.training,
        materials.runtime,
        folder,
        seed=materials.config.seed,
        label=name,
        save=recipe.save,
    )
    best: Any = recipe.load(folder / "best_model").to(materials.runtime.device).eval()
    with torch.no_grad():
        values, rows = recipe.objective.report(best)
    record = {
        "name": name,
        "mode": spec.mode,
        "parameters": sum(p.numel() for p in best.parameters()),
        "learning_parameters": sum(p.numel() for p in recipe.model.parameters() if p.requires_grad),
        "transfer": recipe.transfer,
        **recipe.facts,
        "steps": result.steps,
        "best_step": result.best_step,
        "selection": recipe.objective.selection,
        "held_out": values,
        "table": [row.as_dict() for row in rows],
    }
    durable.write_json(record_file, plain(record))
    return record


def model_recipe(
    name: str, spec: ModelSpec, materials: Materials, folder: Path, start: Path | None
) -> Recipe:
    """Any mode over the run's own tokens."""
    config, tokenizer = materials.config, materials.tokenizer
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

    def load(path: Path) -> nn.Module:
        return SequenceRanker(load_model(path)) if spec.mode == "ranker" else load_model(path)

    return Recipe(
        model,
        make_objective(name, spec, materials, context=_context_of(model)),
        save=lambda m, path: save_model(m, path, tokenizer),
        load=load,
        transfer=transfer.as_dict() | {"start": _relative(transfer.start, folder)},
        facts={"attention": spec.effective_attention},
    )


def ranker_recipe(
    name: str, spec: ModelSpec, materials: Materials, folder: Path, start: Path | None
) -> Recipe:
    """A ranker that reads a prompt and its candidates, as the section `ranker` says."""
    config, settings = materials.config, materials.config.ranker
    model, tokenizer, origin = start_ranker(name, spec, config, materials.tokenizer, start)
    train_pools, selection = materials.pools(spec.split), materials.pools_for_selection()
    size = train_pools.present.shape[1]
    if size != config.candidates.per_example:
        raise BadConfig(
            f"candidates.per_example is {config.candidates.per_example}, but stage 02 made pools of {size}; set it to "
            f"{size}, or run 02_generate_candidates.py --overwrite and the stages after it"
        )
    for split, table in ((spec.split, train_pools), ("selection", selection)):
        if table.skipped:
            say(f"{name}: {table.skipped} pools in {split} have equal rewards; they are skipped")
    reader = PoolReader(tokenizer, settings, materials.runtime, blind=spec.blind)
    objective = PoolChoice(
        name, train_pools, selection, materials.pools("held_out"), reader, config.seed,
        spec.training.evaluation_examples,
    )  # fmt: skip
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{name}: {learning:,} of {sum(p.numel() for p in model.parameters()):,} weights learn; {origin}")
    return Recipe(
        model,
        objective,
        save=lambda m, path: save_ranker(m, path, tokenizer),
        load=lambda path: load_ranker(path)[0],
        transfer={"start": origin},
        facts={"attention": settings.attention, "pooling": settings.pooling, "blind": spec.blind},
    )


def start_ranker(name: str, spec: ModelSpec, config: Config, run_tokenizer: Any, start: Path | None):
    """(ranker, its tokenizer, where it comes from).

    From `start`: a trained ranker goes on as it is; another model of ours lends its trunk. Otherwise from the
    configured encoder, or a fresh backbone of ours.
    """
    settings = config.ranker
    if start is not None and (start / RANKER_FILE).exists():
        model, tokenizer = load_ranker(start, learning=True)
        return model, tokenizer, f"ranker in {os.path.relpath(start)}"
    if start is not None:
        trunk, tokenizer = open_encoder(str(start))
        origin = f"trunk of {os.path.relpath(start)}"
    elif settings.encoder is not None:
        trunk, tokenizer = open_encoder(settings.encoder)
        origin = settings.encoder
    else:
        trunk, tokenizer = fresh_trunk(spec, len(run_tokenizer), config.seed, name), run_tokenizer
        origin = "scratch"
    if settings.adapter == "lora":
        lora = settings.lora
        trunk = with_lora(trunk, lora.rank, lora.alpha, lora.dropout, lora.targets, seed=config.seed)
    elif settings.embeddings == "frozen":
        trunk.get_input_embeddings().requires_grad_(False)
    model = CandidateRanker(
        trunk, pooling=settings.pooling, head=settings.head, head_dropout=settings.head_dropout,
        attention=settings.attention, seed=config.seed,
    )  # fmt: skip
    return model, tokenizer, origin


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
