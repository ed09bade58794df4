"""Which tokens are masked together, and in what order training meets the ways to."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.sections.base import BelowOne, Fraction, Positive, Section, Share


class RandomMasking(Section):
    type: Literal["random"]


class StickyMasking(Section):
    """p1: chance that a token far from any mask is masked in a round; p2: next to a mask.

    Runs are long where p1 is small and p2 large. A p1 above the wanted ratio masks it all in the first round,
    almost independently.
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
    """num_spans: runs per row, of random lengths at random places, that do not touch where there is room."""

    type: Literal["span"]
    num_spans: Positive


class LineMasking(Section):
    """Whole lines; min_ratio, max_ratio: the shares of masked tokens between which a row must end up."""

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
    """A way to mask and the shares to mask. Ends when its validation loss has not fallen by a share of itself, min_improvement,
    so many times in a row."""

    val_loss_stale_count: Positive
    min_improvement: BelowOne = 0.0


class RandomStage(_Stage, RandomMasking):
    """Every row masks a share of its own, uniform up to max_masked_ratio."""

    max_masked_ratio: Share

    @property
    def ratios(self) -> tuple[float, float]:
        return 0.0, self.max_masked_ratio


class StickyStage(_Stage, StickyMasking):
    """Every row masks the same share, in runs."""

    target_masked_ratio: Share

    @property
    def ratios(self) -> tuple[float, float]:
        return self.target_masked_ratio, self.target_masked_ratio


class SpanStage(_Stage, SpanMasking):
    """Every row masks a share of its own, uniform up to max_masked_ratio, in num_spans runs."""

    max_masked_ratio: Share = 1.0

    @property
    def ratios(self) -> tuple[float, float]:
        return 0.0, self.max_masked_ratio


class LineStage(_Stage, LineMasking):
    """Every row masks whole lines, together a share of its own between the two."""

    @property
    def ratios(self) -> tuple[float, float]:
        return self.min_ratio, self.max_ratio


STAGES_OF = {"random": RandomStage, "sticky": StickyStage, "span": SpanStage, "line": LineStage}
UnmaskingStage = Annotated[RandomStage | StickyStage | SpanStage | LineStage, Field(discriminator="type")]


class DiffusionConfig(Section):
    weight: Literal["exact_count", "inverse_t"]
    min_masked_ratio: BelowOne
    masking: Masking
    corruption: Literal["mask", "bert"]
    stages: tuple[UnmaskingStage, ...]
    use_all_stages: bool
