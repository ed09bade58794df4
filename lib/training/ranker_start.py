"""Where a ranker that reads prompts starts from: a trained ranker, a backbone, an encoder, or scratch."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lib import durable
from lib.config import Config
from lib.errors import BadConfig
from lib.models.build import fresh_backbone
from lib.models.encoders import configured
from lib.models.ranker import CandidateRanker, HeadOptions
from lib.models.ranker_files import RANKER_FILE, load_ranker, open_encoder, with_lora
from lib.sections.finqa import YesNoConfig
from lib.sections.models import ModelSpec
from lib.tokenization import num_ids


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
        backbone, tokenizer = fresh_backbone(spec, num_ids(run_tokenizer), config.seed, name), run_tokenizer
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
    if settings.head == "yes_no":
        model.answer_by(*answer_rows(origin if start is None else str(start), tokenizer, settings.yes_no))
    return model, tokenizer, origin


def answer_rows(source: str, tokenizer: Any, settings: YesNoConfig) -> tuple[Tensor, Tensor]:
    """(D,) rows of a causal language model's output layer: those of the first tokens of the two answers.

    Raises BadConfig if the encoder is no causal language model, if the two answers begin with the same token, or if an
    answer changes the tokens of the question.
    """
    name, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
    yes, no = (_first_token(tokenizer, settings.question, word) for word in (settings.yes, settings.no))
    if yes == no:
        raise BadConfig(
            f"ranker.yes_no: '{settings.yes}' and '{settings.no}' begin with the same token of this tokenizer; give other words"
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or None,
            use_safetensors=True,
            local_files_only=Path(name).is_dir(),
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise BadConfig(
            f"ranker.head is yes_no, but {source} cannot be loaded as a causal language model: {str(error).splitlines()[0]}"
        ) from None
    weight = model.get_output_embeddings().weight.detach()
    return weight[yes].clone(), weight[no].clone()


def _first_token(tokenizer: Any, question: str, answer: str) -> int:
    """The id that follows the question's ids in question and answer. The model predicts it behind the question."""
    asked, both = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, question + answer)
    )
    if both[: len(asked)] != asked or len(both) == len(asked):
        raise BadConfig(
            f"ranker.yes_no: '{answer}' adds no token of its own to the question '{question}'; end the question without a "
            "space, and begin the answers with one"
        )
    return both[len(asked)]


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
