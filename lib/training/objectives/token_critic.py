"""`token_critic`: find the tokens of a filled text that differ from the clean one.

The generator fills masks of clean text, as it will when sampling; a token is an error if it differs from the
clean token that stood there. Labels come from the clean text, never from ignore-indices; padding and given tokens
that were not chosen count nothing (Lezama et al., Token-Critic, 2022).

    decoupled   trunk and language-model head are frozen; the critic's own blocks learn
    joint       generator loss + alpha x critic loss through the shared trunk; alpha rises over a ramp

Legend: B rows, T positions, N positions in question.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import metrics, randomness
from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw
from lib.diffusion.masking import lowest
from lib.sections import CriticConfig
from lib.training.objectives.base import ResultRow, chunks, forward, result_row, tensor
from lib.training.objectives.language_model import MaskedDiffusion

REPORT_DRAWS = 4


@dataclass
class Filled:
    """Clean text, its filled version, and where the generator wrote."""

    clean: np.ndarray  # (B, T)
    ids: np.ndarray  # (B, T)
    valid: np.ndarray  # (B, T) bool
    written: np.ndarray  # (B, T) bool
    confidence: np.ndarray  # (B, T) probability of each written token when it was written

    def partly_masked(self, hidden: np.ndarray, mask_id: int) -> "Filled":
        """The same with some written tokens masked again: those are no longer written, and carry no label."""
        return replace(self, ids=np.where(hidden, mask_id, self.ids), written=self.written & ~hidden)


class TokenCritic:
    def __init__(
        self, config: CriticConfig, diffusion: MaskedDiffusion, forbidden: list[int], groups: np.ndarray
    ):
        self.config, self.diffusion, self.groups = config, diffusion, groups
        self.runtime, self.seed, self.label = diffusion.runtime, diffusion.seed, diffusion.label
        self._forbidden = torch.tensor(forbidden, device=self.runtime.device)
        self.joint = config.coupling == "joint"
        self.selection = "nelbo" if self.joint else "critic_loss"
        self.tokens_per_row = diffusion.tokens_per_row

    # ------------------------------------------------------------------ training

    def alpha(self, step: int) -> float:
        """Weight of the critic's loss at a step: 0 before the ramp, config.alpha after it."""
        start, end = (share * self.config.training.steps for share in self.config.ramp)
        return self.config.alpha * float(np.clip((step - start) / max(end - start, 1e-9), 0, 1))

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        index, ids, valid = self.diffusion.windows(rows)
        filled = self.fill(model, ids, valid, index, "critic", self.diffusion.batch_size)
        filled = self._hide(filled, index, "critic", self.config.partial_fraction)
        critic = self._critic_loss(model, filled, index, "critic")
        if not self.joint:
            return {"loss": critic, "critic_loss": critic}
        generator = self.diffusion.loss(model, step, rows)["loss"]
        total = generator + self.alpha(step) * critic
        return {"loss": total, "generator_loss": generator, "critic_loss": critic}

    @torch.no_grad()
    def fill(self, model: nn.Module, ids, valid, rows: np.ndarray, purpose: str, period: int) -> Filled:
        """The model's own samples: masks at all ratios, temperatures as configured, some rows in two passes."""
        masked = self.diffusion.mask(ids, valid, purpose, rows, period).masked
        low, high = self.config.temperature
        heat = low + (high - low) * randomness.uniform(randomness.key(self.seed, f"{purpose} heat"), rows, 1)
        two = (
            randomness.uniform(randomness.key(self.seed, f"{purpose} passes"), rows, 1)
            < self.config.rollout_fraction
        )
        place = randomness.uniform(randomness.key(self.seed, f"{purpose} place"), rows, ids.shape[1])
        half = lowest(place, masked, np.where(two[:, 0], masked.sum(1) // 2, 0))
        result = Filled(ids, np.where(masked, self.diffusion.mask_id, ids), valid, masked, np.ones(ids.shape))
        was_training = model.training
        model.eval()
        if half.any():
            self._write(model, result, half, heat, rows, f"{purpose} first")
        self._write(model, result, masked & ~half, heat, rows, f"{purpose} second")
        model.train(was_training)
        return result

    def _hide(self, filled: Filled, rows: np.ndarray, purpose: str, share: float) -> Filled:
        """A share of the rows loses a part of what was written, as the critic sees text inside a sampling round."""
        which, part = randomness.uniform(randomness.key(self.seed, f"{purpose} hide"), rows, 2).T
        noise = randomness.uniform(randomness.key(self.seed, f"{purpose} hidden"), rows, filled.ids.shape[1])
        hidden = filled.written & (which < share)[:, None] & (noise < part[:, None])
        return filled.partly_masked(hidden, self.diffusion.mask_id)

    def _write(self, model, filled: Filled, now, heat, rows, purpose: str) -> None:
        at = np.flatnonzero(now)
        logits = forward(
            model, self.runtime, filled.ids, filled.valid, logits_at=tensor(at, self.runtime)
        ).logits
        noise = randomness.uniform(randomness.key(self.seed, purpose), rows, now.shape[1]).reshape(-1)[at]
        warm = np.broadcast_to(heat, now.shape).reshape(-1)[at].astype(np.float32)
        tokens, sure = draw(
            logits,
            tensor(noise, self.runtime),
            self._forbidden,
            temperature=tensor(warm, self.runtime)[:, None],
        )
        filled.ids.reshape(-1)[at] = tokens.cpu().numpy()
        filled.confidence.reshape(-1)[at] = sure.cpu().numpy()

    def _critic_loss(self, model: nn.Module, filled: Filled, rows: np.ndarray, purpose: str) -> Tensor:
        """Binary cross-entropy over the written tokens and a share of the given ones."""
        chance = randomness.uniform(randomness.key(self.seed, f"{purpose} clean"), rows, filled.ids.shape[1])
        visible = filled.valid & (filled.ids != self.diffusion.mask_id)
        labelled = filled.written | (visible & (chance < self.config.clean_fraction))
        at = np.flatnonzero(labelled)
        logits = self._critic_logits(model, filled)[tensor(at, self.runtime)]
        wrong = (filled.ids != filled.clean).reshape(-1)[at].astype(np.float32)
        return F.binary_cross_entropy_with_logits(logits, tensor(wrong, self.runtime))

    def _critic_logits(self, model: nn.Module, filled: Filled) -> Tensor:
        """(B T,) log-odds of error, reading the filled text."""
        return forward(model, self.runtime, filled.ids, filled.valid, head="critic").logits.float().flatten()

    # ------------------------------------------------------------------ held-out

    def _held_out(self, model: nn.Module, examples: np.ndarray):
        """Yields (part, Filled, (B, T) raw probability of error) over held-out windows."""
        for part in chunks(len(examples), 64):
            ids, valid = self.diffusion.held_out.batch(examples[part], np.zeros(len(part)))
            filled = self.fill(model, ids, valid, part, "critic evaluation", 64)
            with torch.no_grad():
                raw = torch.sigmoid(self._critic_logits(model, filled)).view(ids.shape)
            yield part, filled, raw.double().cpu().numpy()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raw, wrong = [], []
        for _, filled, probability in self._held_out(model, self.diffusion._evaluated):
            raw.append(probability[filled.written])
            wrong.append((filled.ids != filled.clean)[filled.written])
        p, y = np.concatenate(raw), np.concatenate(wrong)
        clipped = np.clip(p, 1e-7, 1 - 1e-7)
        loss = float(-np.where(y, np.log(clipped), np.log(1 - clipped)).mean())
        values = {"critic_loss": loss, "auroc": metrics.auroc(p, y), "error_rate": float(y.mean())}
        return (self.diffusion.evaluate(model) | values) if self.joint else values

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow], Calibration]:
        """Error detection on held-out fills beside the generator's own confidence, stored and fresh.

        Half of the groups calibrate, the other half measure: the figures are of the second half.
        """
        examples = np.tile(np.arange(self.diffusion.held_out.count), REPORT_DRAWS)
        columns: dict[str, list] = {}
        for part, filled, probability in self._held_out(model, examples):
            where = filled.written
            owner = self.groups[examples[part]]
            found = {
                "critic": probability,
                "confidence": 1 - filled.confidence,
                "confidence_fresh": 1 - self._fresh_confidence(model, filled),
                "critic_partial": self._partial(model, filled, part),
                "wrong": filled.ids != filled.clean,
                "group": np.broadcast_to(owner[:, None], where.shape),
            }
            for name, values in found.items():
                columns.setdefault(name, []).append(values[where])
        data = {name: np.concatenate(values) for name, values in columns.items()}
        names = np.unique(data["group"])
        fitting = np.isin(data["group"], names[::2]) if len(names) > 1 else np.ones(len(data["wrong"]), bool)
        measuring = ~fitting if len(names) > 1 else fitting
        sure = 1 - data["confidence"]
        calibration = Calibration.fit(data["critic"][fitting], data["wrong"][fitting], sure[fitting])
        data["critic_calibrated"] = calibration(data["critic"])
        data["critic_blend"] = calibration.blended(data["critic"], sure)
        return *self._compare({k: v[measuring] for k, v in data.items()}), calibration

    def _compare(self, data: dict[str, np.ndarray]) -> tuple[dict, list[ResultRow]]:
        wrong, group = data["wrong"], data["group"]
        values: dict = {"error_rate": float(wrong.mean()), "tokens": len(wrong), "detection": {}}
        found = {}
        # The partial view exists for the tokens that were left to see; confidence on the same ones stands beside it
        seen = ~np.isnan(data["critic_partial"])
        data["confidence_of_those"] = data["confidence"]
        for name in ("critic", "critic_calibrated", "critic_blend", "confidence", "confidence_fresh", "critic_partial",
                     "confidence_of_those"):  # fmt: skip
            kept = seen if name in ("critic_partial", "confidence_of_those") else np.ones_like(seen)
            score, truth = data[name][kept], wrong[kept]
            found[name] = metrics.resampled(lambda w, s=score, t=truth: metrics.auroc(s, t, w), group[kept])
            values["detection"][name] = {
                "auroc": found[name]._asdict(),
                "average_precision": metrics.average_precision(score, truth),
                "ece": metrics.calibration_error(score, truth),
            }
        bins = np.array_split(np.argsort(data["critic_calibrated"]), 15)
        values["reliability"] = [
            [float(data["critic_calibrated"][b].mean()), float(wrong[b].mean())] for b in bins if len(b)
        ]
        values |= {"auroc": found["critic"].value, "auroc_confidence": found["confidence"].value}
        base = found["confidence"].value
        row = result_row(
            self.label, "AUROC, wrong tokens", found["critic"], "confidence", base, lower_is_better=False
        )
        name = "AUROC, critic and confidence"
        blend = result_row(self.label, name, found["critic_blend"], "confidence", base, lower_is_better=False)
        chance = result_row(
            self.label, "AUROC, wrong tokens", found["critic"], "chance", 0.5, lower_is_better=False
        )
        return values, [chance, row, blend]

    @torch.no_grad()
    def _partial(self, model: nn.Module, filled: Filled, rows: np.ndarray) -> np.ndarray:
        """(B, T) raw probability of error with half of the written tokens masked again, NaN at those."""
        noise = randomness.uniform(randomness.key(self.seed, "partial report"), rows, filled.ids.shape[1])
        hidden = filled.written & (noise < 0.5)
        partly = filled.partly_masked(hidden, self.diffusion.mask_id)
        raw = torch.sigmoid(self._critic_logits(model, partly)).view(filled.ids.shape)
        return np.where(hidden, np.nan, raw.double().cpu().numpy())

    @torch.no_grad()
    def _fresh_confidence(self, model: nn.Module, filled: Filled) -> np.ndarray:
        """(B, T) probability of every token, the whole filled text in view."""
        logits = forward(model, self.runtime, filled.ids, filled.valid).logits.float()
        logits[..., self._forbidden] = -torch.inf
        shares = torch.softmax(logits, -1)
        return (
            shares.gather(-1, tensor(filled.ids, self.runtime)[..., None]).squeeze(-1).double().cpu().numpy()
        )
