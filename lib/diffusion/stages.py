"""Staged unmasking: masks that get harder as training gets better, in place of the bound's uniform ratios.

A stage is a way to mask and a share to mask. Training begins with the first; when its own validation loss has not
improved `val_loss_stale_count` times in a row the next one joins (by `min_improvement`: in a short run a loss falls to the end,
but ever more slowly). Batches are split evenly over the stages so far, so
that nothing learned is left behind, or over all from the start.

Works on numpy arrays; knows no tokens and no model. Legend: B rows, T positions, S stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.diffusion.masking import draw_mask, masked_counts
from lib.diffusion.nelbo import MaskedBatch, stratified
from lib.sections.masking import UnmaskingStage


@dataclass
class Progress:
    """Which stage training is in.

    Attributes:
        patience: `val_loss_stale_count` of each stage.
        min_improvement: of each stage, by what share the loss must fall below the best one to count as better.
        current: its number; the last one stays.
        best, stale: the least validation loss of this stage so far, and how many checks ago that was.
    """

    patience: tuple[int, ...]
    min_improvement: tuple[float, ...]
    current: int = 0
    best: float = math.inf
    stale: int = 0

    def note(self, loss: float) -> bool:
        """Take in the current stage's validation loss. True if that ended the stage."""
        if loss < self.best * (1 - self.min_improvement[self.current]):
            self.best, self.stale = loss, 0
            return False
        self.stale += 1
        if self.stale < self.patience[self.current] or self.current == len(self.patience) - 1:
            return False
        self.current, self.best, self.stale = self.current + 1, math.inf, 0
        return True


def mask_in_stages(
    stages: Sequence[UnmaskingStage],
    of_row: np.ndarray,
    valid: np.ndarray,
    seed: int,
    purpose: str,
    rows: np.ndarray,
    period: int,
    lines: np.ndarray | None = None,
) -> MaskedBatch:
    """Masks of a batch in which row b belongs to stage `of_row[b]`.

    Weights make every row's loss the mean over its masked tokens. That is no bound on the likelihood.

    Args:
        of_row: (B,) numbers of stages.
        valid, seed, purpose, rows, period, lines: as for `nelbo.mask_batch`; row b's mask depends on `rows[b]` and its
            stage alone.
    """
    lengths = valid.sum(1)
    place = stratified(randomness.key(seed, purpose + " ratio"), rows, period)  # (B,)
    masked = np.zeros(valid.shape, bool)
    for number in np.unique(of_row):
        own, stage = np.flatnonzero(of_row == number), stages[number]
        low, high = stage.ratios
        counts = masked_counts(low + (high - low) * place[own], lengths[own])
        here = None if lines is None else lines[own]
        key = randomness.key(seed, f"{purpose} mask {number}")
        masked[own] = draw_mask(stage, valid[own], counts, key, rows[own], here)
    weights = masked / np.maximum(masked.sum(1, keepdims=True), 1)
    return MaskedBatch(masked, weights.astype(np.float32), masked.sum(1) / np.maximum(lengths, 1))
