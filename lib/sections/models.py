"""The models of stage 04: architecture, training and mode."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lib.sections.base import (
    AboveZero,
    BelowOne,
    Count,
    Fraction,
    Layers,
    NonNegative,
    Positive,
    Section,
    UserPath,
    Width,
)

MODES = ("language_model", "token_classifier", "sequence_scorer", "ranker")
MODE_ALIASES = {  # names of earlier versions
    "unmasking": "language_model",
    "remasking_binary": "token_classifier",
    "token_classification": "token_classifier",
    "sequence_scoring": "sequence_scorer",
}


DTYPES = Literal["float32", "bfloat16"]  # of weights


class ArchitectureConfig(Section):
    family: Literal["remask_gpt", "ltg_bert", "pretrained"]
    num_hidden_layers: Layers
    hidden_size: Width
    num_attention_heads: Width
    intermediate_size: Width | None
    context: Annotated[int, Field(ge=2, le=2**24)]
    dropout: BelowOne
    bias: bool
    conv_width: Annotated[int, Field(ge=0, le=255)]
    position_buckets: Annotated[int, Field(ge=2)]
    dtype: DTYPES

    @model_validator(mode="after")
    def _check(self):
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of 2 x num_attention_heads ({2 * self.num_attention_heads}): RoPE rotates pairs of dimensions"
            )
        if self.conv_width and self.family != "remask_gpt":
            raise ValueError(
                f"conv_width is {self.conv_width}, and family {self.family} has no convolution: set conv_width to 0 here"
            )
        if self.conv_width and self.conv_width % 2 == 0:
            raise ValueError(
                f"conv_width ({self.conv_width}) must be odd, so that a token has as many neighbours before as after it, or 0"
            )
        if self.family == "ltg_bert" and self.context <= self.position_buckets // 2:
            raise ValueError(
                f"context ({self.context}) must exceed half of position_buckets ({self.position_buckets}), since each "
                "distance below that has its own bucket"
            )
        return self


class TrainingConfig(Section):
    steps: Positive
    batch_size: Positive
    parts: Positive
    activation_checkpointing: bool
    compile: Literal["off", "on", "auto"]
    optimizer: Literal["muon", "normuon", "adamw"]
    muon_learning_rate: AboveZero
    muon_momentum: BelowOne
    learning_rate: AboveZero
    head_learning_rate: AboveZero | None
    freeze_backbone: bool
    unfreeze_at_step: Count | None
    weight_decay: NonNegative
    warmup_fraction: Fraction
    decay_fraction: Fraction
    muon_decay_fraction: Fraction | None
    gradient_clip: AboveZero
    ema_decay: BelowOne
    evaluate_every: Positive
    evaluation_examples: Positive
    checkpoint_every: Positive
    tracker: Literal["tensorboard", "trackio", "wandb", "mlflow"] | None
    allow_inexact_resume: bool

    @model_validator(mode="after")
    def _check(self):
        for name in ("decay_fraction", "muon_decay_fraction"):
            if self.warmup_fraction + (getattr(self, name) or 0) > 1:
                raise ValueError(f"warmup_fraction + {name} must not exceed 1")
        if self.unfreeze_at_step is not None and not self.freeze_backbone:
            raise ValueError(
                "unfreeze_at_step has no effect without freeze_backbone: true; set both or neither"
            )
        if self.unfreeze_at_step is not None and not 0 < self.unfreeze_at_step < self.steps:
            raise ValueError(
                "unfreeze_at_step must be between 0 and steps; set it to null to keep the backbone frozen"
            )
        return self


class EntropyModifier(Section):
    weight: AboveZero = 1.0
    threshold: AboveZero = 0.1


class _Limited(Section):
    """Weights are clamped to [min_weight, max_weight]."""

    min_weight: AboveZero
    max_weight: AboveZero

    @model_validator(mode="after")
    def _check(self):
        if self.min_weight >= self.max_weight:
            raise ValueError(f"min_weight ({self.min_weight}) must be below max_weight ({self.max_weight})")
        return self


class MaskRatioModifier(_Limited):
    power: AboveZero = 0.5
    min_weight: AboveZero = 0.1
    max_weight: AboveZero = 10.0


class JudgeModifier(_Limited):
    """Weights by the score of a trained sequence scorer, whose folder is `model`. Active in [start_step, stop_step)."""

    model: UserPath
    exponent: AboveZero = 1.0
    min_weight: AboveZero = 0.5
    max_weight: AboveZero = 2.0
    start_step: Count = 0
    stop_step: Positive

    @model_validator(mode="after")
    def _check_steps(self):
        if self.start_step >= self.stop_step:
            raise ValueError(f"stop_step ({self.stop_step}) must be above start_step ({self.start_step})")
        return self


class ModifiersConfig(Section):
    label_smoothing: BelowOne = 0.0
    entropy: EntropyModifier | None = None
    mask_ratio: MaskRatioModifier | None = None
    judge: JudgeModifier | None = None

    @property
    def any(self) -> bool:
        return bool(self.label_smoothing or self.entropy or self.mask_ratio or self.judge)


class ModelSpec(Section):
    """One named model of stage 04. In YAML, `architecture` and `training` state only differences from the top level."""

    mode: Literal["language_model", "token_classifier", "sequence_scorer", "ranker"]
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    split: Literal["train", "held_out", "reference"] = "train"
    start: UserPath = "scratch"
    num_classes: Annotated[int, Field(ge=2)] = 3
    class_weighting: Literal["none", "inverse_frequency", "dynamic"] = "none"
    target_type: Literal["score", "classification"] = "score"
    blind: bool = False
    modifiers: ModifiersConfig = ModifiersConfig()
    architecture: ArchitectureConfig
    training: TrainingConfig

    @field_validator("mode", mode="before")
    @classmethod
    def _alias(cls, mode):
        return MODE_ALIASES.get(mode, mode)

    @model_validator(mode="after")
    def _check(self):
        if self.modifiers.any and (self.mode != "language_model" or self.attention == "causal"):
            what = "a causal language model" if self.mode == "language_model" else f"a {self.mode}"
            raise ValueError(
                f"modifiers change the loss of masked language models, and this is {what}: remove them"
            )
        from_scratch = self.start == "scratch" and self.architecture.family != "pretrained"
        if self.training.freeze_backbone and from_scratch:
            raise ValueError(
                "training.freeze_backbone with start: scratch would keep random weights; set start to a trained model"
            )
        return self

    @property
    def learns_from_shards(self) -> bool:
        """Whether the model learns from the shards of stage 02 if `stream.enabled` is set."""
        return self.mode in ("token_classifier", "sequence_scorer") and self.split == "train"

    @property
    def effective_attention(self) -> str:
        """The attention that is used: token classifiers and sequence scorers are always bidirectional."""
        return "bidirectional" if self.mode in ("token_classifier", "sequence_scorer") else self.attention


class GeneratorConfig(Section):
    checkpoint: UserPath | None
    architecture: ArchitectureConfig
    training: TrainingConfig


def dependency_order(models: Mapping[str, ModelSpec]) -> list[str]:
    """The names in the order of the config, except that a model comes after the model that it starts from.

    Raises ValueError if models start from each other in a circle.
    """
    order: list[str] = []

    def add(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise ValueError(
                f"models start from each other: {circle}; set models.{name}.start to scratch, to a folder or to a model "
                "outside this circle"
            )
        start = models[name].start
        if start in models:
            add(start, (*path, name))
        if name not in order:
            order.append(name)

    for name in models:
        add(name, ())
    return order
