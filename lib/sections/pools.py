"""The task pools: candidates and rewards of the user's own."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lib.errors import did_you_mean
from lib.sections.base import Fraction, Section, Share

# What a column can be. The keys of `pools.keys`
ROLES = (
    "prompt", "id", "candidates", "rewards", "candidate", "reward", "chosen", "rejected", "positive", "negative",
    "kind", "teacher", "split", "group", "tag",
)  # fmt: skip


class PoolFilesConfig(Section):
    layout: Literal["auto", "pools", "rows", "pairs", "tuples", "lists", "rewardbench"]
    keys: dict[str, str]
    reward_range: tuple[float, float]
    reward_rule: Literal["linear", "rank"]
    relevant: Share
    max_candidates: Annotated[int, Field(ge=1, le=1000)]
    near_duplicates: Share | None
    leak_limit: Fraction | None

    @field_validator("keys")
    @classmethod
    def _known(cls, keys):
        for role in keys:
            if role not in ROLES:
                raise ValueError(f"'{role}' is not a role of a column{did_you_mean(role, ROLES)}")
        return keys

    @model_validator(mode="after")
    def _check(self):
        low, high = self.reward_range
        if not low < high:
            raise ValueError(f"reward_range {list(self.reward_range)} must be [low, high] with low < high")
        return self
