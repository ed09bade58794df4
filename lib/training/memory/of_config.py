"""The account of every model of a config. Weights are counted on models without memory; nothing is downloaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from lib import durable
from lib.config import Config
from lib.errors import BadConfig, MissingInput
from lib.models.build import fresh_backbone, heads_of, start_model
from lib.models.checkpointing import transformer_layers
from lib.models.encoders import with_lora
from lib.models.ranker import CandidateRanker, HeadOptions, ScoreHead
from lib.sections.models import ModelSpec, TrainingConfig
from lib.training.memory.formula import KINDS, Account, Backbone, Batch, Plan, Weights, account
from lib.training.objectives.base import evaluation_rows
from lib.training.optimizer import hidden_matrices

LLAMA = {"model_type": "llama", "max_position_embeddings": 8192}
# Encoders of configs/models/, as their config.json describes them
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
       "num_attention_heads": 32, "num_key_value_heads": 8},
    "HuggingFaceTB/SmolLM2-135M": LLAMA
    | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
       "num_attention_heads": 9, "num_key_value_heads": 3},
    "sentence-transformers/all-MiniLM-L6-v2": {"model_type": "bert"}
    | {"vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
       "num_attention_heads": 12},
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """Where the training runs: its precision, and the number of processes that share it."""

    precision: str = "bf16"
    processes: int = 1
    mask_bytes: int = 1


def accounts(config: Config, device: Device, shape: Path | None = None) -> Iterator[tuple[str, Account]]:
    """(name, account) of every model that stages 02 and 04 train.

    Args:
        shape: config.json of `ranker.encoder`, if this is neither a folder nor in `KNOWN`.

    Raises BadConfig for a backbone without a formula, MissingInput for an encoder of unknown shape.
    """
    for name, spec in config.models.items():
        yield name, account_of(config, name, spec, device, shape)


def account_of(config: Config, name: str, spec: ModelSpec, device: Device, shape: Path | None) -> Account:
    prompts = spec.mode == "ranker" and config.task != "text"
    model = ranker_on_meta(config, name, spec, shape) if prompts else model_on_meta(config, name, spec)
    training = spec.training
    if training.freeze_backbone and training.unfreeze_at_step is None:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("head" in parameter_name or "classifier" in parameter_name)
    plan = Plan(
        precision=device.precision,
        checkpointed=training.activation_checkpointing,
        parts=max(training.parts // device.processes, 1),
        processes=device.processes,
        sharded=prompts and config.ranker.shard and device.processes > 1,
        ema=training.ema_decay > 0,
        dropout=spec.architecture.dropout > 0 and not (prompts and config.ranker.encoder),
        adapter_dropout=prompts and config.ranker.adapter == "lora" and config.ranker.lora.dropout > 0,
        mask_bytes=device.mask_bytes,
    )
    batch = prompt_batch(config, training) if prompts else text_batch(config, spec)
    return account(weights_of(model, training), backbone_of(model, config), batch, plan)


# --- models without memory -----------------------------------------------------------------------------------------------


def ranker_on_meta(config: Config, name: str, spec: ModelSpec, shape: Path | None) -> CandidateRanker:
    """The ranker of prompts that the config describes, with tensors that have no memory."""
    settings = config.ranker
    with torch.device("meta"):
        if settings.encoder is None:
            backbone: Any = fresh_backbone(spec, config.tokenizer.vocab_size, 0, name)
        else:
            encoder = encoder_config(settings.encoder, shape)
            backbone = AutoModel.from_config(encoder).to(getattr(torch, settings.dtype))
            backbone.config._name_or_path = settings.encoder
        if settings.adapter == "lora":
            lora = settings.lora
            backbone = with_lora(backbone, lora.rank, lora.alpha, lora.dropout, lora.targets)
        elif settings.embeddings == "frozen":
            backbone.get_input_embeddings().requires_grad_(False)
        head = HeadOptions(settings.head, settings.head_dropout)
        return CandidateRanker(backbone, head=head, attention=settings.attention, seed=0, packs=True)


def encoder_config(encoder: str, shape: Path | None) -> Any:
    """The configuration of `ranker.encoder`. Raises MissingInput if its shape is not known here."""
    name = encoder.partition("@")[0]
    file = shape or (Path(encoder) / "config.json" if Path(encoder).is_dir() else None)
    if file is None and name not in KNOWN:
        raise MissingInput(
            f"the shape of {encoder} is not known here; give its config.json with --shape FILE (known: {', '.join(KNOWN)})"
        )
    try:
        values = dict(KNOWN[name] if file is None else durable.read_json(file))
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError) as error:
        raise BadConfig(f"{file} is not the config.json of a model: {error}") from None


def model_on_meta(config: Config, name: str, spec: ModelSpec) -> nn.Module:
    """A model of this project's own backbone, with tensors that have no memory."""
    with torch.device("meta"):
        model, _ = start_model(
            spec.mode, spec.architecture, spec.effective_attention, config.tokenizer.vocab_size, 0, name,
            **heads_of(spec.mode, spec.target_type, spec.num_classes),
        )  # fmt: skip
    return model


# --- sizes ---------------------------------------------------------------------------------------------------------------


def weights_of(model: nn.Module, training: TrainingConfig) -> Weights:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    exact = {id(m) for head in model.modules() if isinstance(head, ScoreHead) for m in head.modules()}
    linear = {  # once each, also if tied
        id(m.weight): m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear | Conv1D) and id(m) not in exact
    }
    matrices = [p for p in linear.values() if p.dtype == torch.float32]
    layers, embedding = (
        transformer_layers(model),
        next(m for m in model.modules() if isinstance(m, nn.Embedding)),
    )
    muon = hidden_matrices(model) if training.optimizer != "adamw" else set()
    return Weights(
        frozen=sum(p.numel() for p in frozen),
        trained=sum(p.numel() for p in trained.values()),
        frozen_bytes=max((p.element_size() for p in frozen), default=4),
        trained_bytes=max((p.element_size() for p in trained.values()), default=4),
        matrices=sum(p.numel() for p in matrices),
        by_muon=sum(p.numel() for n, p in trained.items() if n in muon),
        gathered=max(4 * max(map(_frozen_bytes, layers), default=0), 2.5 * _frozen_bytes(embedding)),
    )


def _frozen_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def backbone_of(model: nn.Module, config: Config) -> Backbone:
    """Raises BadConfig for a backbone without a formula."""
    inner: Any = getattr(model, "encoder", model)
    shape = inner.config
    layers = shape.num_hidden_layers
    if shape.model_type not in KINDS:
        raise BadConfig(
            f"there is no memory formula for a backbone of type {shape.model_type}; known: {', '.join(sorted(KINDS))}"
        )
    adapters = [
        m for n, m in model.named_modules() if n.endswith("lora_A.default") and isinstance(m, nn.Linear)
    ]
    learning = any(
        p.requires_grad and "lora" not in n for n, p in model.named_parameters() if "backbone." in n
    )
    kind = KINDS[shape.model_type]
    adapted = sum(m.in_features for m in adapters) // layers
    if kind == "llama" and learning:  # inputs of linear layers, for the gradients of their weights
        adapted += 3 * shape.hidden_size + shape.intermediate_size
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    return Backbone(
        kind, layers, shape.hidden_size, shape.intermediate_size, shape.num_attention_heads,
        embedding.weight.element_size(), adapted, sum(m.out_features for m in adapters) // layers,
        getattr(shape, "conv_width", 0),
    )  # fmt: skip


def prompt_batch(config: Config, training: TrainingConfig) -> Batch:
    """Packed pools; with attention full each candidate with its own copy of the prompt."""
    settings, pool = config.ranker, config.candidates.per_example
    packed = settings.attention == "prefix"
    tokens = settings.prompt_tokens + settings.candidate_tokens * (pool if packed else 1)
    copies, pools = 1 if packed else pool, training.batch_size // training.parts
    return Batch(
        pools * copies, tokens, masked=packed, evaluation_rows=copies * evaluation_rows(32, copies * tokens)
    )


def text_batch(config: Config, spec: ModelSpec) -> Batch:
    """Windows or candidates of a text, at their longest."""
    rows, context = spec.training.batch_size // spec.training.parts, spec.architecture.context
    pool = config.candidates.per_example if spec.mode == "ranker" else 1
    tokens = context if spec.mode in ("language_model", "token_classifier") else context + 1
    vocabulary = config.tokenizer.vocab_size if spec.mode == "language_model" else spec.num_classes
    share = 1.0 if spec.effective_attention == "causal" or spec.mode == "token_classifier" else 0.5
    logit_rows = int(rows * tokens * share) if spec.mode in ("language_model", "token_classifier") else 0
    at_once = pool * evaluation_rows(16 if spec.mode == "ranker" else 64, pool * tokens)
    return Batch(rows * pool, tokens, False, logit_rows, vocabulary, at_once)
