"""Data, tokenizer, candidates, stream, labels and rewards: the settings of stages 00 to 03."""

import itertools
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lib.sections.base import AboveZero, Count, Fraction, NonNegative, Positive, Section, Share, UserPath
from lib.sections.masking import Masking


def _name(value: object) -> object:
    """YAML reads the class names 0 and true as a number and a truth value."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else value


ClassName = Annotated[str, BeforeValidator(_name), Field(min_length=1)]


class DataConfig(Section):
    path: UserPath
    text_key: str
    id_key: str | None
    label_key: str | None
    label_classes: tuple[ClassName, ...] | None
    spans_key: str | None
    span_classes: tuple[ClassName, ...] | None
    group_key: str | None
    drop: tuple[str, ...]
    min_document_characters: Positive
    whitespace: Literal["keep", "squeeze"]
    passages: Literal["fixed", "paragraph"]
    passage_characters: Positive
    deduplicate: Literal["none", "document", "paragraph"]
    split: Literal["hash", "contiguous"]
    split_unit: Literal["document", "block"]
    block_characters: Positive
    fractions: dict[Literal["train", "held_out", "reference"], Fraction]
    selection_fraction: Annotated[float, Field(gt=0, le=0.5)]

    @model_validator(mode="after")
    def _check(self):
        if abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"fractions {self.fractions} must add up to 1")
        if self.fractions.get("train", 0) <= 0 or self.fractions.get("held_out", 0) <= 0:
            raise ValueError("the fractions of train and held_out must be above 0")
        if self.block_characters < self.passage_characters:
            raise ValueError(
                f"block_characters ({self.block_characters}) must be at least passage_characters "
                f"({self.passage_characters})"
            )
        self._check_labels()
        return self

    @property
    def has_labels(self) -> bool:
        """Whether labels stand beside the text."""
        return self.label_key is not None or self.spans_key is not None

    @property
    def keeps_documents_whole(self) -> bool:
        """Whether labels or groups forbid to divide a document between two splits."""
        return self.has_labels or self.group_key is not None

    def _check_labels(self) -> None:
        for key, names, fewest in (("label", self.label_classes, 2), ("spans", self.span_classes, 1)):
            setting = "label_classes" if key == "label" else "span_classes"
            if names is None:
                continue
            if getattr(self, f"{key}_key") is None:
                raise ValueError(f"{setting} names the classes of {key}_key, which is null: set {key}_key")
            if len(names) < fewest or len(set(names)) < len(names):
                raise ValueError(f"{setting} {list(names)} must be at least {fewest} different names")
        if self.has_labels and self.deduplicate != "document":
            raise ValueError(
                "labelled documents stay whole, and equal ones must not be in two splits: set deduplicate: document"
            )
        if self.has_labels and self.passages != "fixed":
            raise ValueError(
                "labelled documents are read whole, in windows of equal length: set passages: fixed"
            )


def class_rewards(count: int) -> tuple[float, ...]:
    """The reward of each class of data.label_classes: 1 for the first, 0 for the last, evenly spaced between them."""
    return tuple(1 - c / (count - 1) for c in range(count))


class TokenizerConfig(Section):
    kind: Literal["character", "bpe"]
    vocab_size: Annotated[int, Field(ge=16)]
    unknown: Literal["error", "unk"]
    sample_characters: Positive
    examples_per_part: Positive


class CandidatesConfig(Section):
    source: Literal["masked_lm", "random_tokens", "original_only", "programs", "file"]
    per_example: Annotated[int, Field(ge=1, le=64)]
    mask_ratio: tuple[Fraction, Fraction]
    masking: Masking
    label_rule: Literal["origin", "changed"]
    temperature: AboveZero
    top_k: Count
    top_p: Share
    fill_passes: Positive
    cross_fit_folds: Positive
    batch_size: Positive
    rows_per_group: Positive
    int8: bool
    compile: Literal["off", "on"]

    @model_validator(mode="after")
    def _check(self):
        low, high = self.mask_ratio
        if low > high:
            raise ValueError(f"mask_ratio {list(self.mask_ratio)} must be [low, high] with low <= high")
        if self.int8 and self.compile == "on":
            raise ValueError("int8 layers are not compiled; set candidates.compile to off, or int8 to false")
        if self.source == "original_only" and self.per_example != 1:
            raise ValueError(
                "source original_only gives one candidate per example: set candidates.per_example to 1"
            )
        return self


class StreamConfig(Section):
    enabled: bool
    shard_examples: Positive
    max_backlog: Positive
    timeout_seconds: AboveZero
    initial_mask_ratio: tuple[Fraction, Fraction] | None
    ramp_epochs: Positive


class LabelsConfig(Section):
    path: UserPath | None


class RewardWeights(Section):
    execution: NonNegative
    program: NonNegative
    closeness: NonNegative
    format: NonNegative

    @model_validator(mode="after")
    def _check(self):
        if sum(self.model_dump().values()) <= 0:
            raise ValueError("at least one of the weights must be above 0")
        return self


class RewardsConfig(Section):
    curve: tuple[tuple[Fraction, Fraction], ...]
    weights: RewardWeights

    @field_validator("curve")
    @classmethod
    def _monotone(cls, points):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        if len(points) < 2 or xs[0] != 0 or xs[-1] != 1:
            raise ValueError("curve needs points from x = 0 to x = 1, such as [[0, 1], [1, 0]]")
        if any(b <= a for a, b in itertools.pairwise(xs)):
            raise ValueError("the x values of curve must increase from point to point")
        if any(b > a for a, b in itertools.pairwise(ys)):
            raise ValueError(
                "the y values of curve must not increase: more synthetic tokens cannot give a higher reward"
            )
        return points
