"""`language_model` by staged unmasking: training draws masks as `diffusion.stages` configures them.

Evaluation and report still measure the NELBO. So the best step is chosen, and models are compared, by the same number
as without stages.

Legend: B rows, T positions, S stages.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lib.diffusion.masking import BatchDraw
from lib.diffusion.nelbo import MaskedBatch
from lib.diffusion.stages import Progress, mask_in_stages
from lib.log import say
from lib.training.cross_entropy import cross_entropies
from lib.training.objectives.base import chunks, evaluation_rows
from lib.training.objectives.language_model import EVALUATION_BATCH, MaskedDiffusion

MIN_WINDOWS = 32  # selection windows of each stage's validation loss


class StagedUnmasking(MaskedDiffusion):
    """Masked diffusion by stages.

    `evaluate` also measures the validation loss of every stage, always on the same windows and masks. It moves on to
    the next stage when the loss of the current one no longer improves.
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
        """Number of stages among which the rows of a batch are divided."""
        return len(self.stages) if self.config.use_all_stages else self.progress.current + 1

    def mask(
        self, ids: np.ndarray, valid: np.ndarray, purpose: str, rows: np.ndarray, period: int
    ) -> MaskedBatch:
        """Masks for (B, T) ids: row r follows stage r % `active`."""
        return self._mask(ids, valid, purpose, rows, period, np.asarray(rows) % self.active)

    def _mask(self, ids, valid, purpose, rows, period, stage_of_row) -> MaskedBatch:
        return mask_in_stages(
            self.stages, stage_of_row, valid, BatchDraw(self.seed, purpose, rows, period), self.lines_of(ids)
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The NELBO, `stage` in which the model was trained until now, and `stage_<n>_loss` of every stage."""
        values = super().evaluate(model) | {"stage": float(self.progress.current)}
        losses = self.stage_losses(model)
        values |= {f"stage_{number}_loss": loss for number, loss in enumerate(losses)}
        if self.progress.note(losses[self.progress.current]):
            number = self.progress.current
            say(
                f"  {self.label}: stage {number} of 0 to {len(self.stages) - 1} begins: {self.stages[number].type}"
            )
        return values

    @torch.no_grad()
    def stage_losses(self, model: nn.Module) -> list[float]:
        """(S,) mean cross-entropy of masked tokens on each stage's selection windows."""
        losses = []
        size = max(MIN_WINDOWS, len(self.evaluated) // len(self.stages))
        for number in range(len(self.stages)):
            windows = np.resize(np.roll(self.evaluated, -number * size), size)

            def measure(part: np.ndarray, windows=windows, number=number) -> tuple[np.ndarray]:
                ids, valid = self.splits.selection.batch(windows[part], np.zeros(len(part)))
                stage_of_row = np.full(len(part), number)
                batch = self._mask(ids, valid, "stage evaluation", part, size, stage_of_row)
                inputs = np.where(batch.masked, self.mask_id, ids)
                logits, targets, _ = self.predict(model, inputs, ids, valid, batch.masked)
                return (np.array([float(cross_entropies(logits, targets).sum()), len(targets)]),)

            found = self.runtime.processes.share(
                measure, list(chunks(size, evaluation_rows(EVALUATION_BATCH, self.splits.selection.width)))
            )
            total, count = np.sum([sums for (sums,) in found], axis=0)
            losses.append(float(total / max(count, 1)))
        return losses

    def state(self) -> dict[str, Tensor]:
        """The progress through the stages, for a checkpoint."""
        now = self.progress
        return {"progress": torch.tensor([now.current, now.best, now.stale], dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        current, best, stale = state["progress"].tolist()
        self.progress = replace(self.progress, current=int(current), best=best, stale=int(stale))
