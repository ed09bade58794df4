"""Staged unmasking: masks that get harder as training proceeds, instead of the bound's uniform ratios.

A stage is a type of mask and a range of ratios. Training begins with the first stage. The next one joins when the current
stage's validation loss has not improved `val_loss_stale_count` times in a row. An improvement is one by at least
`min_improvement`, because in a short run the loss falls until the end. Batches are divided evenly over the stages so far, or
over all stages from the start, so earlier stages are not forgotten.

Works on numpy arrays. Legend: B rows, T positions, S stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.diffusion.masking import BatchDraw, draw_mask, masked_counts
from lib.diffusion.nelbo import MaskedBatch, stratified
from lib.sections.masking import UnmaskingStage


@dataclass
class Progress:
    """The current stage of training.

    Attributes:
        patience: `val_loss_stale_count` of each stage.
        min_improvement: of each stage, the relative decrease of the loss that counts as an improvement.
        current: index of the current stage; the last stage never ends.
        best, stale: lowest validation loss of the current stage, and the number of checks since then.
    """

    patience: tuple[int, ...]
    min_improvement: tuple[float, ...]
    current: int = 0
    best: float = math.inf
    stale: int = 0

    def note(self, loss: float) -> bool:
        """Record the current stage's validation loss. True if the stage ends with it."""
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
    stage_of_row: np.ndarray,
    valid: np.ndarray,
    draw: BatchDraw,
    lines: np.ndarray | None = None,
) -> MaskedBatch:
    """Masks of a batch in which row b belongs to stage `stage_of_row[b]`.

    The weights make every row's loss the mean over its masked tokens. That is no bound on the likelihood.

    Args:
        stage_of_row: (B,) indices of stages.
        valid, draw, lines: as for `nelbo.mask_batch`. Row b's mask depends on its key and its stage alone.
    """
    lengths = valid.sum(1)
    position_in_range = stratified(draw.key("ratio"), draw.rows, draw.period)  # (B,) in [0, 1)
    masked = np.zeros(valid.shape, bool)
    for index in np.unique(stage_of_row):
        rows, stage = np.flatnonzero(stage_of_row == index), stages[index]
        low, high = stage.ratios
        counts = masked_counts(low + (high - low) * position_in_range[rows], lengths[rows])
        row_lines = None if lines is None else lines[rows]
        key = draw.key(f"mask {index}")
        masked[rows] = draw_mask(stage, valid[rows], counts, key, draw.rows[rows], row_lines)
    weights = masked / np.maximum(masked.sum(1, keepdims=True), 1)
    return MaskedBatch(masked, weights.astype(np.float32), masked.sum(1) / np.maximum(lengths, 1))
