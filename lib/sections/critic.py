"""The critic, and reinforcement learning (PPO) of the ranker."""

from typing import Literal

from pydantic import model_validator

from lib.sections.base import AboveZero, Count, Fraction, NonNegative, Positive, Section
from lib.sections.models import TrainingConfig
from lib.sections.pretrained import CriticLoraConfig


class PpoConfig(Section):
    ranker: str
    rollout_pools: Positive
    epochs: Positive
    samples_per_pool: Positive
    clip: AboveZero
    value_weight: NonNegative
    entropy_weight: NonNegative
    kl_weight: NonNegative
    normalise_advantages: bool


class CriticConfig(Section):
    method: Literal["token_critic", "ppo", "none"]
    ppo: PpoConfig
    generator: str
    coupling: Literal["decoupled", "joint", "stop_gradient"]
    num_layers: Count
    lora: CriticLoraConfig | None
    alpha: NonNegative
    ramp: tuple[Fraction, Fraction]
    labels: Literal["expected", "sampled"]
    temperature: tuple[AboveZero, AboveZero]
    rollout_passes: tuple[Positive, Positive]
    clean_fraction: Fraction
    partial_fraction: Fraction
    look_back: Fraction
    conditioning_fraction: Fraction
    origin_weight: NonNegative
    selection_weight: NonNegative
    training: TrainingConfig

    @model_validator(mode="after")
    def _check(self):
        if self.ramp[0] > self.ramp[1]:
            raise ValueError(f"ramp {list(self.ramp)} must be [start, end] with start <= end")
        if self.temperature[0] > self.temperature[1]:
            raise ValueError(f"temperature {list(self.temperature)} must be [low, high] with low <= high")
        if self.rollout_passes[0] > self.rollout_passes[1]:
            raise ValueError(
                f"rollout_passes {list(self.rollout_passes)} must be [low, high] with low <= high"
            )
        return self
