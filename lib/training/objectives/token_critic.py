"""`token_critic`: find the tokens of a filled text that differ from the clean one.

The generator fills masks of clean text, as it will when sampling; a token is an error if it differs from the
clean token that stood there. Labels come from the clean text, never from ignore-indices; padding and given tokens
that were not chosen count nothing (Lezama et al., Token-Critic, 2022).

    decoupled      backbone and language-model head are frozen; the critic's own blocks learn
    joint          generator loss + alpha x critic loss through the shared backbone; alpha rises over a ramp
    stop_gradient  the same, but the critic's loss does not reach the backbone, which learns from the generator's alone

A second output guesses which tokens the generator wrote, right or wrong (`origin`). A rare word is likely an error and
likely not the generator's: taking back what looks written does not make text duller, taking back likely errors does.

Labels are 0 or 1 (`sampled`) or their mean over all truths that the given text leaves open, by the generator (`expected`):
given that text, the truth is independent of what was written, so that it is one minus the generator's probability of the
token before anything was written. The pass that writes the first tokens gives it for all. It is as right as the generator
is: what that does not know of the language, only sampled labels can teach.

Legend: B rows, T positions, N positions in question.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import metrics, randomness
from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw, probability_of
from lib.sections.critic import CriticConfig
from lib.training.data import Windows
from lib.training.objectives.base import ResultRow, chunks, forward, result_row, tensor
from lib.training.objectives.error_detection import (
    Seen,
    bands,
    detection,
    fitted,
)
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
    # (B, T) probability of each written token with the given text alone in view; given ones: 1
    expected: np.ndarray
    share: np.ndarray  # (B,) of the text that was masked before the pass that completed it

    def partly_masked(self, hidden: np.ndarray, mask_id: int) -> "Filled":
        """The same with some written tokens masked again: those are no longer written, and carry no label."""
        return replace(self, ids=np.where(hidden, mask_id, self.ids), written=self.written & ~hidden)


class TokenCritic:
    """
    Args:
        diffusion: the generator's objective over the same windows; of its held-out windows' groups the intervals are.
        forbidden: ids that are never drawn.
    """

    def __init__(self, config: CriticConfig, diffusion: MaskedDiffusion, forbidden: list[int]):
        self.config, self.diffusion = config, diffusion
        self.runtime, self.seed, self.label = diffusion.runtime, diffusion.seed, diffusion.label
        self._forbidden = torch.tensor(forbidden, device=self.runtime.device)
        self.joint = config.coupling != "decoupled"  # the generator learns too
        self.selection = "nelbo_and_auroc" if self.joint else "critic_loss"
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
        stopped = without_gradient(model) if self.config.coupling == "stop_gradient" else nullcontext()
        with stopped:
            error, origin = self._critic_losses(model, filled, index, "critic")
        critic = error + self.config.origin_weight * origin
        parts = {"critic_loss": error, "origin_loss": origin}
        if not self.joint:
            return {"loss": critic} | parts
        generator = self.diffusion.loss(model, step, rows)["loss"]
        return {"loss": generator + self.alpha(step) * critic, "generator_loss": generator} | parts

    @torch.no_grad()
    def fill(self, model: nn.Module, ids, valid, rows: np.ndarray, purpose: str, period: int) -> Filled:
        """The model's own samples: masks at all ratios, temperatures and numbers of passes as configured.

        A row's masks fall into the passes evenly, at random: what a pass writes, it writes with all that the passes
        before it wrote in view, right or wrong, as in a sampling round.
        """
        masked = self.diffusion.mask(ids, valid, purpose, rows, period).masked
        low, high = self.config.temperature
        heat = low + (high - low) * randomness.uniform(randomness.key(self.seed, f"{purpose} heat"), rows, 1)
        passes = self._passes(rows, purpose)
        place = randomness.uniform(randomness.key(self.seed, f"{purpose} place"), rows, ids.shape[1])
        rank = np.argsort(np.argsort(np.where(masked, place, np.inf), 1, kind="stable"), 1, kind="stable")
        # (B, T): the pass that writes the token
        turn = rank * passes[:, None] // np.maximum(masked.sum(1), 1)[:, None]
        last = masked & (turn == turn.max(1, initial=0, where=masked)[:, None])
        start = np.where(masked, self.diffusion.mask_id, ids)
        share = last.sum(1) / np.maximum(valid.sum(1), 1)
        result = Filled(ids, start, valid, masked, np.ones(ids.shape), np.ones(ids.shape), share)
        was_training = model.training
        model.eval()
        at, first = self._logits(model, result, masked)  # this pass reads the given text alone
        for number in range(passes.max(initial=0)):
            now = masked & (turn == number)
            if number:
                where, logits = self._logits(model, result, now)
            else:
                here = np.flatnonzero(now.reshape(-1)[at])
                where, logits = at[here], first[tensor(here, self.runtime)]
            self._write(result, where, logits, heat, rows, f"{purpose} {number}")
        model.train(was_training)
        tokens = tensor(result.ids.reshape(-1)[at], self.runtime)[:, None]
        result.expected.reshape(-1)[at] = torch.softmax(first, -1).gather(1, tokens).squeeze(1).cpu().numpy()
        return result

    def _passes(self, rows: np.ndarray, purpose: str) -> np.ndarray:
        """(B,) number of passes in which each row is filled, even on a logarithmic scale."""
        low, high = self.config.rollout_passes
        chance = randomness.uniform(randomness.key(self.seed, f"{purpose} passes"), rows, 1)[:, 0]
        return np.floor(low * ((high + 1) / low) ** chance).astype(np.int64)

    def _hide(self, filled: Filled, rows: np.ndarray, purpose: str, share: float) -> Filled:
        """A share of the rows loses a part of what was written, as the critic sees text inside a sampling round."""
        which, part = randomness.uniform(randomness.key(self.seed, f"{purpose} hide"), rows, 2).T
        noise = randomness.uniform(randomness.key(self.seed, f"{purpose} hidden"), rows, filled.ids.shape[1])
        hidden = filled.written & (which < share)[:, None] & (noise < part[:, None])
        return filled.partly_masked(hidden, self.diffusion.mask_id)

    def _logits(self, model, filled: Filled, where: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """((N,) flat places of `where` (B, T), (N, V) logits there); only the rows that have such places are read."""
        some = np.flatnonzero(where.any(1))
        if not len(some):
            return np.empty(0, np.int64), torch.empty((0, 1), device=self.runtime.device)
        at = tensor(np.flatnonzero(where[some]), self.runtime)
        output = forward(model, self.runtime, filled.ids[some], filled.valid[some], logits_at=at)
        return np.flatnonzero(where), output.logits.float().index_fill(1, self._forbidden, -torch.inf)

    def _write(self, filled: Filled, at: np.ndarray, logits: Tensor, heat, rows, purpose: str) -> None:
        """A token at every flat place of `at` (N,), in place."""
        if not len(at):
            return
        noise = randomness.uniform(randomness.key(self.seed, purpose), rows, filled.ids.shape[1])
        warm = np.broadcast_to(heat, filled.ids.shape).reshape(-1)[at].astype(np.float32)
        chance = tensor(noise.reshape(-1)[at], self.runtime)
        temperature = tensor(warm, self.runtime)[:, None]
        tokens, sure = draw(logits, chance, self._forbidden, temperature=temperature)
        filled.ids.reshape(-1)[at] = tokens.cpu().numpy()
        filled.confidence.reshape(-1)[at] = sure.cpu().numpy()

    def _critic_losses(
        self, model: nn.Module, filled: Filled, rows: np.ndarray, purpose: str
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy of errors, over the written tokens and a share of the given ones, and of origin, over the
        tokens of texts of which nothing was told: who is told need not guess. 0 where nobody guesses."""
        chance = randomness.uniform(randomness.key(self.seed, f"{purpose} clean"), rows, filled.ids.shape[1])
        visible = self._visible(filled)
        labelled = filled.written | (visible & (chance < self.config.clean_fraction))
        chance = randomness.uniform(randomness.key(self.seed, f"{purpose} told"), rows, 1)
        # In the middle of a round nothing is told
        told = visible.all(1, keepdims=True, where=filled.valid) & (
            chance < self.config.conditioning_fraction
        )
        error, origin = self._critic_logits(model, filled, told)
        wrong = filled.ids != filled.clean
        if self.config.labels == "expected":
            wrong = np.where(filled.written, 1 - filled.expected, wrong)
        errors = self._cross_entropy(error, labelled, wrong)
        if not self.config.origin_weight or told.all():
            return errors, errors.new_zeros(())
        return errors, self._cross_entropy(origin, visible & ~told, filled.written)

    def _cross_entropy(self, logits: Tensor, where: np.ndarray, happened: np.ndarray) -> Tensor:
        """Mean over the places of `where` (B, T), of log-odds (B T,) against what happened (B, T)."""
        at = np.flatnonzero(where)
        targets = tensor(happened.reshape(-1)[at].astype(np.float32), self.runtime)
        return F.binary_cross_entropy_with_logits(logits[tensor(at, self.runtime)], targets)

    def _visible(self, filled: Filled) -> np.ndarray:
        """(B, T) bool: a token, and not the mask."""
        return filled.valid & (filled.ids != self.diffusion.mask_id)

    def _critic_logits(self, model: nn.Module, filled: Filled, told: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B T,) log-odds of error and of having been written by the generator, reading the filled text.

        `told` (B, 1) or (1,): is it told which tokens were given?
        """
        given = None
        if told.any():
            given = tensor(self._visible(filled) & ~filled.written & told, self.runtime)
        output = forward(
            model, self.runtime, filled.ids, filled.valid, head="critic", conditioning_mask=given
        )
        return output.logits.float().flatten(), output.origin_logits.float().flatten()

    def _raw(self, model: nn.Module, filled: Filled, told: bool) -> tuple[np.ndarray, np.ndarray]:
        """((B, T), (B, T)) raw probabilities of error and of origin."""
        with torch.no_grad():
            logits = self._critic_logits(model, filled, np.array([told]))
        error, origin = (torch.sigmoid(x).view(filled.ids.shape).double().cpu().numpy() for x in logits)
        return error, origin

    # ------------------------------------------------------------------ selection and report

    def _fills(self, model: nn.Module, windows: Windows, examples: np.ndarray):
        """Yields (part, Filled, (B, T) raw probability of error) over some windows."""
        for part in chunks(len(examples), 64):
            ids, valid = windows.batch(examples[part], np.zeros(len(part)))
            filled = self.fill(model, ids, valid, part, "critic evaluation", 64)
            yield part, filled, self._raw(model, filled, told=True)[0]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """How well errors are found on the selection windows; when the generator learns too, also its NELBO there, and
        `nelbo_and_auroc`, which weighs both and chooses the best step."""
        windows, chosen = self.diffusion.selection_windows, self.diffusion._evaluated
        raw, wrong, origin, written = [], [], [], []
        for _, filled, probability in self._fills(model, windows, chosen):
            raw.append(probability[filled.written])
            wrong.append((filled.ids != filled.clean)[filled.written])
            origin.append(self._raw(model, filled, told=False)[1][filled.valid])
            written.append(filled.written[filled.valid])
        p, y = np.concatenate(raw), np.concatenate(wrong)
        clipped = np.clip(p, 1e-7, 1 - 1e-7)
        loss = float(-np.where(y, np.log(clipped), np.log(1 - clipped)).mean())
        values = {"critic_loss": loss, "auroc": metrics.auroc(p, y), "error_rate": float(y.mean()),
                  "auroc_origin": metrics.auroc(np.concatenate(origin), np.concatenate(written))}  # fmt: skip
        if not self.joint:
            return values
        values = self.diffusion.evaluate(model) | values
        both = nelbo_and_auroc(values["nelbo"], values["auroc"], self.config.selection_weight)
        return values | {"nelbo_and_auroc": both}

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow], Calibration]:
        """Error detection on held-out fills beside the generator's own confidence, stored and fresh.

        Fills of the selection windows calibrate: no figure is of text that the calibration was fitted on.
        """
        diffusion = self.diffusion
        own = diffusion.selection_windows
        calibration = fitted(self.observe(model, own, np.arange(own.count), REPORT_DRAWS))
        seen = self.observe(model, diffusion.held_out, diffusion.groups, REPORT_DRAWS)
        found = detection(seen, calibration)
        filled = seen.reading("filled")
        calibrated = calibration(filled.probability, "filled", filled.share)
        values = {
            "error_rate": float(filled.wrong.mean()),
            "error_rate_whole_text": float(seen.wrong.mean()),
            "tokens": len(filled.wrong),
            "detection": found,
            "bands": bands(seen, calibration),
            "reliability": metrics.reliability(calibrated, filled.wrong, 15),
            "auroc": found["critic"]["auroc"]["value"],
            "auroc_confidence": found["confidence"]["auroc"]["value"],
        }
        return values, self._rows(found), calibration

    def _rows(self, found: dict[str, dict]) -> list[ResultRow]:
        base = found["confidence"]["auroc"]["value"]
        fresh = found["whole_text_confidence_fresh"]["auroc"]["value"]

        def row(name: str, score: str, baseline: str, value: float) -> ResultRow:
            estimate = metrics.Estimate(**found[score]["auroc"])
            return result_row(self.label, name, estimate, baseline, value, lower_is_better=False)

        return [
            row("AUROC, wrong tokens", "critic", "chance", 0.5),
            row("AUROC, wrong tokens", "critic", "confidence", base),
            row("AUROC, critic and confidence", "critic_blend", "confidence", base),
            row("AUROC, nothing known of the text", "whole_text_critic", "fresh confidence", fresh),
        ]

    def observe(self, model: nn.Module, windows: Windows, groups: np.ndarray, draws: int) -> Seen:
        """Every token of the windows, filled `draws` times, and what each view says of it. `groups`: one per window."""
        examples = np.tile(np.arange(windows.count), draws)
        parts = []
        for part, filled, probability in self._fills(model, windows, examples):
            where = filled.valid
            partial, partial_share = self._partial(model, filled, part)
            columns = {
                "wrong": filled.ids != filled.clean,
                "written": filled.written,
                "group": groups[examples[part]][:, None],
                "critic": probability,
                "unknown": self._raw(model, filled, told=False)[0],
                "share": filled.share[:, None],
                "partial": partial,
                "partial_share": partial_share[:, None],
                "confidence": 1 - filled.confidence,
                "fresh": 1 - self._fresh_confidence(model, filled),
                "given": 1 - filled.expected,
            }
            parts.append({n: np.broadcast_to(v, where.shape)[where] for n, v in columns.items()})
        return Seen(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    @torch.no_grad()
    def _partial(self, model: nn.Module, filled: Filled, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B, T) raw probability of error with a random share of the written tokens masked again, NaN at those;
        (B,) share of the text that is masked then)."""
        columns = filled.ids.shape[1]
        noise = randomness.uniform(randomness.key(self.seed, "partial report"), rows, columns)
        part = randomness.uniform(randomness.key(self.seed, "partial report share"), rows, 1)
        hidden = filled.written & (noise < part)
        partly = filled.partly_masked(hidden, self.diffusion.mask_id)
        raw = self._raw(model, partly, told=False)[0]
        share = hidden.sum(1) / np.maximum(filled.valid.sum(1), 1)
        return np.where(hidden, np.nan, raw), share

    @torch.no_grad()
    def _fresh_confidence(self, model: nn.Module, filled: Filled) -> np.ndarray:
        """(B, T) probability of every token, the whole filled text in view."""
        logits = forward(model, self.runtime, filled.ids, filled.valid).logits
        return (
            probability_of(tensor(filled.ids, self.runtime), logits, self._forbidden).double().cpu().numpy()
        )


def nelbo_and_auroc(nelbo: float, auroc: float, weight: float) -> float:
    """nelbo + weight x (1 - auroc): what the best step of a generator and its critic has least of.

    `weight` nats per token are worth as much as the whole way from an AUROC of 0 to 1. An AUROC that is not defined
    (NaN: all written tokens are right, or all wrong) counts as chance, 0.5.
    """
    return nelbo + weight * (1 - (0.5 if np.isnan(auroc) else auroc))


@contextmanager
def without_gradient(model: nn.Module) -> Iterator[None]:
    """While active, nothing but the critic's own weights takes part in what is recorded for the backward pass."""
    others = [p for name, p in model.named_parameters() if not name.startswith("critic.") and p.requires_grad]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
