"""Sampling from a causal model, token by token: the baseline. NFE is the number of generated tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lib import randomness
from lib.diffusion.blocks import blocks_of
from lib.diffusion.categorical import draw
from lib.diffusion.samples import MaskedTexts, Samples
from lib.runtime import Runtime
from lib.sections.sampler import SamplerConfig


@dataclass
class AutoregressiveSampler:
    """A causal language model that fills texts from left to right. The other tokens are read and not changed.

    Keys and values of earlier tokens are cached. Tokens that are not free are read together with the next generated one, so a
    prompt costs no forward pass. A text longer than the context is generated in blocks of half the context. Each is
    read with as much of the text before it as the context holds. Noise is keyed by `MaskedTexts.rows`, as in the sampler.

    Attributes:
        cls_id: the token in front of every text.
        forbidden: special ids that are never sampled.
        settings: `batch_size` texts have a cache at a time.
        context: longest text that the model reads; None: no limit.
    """

    model: Any
    cls_id: int
    forbidden: list[int]
    runtime: Runtime
    settings: SamplerConfig
    seed: int
    context: int | None = None

    @torch.no_grad()
    def sample(self, texts: MaskedTexts) -> Samples:
        """Generate the free positions of (B, T) texts."""
        ids, size = texts.ids.copy(), self.settings.batch_size
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            self._fill_batch(ids[part], texts.free[part], texts.rows[part])
        return Samples(ids, texts.free.sum(1))

    def _fill_batch(self, ids: np.ndarray, free: np.ndarray, rows: np.ndarray) -> None:
        """Fill (B, T) ids in place."""
        settings, device = self.settings, self.runtime.device
        forbidden = torch.tensor(self.forbidden, device=device)
        noise = randomness.uniform(randomness.key(self.seed, "autoregressive token"), rows, ids.shape[1])
        for block in blocks_of(ids.shape[1], None, self.context):
            prefix = np.full((len(ids), 1), self.cls_id)
            num_cached, cache = block.window, None  # the cache holds the tokens before `num_cached`
            for position in block.start + np.flatnonzero(free[:, block.start : block.end].any(0)):
                unread = np.concatenate([prefix, ids[:, num_cached:position]], 1)
                with self.runtime.autocast():
                    inputs = torch.from_numpy(unread).to(device)
                    output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache, num_cached, prefix = output.past_key_values, position, prefix[:, :0]
                draws = torch.from_numpy(noise[:, position]).to(device)
                logits = output.logits[:, -1]  # (B, V)
                tokens, _ = draw(logits, draws, forbidden, settings.temperature, top_p=settings.top_p)
                ids[:, position] = np.where(free[:, position], tokens.cpu().numpy(), ids[:, position])
