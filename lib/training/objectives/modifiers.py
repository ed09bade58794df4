"""Loss modifiers of masked language models: what a token or a row counts, and what its target is.

Each is off unless the config names it; any may be combined. They change the training loss only: what is evaluated is the
plain bound. Row weights multiply, and are scaled so that their mean over the batch is 1: they say what to look at, not
how fast to learn.

Legend: B rows, T positions, N masked positions of the batch, V vocabulary, A ids that are text.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.categorical import draw
from lib.errors import BadConfig
from lib.runtime import Runtime
from lib.sections.models import EntropyModifier, JudgeModifier, MaskRatioModifier, ModifiersConfig
from lib.training.objectives.base import forward, tensor, with_cls


@dataclass(frozen=True)
class Masked:
    """What a modifier may look at.

    Attributes:
        logits: (N, V), with gradient; targets: (N,); row: (N,) numbers of rows.
        ids, valid: (B, T) clean text; at: (N,) flat places in it.
        ratios: (B,) share of tokens masked.
        rows: (B,) global numbers of the rows, for keyed draws.
    """

    logits: Tensor
    targets: Tensor
    row: Tensor
    ids: np.ndarray
    valid: np.ndarray
    at: np.ndarray
    ratios: np.ndarray
    rows: np.ndarray


class Modifiers:
    """The configured modifiers of one model.

    Args:
        text_ids: (A,) ids that are no special tokens.
        judge: the trained sequence scorer of the judge modifier; cls_id: what it reads its score at.
    """

    def __init__(
        self, config: ModifiersConfig, text_ids: np.ndarray, runtime: Runtime, seed: int, label: str,
        judge: nn.Module | None = None, cls_id: int = -1,
    ):  # fmt: skip
        self.config, self.runtime, self.seed, self.label = config, runtime, seed, label
        self.text_ids = torch.from_numpy(np.asarray(text_ids)).to(runtime.device)
        self.judge = judge.to(runtime.device).eval() if judge is not None else None
        self.cls_id = cls_id

    def apply(self, ce: Tensor, masked: Masked, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """((N,) losses of the positions, (B,) weights of the rows, a line each for the plot)."""
        config, terms = self.config, {}
        size = len(masked.rows)
        if config.label_smoothing:
            spread = uniform_cross_entropies(masked.logits, self.text_ids)
            terms["modifier_smoothing"] = spread.detach().mean()
            ce = (1 - config.label_smoothing) * ce + config.label_smoothing * spread
        weights = torch.ones(size, device=ce.device)
        if config.entropy is not None:
            weights = weights * self._note("entropy", terms, entropy_weights(masked, config.entropy, size))
        if config.mask_ratio is not None:
            ratios = tensor(masked.ratios.astype(np.float32), self.runtime)
            weights = weights * self._note("mask_ratio", terms, mask_ratio_weights(ratios, config.mask_ratio))
        if config.judge is not None and config.judge.start_step <= step < config.judge.stop_step:
            weights = weights * self._note("judge", terms, self._judge_weights(masked, config.judge))
        return ce, weights / weights.mean(), terms

    @staticmethod
    def _note(name: str, terms: dict[str, Tensor], weights: Tensor) -> Tensor:
        """Its plot line: how far the weights spread. 0 is no effect."""
        terms[f"modifier_{name}"] = weights.std(correction=0) / weights.mean()
        return weights

    @torch.no_grad()
    def _judge_weights(self, masked: Masked, config: JudgeModifier) -> Tensor:
        """(B,) more for rows whose sampled completion the judge takes for more synthetic than its share of masks.

        A row's completion is a function of the row, not of the batch that it is in.
        """
        assert self.judge is not None
        key = randomness.key(self.seed, f"{self.label} judge weight")
        noise = randomness.uniform(key, masked.rows, masked.ids.shape[1]).reshape(-1)[masked.at]
        specials = np.setdiff1d(np.arange(masked.logits.shape[1]), self.text_ids.cpu().numpy())
        drawn, _ = draw(masked.logits, tensor(noise, self.runtime), tensor(specials, self.runtime))
        filled = masked.ids.copy().reshape(-1)
        filled[masked.at] = drawn.cpu().numpy()
        ids, valid = with_cls(filled.reshape(masked.ids.shape), masked.valid, self.cls_id)
        score = (
            forward(self.judge, self.runtime, ids, valid).logits.float().squeeze(-1)
        )  # (B,) 1: all original
        ratios = tensor(masked.ratios.astype(np.float32), self.runtime).clamp(min=1e-3)
        return ((1 - score) / ratios).pow(config.exponent).clamp(config.min_weight, config.max_weight)


def uniform_cross_entropies(logits: Tensor, text_ids: Tensor) -> Tensor:
    """(N,) cross-entropies of targets spread evenly over text: special tokens get no share (Szegedy et al., 2016)."""
    logits = logits.float()
    return logits.logsumexp(-1) - logits[:, text_ids].mean(-1)


def entropy_weights(masked: Masked, config: EntropyModifier, size: int) -> Tensor:
    """(B,) weight / max(H, threshold): more for rows whose wrong answers gather on few tokens.

    H is the entropy of the model's distribution without the right answer, over that of a uniform one: a model that
    errs with conviction has more to unlearn than one that does not know. Mean over the row's masked positions.
    """
    with torch.no_grad():
        wrong = masked.logits.float().scatter(1, masked.targets[:, None], -torch.inf)
        logs = torch.log_softmax(wrong, -1)  # (N, V), -inf at the target
        entropy = -torch.where(logs.isfinite(), logs.exp() * logs, 0.0).sum(-1) / np.log(wrong.shape[1] - 1)
        count = torch.bincount(masked.row, minlength=size).clamp(min=1)
        mean = torch.zeros(size, device=entropy.device).index_add_(0, masked.row, entropy) / count
        return config.weight / mean.clamp(min=config.threshold)


def mask_ratio_weights(ratios: Tensor, config: MaskRatioModifier) -> Tensor:
    """(B,) ratio ** -power within limits: rows with few masks count more, as their tokens can be known better."""
    return ratios.clamp(min=1e-6).pow(-config.power).clamp(config.min_weight, config.max_weight)


def check_judge(judge: Any, vocab_size: int, context: int, name: str) -> None:
    """Raises BadConfig when a model cannot be the judge of modifiers.judge."""
    config = judge.config
    if getattr(config, "num_labels", 0) != 1 or getattr(config, "score_activation", "") != "sigmoid":
        raise BadConfig(f"{name} is no sequence scorer with a score in [0, 1]; give the folder of a judge")
    if config.vocab_size != vocab_size:
        raise BadConfig(f"{name} reads {config.vocab_size} ids, this run's tokenizer has {vocab_size}")
    if config.max_position_embeddings < context + 1:
        raise BadConfig(
            f"{name} reads {config.max_position_embeddings - 1} tokens at most, this model's windows have {context}"
        )
