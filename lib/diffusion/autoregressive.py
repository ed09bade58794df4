"""Sampling from a causal model, token by token: the baseline. One forward pass per written token, so NFE = those."""

import numpy as np
import torch
from torch import nn

from lib import randomness
from lib.diffusion.blocks import blocks_of
from lib.diffusion.categorical import draw
from lib.diffusion.sampler import Samples
from lib.runtime import Runtime
from lib.sections.sampler import SamplerConfig


@torch.no_grad()
def sample_autoregressively(
    model: nn.Module,
    ids: np.ndarray,
    free: np.ndarray,
    rows: np.ndarray,
    cls_id: int,
    forbidden: list[int],
    settings: SamplerConfig,
    runtime: Runtime,
    seed: int,
    context: int | None = None,
) -> Samples:
    """Write the free positions of (B, T) ids from left to right; given ones are read, not changed.

    Keys and values of earlier tokens are cached, and given tokens wait for the pass that writes the next one: a prompt
    costs none. A text longer than the context is written in blocks of half of it, each behind as much text as the context
    holds, which one pass reads. The sample's noise is keyed by `rows`, as in the sampler. `sampler.batch_size` texts have a
    cache at a time.
    """
    written, size = ids.copy(), settings.batch_size
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        _write_batch(
            model, written[part], free[part], rows[part], cls_id, forbidden, settings, runtime, seed, context
        )
    return Samples(written, free.sum(1))


def _write_batch(
    model,
    ids,
    free,
    rows,
    cls_id: int,
    forbidden: list[int],
    settings,
    runtime,
    seed: int,
    context: int | None,
) -> None:
    """Into (B, T) ids, in place."""
    barred = torch.tensor(forbidden, device=runtime.device)
    noise = randomness.uniform(randomness.key(seed, "autoregressive token"), rows, ids.shape[1])
    for block in blocks_of(ids.shape[1], None, context):
        before = np.full((len(ids), 1), cls_id)
        read, cache = block.window, None  # the cache holds what lies before `read`
        for position in block.start + np.flatnonzero(free[:, block.start : block.end].any(0)):
            unread = np.concatenate([before, ids[:, read:position]], 1)
            with runtime.autocast():
                inputs = torch.from_numpy(unread).to(runtime.device)
                output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache, read, before = output.past_key_values, position, before[:, :0]
            here = torch.from_numpy(noise[:, position]).to(runtime.device)
            tokens, _ = draw(output.logits[:, -1], here, barred, settings.temperature, top_p=settings.top_p)
            ids[:, position] = np.where(free[:, position], tokens.cpu().numpy(), ids[:, position])
