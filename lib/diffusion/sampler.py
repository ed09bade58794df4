"""Sampling by masked diffusion: write every masked token, take back the worst, and again.

Knows token ids, a model and a policy; no tokenizer and no file. A sample is a function of the seed and its own
number: any batch size gives the same tokens. Given (protected) tokens are never changed and never counted.
Every forward pass of the trunk counts as one (NFE).

Legend: B samples, T positions, N positions in question.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.config import SamplerConfig
from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw
from lib.diffusion.masking import lowest
from lib.diffusion.policies import Policy, View, rounds_for
from lib.diffusion.schedule import masked_counts_left, masked_shares
from lib.runtime import Runtime

UNCHANGED, WRITTEN, TAKEN_BACK, STILL_MASKED = 0, 1, 2, 3


@dataclass
class Round:
    """One round of a trace: tokens after it (the mask id where taken back or still to write) and what happened."""

    ids: np.ndarray  # (B, T)
    events: np.ndarray  # (B, T) UNCHANGED, WRITTEN, TAKEN_BACK or STILL_MASKED


@dataclass
class Samples:
    ids: np.ndarray  # (B, T)
    nfe: int  # forward passes per sample
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Sampler:
    """A masked LM, with a critic head if a policy asks for one.

    Attributes:
        model: RemaskGptForMaskedLM or alike: forward(input_ids, logits_at, head) -> .logits.
        mask_id, forbidden: the mask, and the special ids that are never written.
        calibration: turns the critic's raw probabilities into frequencies.
    """

    model: nn.Module
    mask_id: int
    forbidden: list[int]
    runtime: Runtime
    settings: SamplerConfig
    seed: int
    calibration: Calibration = field(default_factory=Calibration)

    @torch.no_grad()
    def sample(
        self,
        ids: np.ndarray,
        free: np.ndarray,
        rows: np.ndarray,
        policy: Policy,
        nfe: int,
        trace: bool = False,
    ) -> Samples:
        """Write the free positions of (B, T) ids.

        Args:
            free: (B, T) bool; the others are given and stay as they are.
            rows: (B,) numbers of the samples, which key their noise.
            nfe: forward passes to spend; policies with an extra pass get half as many rounds.
            trace: keep every round.
        """
        size, parts = self.settings.batch_size, []
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            parts.append(self._sample_batch(ids[part], free[part], rows[part], policy, nfe, trace))
        rounds = [
            Round(
                np.concatenate([p.rounds[i].ids for p in parts]),
                np.concatenate([p.rounds[i].events for p in parts]),
            )
            for i in range(len(parts[0].rounds))
        ]
        return Samples(np.concatenate([p.ids for p in parts]), parts[0].nfe, rounds)

    def _sample_batch(self, ids, free, rows, policy: Policy, nfe: int, trace: bool) -> Samples:
        rounds = rounds_for(policy, nfe)
        left = masked_counts_left(masked_shares(self.settings, rounds), free.sum(1))
        ids = np.where(free, self.mask_id, ids)
        confidence = np.ones(ids.shape, np.float32)
        result = Samples(ids, 0)
        for number in range(rounds):
            masked = ids == self.mask_id
            masked &= free
            now = masked
            if policy.suspicion is None:
                place = self._noise("place", number, rows, ids.shape[1])
                now = lowest(place, masked, masked.sum(1) - left[number])
            ids = self._write(ids, now, confidence, number, rows)
            result.nfe += 1
            back = np.zeros_like(now)
            if policy.suspicion is not None and number + 1 < rounds:
                back = self._take_back(ids, free, confidence, policy, left[number], number, rows)
                result.nfe += int(policy.extra_pass)
                ids = np.where(back, self.mask_id, ids)
            if trace:
                result.rounds.append(self._record(ids, free, now, masked, back))
        result.ids = ids
        return result

    def _write(self, ids, now, confidence, number, rows) -> np.ndarray:
        """Draw a token at every position in `now`; remembers how sure the model was."""
        at = np.flatnonzero(now)
        if not len(at):
            return ids
        noise = self._noise("token", number, rows, ids.shape[1]).reshape(-1)[at]
        logits = self._logits(ids, torch.from_numpy(at).to(self.runtime.device))  # (N, V)
        tokens, sure = draw(
            logits,
            torch.from_numpy(noise).to(logits.device),
            torch.tensor(self.forbidden, device=logits.device),
            self.settings.temperature,
            top_p=self.settings.top_p,
        )
        ids = ids.copy()
        ids.reshape(-1)[at] = tokens.cpu().numpy()
        confidence.reshape(-1)[at] = sure.cpu().numpy()
        return ids

    def _take_back(self, ids, free, confidence, policy: Policy, count, number, rows) -> np.ndarray:
        """(B, T) bool: the `count[b]` most suspicious free tokens, the suspicion blended with noise."""
        assert policy.suspicion is not None
        noise = self._noise("take back", number, rows, ids.shape[1])
        view = View(
            noise=torch.from_numpy(noise),
            written_confidence=torch.from_numpy(confidence),
            fresh_confidence=lambda: self._fresh_confidence(ids),
            critic_error=lambda: self.critic_error(ids),
        )
        suspicion = policy.suspicion(view).double().cpu().numpy()
        strength = self.settings.randomness_strength
        blended = (1 - strength) * suspicion + strength * noise
        # Equal suspicions must not be settled by position: a trace of noise settles them by chance.
        return lowest(-(blended + 1e-9 * noise), free, count)

    def _logits(self, ids: np.ndarray, at: Tensor | None = None, head: str = "lm") -> Tensor:
        inputs = torch.from_numpy(ids).to(self.runtime.device)
        with self.runtime.autocast():
            return self.model(input_ids=inputs, logits_at=at, head=head).logits.float()

    def _fresh_confidence(self, ids: np.ndarray) -> Tensor:
        logits = self._logits(ids)
        logits[..., self.forbidden] = -torch.inf
        shares = torch.softmax(logits, -1)
        return shares.gather(-1, torch.from_numpy(ids).to(shares.device)[..., None]).squeeze(-1)

    @torch.no_grad()
    def critic_error(self, ids: np.ndarray) -> Tensor:
        """(B, T) calibrated chance that each token of a whole text is an error. One forward pass."""
        raw = torch.sigmoid(self._logits(ids, head="critic")).double().cpu().numpy()
        return torch.from_numpy(self.calibration(raw))

    def _noise(self, purpose: str, number: int, rows: np.ndarray, columns: int) -> np.ndarray:
        return randomness.uniform(randomness.key(self.seed, f"sample {purpose}", number), rows, columns)

    def _record(self, ids, free, now, masked, back) -> Round:
        events = np.full(ids.shape, UNCHANGED, np.int8)
        events[now] = WRITTEN
        events[back] = TAKEN_BACK
        events[masked & ~now] = STILL_MASKED
        return Round(ids.copy(), events)
