"""Sampling and its re-masking policies."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lib.errors import did_you_mean
from lib.sections.base import AboveZero, Fraction, Positive, Probability, Section, Share, UserPath

POLICIES = (
    "ancestral", "confidence_order", "margin_order", "random_remask", "confidence_remask", "fresh_confidence_remask",
    "present_confidence", "temporal_difference", "remdm_cap", "remdm_rescale", "remdm_conf", "critic", "critic_blend", "critic_partial", "critic_origin", "oracle",
)  # fmt: skip
WITH_ERROR_VIEW = (
    "confidence_order",
    "confidence_remask",
    "fresh_confidence_remask",
    "critic",
    "critic_blend",
    "oracle",
)


class SamplerConfig(Section):
    policies: Annotated[tuple[str, ...], Field(min_length=1)]
    num_samples: Positive
    length: Positive | None
    nfe: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]
    block_tokens: Positive | None
    schedule: Literal["linear", "cosine", "custom", "threshold"]
    start_ratio: Fraction
    end_ratio: Fraction
    corrector_share: Fraction
    corrector_resampling: AboveZero
    corrector_temperature: AboveZero
    stable_rounds: Positive | None
    masking_ratios: tuple[Fraction, ...]
    threshold: Probability
    temperature: AboveZero
    top_p: Share
    randomness_strength: Fraction
    selection_temperature: AboveZero | None
    remask_share: Fraction
    remdm_share: Fraction
    best_of: Positive
    best_of_policy: str
    prompt: str
    infill: str
    infill_file: UserPath | None
    batch_size: Positive
    compile: Literal["off", "on"]

    @field_validator("policies", "best_of_policy")
    @classmethod
    def _known(cls, names):
        for name in (names,) if isinstance(names, str) else names:
            if name not in POLICIES:
                raise ValueError(f"unknown policy '{name}'{did_you_mean(name, POLICIES)}")
        return names

    @field_validator("policies", "nfe")
    @classmethod
    def _once(cls, values):
        if repeated := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ValueError(
                f"{', '.join(map(str, repeated))} more than once; each value gives one set of samples"
            )
        return values

    @model_validator(mode="after")
    def _check(self):
        if self.schedule == "custom" and not self.masking_ratios:
            raise ValueError("schedule custom needs masking_ratios, one for each round but the last")
        if self.schedule != "custom" and self.masking_ratios:
            raise ValueError(f"masking_ratios needs schedule custom, but the schedule is {self.schedule}")
        if bool(self.prompt) + bool(self.infill) + bool(self.infill_file) > 1:
            raise ValueError(
                "give only one of prompt (to continue), infill (to fill its [MASK]s) and infill_file"
            )
        if self.stable_rounds and (self.schedule == "custom" or not self.corrector_share):
            why = "schedule custom has none" if self.schedule == "custom" else "corrector_share is 0"
            raise ValueError(
                f"stable_rounds ends a sample during its corrector steps, but {why}; set stable_rounds to null"
            )
        self._check_policies()
        return self

    def _check_policies(self) -> None:
        used = [*self.policies, *([self.best_of_policy] if self.best_of > 1 else [])]
        if self.schedule == "threshold" and (others := [n for n in used if n not in WITH_ERROR_VIEW]):
            raise ValueError(
                f"schedule threshold needs policies that estimate how likely each token is an error; "
                f"{', '.join(others)} cannot. Policies that can: {', '.join(WITH_ERROR_VIEW)}"
            )
        if self.best_of > 1 and self.best_of_policy == "oracle":
            raise ValueError("best_of chooses without the true text, so best_of_policy cannot be oracle")
        if "oracle" in used and not self.infill_file:
            raise ValueError("the policy oracle needs the true text: give infill_file with a column target")
