"""Attention of packed rows on a GPU without a mask of every pair of tokens: torch's FlexAttention.

The mask is a function of two positions, and blocks of 128 x 128 pairs that nobody sees are skipped. A dense mask needs
T x T bytes for each row.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib.errors import BadConfig
from lib.models.packing import PROMPT, Packed

BLOCKS = "remask_blocks"  # the name of this attention in transformers


def on_a_gpu(mask: str, ranker: Any, device: torch.device) -> None:
    """Follow `ranker.mask` for a ranker that is to be trained on a device. Only packed rows on a GPU have blocks."""
    if mask == "blocks" and device.type == "cuda" and ranker.packs:
        use_blocks(ranker.base)


def use_blocks(backbone: Any) -> None:
    """Let a backbone of transformers read packed rows with `block_mask`, and other rows as with "sdpa".

    Raises BadConfig for a backbone that does not take such masks, or has dropout of attention weights.
    """
    name = type(backbone).__name__
    if not getattr(backbone, "_supports_flex_attn", False):
        raise BadConfig(f"ranker.mask is blocks, but {name} does not support FlexAttention; set it to dense")
    for option in ("attention_dropout", "attention_probs_dropout_prob"):
        if getattr(backbone.config, option, 0.0):
            raise BadConfig(
                f"ranker.mask is blocks, but {name} has {option} {getattr(backbone.config, option)}, which "
                "FlexAttention does not compute; set ranker.mask to dense"
            )
    ALL_ATTENTION_FUNCTIONS.register(BLOCKS, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    backbone.set_attn_implementation(BLOCKS)


def block_mask(packed: Packed, is_causal: bool) -> BlockMask:
    """`packed.visible(is_causal)` as a function of two positions, on the device of `packed`."""
    owner, segment, positions = packed.owner, packed.segment, packed.positions
    rows, length = owner.shape

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (owner[row, key] == PROMPT) | (owner[row, key] == owner[row, query])
        seen = seen & (segment[row, key] == segment[row, query])
        return seen & (positions[row, key] <= positions[row, query]) if is_causal else seen

    make = _compiled(create_block_mask) if owner.is_cuda else create_block_mask
    return make(visible, rows, None, length, length, device=owner.device)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """((B, T, H, C) mixed values, None) of queries (B, H, T, C) and keys, values (B, G, T, C), as transformers calls it.

    G divides H. Masks that are no `BlockMask` go to torch's "sdpa".
    """
    if not isinstance(attention_mask, BlockMask):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **arguments)
    run = _compiled(flex_attention) if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    scale = arguments.get("scaling")
    mixed: Any = run(query, key, value, block_mask=attention_mask, scale=scale, enable_gqa=grouped)
    return mixed.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without compilation FlexAttention would compute all pairs."""
    return torch.compile(function, dynamic=True)
