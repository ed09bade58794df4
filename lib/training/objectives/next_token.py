"""`language_model` of causal models: next-token prediction.

The model reads [CLS] as the beginning of every window, so that the first token counts too. Loss and report are the
exact negative log-likelihood (NLL) in nats per token.

Legend: B rows, T positions, V vocabulary, R windows.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lib.engine.parts import Part
from lib.runtime import Runtime
from lib.training.cross_entropy import cross_entropies
from lib.training.data import Windows
from lib.training.objectives.base import ResultRow, TrainingContext, chunks, evaluation_rows, forward, tensor
from lib.training.objectives.language_model import EVALUATION_BATCH, WindowObjective, WindowSplits


class NextToken(WindowObjective):
    """The ordinary causal language model over windows of text."""

    selection = "nll"
    draws_ahead = True

    def __init__(self, context: TrainingContext, splits: WindowSplits, cls_id: int):
        super().__init__(context, splits)
        self.cls_id = cls_id

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The mean NLL of the batch's tokens."""
        _, ids, valid = self.windows(rows)

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            nll, mask = causal_nll(model, self.runtime, ids, valid, self.cls_id)
            return {"loss": (nll * mask).sum() / totals["tokens"]}

        return Part({"tokens": int(valid.sum())}, losses)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """NLL of the `evaluated` selection windows."""
        nats, tokens = self.window_nlls(model, self.splits.selection, self.evaluated)
        return {"nll": float(nats.sum() / tokens.sum())}

    def report(self, model: nn.Module) -> tuple[dict[str, float], list[ResultRow]]:
        """NLL of the `reported` windows; `nll_half_width` is the half-width of the 95 % interval."""
        nll = self.estimate(*self.window_nlls(model, self.splits.held_out, self.reported))
        unigram = self.unigram_nll()
        metrics = {"nll": nll.value, "nll_half_width": nll.half_width, "unigram_nll": unigram}
        metrics["bits_per_character"], rows = self.result_rows("NLL", nll, unigram)
        return metrics, rows

    def window_nlls(
        self, model: nn.Module, windows: Windows, examples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """((R,) nats, (R,) tokens) of the windows `examples`."""

        def measure(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            ids, valid = windows.batch(examples[part], np.zeros(len(part)))
            nll, mask = causal_nll(model, self.runtime, ids, valid, self.cls_id)
            return (nll * mask).sum(1).cpu().numpy(), valid.sum(1)

        found = self.runtime.processes.share(
            measure, list(chunks(len(examples), evaluation_rows(EVALUATION_BATCH, windows.width)))
        )
        nats, tokens = zip(*found, strict=True)
        return np.concatenate(nats), np.concatenate(tokens)


def causal_nll(
    model: nn.Module, runtime: Runtime, ids: np.ndarray, valid: np.ndarray, cls_id: int
) -> tuple[Tensor, Tensor]:
    """((B, T) nats of every token given [CLS] and the tokens before it, (B, T) float32 validity)."""
    inputs = np.concatenate([np.full_like(ids[:, :1], cls_id), ids[:, :-1]], 1)
    input_valid = np.concatenate([np.ones_like(valid[:, :1]), valid[:, :-1]], 1)
    # Without use_cache=False a model in evaluation mode would build a key-value cache
    logits = forward(model, runtime, inputs, input_valid, use_cache=False).logits  # (B, T, V)
    nll = cross_entropies(logits.flatten(0, 1), tensor(ids, runtime).flatten())
    return nll.view(ids.shape), tensor(valid, runtime).to(torch.float32)
