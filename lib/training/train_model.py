"""Train one model of the config, from its start to its record. Stage 04 and, for its generator, stage 02 call this.

    train_model    the whole training of a model
    set_up         what is trained: the model, its objective, and how it is saved and loaded
    make_objective the objective of each mode: its data, its loss, its metrics

The loss itself is in `lib/training/objectives/` (masked diffusion: `language_model.py`), the steps in `loop.py`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib import durable
from lib.config import Config
from lib.errors import BadConfig, BadData
from lib.log import say
from lib.models.backbones import longest_input
from lib.models.block_attention import on_a_gpu
from lib.models.build import Checkpoint, PretrainedStart, heads_of, load_model, save_model, start_model
from lib.models.families import PRETRAINED
from lib.models.pretrained import open_pretrained, special_ids
from lib.models.ranker import SequenceRanker
from lib.models.ranker_files import load_ranker, save_ranker
from lib.models.ranker_placement import on_device
from lib.ranking.losses import POINTWISE, TEACHER
from lib.runs import plain
from lib.runtime import Runtime, release_memory
from lib.sections.models import ArchitectureConfig, ModelSpec
from lib.sections.pretrained import AdapterConfig, PretrainedConfig
from lib.tokenization import num_ids
from lib.training.loop import train
from lib.training.objectives.base import ReportingObjective, TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.objectives.modifiers import load_modifiers
from lib.training.objectives.next_token import NextToken
from lib.training.objectives.pool_choice import PoolChoice, PoolReader, PoolSplits, say_shortened
from lib.training.objectives.ranker import ranker_objective
from lib.training.objectives.sequence_scorer import sequence_scorer_objective
from lib.training.objectives.staged import StagedUnmasking
from lib.training.objectives.token_classifier import token_classifier_objective
from lib.training.pool_table import TEACHER_TERM, say_skipped, terms_of
from lib.training.ranker_start import start_in_run, start_ranker
from lib.training.stage_inputs import StageInputs

RECORD = "training_manifest.json"


def train_model(
    name: str, spec: ModelSpec, stage_inputs: StageInputs, folder: Path, start: Path | None
) -> dict[str, Any]:
    """Train a model, or return the record of one that is already trained.

    Args:
        folder: gets the models and the record.
        start: folder of the model to start from; None for random weights.

    Returns:
        The record, as written to `folder/training_manifest.json`. It has the transferred tensors, the optimizer's
        groups, the best step, held-out metrics, and rows of the results table.
    """
    return recorded(folder, lambda: _train(name, spec, stage_inputs, folder, start), stage_inputs.runtime)


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = durable.read_json(file)
    except (OSError, ValueError) as error:
        raise BadData(f"{file} is damaged ({error}); remove it to train this model again") from None
    if not isinstance(record, dict):
        raise BadData(f"{file} is no record of a training; remove it to train this model again")
    return record


def recorded(folder: Path, make: Callable[[], dict[str, Any]], runtime: Runtime) -> dict[str, Any]:
    """The record of a training in `folder`. If there is none, the training `make` makes it, and it is written.

    So an interrupted stage does not repeat a training that is complete. All processes call this together.
    """
    file, processes = folder / RECORD, runtime.processes
    known = _read_record(file) if processes.is_main and file.exists() else None
    if (known := processes.from_main(known)) is not None:
        say(f"{folder.name}: already trained")
        return known
    record = plain(make())
    if processes.is_main:
        durable.write_json(file, record)
    processes.barrier()  # the others may read the record now
    return json.loads(json.dumps(record))


def _train(
    name: str, spec: ModelSpec, stage_inputs: StageInputs, folder: Path, start: Path | None
) -> dict[str, Any]:
    # 1. The model, from its start, and what it learns
    context = context_of(name, spec, stage_inputs)
    setup = set_up(context, spec, stage_inputs, folder, start)
    learning = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)

    # 2. Train; the best step is chosen on the selection split
    result = train(setup.take_model(), setup.objective, context, folder, setup.save)

    # 3. Measure the best model on the held-out split, when the trained one has left the memory
    release_memory()
    best: Any = setup.load(folder / "best_model").to(context.runtime.device).eval()
    with torch.no_grad():
        values, rows = setup.objective.report(best)

    # 4. Record
    return {
        "name": name,
        "mode": spec.mode,
        "parameters": sum(p.numel() for p in best.parameters()),
        "learning_parameters": learning,
        "transfer": setup.transfer,
        **setup.facts,
        "optimizer": result.optimizer,
        "compiled": result.compiled,
        "steps": result.steps,
        "best_step": result.best_step,
        "selection": setup.objective.selection,
        "held_out": values,
        "table": [row.as_dict() for row in rows],
    }


def context_of(name: str, spec: ModelSpec, stage_inputs: StageInputs) -> TrainingContext:
    return TrainingContext(name, stage_inputs.config.seed, spec.training, stage_inputs.runtime)


@dataclass
class TrainerSetup:
    """A model that is ready to be trained.

    Attributes:
        save: (model, folder) -> None, writes what `load` reads.
        load: folder -> the trained model.
        transfer: which tensors came from the start, for the record.
        facts: further entries of the record.
    """

    model: nn.Module
    objective: ReportingObjective
    save: Callable[[Any, Path], object]
    load: Callable[[Path], nn.Module]
    transfer: dict[str, Any]
    facts: dict[str, Any]

    def take_model(self) -> nn.Module:
        """The model, which from now on is the caller's alone: its memory is free when the caller drops it."""
        model = self.model
        del self.model
        return model


def set_up(
    context: TrainingContext, spec: ModelSpec, stage_inputs: StageInputs, folder: Path, start: Path | None
) -> TrainerSetup:
    """Model and objective of any mode. `folder` and `start` as in `train_model`."""
    if spec.mode == "ranker" and stage_inputs.have_prompts:
        return set_up_prompt_ranker(context, spec, stage_inputs, folder, start)
    name, config, tokenizer = context.label, stage_inputs.config, stage_inputs.tokenizer
    if spec.attention != spec.effective_attention:
        say(f"{name}: mode {spec.mode} needs bidirectional attention; {spec.attention} is ignored")
    own_labels = spec.mode == "token_classifier" and config.has_own_labels
    heads = heads_of(spec.mode, spec.target_type, spec.num_classes, own_labels, config.class_names(spec))
    backbone = start_of(spec, config.pretrained, start)
    if isinstance(backbone, ArchitectureConfig):
        heads |= special_ids(tokenizer)
    model, transfer = start_model(
        spec.mode,
        backbone,
        spec.effective_attention,
        num_ids(tokenizer),
        config.seed,
        name,
        **heads,
    )
    if start is not None:
        say(f"{name}: {len(transfer.loaded)} tensors loaded from {os.path.relpath(start)}; "
            f"dropped: {transfer.dropped or 'none'}; new: {transfer.created or 'none'}")  # fmt: skip

    inner: Any = model.encoder if isinstance(model, SequenceRanker) else model
    context_length = inner.config.max_position_embeddings - 1  # one position is for [CLS]
    objective: Any = make_objective(context, spec, stage_inputs, context_length)
    facts: dict[str, Any] = {"attention": spec.effective_attention}
    if spec.mode == "ranker":
        pools = objective.splits
        facts["skipped_pools"] = {spec.split: pools.train.skipped, "held_out": pools.held_out.skipped}

    def load(path: Path) -> nn.Module:
        return SequenceRanker(load_model(path)) if spec.mode == "ranker" else load_model(path)

    return TrainerSetup(
        model,
        objective,
        save=lambda m, path: save_model(m, path, tokenizer),
        load=load,
        transfer=transfer.as_dict() | {"start": start_in_run(transfer.start, folder)},
        facts=facts,
    )


def start_of(
    spec: ModelSpec, pretrained: PretrainedConfig, start: Path | None
) -> ArchitectureConfig | Checkpoint | PretrainedStart:
    """Where the weights of a model come from. `start`: the folder of another model, None if it has none."""
    architecture = spec.architecture
    if start is not None:
        return Checkpoint(start, architecture.dropout, architecture.dtype, adapter_of(spec, pretrained))
    if architecture.family == PRETRAINED:
        opened = open_pretrained(pretrained)
        sizes = architecture.context, architecture.dropout, architecture.dtype
        return PretrainedStart(opened, *sizes, adapter_of(spec, pretrained))
    return architecture


def adapter_of(spec: ModelSpec, pretrained: PretrainedConfig) -> AdapterConfig | None:
    """The adapter that a model learns in place of the weights of its pretrained backbone; None if it learns these."""
    return (
        pretrained.lora if spec.architecture.family == PRETRAINED and pretrained.adapter == "lora" else None
    )


def make_objective(
    context: TrainingContext, spec: ModelSpec, stage_inputs: StageInputs, context_length: int
) -> ReportingObjective:
    """The objective of a mode over the run's tokens. `context_length`: longest input in tokens, without [CLS]."""
    if spec.mode == "token_classifier":
        return token_classifier_objective(context, spec, stage_inputs, context_length)
    if spec.mode == "sequence_scorer":
        return sequence_scorer_objective(context, spec, stage_inputs, context_length)
    if spec.mode == "ranker":
        return ranker_objective(context, spec, stage_inputs, context_length)

    # language_model: next tokens for causal models, masked diffusion for bidirectional ones
    tokenizer = stage_inputs.tokenizer
    splits = WindowSplits.of(stage_inputs.text_splits(spec.split), context_length, tokenizer.pad_token_id)
    if spec.effective_attention == "causal":
        return NextToken(context, splits, tokenizer.cls_token_id)
    tokens, diffusion = MaskingTokens.of(tokenizer), stage_inputs.config.diffusion
    modifiers = load_modifiers(spec.modifiers, context, tokenizer, tokens.text_ids, context_length)
    kind = StagedUnmasking if diffusion.stages else MaskedDiffusion
    return kind(context, splits, diffusion, tokens, modifiers)


def refuse_longer_than_positions(model: Any, config: Config) -> None:
    """Raises BadConfig if the longest prompts and candidates of a user's file could not be read by the backbone."""
    limit = longest_input(model.base) if hasattr(model, "base") else None
    lengths = config.ranker.prompt_tokens, config.ranker.candidate_tokens
    if config.candidates.source == "file" and limit is not None and sum(lengths) > limit:
        raise BadConfig(
            f"ranker.prompt_tokens ({lengths[0]}) and ranker.candidate_tokens ({lengths[1]}) are more than the {limit} tokens that "
            f"the backbone reads; lower them, such as to {limit // 2} each, or use a backbone that reads more"
        )


def learns_from_equal(config: Config, spec: ModelSpec, stage_inputs: StageInputs) -> bool:
    """Whether a ranker learns from pools of equal rewards: each candidate by itself, or the scores of a teacher."""
    taught = config.ranker.loss in TEACHER and TEACHER_TERM in terms_of(stage_inputs.candidates(spec.split))
    return taught or config.ranker.loss in POINTWISE


def set_up_prompt_ranker(
    context: TrainingContext, spec: ModelSpec, stage_inputs: StageInputs, folder: Path, start: Path | None
) -> TrainerSetup:
    """A ranker that reads a prompt and its candidates as texts, as the section `ranker` of the config says."""
    name, config = context.label, stage_inputs.config
    shard, runtime = config.ranker.shard, context.runtime
    model, tokenizer, origin = on_device(
        lambda: start_ranker(name, spec, config, stage_inputs.tokenizer, start, folder), shard, runtime
    )
    refuse_longer_than_positions(model, config)
    on_a_gpu(config.ranker.mask, model, runtime.device)
    model.prompt_tokens, model.candidate_tokens = config.ranker.prompt_tokens, config.ranker.candidate_tokens
    model.suffix, model.blind = config.ranker.suffix, spec.blind
    splits = PoolSplits(
        stage_inputs.draws(spec.split, with_equal=learns_from_equal(config, spec, stage_inputs)),
        stage_inputs.pools_for_selection(),
        stage_inputs.pools("held_out"),
    )
    reader = PoolReader(tokenizer, config.ranker, runtime, config.seed, spec.blind)
    tables = {spec.split: splits.train, "selection": [splits.selection], "held_out": [splits.held_out]}
    for split, draws in tables.items():
        say_skipped(name, split, draws[0].skipped)
    shortened = {split: say_shortened(name, split, reader, draws) for split, draws in tables.items()}
    objective = PoolChoice(context, splits, reader)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"{name}: {learning:,} of {sum(p.numel() for p in model.parameters()):,} weights learn; start: {origin}"
    )
    return TrainerSetup(
        model,
        objective,
        save=lambda m, path: save_ranker(m, path, tokenizer),
        load=lambda path: on_device(lambda: load_ranker(path), shard, runtime)[0],
        transfer={"start": origin},
        facts={
            "attention": config.ranker.attention,
            "pooling": config.ranker.pooling,
            "blind": spec.blind,
            "packs": model.packs,
            "skipped_pools": {split: draws[0].skipped for split, draws in tables.items()},
            "shortened": shortened,
        },
    )
