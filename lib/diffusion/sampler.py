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
from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw
from lib.diffusion.masking import lowest
from lib.diffusion.policies import Policy, View, rounds_for
from lib.diffusion.schedule import masked_counts_left, masked_shares
from lib.errors import BadConfig
from lib.runtime import Runtime
from lib.sections import SamplerConfig

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
        truth: np.ndarray | None = None,
    ) -> Samples:
        """Write the free positions of (B, T) ids.

        Args:
            free: (B, T) bool; the others are given and stay as they are.
            rows: (B,) numbers of the samples, which key their noise.
            nfe: forward passes to spend; policies with an extra pass get half as many rounds.
            trace: keep every round.
            truth: (B, T) the text that once stood there, for the policy `oracle` alone.
        """
        size, parts = self.settings.batch_size, []
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            known = None if truth is None else truth[part]
            parts.append(self._sample_batch(ids[part], free[part], rows[part], policy, nfe, trace, known))
        rounds = [
            Round(
                np.concatenate([p.rounds[i].ids for p in parts]),
                np.concatenate([p.rounds[i].events for p in parts]),
            )
            for i in range(len(parts[0].rounds))
        ]
        return Samples(np.concatenate([p.ids for p in parts]), parts[0].nfe, rounds)

    def _sample_batch(self, ids, free, rows, policy: Policy, nfe: int, trace: bool, truth) -> Samples:
        rounds = rounds_for(policy, nfe)
        left = masked_counts_left(masked_shares(self.settings, rounds), free.sum(1))
        ids = np.where(free, self.mask_id, ids)
        confidence = np.ones(ids.shape)
        result = Samples(ids, 0)
        for number in range(rounds):
            masked = (ids == self.mask_id) & free
            last = number + 1 == rounds
            after = np.zeros_like(masked)
            if policy.blind and not last:
                after = policy.choose(
                    self._view(number, rows, ids, masked, free, left, confidence, _Draft(ids))
                )
            draft = self._draft(ids, masked & ~after, confidence, number, rows, policy.partial and not last)
            result.nfe += 1
            if not (policy.blind or last):
                view = self._view(number, rows, ids, masked, free, left, confidence, draft, truth)
                after = policy.choose(view)
                result.nfe += int(policy.extra_pass)
            ids = np.where(after, self.mask_id, draft.ids)
            if trace:
                result.rounds.append(_record(ids, masked, after, drafted=not policy.blind))
        result.ids = ids
        return result

    def _draft(self, ids, now, confidence, number, rows, partial: bool) -> "_Draft":
        """A token at every position in `now`, one forward pass; `confidence` learns how sure the model was."""
        draft = _Draft(ids.copy(), at=np.flatnonzero(now))
        where = torch.from_numpy(draft.at).to(self.runtime.device)
        output = self._forward(ids, where, "both" if partial else "lm")
        draft.logits = output.logits.float()  # (N, V)
        if partial:
            draft.critic = torch.sigmoid(output.critic_logits.float()).double().cpu().numpy()
        if len(draft.at):
            noise = self._noise("token", number, rows, ids.shape[1]).reshape(-1)[draft.at]
            tokens, sure = draw(
                draft.logits,
                torch.from_numpy(noise).to(draft.logits.device),
                torch.tensor(self.forbidden, device=draft.logits.device),
                self.settings.temperature,
                top_p=self.settings.top_p,
            )
            draft.ids.reshape(-1)[draft.at] = tokens.cpu().numpy()
            confidence.reshape(-1)[draft.at] = sure.double().cpu().numpy()
        return draft

    def _view(self, number, rows, ids, masked, free, left, confidence, draft: "_Draft", truth=None) -> View:
        noise = self._noise("take back", number, rows, ids.shape[1])

        def margin() -> np.ndarray:
            barred = torch.tensor(self.forbidden, device=draft.logits.device)
            shares = torch.softmax(draft.logits.index_fill(1, barred, -torch.inf), -1)
            two = shares.topk(2, dim=-1).values.double().cpu().numpy()
            gaps = np.zeros(ids.shape)
            gaps.reshape(-1)[draft.at] = two[:, 0] - two[:, 1]
            return gaps + 1e-9 * noise

        def wrong() -> np.ndarray:
            if truth is None:
                raise BadConfig(
                    "the policy oracle needs the truth: it is for filling known text, in benchmarks"
                )
            return draft.ids != truth

        return View(
            masked=masked,
            free=free,
            left=left[number],
            noise=noise,
            chance=self._noise("take back count", number, rows, 1)[:, 0],
            confidence=confidence + 1e-9 * noise,
            margin=margin,
            back_share=self.settings.back_share,
            fresh_confidence=lambda: self.fresh_confidence(draft.ids),
            critic_error=lambda: self.critic_error(draft.ids),
            blend_error=lambda: self.calibration.blended(self._critic_raw(draft.ids), confidence),
            partial_error=lambda: self.calibration(draft.critic),
            wrong=wrong,
            most=lambda suspicion, where, count: self._most(suspicion, where, count, noise),
        )

    def _most(
        self, suspicion: np.ndarray, where: np.ndarray, count: np.ndarray, noise: np.ndarray
    ) -> np.ndarray:
        """(B, T) bool: `count[b]` positions of `where`, the more suspicious the likelier.

        Either suspicion blended with noise, or, with a selection temperature, Gumbel-top-k on the log-odds: a draw
        without replacement whose chances follow the odds (Kool et al. 2019).
        """
        heat = self.settings.selection_temperature
        if heat is None:
            strength = self.settings.randomness_strength
            score = (1 - strength) * suspicion + strength * noise
        else:
            share = np.clip(suspicion, 1e-6, 1 - 1e-6)
            score = np.log(share / (1 - share)) / heat - np.log(-np.log(np.clip(noise, 1e-12, 1 - 1e-12)))
        # Equal suspicions must not be settled by position: a trace of noise settles them by chance.
        return lowest(-(score + 1e-9 * noise), where, count)

    def _forward(self, ids: np.ndarray, at: Tensor | None = None, head: str = "lm"):
        inputs = torch.from_numpy(ids).to(self.runtime.device)
        with self.runtime.autocast():
            return self.model(input_ids=inputs, logits_at=at, head=head)

    @torch.no_grad()
    def fresh_confidence(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) probability of each token of a whole text, itself in view. One forward pass."""
        logits = self._forward(ids).logits.float()
        logits[..., self.forbidden] = -torch.inf
        shares = torch.softmax(logits, -1)
        at = torch.from_numpy(ids).to(shares.device)[..., None]
        return shares.gather(-1, at).squeeze(-1).double().cpu().numpy()

    def _critic_raw(self, ids: np.ndarray) -> np.ndarray:
        return torch.sigmoid(self._forward(ids, head="critic").logits.float()).double().cpu().numpy()

    @torch.no_grad()
    def critic_error(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) calibrated chance that each token of a whole text is an error. One forward pass."""
        return self.calibration(self._critic_raw(ids))

    def _noise(self, purpose: str, number: int, rows: np.ndarray, columns: int) -> np.ndarray:
        return randomness.uniform(randomness.key(self.seed, f"sample {purpose}", number), rows, columns)


@dataclass
class _Draft:
    """The text with every position of a round written, and what the pass said."""

    ids: np.ndarray  # (B, T)
    at: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # (N,) flat positions written
    logits: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (N, V)
    critic: np.ndarray = field(
        default_factory=lambda: np.empty(0)
    )  # (B, T) raw error of the text before the round


def _record(ids: np.ndarray, masked: np.ndarray, after: np.ndarray, drafted: bool) -> Round:
    """`drafted`: a masked position that stays masked had a draft, which was taken back."""
    events = np.full(ids.shape, UNCHANGED, np.int8)
    events[masked & ~after] = WRITTEN
    events[after & ~masked] = TAKEN_BACK
    events[masked & after] = TAKEN_BACK if drafted else STILL_MASKED
    return Round(ids.copy(), events)
