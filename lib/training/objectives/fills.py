"""Text that the generator fills itself: what a token critic learns from.

The generator fills masks of clean text in several forward passes, as it does when sampling.

Look-back injection (BackPlay, 2026) makes errors that the generator itself corrects later. An early pass predicts every
masked token, but keeps few. Some of the predictions that it did not keep replace the tokens of later passes, which saw more.

Legend: B rows, T positions, N positions in question, V vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.categorical import draw, probability_of
from lib.sections.critic import CriticConfig
from lib.training.objectives.base import forward, tensor
from lib.training.objectives.language_model import MaskedDiffusion


@dataclass
class Filled:
    """Clean text and its filled version. The tokens that are not generated are the conditioning tokens.

    Attributes:
        clean, ids: (B, T) the text before, and filled.
        valid: (B, T) bool, False for padding.
        generated: (B, T) bool, True where the generator filled a mask.
        confidence: (B, T) probability of each generated token in the forward pass that sampled it; 1 for the others.
        expected: (B, T) probability of each generated token in the first forward pass, which reads the conditioning
            tokens only; 1 for the others.
        share: (B,) share of the text that was masked before the last forward pass.
    """

    clean: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    generated: np.ndarray
    confidence: np.ndarray
    expected: np.ndarray
    share: np.ndarray

    def remask(self, positions: np.ndarray, mask_id: int) -> "Filled":
        """The same text with some generated tokens, (B, T) bool, masked again. These no longer count as generated."""
        return replace(
            self, ids=np.where(positions, mask_id, self.ids), generated=self.generated & ~positions
        )


@dataclass
class Drafts:
    """Tokens that a forward pass predicts but does not keep.

    Attributes:
        ids, confidence: (B, T), as in `Filled`.
        of_pass: (B, T) the pass that predicts the token; -1 where none is wanted.
    """

    ids: np.ndarray
    confidence: np.ndarray
    of_pass: np.ndarray

    def inject(self, filled: Filled) -> None:
        """Replace the tokens of later passes, in place."""
        positions = self.of_pass >= 0
        filled.ids[positions] = self.ids[positions]
        filled.confidence[positions] = self.confidence[positions]


class Filler:
    """Fills masks of clean text with samples of the generator.

    Args:
        config: range of the temperature and of the number of forward passes.
        diffusion: masks the text as in the generator's own training.
        forbidden: ids that are never sampled.
    """

    def __init__(self, config: CriticConfig, diffusion: MaskedDiffusion, forbidden: list[int]):
        self.config, self.diffusion, self.runtime, self.seed = (
            config,
            diffusion,
            diffusion.runtime,
            diffusion.seed,
        )
        self._forbidden = torch.tensor(forbidden, device=self.runtime.device)

    def fill(
        self,
        model: nn.Module,
        ids: np.ndarray,
        valid: np.ndarray,
        rows: np.ndarray,
        purpose: str,
        period: int,
    ) -> Filled:
        """Mask (B, T) text and fill it, as it is sampled.

        Args:
            rows, purpose: key of the draws; what happens to a row depends on its number alone.
            period: masking ratios are spread evenly over this many rows.
        """
        return self._fill(model, ids, valid, rows, purpose, period, look_back=0.0)

    def fill_to_learn_from(
        self,
        model: nn.Module,
        ids: np.ndarray,
        valid: np.ndarray,
        rows: np.ndarray,
        purpose: str,
        period: int,
    ) -> Filled:
        """As `fill`, with look-back injection in the share `look_back` of the rows."""
        return self._fill(model, ids, valid, rows, purpose, period, look_back=self.config.look_back)

    @torch.no_grad()
    def _fill(
        self,
        model: nn.Module,
        ids: np.ndarray,
        valid: np.ndarray,
        rows: np.ndarray,
        purpose: str,
        period: int,
        *,
        look_back: float,
    ) -> Filled:
        # 1. Mask a share of the text that may be any; a temperature and a number of forward passes for each row
        masked = self.diffusion.mask_to_fill(ids, valid, purpose, rows, period).masked  # (B, T)
        low, high = self.config.temperature
        noise = randomness.uniform(randomness.key(self.seed, f"{purpose} heat"), rows, 1)
        temperature = low + (high - low) * noise  # (B, 1)
        passes = self.passes(rows, purpose)  # (B,)

        # 2. Divide the masks of a row evenly among its forward passes, in random order
        order = randomness.uniform(randomness.key(self.seed, f"{purpose} place"), rows, ids.shape[1])
        rank = np.argsort(np.argsort(np.where(masked, order, np.inf), 1, kind="stable"), 1, kind="stable")
        pass_of = rank * passes[:, None] // np.maximum(masked.sum(1), 1)[:, None]  # (B, T)
        last = masked & (pass_of == pass_of.max(1, initial=0, where=masked)[:, None])
        share = last.sum(1) / np.maximum(valid.sum(1), 1)
        start = np.where(masked, self.diffusion.mask_id, ids)
        filled = Filled(ids, start, valid, masked, np.ones(ids.shape), np.ones(ids.shape), share)

        # 3. The first pass reads the conditioning tokens only; later ones also read what was sampled before
        was_training = model.training
        model.eval()
        first_idx, first_logits = self._logits(model, filled, masked)
        drafts = self._drafts_to_keep(masked, pass_of, rows, purpose, look_back)
        for number in range(passes.max(initial=0)):
            now = masked & (pass_of == number)
            kept = (
                drafts.of_pass == number
            )  # (B, T) predictions that this pass will not keep, but a later text gets
            wanted = now | kept
            if number:
                flat_idx, logits = self._logits(model, filled, wanted)
            else:
                of_now = np.flatnonzero(wanted.reshape(-1)[first_idx])
                flat_idx, logits = first_idx[of_now], first_logits[tensor(of_now, self.runtime)]
            for positions, into, name in ((now, filled, ""), (kept, drafts, " look back")):
                chosen = np.flatnonzero(positions.reshape(-1)[flat_idx])
                every = len(chosen) == len(flat_idx)  # no copy of the logits then
                some = logits if every else logits[tensor(chosen, self.runtime)]
                self._sample(into, flat_idx[chosen], some, temperature, rows, f"{purpose}{name} {number}")
        drafts.inject(filled)
        model.train(was_training)

        # 4. Probabilities of the sampled tokens in the first pass
        tokens = tensor(filled.ids.reshape(-1)[first_idx], self.runtime)[:, None]
        expected = torch.softmax(first_logits, -1).gather(1, tokens).squeeze(1)
        filled.expected.reshape(-1)[first_idx] = expected.cpu().numpy()
        return filled

    def _drafts_to_keep(
        self, masked: np.ndarray, pass_of: np.ndarray, rows: np.ndarray, purpose: str, share: float
    ) -> "Drafts":
        """Where, and from which pass, look-back injection takes tokens.

        In a `share` of the rows one pass is drawn, any but the last, and a part of the tokens that it does not keep.
        """
        of_pass = np.full(masked.shape, -1)
        if share:
            passes = pass_of.max(1, initial=0, where=masked) + 1  # (B,)
            key = randomness.key(self.seed, f"{purpose} look back rows")
            chosen, early, part = randomness.uniform(key, rows, 3).T
            number = np.floor(early * (passes - 1)).astype(np.int64)  # any pass but the last
            noise = randomness.uniform(
                randomness.key(self.seed, f"{purpose} look back positions"), rows, masked.shape[1]
            )
            injected = masked & (pass_of > number[:, None]) & (noise < part[:, None])
            injected &= (chosen < share)[:, None]
            of_pass = np.where(injected, number[:, None], -1)
        return Drafts(np.zeros(masked.shape, np.int64), np.ones(masked.shape), of_pass)

    def passes(self, rows: np.ndarray, purpose: str) -> np.ndarray:
        """(B,) forward passes that fill each row, uniform on a logarithmic scale within `rollout_passes`."""
        low, high = self.config.rollout_passes
        noise = randomness.uniform(randomness.key(self.seed, f"{purpose} passes"), rows, 1)[:, 0]
        return np.floor(low * ((high + 1) / low) ** noise).astype(np.int64)

    def remask_some(self, filled: Filled, rows: np.ndarray, purpose: str, share: float) -> Filled:
        """In a share of the rows, re-mask a random part of the generated tokens, as in the middle of sampling."""
        chosen, part = randomness.uniform(randomness.key(self.seed, f"{purpose} hide"), rows, 2).T
        noise = randomness.uniform(randomness.key(self.seed, f"{purpose} hidden"), rows, filled.ids.shape[1])
        positions = filled.generated & (chosen < share)[:, None] & (noise < part[:, None])
        return filled.remask(positions, self.diffusion.mask_id)

    @torch.no_grad()
    def fresh_confidence(self, model: nn.Module, filled: Filled) -> np.ndarray:
        """(B, T) probability of every token under the generator, given the whole filled text."""
        logits = forward(model, self.runtime, filled.ids, filled.valid).logits  # (B, T, V)
        found = probability_of(tensor(filled.ids, self.runtime), logits, self._forbidden)
        return found.double().cpu().numpy()

    def _logits(self, model: nn.Module, filled: Filled, positions: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """((N,) flat indices of the true `positions` (B, T), (N, V) logits there). Reads only rows that have any."""
        some = np.flatnonzero(positions.any(1))
        if not len(some):
            return np.empty(0, np.int64), torch.empty((0, 1), device=self.runtime.device)
        logits_at = tensor(np.flatnonzero(positions[some]), self.runtime)
        output = forward(model, self.runtime, filled.ids[some], filled.valid[some], logits_at=logits_at)
        return np.flatnonzero(positions), output.logits.float().index_fill(1, self._forbidden, -torch.inf)

    def _sample(
        self, filled: "Filled | Drafts", flat_idx: np.ndarray, logits: Tensor, temperature, rows, purpose: str
    ) -> None:
        """Sample a token at each of the (N,) flat indices, in place."""
        if not len(flat_idx):
            return
        shape = filled.ids.shape
        noise = randomness.uniform(randomness.key(self.seed, purpose), rows, shape[1]).reshape(-1)[flat_idx]
        per_token = np.broadcast_to(temperature, shape).reshape(-1)[flat_idx].astype(np.float32)
        tokens, probability = draw(
            logits,
            tensor(noise, self.runtime),
            self._forbidden,
            temperature=tensor(per_token, self.runtime)[:, None],
        )
        filled.ids.reshape(-1)[flat_idx] = tokens.cpu().numpy()
        filled.confidence.reshape(-1)[flat_idx] = probability.cpu().numpy()
