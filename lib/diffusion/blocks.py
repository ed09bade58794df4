"""Where the blocks of a text lie that is written from left to right, piece by piece (semi-autoregressive diffusion).

Knows lengths only. A text longer than the context is written in blocks; each is read together with as much of the text
before it as the context holds, and with nothing behind it (Arriola et al., Block Diffusion, 2025, without its cache).
"""

from dataclasses import dataclass

from lib.errors import BadConfig


@dataclass(frozen=True)
class Block:
    """Positions `start` to `end` are written, `window` to `start` are read as they stand."""

    window: int
    start: int
    end: int


def blocks_of(length: int, block_tokens: int | None, context: int | None) -> list[Block]:
    """The blocks of a text of `length` tokens, from left to right.

    Args:
        block_tokens: tokens per block; None: all at once, or half the context where the text is longer.
        context: longest text that the model reads, None if it reads any.

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
