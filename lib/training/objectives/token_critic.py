"""`token_critic`: find the tokens of a filled text that differ from the clean one.

The generator fills masks of clean text, as it does when sampling (`fills.py`). A generated token is an error if it
differs from the clean token (Lezama et al., Token-Critic, 2022). Padding counts nothing, and conditioning tokens
count only as far as `clean_fraction` says.

    decoupled      backbone and language-model head are frozen, without dropout; only the critic's blocks learn
    joint          generator loss + alpha x critic loss through the shared backbone; alpha is ramped up
    stop_gradient  as joint, but the critic's loss does not reach the backbone

A second output predicts the origin: which tokens the generator generated, right or wrong. A rare word is a likely error
but an unlikely generation. So re-masking likely errors lowers the diversity of the text; re-masking by origin does not.

Error labels are 0 or 1 (`sampled`), or their expectation over the clean texts that fit the conditioning tokens
(`expected`). Given these tokens, the clean text is independent of what was generated. So the expectation is one minus
the probability of the token in the first forward pass, which reads the conditioning tokens only. It is as accurate as
the generator's probabilities; only sampled labels can teach the critic more than the generator knows.

Legend: B rows, T positions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import metrics, randomness
from lib.diffusion.calibration import Calibration
from lib.engine.parts import Part
from lib.sections.critic import CriticConfig
from lib.training.data import Windows
from lib.training.objectives.base import (
    ResultRow,
    chunks,
    evaluation_rows,
    forward,
    result_row,
    some_of,
    tensor,
)
from lib.training.objectives.error_detection import (
    ScoredTokens,
    auroc_difference,
    bands,
    detection,
    fit_calibration,
)
from lib.training.objectives.fills import Filled, Filler
from lib.training.objectives.language_model import MaskedDiffusion

EVALUATION_BATCH = 64
REPORT_DRAWS = 2  # fills of each window
MAX_SCORED_TOKENS = 2**22  # of a split, all draws together; about 100 bytes each are held in memory

# (indices of a batch, its fills, (B, T) raw probability of error) -> arrays that are concatenated over the batches
Measure = Callable[[np.ndarray, Filled, np.ndarray], tuple[np.ndarray, ...]]


class TokenCritic:
    """Objective of a critic, and of its generator if both learn.

    Args:
        diffusion: the generator's objective over the same windows. Intervals are over the groups of its held-out
        windows.
        forbidden: ids that are never sampled.
    """

    def __init__(self, config: CriticConfig, diffusion: MaskedDiffusion, forbidden: list[int]):
        self.config, self.diffusion = config, diffusion
        self.filler = Filler(config, diffusion, forbidden)
        self.runtime, self.seed, self.label = diffusion.runtime, diffusion.seed, diffusion.label
        self.joint = config.coupling != "decoupled"  # the generator learns too
        self.selection = "nelbo_and_auroc" if self.joint else "critic_loss"
        self.tokens_per_row = diffusion.tokens_per_row

    # ------------------------------------------------------------------ training

    def alpha(self, step: int) -> float:
        """Weight of the critic's loss at a step: 0 before the ramp, config.alpha after it."""
        start, end = (share * self.config.training.steps for share in self.config.ramp)
        return self.config.alpha * float(np.clip((step - start) / max(end - start, 1e-9), 0, 1))

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The loss of the critic, and of its generator if both learn."""
        # 1. Rows of clean text; 2. mask and fill them; 3. re-mask a part of the fills in some rows
        index, ids, valid = self.diffusion.windows(rows)  # (B,), (B, T), (B, T)
        filled = self.filler.fill_to_learn_from(model, ids, valid, index, "critic", self.diffusion.batch_size)
        filled = self.filler.remask_some(filled, index, "critic", self.config.partial_fraction)

        # 4. Losses of the critic: errors, and origin
        critic = self._critic_part(model, filled, index, "critic")
        if not self.joint:

            def losses_of_critic(totals: Mapping[str, float]) -> dict[str, Tensor]:
                with backbone_in_evaluation(model):
                    return critic.losses(totals)

            return Part(critic.weights, losses_of_critic)

        # 5. Loss of the generator on its own masks of the same rows
        generator = self.diffusion.part(model, step, rows)

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            stopped = without_gradient(model) if self.config.coupling == "stop_gradient" else nullcontext()
            with stopped:
                terms = critic.losses(totals)
            own = generator.losses(totals)["loss"]
            return terms | {"loss": own + self.alpha(step) * terms["loss"], "generator_loss": own}

        return Part(critic.weights | generator.weights, losses)

    def _critic_part(self, model: nn.Module, filled: Filled, rows: np.ndarray, purpose: str) -> Part:
        """Binary cross-entropies of errors and of origin.

        The error loss is over the generated tokens and a share of the conditioning tokens. The origin loss is over the
        rows without a conditioning mask: with it, the origin is known. It is 0 if there are no such rows.
        """
        noise = randomness.uniform(randomness.key(self.seed, f"{purpose} clean"), rows, filled.ids.shape[1])
        visible = self._visible(filled)
        labelled = filled.generated | (visible & (noise < self.config.clean_fraction))
        noise = randomness.uniform(randomness.key(self.seed, f"{purpose} told"), rows, 1)
        # A text with masks in it is read without a conditioning mask, as in the middle of sampling
        complete = visible.all(1, keepdims=True, where=filled.valid)
        conditioned = complete & (noise < self.config.conditioning_fraction)  # (B, 1)
        wrong = filled.ids != filled.clean
        if self.config.labels == "expected":
            wrong = np.where(filled.generated, 1 - filled.expected, wrong)
        unknown = visible & ~conditioned

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            error_logits, origin_logits = self._critic_logits(model, filled, conditioned)
            error = self._cross_entropy(error_logits, labelled, wrong, totals["labelled"])
            origin = error.new_zeros(())
            if self.config.origin_weight and unknown.any():
                origin = self._cross_entropy(origin_logits, unknown, filled.generated, totals["unknown"])
            loss = error + self.config.origin_weight * origin
            return {"loss": loss, "critic_loss": error, "origin_loss": origin}

        return Part({"labelled": int(labelled.sum()), "unknown": int(unknown.sum())}, losses)

    def _cross_entropy(
        self, logits: Tensor, positions: np.ndarray, labels: np.ndarray, total: float
    ) -> Tensor:
        """Sum over the true `positions` (B, T), of log-odds (B T,) against labels (B, T) in [0, 1], divided by `total`."""
        flat_idx = np.flatnonzero(positions)
        targets = tensor(labels.reshape(-1)[flat_idx].astype(np.float32), self.runtime)
        chosen = logits[tensor(flat_idx, self.runtime)]
        return F.binary_cross_entropy_with_logits(chosen, targets, reduction="sum") / max(total, 1)

    def _visible(self, filled: Filled) -> np.ndarray:
        """(B, T) bool: neither padding nor [MASK]."""
        return filled.valid & (filled.ids != self.diffusion.mask_id)

    def _critic_logits(
        self, model: nn.Module, filled: Filled, conditioned: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """(B T,) log-odds of error, and of having been generated, for the filled text.

        Args:
            conditioned: (B, 1) or (1,) bool, whether a row is read with the conditioning mask.
        """
        conditioning = None
        if conditioned.any():
            conditioning = tensor(self._visible(filled) & ~filled.generated & conditioned, self.runtime)
        output = forward(
            model, self.runtime, filled.ids, filled.valid, head="critic", conditioning_mask=conditioning
        )
        return output.logits.float().flatten(), output.origin_logits.float().flatten()

    def _probabilities(
        self, model: nn.Module, filled: Filled, conditioned: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """((B, T), (B, T)) raw probabilities of error and of origin."""
        with torch.no_grad():
            logits = self._critic_logits(model, filled, np.array([conditioned]))
        error, origin = (torch.sigmoid(x).view(filled.ids.shape).double().cpu().numpy() for x in logits)
        return error, origin

    # ------------------------------------------------------------------ selection and report

    def _of_fills(
        self, model: nn.Module, windows: Windows, examples: np.ndarray, measure: Measure
    ) -> list[np.ndarray]:
        """Fill the windows `examples` in batches, and concatenate what `measure` gives for each batch.

        Args:
            measure: (indices into `examples`, fills, (B, T) raw probability of error) -> arrays.
        """

        def of_batch(part: np.ndarray) -> tuple[np.ndarray, ...]:
            ids, valid = windows.batch(examples[part], np.zeros(len(part)))
            filled = self.filler.fill(model, ids, valid, part, "critic evaluation", EVALUATION_BATCH)
            return measure(part, filled, self._probabilities(model, filled, conditioned=True)[0])

        found = self.runtime.processes.share(
            of_batch, list(chunks(len(examples), evaluation_rows(EVALUATION_BATCH, windows.width)))
        )
        return [np.concatenate(column) for column in zip(*found, strict=True)]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Error detection on fills of the selection windows.

        If the generator learns too: also its NELBO, and `nelbo_and_auroc`, which weighs both and chooses the best step.
        """
        windows, examples = self.diffusion.splits.selection, self.diffusion.evaluated

        def measure(_, filled: Filled, probability: np.ndarray) -> tuple[np.ndarray, ...]:
            origin = self._probabilities(model, filled, conditioned=False)[1]
            wrong = filled.ids != filled.clean
            made = filled.generated
            return probability[made], wrong[made], origin[filled.valid], made[filled.valid]

        p, y, origin, generated = self._of_fills(model, windows, examples, measure)
        clipped = np.clip(p, 1e-7, 1 - 1e-7)
        loss = float(-np.where(y, np.log(clipped), np.log(1 - clipped)).mean())
        auroc_origin = metrics.auroc(origin, generated)
        values = {
            "critic_loss": loss,
            "auroc": metrics.auroc(p, y),
            "error_rate": float(y.mean()),
            "auroc_origin": auroc_origin,
        }
        if not self.joint:
            return values
        values = self.diffusion.evaluate(model) | values
        both = nelbo_and_auroc(values["nelbo"], values["auroc"], self.config.selection_weight)
        return values | {"nelbo_and_auroc": both}

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow], Calibration]:
        """(metrics, rows of the results table, calibration): error detection on held-out fills.

        Splits of more than `MAX_SCORED_TOKENS` are measured on a random sample of windows. The calibration is fitted on fills of the selection windows only. Baselines are the generator's own confidences.
        """
        selection, held_out = self.diffusion.splits.selection, self.diffusion.splits.held_out
        limit = max(1, MAX_SCORED_TOKENS // (REPORT_DRAWS * held_out.width))
        chosen = some_of(self.seed, self.label, "selection windows", selection.count, limit)
        calibration = fit_calibration(self.score_fills(model, selection, chosen, chosen, REPORT_DRAWS))
        chosen = some_of(self.seed, self.label, "held-out windows", held_out.count, limit)
        groups = self.diffusion.splits.groups[chosen]
        scored = self.score_fills(model, held_out, chosen, groups, REPORT_DRAWS)
        found = detection(scored, calibration)
        filled = scored.reading("filled")
        calibrated = calibration(filled.probability, "filled", filled.share)
        values = {
            "error_rate": float(filled.wrong.mean()),
            "error_rate_whole_text": float(scored.wrong.mean()),
            "tokens": len(filled.wrong),
            "detection": found,
            "bands": bands(scored, calibration),
            "reliability": metrics.reliability(calibrated, filled.wrong, 15),
            "auroc": found["critic"]["auroc"]["value"],
            "auroc_confidence": found["confidence"]["auroc"]["value"],
        }
        return values, self._rows(found, scored, calibration), calibration

    def _rows(
        self, found: dict[str, dict], scored: ScoredTokens, calibration: Calibration
    ) -> list[ResultRow]:
        def row(metric: str, score: str, baseline: str, other: str | None) -> ResultRow:
            """The AUROC of a score beside that of `other`, or beside chance."""
            estimate = metrics.Estimate(**found[score]["auroc"])
            value = 0.5 if other is None else found[other]["auroc"]["value"]
            paired = None if other is None else auroc_difference(scored, calibration, score, other)
            result = result_row(self.label, metric, estimate, baseline, value, lower_is_better=False)
            return result.with_difference(paired)

        return [
            row("AUROC, wrong tokens", "critic", "chance", None),
            row("AUROC, wrong tokens", "critic", "confidence", "confidence"),
            row("AUROC, critic and confidence", "critic_blend", "confidence", "confidence"),
            row(
                "AUROC, external text", "whole_text_critic", "fresh confidence", "whole_text_fresh_confidence"
            ),
        ]

    def score_fills(
        self, model: nn.Module, windows: Windows, examples: np.ndarray, groups: np.ndarray, draws: int
    ) -> ScoredTokens:
        """Fill the windows `examples` `draws` times, and score every token in every way. `groups`: one per example."""
        examples, groups = np.tile(examples, draws), np.tile(groups, draws)
        names = [f.name for f in fields(ScoredTokens)]

        def measure(part: np.ndarray, filled: Filled, probability: np.ndarray) -> tuple[np.ndarray, ...]:
            partial, partial_share = self._partial(model, filled, part)
            columns = {
                "wrong": filled.ids != filled.clean,
                "generated": filled.generated,
                "group": part[:, None],
                "critic": probability,
                "unknown": self._probabilities(model, filled, conditioned=False)[0],
                "share": filled.share[:, None],
                "partial": partial,
                "partial_share": partial_share[:, None],
                "confidence": 1 - filled.confidence,
                "fresh": 1 - self.filler.fresh_confidence(model, filled),
                "first_pass": 1 - filled.expected,
            }
            valid = filled.valid
            return tuple(np.broadcast_to(columns[name], valid.shape)[valid] for name in names)

        found = dict(zip(names, self._of_fills(model, windows, examples, measure), strict=True))
        return ScoredTokens(**found | {"group": groups[found["group"]]})

    @torch.no_grad()
    def _partial(self, model: nn.Module, filled: Filled, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raw probability of error with a random share of the generated tokens re-masked.

        Returns:
            (B, T) probabilities, NaN at the re-masked positions, and (B,) the share of the text that is masked.
        """
        noise = randomness.uniform(randomness.key(self.seed, "partial report"), rows, filled.ids.shape[1])
        part = randomness.uniform(randomness.key(self.seed, "partial report share"), rows, 1)
        positions = filled.generated & (noise < part)
        partly = filled.remask(positions, self.diffusion.mask_id)
        raw = self._probabilities(model, partly, conditioned=False)[0]
        share = positions.sum(1) / np.maximum(filled.valid.sum(1), 1)
        return np.where(positions, np.nan, raw), share


def nelbo_and_auroc(nelbo: float, auroc: float, weight: float) -> float:
    """nelbo + weight x (1 - auroc), which the best step of a generator and its critic minimises.

    `weight` is in nats per token, for an AUROC of 0 instead of 1. An undefined AUROC (NaN, if all generated tokens are
    right, or all wrong) counts as 0.5.
    """
    return nelbo + weight * (1 - (0.5 if np.isnan(auroc) else auroc))


@contextmanager
def without_gradient(model: nn.Module) -> Iterator[None]:
    """While active, only the critic's own weights require a gradient."""
    others = [p for name, p in model.named_parameters() if not name.startswith("critic.") and p.requires_grad]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


@contextmanager
def backbone_in_evaluation(model: nn.Module) -> Iterator[None]:
    """While active, only the critic is in training mode: a frozen backbone has the states that it has in use, without dropout."""
    others = [m for name, m in model.named_modules() if name.split(".")[0] != "critic" and m.training]
    for module in others:
        module.training = False
    try:
        yield
    finally:
        for module in others:
            module.training = True
