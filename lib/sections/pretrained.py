"""A pretrained masked LM of another project as the backbone and tokenizer of a run."""

import re
from typing import Literal

from pydantic import field_validator

from lib.sections.base import AboveZero, Positive, Section, UserPath


class CriticLoraConfig(Section):
    """Low-rank adapters on a frozen backbone, for the critic's own forward pass."""

    rank: Positive = 16
    alpha: AboveZero = 32.0


class AdapterConfig(Section):
    """Low-rank adapters on the linear layers of a backbone."""

    rank: Positive
    alpha: AboveZero
    targets: str


class PretrainedConfig(Section):
    model: UserPath | None
    code_sha256: str | None
    mask_token: str | None
    shift_logits: bool
    text: Literal["exact", "normalise"]
    adapter: Literal["none", "lora"]
    lora: AdapterConfig

    @field_validator("code_sha256")
    @classmethod
    def _hash(cls, value):
        if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
            raise ValueError("must be a sha256 of 64 hexadecimal digits")
        return value
