"""Masked diffusion's bound on the negative log-likelihood (NELBO), as a rule for masking and weighting.

A sequence x of n tokens is masked with ratio t ~ U(0, 1); the model predicts each masked token from the rest.
With the linear schedule alpha(t) = 1 - t (Sahoo et al., MDLM, 2024; Shi et al., MD4, 2024)

    -log p(x)  <=  E_t  (1 / t)  sum over masked positions of  -log p(x_i | rest).

- `inverse_t` draws this, with 1 / t limited to 1,000.
- `exact_count` draws the number of masks k ~ U{1..n} instead, with weight n / k (Ou et al., RADD, 2024). It is the same bound
  with less variance.

In both, `MaskedBatch.weights` times the cross-entropies, summed over a row, is the row's NELBO in nats per token. For a batch,
see `weights_per_token`. This holds for masks of the type `random`. With sticky, span and line masks the loss is the mean over
masked tokens, and no bound.

Works on numpy arrays. Legend: B rows, T positions.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from lib import randomness
from lib.diffusion.masking import BatchDraw, draw_mask
from lib.sections.masking import DiffusionConfig, Ratios


@dataclass(frozen=True)
class MaskedBatch:
    masked: np.ndarray  # (B, T) bool
    weights: np.ndarray  # (B, T) float32, 0 where not masked; a row's sum of weight x CE is nats per token
    ratios: np.ndarray  # (B,) share of tokens masked


def stratified(draw_key: int, rows: np.ndarray, period: int) -> np.ndarray:
    """(B,) numbers in [0, 1), each uniform, spread evenly over every `period` consecutive rows.

    Each row of a period has its own stratum of width 1 / period. A keyed offset rotates the strata, so a row's ratio does
    not depend on what the row holds. This is MDLM's low-variance sampling of t, with keys.
    """
    rows = np.asarray(rows, dtype=np.int64)
    offset = randomness.uniform(draw_key, rows // period, 1)[:, 0]
    return (offset + (rows % period) / period) % 1.0


def draw_ratios(ratios: Ratios, uniform: np.ndarray, progress: np.ndarray | float) -> np.ndarray:
    """(B,) mask ratios in (0, 1) from (B,) uniform numbers: the quantiles of the configured distribution.

    So ratios that are spread evenly stay spread evenly.

    Args:
        progress: share of the training's steps that were done, of each row.
    """
    if ratios.type == "uniform":
        return uniform
    low, high = ndtr((np.array([0.0, 1.0]) - ratios.mean) / ratios.deviation)
    normal = ratios.mean + ratios.deviation * ndtri(low + uniform * (high - low))
    left = np.clip(
        (1.0 - progress) / max(1.0 - ratios.uniform_from, 1e-9), 0.0, 1.0
    )  # of the normal distribution
    return np.clip(left * normal + (1.0 - left) * uniform, 0.0, np.nextafter(1.0, 0.0))


def mask_batch(
    config: DiffusionConfig,
    valid: np.ndarray,
    draw: BatchDraw,
    lines: np.ndarray | None = None,
    progress: np.ndarray | float = 0.0,
) -> MaskedBatch:
    """Draw masks for a batch.

    Args:
        valid: (B, T) bool, real tokens.
        draw: keys of the rows. The ratios are spread evenly over its period.
        lines: (B, T) line number of each token, for masking by lines; see `masking.line_numbers`.
        progress: see `draw_ratios`.
    """
    lengths = valid.sum(1)
    # 1. The masking ratio t of each row
    low = config.min_masked_ratio
    uniform = stratified(draw.key("ratio"), draw.rows, draw.period)
    time = low + (1 - low) * draw_ratios(config.ratios, uniform, progress)  # (B,)
    # 2. The masks, and the weight of each masked token
    mask_key = draw.key("mask")
    if config.weight == "exact_count":
        counts = np.minimum(np.floor(time * lengths).astype(np.int64) + 1, lengths)
        masked = draw_mask(config.masking, valid, counts, mask_key, draw.rows, lines)
        per_token = 1.0 / np.maximum(masked.sum(1), 1)  # whole lines meet the count only approximately
    else:
        masked = (randomness.uniform(mask_key, draw.rows, valid.shape[1]) < time[:, None]) & valid
        per_token = 1.0 / (np.maximum(time, 1e-3) * np.maximum(lengths, 1))
    weights = (masked * per_token[:, None]).astype(np.float32)
    return MaskedBatch(masked, weights, masked.sum(1) / np.maximum(lengths, 1))


def weights_per_token(batch: MaskedBatch, valid: np.ndarray, total: float) -> np.ndarray:
    """(B, T) float32 weights whose sum of weight x CE over the whole batch is its NELBO in nats per token.

    Each row is weighted by its number of tokens: the sum of the rows' nats over the sum of their tokens.

    Args:
        total: tokens of the whole batch, of which these rows may be a part.
    """
    lengths = valid.sum(1, keepdims=True)
    return batch.weights * (lengths / max(total, 1)).astype(np.float32)
