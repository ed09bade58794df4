"""How masked tokens are chosen, and the stages of staged unmasking."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.sections.base import AboveZero, BelowOne, Fraction, Positive, Probability, Section, Share


class RandomMasking(Section):
    """Every token is as likely to be masked as any other."""

    type: Literal["random"]


class StickyMasking(Section):
    """Masks grow in rounds: a token beside a masked one is masked with probability p2, any other with probability p1.

    A small p1 and a large p2 give long runs. A p1 above the mask ratio masks almost all tokens independently in the first
    round.
    """

    type: Literal["sticky"]
    p1: Fraction
    p2: Fraction

    @model_validator(mode="after")
    def _check(self):
        if max(self.p1, self.p2) < 1e-6:
            raise ValueError(
                "p1 and p2 are both 0 or nearly so, no token would ever be masked: raise one of them"
            )
        return self


class SpanMasking(Section):
    """num_spans runs of masked tokens per row, of random lengths at random positions. Runs do not touch where there is
    room."""

    type: Literal["span"]
    num_spans: Positive


class LineMasking(Section):
    """Whole lines of text. The share of masked tokens in a row is between min_ratio and max_ratio."""

    type: Literal["line"]
    min_ratio: Fraction
    max_ratio: Share

    @model_validator(mode="after")
    def _check(self):
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio ({self.min_ratio}) must not exceed max_ratio ({self.max_ratio})")
        return self


MASKINGS = {"random": RandomMasking, "sticky": StickyMasking, "span": SpanMasking, "line": LineMasking}
Masking = Annotated[RandomMasking | StickyMasking | SpanMasking | LineMasking, Field(discriminator="type")]


class _Stage(Section):
    """A masking and its range of mask ratios.

    A stage ends after val_loss_stale_count evaluations in a row in which the validation loss fell by less than the share
    min_improvement of itself.
    """

    val_loss_stale_count: Positive
    min_improvement: BelowOne = 0.0


class RandomStage(_Stage, RandomMasking):
    """The mask ratio of each row is drawn uniformly up to max_masked_ratio."""

    max_masked_ratio: Share

    @property
    def ratios(self) -> tuple[float, float]:
        return 0.0, self.max_masked_ratio


class StickyStage(_Stage, StickyMasking):
    """Every row has the mask ratio target_masked_ratio, in runs."""

    target_masked_ratio: Share

    @property
    def ratios(self) -> tuple[float, float]:
        return self.target_masked_ratio, self.target_masked_ratio


class SpanStage(_Stage, SpanMasking):
    """The mask ratio of each row is drawn uniformly up to max_masked_ratio. Its masks form num_spans runs."""

    max_masked_ratio: Share = 1.0

    @property
    def ratios(self) -> tuple[float, float]:
        return 0.0, self.max_masked_ratio


class LineStage(_Stage, LineMasking):
    """Each row masks whole lines. Its mask ratio is between min_ratio and max_ratio."""

    @property
    def ratios(self) -> tuple[float, float]:
        return self.min_ratio, self.max_ratio


STAGES_OF = {"random": RandomStage, "sticky": StickyStage, "span": SpanStage, "line": LineStage}
UnmaskingStage = Annotated[RandomStage | StickyStage | SpanStage | LineStage, Field(discriminator="type")]


class UniformRatios(Section):
    """Every mask ratio is as likely as any other, as in the bound."""

    type: Literal["uniform"]


class NormalRatios(Section):
    """Mask ratios of a normal distribution within (0, 1): bell-shaped time sampling (Hong et al. 2026, arXiv 2605.13026).

    Weights stay those of the bound, so the loss is no bound. From the share uniform_from of the steps on, the
    distribution turns into the uniform one, which it reaches at the end.
    """

    type: Literal["normal"]
    mean: Probability = 0.5
    deviation: AboveZero = 0.2
    uniform_from: Fraction = 1.0


RATIOS = {"uniform": UniformRatios, "normal": NormalRatios}
Ratios = Annotated[UniformRatios | NormalRatios, Field(discriminator="type")]


class DiffusionConfig(Section):
    weight: Literal["exact_count", "inverse_t"]
    ratios: Ratios
    min_masked_ratio: BelowOne
    masking: Masking
    corruption: Literal["mask", "bert"]
    stages: tuple[UnmaskingStage, ...]
    use_all_stages: bool

    @model_validator(mode="after")
    def _independent_masks(self):
        if self.weight == "inverse_t" and self.masking.type != "random":
            raise ValueError(
                f"weight inverse_t masks each token on its own, so masking {self.masking.type} would have no effect; set weight to "
                "exact_count, or masking to {type: random}"
            )
        return self
