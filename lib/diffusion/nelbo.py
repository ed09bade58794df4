"""Masked diffusion's bound on the negative log-likelihood (NELBO), as a rule for masking and weighting.

A sequence x of n tokens is masked with ratio t ~ U(0, 1); the model predicts each masked token from the rest.
With the linear schedule alpha(t) = 1 - t (Sahoo et al., MDLM, 2024; Shi et al., MD4, 2024)

    -log p(x)  <=  E_t  (1 / t)  sum over masked positions of  -log p(x_i | rest).

`inverse_t` draws just that. `exact_count` draws the number of masks k ~ U{1..n} instead, with weight n / k
(Ou et al., RADD, 2024): the same bound with less variance, since k is not left to chance. Either way
`MaskedBatch.weights` times the cross-entropies, summed over a row, is the row's NELBO in nats per token; of a batch, see
`weights_per_token`. That holds for masks of the type `random`; sticky ones, spans and lines make other training losses,
each the mean over masked tokens.

Works on numpy arrays. Legend: B rows, T positions.
"""

from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.diffusion.masking import draw_mask
from lib.sections.masking import DiffusionConfig


@dataclass(frozen=True)
class MaskedBatch:
    masked: np.ndarray  # (B, T) bool
    weights: np.ndarray  # (B, T) float32, 0 where not masked; a row's sum of weight x CE is nats per token
    ratios: np.ndarray  # (B,) share of tokens masked


def stratified(draw_key: int, rows: np.ndarray, period: int) -> np.ndarray:
    """(B,) numbers in [0, 1), each uniform, spread evenly over every `period` consecutive rows.

    Row r of a period sits in its own stratum of width 1/period; the strata's order turns with the key, so
    which row gets which ratio says nothing about the row. The antithetic trick of MDLM in keyed form.
    """
    rows = np.asarray(rows, dtype=np.int64)
    offset = randomness.uniform(draw_key, rows // period, 1)[:, 0]
    return (offset + (rows % period) / period) % 1.0


def mask_batch(
    config: DiffusionConfig,
    valid: np.ndarray,
    seed: int,
    purpose: str,
    rows: np.ndarray,
    period: int,
    lines: np.ndarray | None = None,
) -> MaskedBatch:
    """Draw masks for a batch.

    Args:
        valid: (B, T) bool, real tokens.
        seed, purpose, rows: the draw's key; row b's mask depends on `rows[b]` alone.
        period: rows per step, over which the ratios are spread evenly.
        lines: (B, T) the number of each token's line, for masking by lines; see `masking.line_numbers`.
    """
    lengths = valid.sum(1)
    low = config.min_masked_ratio
    time = low + (1 - low) * stratified(randomness.key(seed, purpose + " ratio"), rows, period)  # (B,)
    mask_key = randomness.key(seed, purpose + " mask")
    if config.weight == "exact_count":
        counts = np.minimum(np.floor(time * lengths).astype(np.int64) + 1, lengths)
        masked = draw_mask(config.masking, valid, counts, mask_key, rows, lines)
        per_token = 1.0 / np.maximum(masked.sum(1), 1)  # whole lines need not meet the count exactly
    else:
        masked = (randomness.uniform(mask_key, rows, valid.shape[1]) < time[:, None]) & valid
        per_token = 1.0 / (np.maximum(time, 1e-3) * np.maximum(lengths, 1))
    weights = (masked * per_token[:, None]).astype(np.float32)
    return MaskedBatch(masked, weights, masked.sum(1) / np.maximum(lengths, 1))


def weights_per_token(batch: MaskedBatch, valid: np.ndarray) -> np.ndarray:
    """(B, T) float32 weights whose sum of weight x CE over the whole batch is its NELBO in nats per token.

    A row counts by its number of tokens: the sum of the rows' nats over the sum of their tokens.
    """
    lengths = valid.sum(1, keepdims=True)
    return batch.weights * (lengths / max(lengths.sum(), 1)).astype(np.float32)
