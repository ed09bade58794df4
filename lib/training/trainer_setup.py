"""What it takes to train a model: how it starts, what it learns, how it is saved and read back."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lib import durable
from lib.config import Config
from lib.log import say
from lib.models.build import Checkpoint, fresh_backbone, heads_of, load_model, save_model, start_model
from lib.models.encoders import configured
from lib.models.ranker import CandidateRanker, HeadOptions, SequenceRanker
from lib.models.ranker_files import RANKER_FILE, load_ranker, open_encoder, save_ranker, with_lora
from lib.sections.models import ModelSpec
from lib.training.objectives.build import make_objective, say_skipped
from lib.training.objectives.pool_choice import PoolChoice, PoolReader, say_shortened
from lib.training.stage_inputs import StageInputs


@dataclass
class TrainerSetup:
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


def set_up_model(
    name: str, spec: ModelSpec, stage_inputs: StageInputs, folder: Path, start: Path | None
) -> TrainerSetup:
    """Any mode over the run's own tokens."""
    config, tokenizer = stage_inputs.config, stage_inputs.tokenizer
    if spec.attention != spec.effective_attention:
        say(f"{name}: {spec.mode} reads both ways; attention is bidirectional, not {spec.attention}")
    model, transfer = start_model(
        spec.mode,
        spec.architecture if start is None else Checkpoint(start, spec.architecture.dropout),
        spec.effective_attention,
        len(tokenizer),
        config.seed,
        name,
        **heads_of(spec.mode, spec.target_type, spec.num_classes, config.labels.path is not None),
    )
    if start is not None:
        say(f"{name}: {len(transfer.loaded)} tensors from {os.path.relpath(start)}; "
            f"left out: {transfer.dropped or 'none'}; new: {transfer.created or 'none'}")  # fmt: skip

    objective = make_objective(name, spec, stage_inputs, context=_context_of(model))
    facts: dict[str, Any] = {"attention": spec.effective_attention}
    if spec.mode == "ranker":
        facts["skipped_pools"] = {spec.split: objective.train.skipped, "held_out": objective.held_out.skipped}

    def load(path: Path) -> nn.Module:
        return SequenceRanker(load_model(path)) if spec.mode == "ranker" else load_model(path)

    return TrainerSetup(
        model,
        objective,
        save=lambda m, path: save_model(m, path, tokenizer),
        load=load,
        transfer=transfer.as_dict() | {"start": _relative(transfer.start, folder)},
        facts=facts,
    )


def set_up_ranker(
    name: str, spec: ModelSpec, stage_inputs: StageInputs, folder: Path, start: Path | None
) -> TrainerSetup:
    """A ranker that reads a prompt and its candidates, as the section `ranker` says."""
    config, settings = stage_inputs.config, stage_inputs.config.ranker
    model, tokenizer, origin = start_ranker(name, spec, config, stage_inputs.tokenizer, start, folder)
    train_pools, selection = stage_inputs.draws(spec.split), stage_inputs.pools_for_selection()
    held_out = stage_inputs.pools("held_out")
    reader = PoolReader(tokenizer, settings, stage_inputs.runtime, config.seed, spec.blind)
    tables = {spec.split: train_pools, "selection": [selection], "held_out": [held_out]}
    for split, of_split in tables.items():
        say_skipped(name, split, of_split[0].skipped)
    shortened = {split: say_shortened(name, split, reader, of_split) for split, of_split in tables.items()}
    objective = PoolChoice(
        name, train_pools, selection, held_out, reader, config.seed, spec.training.evaluation_examples
    )
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{name}: {learning:,} of {sum(p.numel() for p in model.parameters()):,} weights learn; {origin}")
    return TrainerSetup(
        model,
        objective,
        save=lambda m, path: save_ranker(m, path, tokenizer),
        load=lambda path: load_ranker(path)[0],
        transfer={"start": origin},
        facts={
            "attention": settings.attention,
            "pooling": settings.pooling,
            "blind": spec.blind,
            "packs": model.packs,
            "skipped_pools": {split: of_split[0].skipped for split, of_split in tables.items()},
            "shortened": shortened,
        },
    )


def start_ranker(
    name: str, spec: ModelSpec, config: Config, run_tokenizer: Any, start: Path | None, folder: Path
):
    """(ranker, its tokenizer, where it comes from).

    From `start`: a trained ranker goes on as it is; another model of ours lends its backbone. Otherwise from the
    configured encoder, or a fresh backbone of ours.
    """
    settings = config.ranker
    if start is not None and (start / RANKER_FILE).exists():
        model, tokenizer = load_ranker(start, learning=True)
        return model, tokenizer, f"ranker in {_relative(start, folder)}"
    if start is not None:
        backbone, tokenizer = open_encoder(str(start))
        origin = f"backbone of {_relative(start, folder)}"
    elif settings.encoder is not None:
        source, revision = configured(settings.encoder)
        backbone, tokenizer = open_encoder(source, revision=revision)
        origin = source if revision is None else f"{source}@{revision}"
    else:
        backbone, tokenizer = fresh_backbone(spec, len(run_tokenizer), config.seed, name), run_tokenizer
        origin = "scratch"
    if settings.adapter == "lora":
        lora = settings.lora
        backbone = with_lora(backbone, lora.rank, lora.alpha, lora.dropout, lora.targets, seed=config.seed)
    elif settings.embeddings == "frozen":
        any_backbone: Any = backbone
        any_backbone.get_input_embeddings().requires_grad_(False)
    model = CandidateRanker(
        backbone, pooling=settings.pooling, head=HeadOptions(settings.head, settings.head_dropout),
        attention=settings.attention, seed=config.seed,
    )  # fmt: skip
    return model, tokenizer, origin


def _relative(start: str | Path, folder: Path) -> str:
    """The start as seen from the run's folder, so that a record does not depend on where the run lies, nor on whether
    its stage is being made again beside the old one."""
    if start == "scratch":
        return str(start)
    stage = folder.parent
    if Path(start).is_relative_to(stage):
        return str(Path(stage.name.removesuffix(durable.NEW)) / Path(start).relative_to(stage))
    return os.path.relpath(start, stage.parent)


def _context_of(model: nn.Module) -> int:
    inner: Any = model.encoder if isinstance(model, SequenceRanker) else model
    return inner.config.max_position_embeddings - 1
