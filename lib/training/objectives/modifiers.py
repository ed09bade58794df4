"""Optional modifiers of the masked-diffusion loss: other targets for tokens, and weights for rows.

Each is off unless the config names it, and they can be combined. They change the training loss only; evaluation always
measures the plain NELBO. The row weights of several modifiers are multiplied. Then they are scaled to mean 1 over the rows
of the global batch that have masks, so that they do not change the effective learning rate. Their mean is known after the
forward passes of all parts, so `finish` scales the gradients.

Legend: B rows, T positions, N masked positions of the batch, V vocabulary, A ids of text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.categorical import draw
from lib.errors import BadConfig
from lib.models.build import load_model
from lib.sections.models import EntropyModifier, JudgeModifier, MaskRatioModifier, ModifiersConfig
from lib.tokenization import num_ids
from lib.training.objectives.base import TrainingContext, forward, tensor, with_cls

_WEIGHT, _SQUARE, _MASKED = "row_weight", "_square", "row_masked"  # of terms that `Modifiers.finish` uses up


@dataclass(frozen=True)
class MaskedPredictions:
    """A masked batch and the model's predictions for it.

    Attributes:
        logits: (N, V), with gradient.
        targets: (N,) clean tokens.
        row_idx: (N,) row of each masked position, 0 to B - 1.
        ids, valid: (B, T) clean text.
        flat_idx: (N,) index of each masked position in the flattened (B, T) batch.
        ratios: (B,) share of tokens masked.
        rows: (B,) global row numbers, for keyed draws.
    """

    logits: Tensor
    targets: Tensor
    row_idx: Tensor
    ids: np.ndarray
    valid: np.ndarray
    flat_idx: np.ndarray
    ratios: np.ndarray
    rows: np.ndarray


class Modifiers:
    """The configured modifiers of one model.

    Args:
        text_ids: (A,) ids that are not special tokens.
        judge: the trained sequence scorer of the judge modifier.
        cls_id: [CLS], which the judge reads in front of a text.
    """

    def __init__(
        self,
        config: ModifiersConfig,
        text_ids: np.ndarray,
        context: TrainingContext,
        judge: nn.Module | None = None,
        cls_id: int = -1,
    ):
        runtime = context.runtime
        self.config, self.runtime, self.seed, self.label = config, runtime, context.seed, context.label
        self.text_ids = torch.from_numpy(np.asarray(text_ids)).to(runtime.device)
        self.judge = judge.to(runtime.device).eval() if judge is not None else None
        self.cls_id = cls_id

    def apply(
        self, ce: Tensor, masked: MaskedPredictions, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """((N,) losses of the positions, (B,) weights of the rows, name -> (B,) numbers for `finish`).

        A row without masks, which `diffusion.weight: inverse_t` can draw, has no loss. All its numbers are 0, and it is in
        no mean.

        Args:
            ce: (N,) plain cross-entropies.
        """
        config, terms = self.config, {}
        size = len(masked.rows)
        if config.label_smoothing:
            spread = uniform_cross_entropies(masked.logits, self.text_ids)
            terms["modifier_smoothing"] = _mean_by_row(spread.detach(), masked.row_idx, size)
            ce = (1 - config.label_smoothing) * ce + config.label_smoothing * spread
        has_masks = torch.bincount(masked.row_idx, minlength=size).clamp(max=1).float()  # (B,) 0 or 1
        found = {}
        if config.entropy is not None:
            found["entropy"] = entropy_weights(masked, config.entropy, size)
        if config.mask_ratio is not None:
            ratios = tensor(masked.ratios.astype(np.float32), self.runtime)
            found["mask_ratio"] = mask_ratio_weights(ratios, config.mask_ratio)
        if config.judge is not None and config.judge.start_step <= step < config.judge.stop_step:
            found["judge"] = self._judge_weights(masked, config.judge)
        weights = has_masks
        for name, own in found.items():
            weights = weights * self._log(name, terms, own * has_masks)
        terms |= {_WEIGHT: weights, _MASKED: has_masks}
        return ce, weights, terms

    @staticmethod
    def _log(name: str, terms: dict[str, Tensor], weights: Tensor) -> Tensor:
        """Add what the coefficient of variation of the weights needs to the terms. Returns the weights."""
        terms[f"modifier_{name}"], terms[f"modifier_{name}{_SQUARE}"] = weights, weights.double().square()
        return weights

    @staticmethod
    def finish(terms: dict[str, float]) -> tuple[dict[str, float], float]:
        """(the terms to log, the factor of the gradients) from the means over the rows of a global batch.

        The term of a modifier of row weights is their coefficient of variation: 0 means no effect.
        """
        masked = terms[_MASKED] or 1.0  # the share of rows with masks; without any, all terms are 0
        factor = masked / (terms[_WEIGHT] or 1.0)
        logged = {}
        for name, value in terms.items():
            if name.startswith("modifier_"):
                value /= masked
            if name + _SQUARE in terms:
                value = max(terms[name + _SQUARE] / masked - value**2, 0.0) ** 0.5 / (value or 1.0)
            if name not in (_WEIGHT, _MASKED) and not name.endswith(_SQUARE):
                logged[name] = value
        return logged | {"loss": terms["loss"] * factor}, factor

    @torch.no_grad()
    def _judge_weights(self, masked: MaskedPredictions, config: JudgeModifier) -> Tensor:
        """(B,) weights that grow with (1 - judge's score) / masking ratio of the row's sampled completion.

        The completion depends on the row number alone, not on the other rows of the batch.
        """
        assert self.judge is not None
        key = randomness.key(self.seed, f"{self.label} judge weight")
        noise = randomness.uniform(key, masked.rows, masked.ids.shape[1]).reshape(-1)[masked.flat_idx]  # (N,)
        specials = np.setdiff1d(np.arange(masked.logits.shape[1]), self.text_ids.cpu().numpy())
        sampled, _ = draw(masked.logits, tensor(noise, self.runtime), tensor(specials, self.runtime))  # (N,)
        filled = masked.ids.copy().reshape(-1)  # (B T,)
        filled[masked.flat_idx] = sampled.cpu().numpy()
        ids, valid = with_cls(filled.reshape(masked.ids.shape), masked.valid, self.cls_id)
        score = (
            forward(self.judge, self.runtime, ids, valid).logits.float().squeeze(-1)
        )  # (B,), 1: all original
        ratios = tensor(masked.ratios.astype(np.float32), self.runtime).clamp(min=1e-3)
        return ((1 - score) / ratios).pow(config.exponent).clamp(config.min_weight, config.max_weight)


def _mean_by_row(values: Tensor, row_idx: Tensor, size: int) -> Tensor:
    """(B,) mean over each row's masked positions, of (N,) values."""
    count = torch.bincount(row_idx, minlength=size).clamp(min=1)
    return torch.zeros(size, device=values.device, dtype=values.dtype).index_add_(0, row_idx, values) / count


def uniform_cross_entropies(logits: Tensor, text_ids: Tensor) -> Tensor:
    """(N,) cross-entropies of a target that is uniform over the ids of text (label smoothing, Szegedy et al., 2016)."""
    logits = logits.float()
    return logits.logsumexp(-1) - logits[:, text_ids].mean(-1)


def entropy_weights(masked: MaskedPredictions, config: EntropyModifier, size: int) -> Tensor:
    """(B,) weight / max(H, threshold): more for rows where the model's wrong answers concentrate on few tokens.

    H is the entropy of the distribution over the wrong tokens, relative to that of a uniform one. It is the mean over
    the row's masked positions. A low H means that the model errs with high confidence.
    """
    with torch.no_grad():
        wrong = masked.logits.float().scatter(1, masked.targets[:, None], -torch.inf)
        logs = torch.log_softmax(wrong, -1)  # (N, V), -inf at the target
        entropy = -torch.where(logs.isfinite(), logs.exp() * logs, 0.0).sum(-1) / np.log(wrong.shape[1] - 1)
        mean = _mean_by_row(entropy, masked.row_idx, size)
        return config.weight / mean.clamp(min=config.threshold)


def mask_ratio_weights(ratios: Tensor, config: MaskRatioModifier) -> Tensor:
    """(B,) ratio ** -power within limits. Rows with few masks count more: their tokens are easier to predict."""
    return ratios.clamp(min=1e-6).pow(-config.power).clamp(config.min_weight, config.max_weight)


def load_modifiers(
    config: ModifiersConfig, context: TrainingContext, tokenizer: Any, text_ids: np.ndarray, width: int
) -> Modifiers | None:
    """The modifiers of a model with windows of `width` tokens, with their judge; None if none is configured."""
    if not config.any:
        return None
    judge = None
    if config.judge is not None:
        folder = Path(config.judge.model)
        judge = load_model(folder)
        check_judge(
            judge, num_ids(tokenizer), width, f"models.{context.label}.modifiers.judge.model: {folder}"
        )
    return Modifiers(config, text_ids, context, judge, tokenizer.cls_token_id)


def check_judge(judge: Any, vocab_size: int, width: int, name: str) -> None:
    """Raises BadConfig if a model cannot be the judge for windows of `width` tokens."""
    config = judge.config
    if getattr(config, "num_labels", 0) != 1 or getattr(config, "score_activation", "") != "sigmoid":
        raise BadConfig(f"{name} is no sequence scorer with a score in [0, 1]; give the folder of a judge")
    if config.vocab_size != vocab_size:
        raise BadConfig(f"{name} reads {config.vocab_size} ids, but this run's tokenizer has {vocab_size}")
    if config.max_position_embeddings < width + 1:
        raise BadConfig(
            f"{name} reads {config.max_position_embeddings - 1} tokens at most, but this model's windows have {width}"
        )
