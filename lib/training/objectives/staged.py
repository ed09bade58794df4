"""`language_model` by staged unmasking: the masks follow `diffusion.stages`, the report stays the bound.

Knows windows of tokens, the stages and a model. The best model is chosen by the bound, as without stages, so that staged
and continuous-time models are chosen and compared by one number.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lib.diffusion.masking import BatchDraw
from lib.diffusion.nelbo import MaskedBatch
from lib.diffusion.stages import Progress, mask_in_stages
from lib.log import say
from lib.training.objectives.base import chunks
from lib.training.objectives.language_model import EVALUATION_BATCH, MaskedDiffusion

LEAST_CHECKED = 32  # selection windows of each stage's validation loss


class StagedUnmasking(MaskedDiffusion):
    """Masked language modelling by stages.

    `evaluate` also measures every stage on its share of the selection windows, the same windows and masks each time, and
    moves on to the next stage when the current one's loss is stale.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stages = self.config.stages
        patience, min_improvement = zip(
            *((s.val_loss_stale_count, s.min_improvement) for s in self.stages), strict=True
        )
        self.progress = Progress(patience, min_improvement)

    @property
    def active(self) -> int:
        """How many stages batches are split over."""
        return len(self.stages) if self.config.use_all_stages else self.progress.current + 1

    def mask(
        self, ids: np.ndarray, valid: np.ndarray, purpose: str, rows: np.ndarray, period: int
    ) -> MaskedBatch:
        return self._masked(ids, valid, purpose, rows, period, np.asarray(rows) % self.active)

    def _masked(self, ids, valid, purpose, rows, period, of_row) -> MaskedBatch:
        return mask_in_stages(
            self.stages, of_row, valid, BatchDraw(self.seed, purpose, rows, period), self.lines_of(ids)
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The bound, `stage` in which training was until now, and `stage_<n>_loss` of all stages."""
        values = super().evaluate(model) | {"stage": float(self.progress.current)}
        losses = self.stage_losses(model)
        values |= {f"stage_{number}_loss": loss for number, loss in enumerate(losses)}
        if self.progress.note(losses[self.progress.current]):
            now = self.stages[self.progress.current]
            say(f"  {self.label}: stage {self.progress.current} of {len(self.stages) - 1}, {now.type}, joins")
        return values

    @torch.no_grad()
    def stage_losses(self, model: nn.Module) -> list[float]:
        """(S,) mean cross-entropy over the masked tokens of each stage's selection windows."""
        losses = []
        size = max(LEAST_CHECKED, len(self._evaluated) // len(self.stages))
        for number in range(len(self.stages)):
            windows = np.resize(np.roll(self._evaluated, -number * size), size)
            total = count = 0.0
            for part in chunks(size, EVALUATION_BATCH):
                ids, valid = self.selection_windows.batch(windows[part], np.zeros(len(part)))
                of_row = np.full(len(part), number)
                batch = self._masked(ids, valid, "stage evaluation", part, size, of_row)
                ce, at = self.cross_entropies(model, ids, valid, batch)
                total, count = total + float(ce.sum()), count + len(at)
            losses.append(total / max(count, 1))
        return losses

    def state(self) -> dict[str, Tensor]:
        """The progress, for a checkpoint."""
        now = self.progress
        return {"progress": torch.tensor([now.current, now.best, now.stale], dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        current, best, stale = state["progress"].tolist()
        self.progress = replace(self.progress, current=int(current), best=best, stale=int(stale))
