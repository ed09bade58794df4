"""`token_critic`: find the tokens of a filled text that differ from the clean one.

The generator fills masks of clean text, as it will when sampling; a token is an error if it differs from the
clean token that stood there. Labels come from the clean text, never from ignore-indices; padding and given tokens
that were not chosen count nothing (Lezama et al., Token-Critic, 2022).

    decoupled   trunk and language-model head are frozen; the critic's own blocks learn
    joint       generator loss + alpha x critic loss through the shared trunk; alpha rises over a ramp

Legend: B rows, T positions, N positions in question.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import metrics, randomness
from lib.config import CriticConfig
from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw
from lib.diffusion.masking import lowest
from lib.diffusion.nelbo import mask_batch
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
        critic = self._critic_loss(model, filled, index, "critic")
        if not self.joint:
            return {"loss": critic, "critic_loss": critic}
        generator = self.diffusion.loss(model, step, rows)["loss"]
        total = generator + self.alpha(step) * critic
        return {"loss": total, "generator_loss": generator, "critic_loss": critic}

    @torch.no_grad()
    def fill(self, model: nn.Module, ids, valid, rows: np.ndarray, purpose: str, period: int) -> Filled:
        """The model's own samples: masks at all ratios, temperatures as configured, some rows in two passes."""
        masked = mask_batch(self.diffusion.config, valid, self.seed, purpose, rows, period).masked
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
        labelled = filled.written | (filled.valid & (chance < self.config.clean_fraction))
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
        columns: dict[str, list] = {
            "critic": [],
            "confidence": [],
            "confidence_fresh": [],
            "wrong": [],
            "group": [],
        }
        for part, filled, probability in self._held_out(model, examples):
            where = filled.written
            fresh = self._fresh_confidence(model, filled)
            columns["critic"].append(probability[where])
            columns["confidence"].append(1 - filled.confidence[where])
            columns["confidence_fresh"].append(1 - fresh[where])
            columns["wrong"].append((filled.ids != filled.clean)[where])
            owner = self.groups[examples[part]]
            columns["group"].append(np.broadcast_to(owner[:, None], where.shape)[where])
        data = {name: np.concatenate(values) for name, values in columns.items()}
        names = np.unique(data["group"])
        fitting = np.isin(data["group"], names[::2]) if len(names) > 1 else np.ones(len(data["wrong"]), bool)
        measuring = ~fitting if len(names) > 1 else fitting
        calibration = Calibration.fit(data["critic"][fitting], data["wrong"][fitting])
        data["critic_calibrated"] = calibration(data["critic"])
        return *self._compare({k: v[measuring] for k, v in data.items()}), calibration

    def _compare(self, data: dict[str, np.ndarray]) -> tuple[dict, list[ResultRow]]:
        wrong, group = data["wrong"], data["group"]
        values: dict = {"error_rate": float(wrong.mean()), "tokens": len(wrong), "detection": {}}
        found = {}
        for name in ("critic", "critic_calibrated", "confidence", "confidence_fresh"):
            score = data[name]
            found[name] = metrics.resampled(lambda w, s=score: metrics.auroc(s, wrong, w), group)
            values["detection"][name] = {
                "auroc": found[name]._asdict(),
                "average_precision": metrics.average_precision(score, wrong),
                "ece": metrics.calibration_error(score, wrong),
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
        chance = result_row(
            self.label, "AUROC, wrong tokens", found["critic"], "chance", 0.5, lower_is_better=False
        )
        return values, [chance, row]

    @torch.no_grad()
    def _fresh_confidence(self, model: nn.Module, filled: Filled) -> np.ndarray:
        """(B, T) probability of every token, the whole filled text in view."""
        logits = forward(model, self.runtime, filled.ids, filled.valid).logits.float()
        logits[..., self._forbidden] = -torch.inf
        shares = torch.softmax(logits, -1)
        return (
            shares.gather(-1, tensor(filled.ids, self.runtime)[..., None]).squeeze(-1).double().cpu().numpy()
        )
