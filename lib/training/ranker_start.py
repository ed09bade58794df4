"""Where a ranker that reads prompts starts from: a trained ranker, a backbone, an encoder, or scratch."""

import os
from pathlib import Path
from typing import Any

import torch

from lib import durable
from lib.config import Config
from lib.models.build import fresh_backbone
from lib.models.encoders import configured
from lib.models.ranker import CandidateRanker, HeadOptions
from lib.models.ranker_files import RANKER_FILE, load_ranker, open_encoder, with_lora
from lib.sections.models import ModelSpec


def start_ranker(
    name: str, spec: ModelSpec, config: Config, run_tokenizer: Any, start: Path | None, folder: Path
) -> tuple[CandidateRanker, Any, str]:
    """(ranker, its tokenizer, where it comes from).

    A trained ranker in `start` is taken whole. From any other model in `start` the backbone is taken. Without `start`
    the backbone is the encoder that `ranker.encoder` names, or a new one.

    Args:
        folder: of the ranker to be trained; the origin is named relative to its run.
    """
    settings, dtype = config.ranker, getattr(torch, config.ranker.dtype)
    if start is not None and (start / RANKER_FILE).exists():
        model, tokenizer = load_ranker(start, learning=True)
        return model, tokenizer, f"ranker in {start_in_run(start, folder)}"
    if start is not None:
        backbone, tokenizer = open_encoder(str(start), dtype)
        origin = f"backbone of {start_in_run(start, folder)}"
    elif settings.encoder is not None:
        source, revision = configured(settings.encoder)
        backbone, tokenizer = open_encoder(source, dtype, revision)
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


def start_in_run(start: str | Path, folder: Path) -> str:
    """The start as a path relative to the run.

    So a record does not depend on where the run lies, nor on whether its stage is being made again beside the old one.
    """
    if start == "scratch":
        return str(start)
    stage = folder.parent
    if Path(start).is_relative_to(stage):
        return str(Path(stage.name.removesuffix(durable.NEW)) / Path(start).relative_to(stage))
    return os.path.relpath(start, stage.parent)
