"""The blocks of a text that is generated from left to right, block by block (semi-autoregressive diffusion).

A text longer than the context is generated in blocks. The model reads each block with as much of the text before it as the
context holds. It reads nothing after the block (Arriola et al., Block Diffusion, 2025, without its cache).
"""

from dataclasses import dataclass

from lib.errors import BadConfig


@dataclass(frozen=True)
class Block:
    """Positions `start` to `end` are generated. Those from `window` to `start` are read and not changed."""

    window: int
    start: int
    end: int


def blocks_of(length: int, block_tokens: int | None, context: int | None) -> list[Block]:
    """The blocks of a text of `length` tokens, from left to right.

    Args:
        block_tokens: tokens per block. None: the whole text, or half the context if the text is longer than the context.
        context: longest text that the model reads; None: no limit.

    Raises:
        BadConfig: a block does not fit into the context.
    """
    longest = length if context is None else context
    size = block_tokens or (length if length <= longest else max(1, longest // 2))
    if size > longest:
        raise BadConfig(f"sampler.block_tokens is {size}, but the generator reads at most {longest} tokens")
    ends = [min(start + size, length) for start in range(0, length, size)]
    return [
        Block(max(0, end - longest), start, end)
        for start, end in zip(range(0, length, size), ends, strict=True)
    ]
