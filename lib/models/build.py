"""Make, initialise, save and load the models of every mode. The mode is the head class; the backbone is always the same.

Transfer: any checkpoint can initialise any mode. All tensors of the backbone must match. Heads that do not match are dropped and
reported, and new ones are initialised. Anything else that does not match is an error.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from lib import durable, own_code, randomness
from lib.errors import BadConfig, BadData, MissingInput
from lib.labels import OUTSIDE
from lib.models.families import FAMILIES, PRETRAINED, Family
from lib.models.folder_check import check_config, first_line, read_header, refuse_non_finite
from lib.models.hugging_face import AdaptedPreTrainedModel
from lib.models.hugging_face.modeling_adapted import with_dtype
from lib.models.pretrained import Pretrained, code_files_of
from lib.models.pretrained_tokenizer import framed_tokenizer
from lib.models.ranker import SequenceRanker
from lib.sections.models import ArchitectureConfig, ModelSpec
from lib.sections.pretrained import AdapterConfig
from lib.tokenization import model_tokenizer

# Progress bars for every load and save of a small model would hide other output.
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Checkpoint:
    """A saved model whose backbone a new model starts from, and dropout and type of the weights of the new model.

    `adapter`: what a new model with a pretrained backbone learns in place of the backbone's weights.
    """

    folder: Path
    dropout: float
    dtype: str = "float32"
    adapter: AdapterConfig | None = None


@dataclass(frozen=True)
class PretrainedStart:
    """A pretrained masked LM that a new model starts from. `context`: tokens of a text that the new model reads."""

    opened: Pretrained
    context: int
    dropout: float
    dtype: str = "float32"
    adapter: AdapterConfig | None = None


@dataclass
class Transfer:
    """Which tensors were loaded from a checkpoint, which of its tensors were dropped, and which are new."""

    start: str = "scratch"
    loaded: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "loaded": len(self.loaded),
            "dropped": self.dropped,
            "created": self.created,
        }


def model_config(
    architecture: ArchitectureConfig, attention: str, vocab_size: int, **heads
) -> PreTrainedConfig:
    """The Hugging Face config of the architecture's family. It has one more position than the context, for [CLS]."""
    if architecture.family == PRETRAINED:
        raise BadConfig(
            "architecture.family is pretrained: the sizes of this backbone are those of the model that pretrained.model names"
        )
    family = FAMILIES[architecture.family]
    _require_attention(family, attention)
    assert family.config_of is not None
    return family.config_of(architecture, vocab_size, attention, **heads)


def _require_attention(family: Family, attention: str) -> None:
    if attention == "causal" and "causal_lm" not in family.heads:
        name = PRETRAINED if family.name == "remask_adapted" else family.name
        raise BadConfig(
            f"architecture.family {name} is bidirectional and cannot be causal; give this model "
            "architecture: {family: remask_gpt}, or attention: bidirectional"
        )


def make_model(mode: str, config: PreTrainedConfig, seed: int, label: str) -> nn.Module:
    """A new model. Its weights are a function of seed and label."""
    heads = FAMILIES[config.model_type].heads
    with torch.random.fork_rng():
        torch.manual_seed(randomness.key(seed, f"{label} weights") % 2**63)
        if mode == "language_model":
            return heads["causal_lm" if getattr(config, "is_causal", False) else "masked_lm"](config)
        if mode == "token_classifier":
            return heads["token"](config)
        model = heads["sequence"](config)
        return SequenceRanker(model) if mode == "ranker" else model


def fresh_backbone(spec: ModelSpec, vocab_size: int, seed: int, label: str) -> nn.Module:
    """A new backbone of this project without a head. Its weights are a function of seed and label."""
    config = model_config(spec.architecture, spec.effective_attention, vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(randomness.key(seed, f"{label} weights") % 2**63)
        return AutoModel.from_config(config).to(getattr(torch, spec.architecture.dtype))


def heads_of(
    mode: str,
    target_type: str = "score",
    num_classes: int = 3,
    own_labels: bool = False,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The config keys of a mode's head, with names of its classes.

    Args:
        own_labels: the token classes are user-defined.
        names: of all classes, if the user gave them.
    """
    if names is not None:
        return _classes(list(names))
    if mode == "token_classifier":
        return _classes(_token_classes(num_classes, own_labels))
    if mode == "sequence_scorer" and target_type == "classification":
        return _classes(_bands(num_classes))
    if mode == "sequence_scorer":
        return _classes(["score"]) | {"score_activation": "sigmoid", "problem_type": "regression"}
    # A regression for transformers, whose pipelines would apply a sigmoid to the one score of a classifier.
    return _classes(["score"]) | {"problem_type": "regression"} if mode == "ranker" else {}


def _classes(names: list[str]) -> dict[str, Any]:
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _token_classes(count: int, own_labels: bool) -> list[str]:
    """Names of token classes: the origin of a token, or numbers for user-defined ones."""
    known = [OUTSIDE] if own_labels else ["original", "random", "predicted"]
    return [known[i] if i < len(known) else f"class_{i}" for i in range(count)]


def _bands(count: int) -> list[str]:
    """Names of equal intervals of the score's range [0, 1]."""
    digits = max(2, len(str(count)))
    return [f"score {i / count:.{digits}f} to {(i + 1) / count:.{digits}f}" for i in range(count)]


def start_model(
    mode: str,
    backbone: ArchitectureConfig | Checkpoint | PretrainedStart,
    attention: str,
    vocab_size: int,
    seed: int,
    label: str,
    **heads,
) -> tuple[Any, Transfer]:
    """A model of `mode`, and the record of which tensors a checkpoint initialised.

    Args:
        backbone: an architecture for new weights, a checkpoint, or a pretrained model. The last two give the architecture,
            the weights of the backbone and those of matching heads.
        seed, label: new weights are a function of them.
        heads: config keys of the head; see `heads_of`.

    Raises:
        BadData: the checkpoint has another vocabulary, or its backbone does not match.
        BadConfig: the family of the backbone does not have this attention.
    """
    if isinstance(backbone, ArchitectureConfig):
        config = model_config(backbone, attention, vocab_size, **heads)
        model = make_model(mode, config, seed, label).to(getattr(torch, backbone.dtype))
        return model, Transfer(created=["everything"])
    if isinstance(backbone, PretrainedStart):
        opened, start = backbone.opened, backbone.opened.folder
        source = opened.config(backbone.context)
        tensors = {f"backbone.{name}": value for name, value in opened.model.state_dict().items()}
    else:
        start = backbone.folder
        source, tensors = read_folder(start)
    if source.vocab_size != vocab_size:
        raise BadData(
            f"{start} has a vocabulary of {source.vocab_size} ids, the tokenizer of this run has {vocab_size}; "
            "start from a model with the same tokenizer"
        )
    family = FAMILIES[source.model_type]
    _require_attention(family, attention)
    if "causal_lm" in family.heads:
        if getattr(source, "conv_width", 0) and source.attention != attention:
            raise BadConfig(
                f"{start} is {source.attention} and has a convolution (architecture.conv_width {source.conv_width}), whose weights belong "
                f"to other neighbours in a model that is {attention}: start from scratch, or from a model that is {attention}"
            )
        heads["attention"] = attention
    is_adapted, adapter = family.name == "remask_adapted", backbone.adapter
    if adapter is not None and is_adapted:
        heads |= {f"adapter_{key}": value for key, value in adapter.model_dump().items()}
    config = family.restarted(source, backbone.dropout, **heads)
    model = make_model(mode, config, seed, label)
    dtype = getattr(torch, backbone.dtype)
    model = with_dtype(model, dtype) if is_adapted else model.to(dtype)
    inner: Any = model.encoder if isinstance(model, SequenceRanker) else model
    # The adapter of a new model is not part of the checkpoint.
    backbone_names = (inner.pretrained_prefix,) if is_adapted else family.backbone
    report = _load_matching(inner, tensors, backbone_names, start)
    if adapter is not None and is_adapted:
        for parameter in inner.backbone.parameters():
            parameter.requires_grad_(False)
    return model, report


def _load_matching(
    model: nn.Module, tensors: dict[str, torch.Tensor], backbone: tuple[str, ...], start: Path
) -> Transfer:
    report = Transfer(start=str(start))
    targets = model.state_dict()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())  # the embedding, under a second name
    tied |= set(getattr(model, "all_tied_weights_keys", None) or ())
    with torch.no_grad():
        for name, value in targets.items():
            source = tensors.get(name)
            if source is not None and source.shape == value.shape:
                value.copy_(source)
                report.loaded.append(name)
            elif source is None and name in tied:
                continue
            elif name.startswith(backbone):
                problem = (
                    "is missing"
                    if source is None
                    else f"has shape {tuple(source.shape)}, not {tuple(value.shape)}"
                )
                raise BadData(f"{start}: tensor {name} {problem}; the whole backbone must match")
            else:
                report.created.append(name)
    report.dropped = sorted(n for n in tensors if n not in report.loaded and n not in tied)
    unknown = [n for n in report.dropped if n.startswith(backbone)]
    if unknown:
        raise BadData(
            f"{start}: tensors {unknown} are not part of the new model; the whole backbone must match"
        )
    return report


def read_folder(folder: Path) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """(config, tensors) of a saved folder of one of the families. Raises MissingInput or BadData."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    weights = folder / "model.safetensors"
    if not weights.exists():
        hint = "; pickled weights are not read" if list(folder.glob("*.bin")) else ""
        raise MissingInput(
            f"{folder} has no model.safetensors{hint}; give a folder of a model that stage 04 or 05 trained"
        )
    check_config(folder / "config.json", len(read_header(weights)), weights.stat().st_size)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tensors = load_file(str(weights))
    except Exception as error:  # what the files say decides which kind
        raise BadData(f"{folder} cannot be loaded: {first_line(error)}") from None
    refuse_non_finite(tensors, folder)
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BadData(
            f"{folder}/config.json has model_type {config.model_type}; a checkpoint must be of {known}"
        )
    if code := [name for name in _code_classes(config) if name is not None]:
        own_code.require_allowed(folder, config.code_files, code)
    return config, tensors


def _code_classes(config: PreTrainedConfig) -> tuple[str | None, ...]:
    """The classes of a model that are defined in its folder."""
    return tuple(getattr(config, key, None) for key in ("backbone_class", "backbone_config_class"))


def is_ours(folder: Path) -> bool:
    """Whether the folder's config is of one of the families. Raises BadData if it is not JSON."""
    try:
        content = durable.read_json(folder / "config.json")
    except ValueError as error:
        raise BadData(f"{folder / 'config.json'} is not JSON: {error}") from None
    return isinstance(content, dict) and content.get("model_type") in FAMILIES


def load_model(folder: Path) -> Any:
    """The model of a saved folder, in evaluation mode, of the class that its config names."""
    config, tensors = read_folder(folder)
    name = (config.architectures or ["?"])[0]
    classes = {c.__name__: c for c in FAMILIES[config.model_type].heads.values()}
    if name not in classes:
        raise BadData(f"{folder}/config.json names the architecture {name}; known: {', '.join(classes)}")
    if config.model_type == "remask_adapted":
        return _load_adapted(cast(Any, classes[name]), config, tensors)
    return classes[name].from_pretrained(folder).eval()


def _load_adapted(kind: type[AdaptedPreTrainedModel], config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A model with a backbone of another project, whose buffers only its own constructor fills."""
    with torch.random.fork_rng():
        model: Any = kind(config)
    report = model.load_state_dict(tensors, strict=False)
    missing = sorted(set(report.missing_keys) - set(model.all_tied_weights_keys))
    if missing or report.unexpected_keys:
        raise BadData(
            f"{config.name_or_path}: its tensors do not match its config: missing {missing[:3]}, unknown {report.unexpected_keys[:3]}"
        )
    weights = {name for name, _ in model.named_parameters()}
    dtype = next(value.dtype for name, value in tensors.items() if name in weights)
    return with_dtype(model, dtype).eval()


def save_model(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Write weights, config, code and tokenizer into `folder` in the format of transformers.

    `tokenizer` is the run's. The folder's tokenizer has the same tokens and adds special tokens as in training.
    """
    inner: Any = model.encoder if isinstance(model, SequenceRanker) else model
    if isinstance(inner, AdaptedPreTrainedModel):
        for name, file in code_files_of(inner.config).items():
            shutil.copyfile(file, folder / name)
        inner = inner.merged()
    if head_of(inner) == "causal_lm":  # defaults of `generate`: no special tokens, at most the model's length
        inner.generation_config = GenerationConfig(
            max_length=inner.config.max_position_embeddings,
            suppress_tokens=sorted(set(tokenizer.all_special_ids)),
            pad_token_id=tokenizer.pad_token_id,
        )
    # The names of a backbone's tensors stay those of its class, also where transformers once had others
    inner.save_pretrained(folder, save_original_format=False)
    tokenizer_of(inner, tokenizer).save_pretrained(folder)


def save_as_pretrained(model: AdaptedPreTrainedModel, folder: Path, tokenizer: Any) -> None:
    """Write a generator as the class of its pretrained backbone. The tokenizer adds the special tokens around a text."""
    backbone, config = model.merged().backbone, model.config
    for name, file in code_files_of(config).items():
        shutil.copyfile(file, folder / name)
    backbone.save_pretrained(folder)
    framed_tokenizer(
        tokenizer, config.prefix_ids, config.suffix_ids, config.max_position_embeddings - 1
    ).save_pretrained(folder)


def head_of(model: Any) -> str:
    """The head of a model: masked_lm, causal_lm, token or sequence."""
    heads = FAMILIES[model.config.model_type].heads
    return next(name for name, head in heads.items() if isinstance(model, head))


def tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """The run's tokenizer with the special tokens and the length that `model` was trained with.

    Sequence scorers, rankers and causal models read [CLS] in front of a text. Masked models and token classifiers read text
    alone. Their maximum is one token less than their positions, because the last position is never trained. Only masked
    models read [MASK].
    """
    head, positions = head_of(model), model.config.max_position_embeddings
    cls_in_front = head in ("sequence", "causal_lm")
    return model_tokenizer(
        tokenizer,
        positions if cls_in_front else positions - 1,
        cls_in_front=cls_in_front,
        reads_masks=head == "masked_lm",
        padding_side="left" if head == "causal_lm" else "right",
    )
