"""What a ranker must know of a Hugging Face trunk before it asks it anything. Knows no ranker."""

import inspect
from typing import Any

from lib.errors import BadConfig

TAKES_OWN_MASKS = ("sdpa", "eager")  # attention implementations that let a mask of four dimensions through


def is_causal_trunk(trunk: Any) -> bool:
    """Whether the trunk's tokens see only earlier ones, by its config or its attention layers.

    Raises:
        BadConfig: the trunk is an encoder with a decoder.
    """
    config = trunk.config
    if getattr(config, "is_encoder_decoder", False):
        raise BadConfig(
            f"{type(trunk).__name__} has an encoder and a decoder; a ranker needs one of both: "
            "take a BERT- or GPT-like model"
        )
    said = getattr(config, "is_causal", None)
    if said is not None:
        return bool(said)
    layers = [m.is_causal for m in trunk.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(layers) if layers else bool(getattr(config, "is_decoder", False))


def width_of(trunk: Any) -> int:
    """D, the width of the trunk's hidden states."""
    return trunk.config.get_text_config().hidden_size


def arguments_of(trunk: Any) -> frozenset[str]:
    """Names that the trunk's forward takes."""
    return frozenset(inspect.signature(trunk.forward).parameters)


def attention_of(trunk: Any) -> str:
    """The attention implementation in use."""
    return getattr(trunk.config, "_attn_implementation", None) or "eager"


def why_not_packed(trunk: Any) -> str | None:
    """Why the trunk takes no packed rows, None if it does."""
    if attention_of(trunk) not in TAKES_OWN_MASKS:
        return f"attention implementation {attention_of(trunk)!r} takes no mask of its own; {' or '.join(TAKES_OWN_MASKS)} do"
    return None if "position_ids" in arguments_of(trunk) else "its forward takes no position_ids"


def position_offset(trunk: Any) -> int:
    """The position of a first token: RoBERTa and its kin count on from the padding's id."""
    embeddings: Any = getattr(trunk, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return int(embeddings.padding_idx) + 1
    return 0
