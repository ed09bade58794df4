"""Sampling by masked diffusion: write every masked token, take back the worst, and again.

Knows token ids, a model and a policy; no tokenizer and no file. A sample is a function of the seed and its own
number: any batch size gives the same tokens. Given (protected) tokens are never changed and never counted.
Every forward pass of the backbone counts as one (NFE), for each sample on its own: with the schedule `threshold` a sample is
finished when its policy doubts no token any more.

Legend: B samples, T positions, N positions in question.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.blocks import blocks_of
from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw, probability_of
from lib.diffusion.policies import Policy, View, rounds_for, rule
from lib.diffusion.schedule import held_rounds, masked_counts_left, masked_shares, temperatures
from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig
from lib.runtime import Runtime
from lib.sections.sampler import SamplerConfig

UNCHANGED, WRITTEN, TAKEN_BACK, STILL_MASKED = 0, 1, 2, 3


@dataclass
class Round:
    """One round of a trace: tokens after it (the mask id where taken back or still to write) and what happened."""

    ids: np.ndarray  # (B, T)
    events: np.ndarray  # (B, T) UNCHANGED, WRITTEN, TAKEN_BACK or STILL_MASKED


@dataclass
class Samples:
    ids: np.ndarray  # (B, T)
    passes: np.ndarray  # (B,) forward passes of each sample
    rounds: list[Round] = field(default_factory=list)

    @property
    def nfe(self) -> float:
        """Forward passes per sample, in the mean."""
        return float(self.passes.mean()) if len(self.passes) else 0.0


@dataclass
class _Rows:
    """The rows still at work."""

    place: np.ndarray  # (B,) where they stand in the batch
    number: np.ndarray  # (B,) the samples' own numbers, which key their noise
    ids: np.ndarray  # (B, T)
    free: np.ndarray  # (B, T) to be written in this block
    given: np.ndarray  # (B, T) known to be right; what an earlier block wrote is neither
    confidence: np.ndarray  # (B, T) of each token when it was written
    left: np.ndarray  # (B, rounds) positions to be masked after each round
    truth: np.ndarray | None  # (B, T)

    def only(self, kept: np.ndarray) -> "_Rows":
        """Those of a (B,) mask."""
        return _Rows(
            self.place[kept],
            self.number[kept],
            self.ids[kept],
            self.free[kept],
            self.given[kept],
            self.confidence[kept],
            self.left[kept],
            None if self.truth is None else self.truth[kept],
        )


@dataclass
class Sampler:
    """A masked LM, with a critic head if a policy asks for one.

    Attributes:
        model: RemaskGptForMaskedLM or alike: forward(input_ids, logits_at, head) -> .logits.
        mask_id, forbidden: the mask, and the special ids that are never written.
        calibration: turns the critic's raw probabilities into frequencies.
        context: longest text that the model reads; longer ones are written block by block. None: any.
    """

    model: nn.Module
    mask_id: int
    forbidden: list[int]
    runtime: Runtime
    settings: SamplerConfig
    seed: int
    calibration: Calibration = field(default_factory=Calibration)
    context: int | None = None

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
            nfe: forward passes to spend on each block; policies with an extra pass get half as many rounds.
            trace: keep every round.
            truth: (B, T) the text that once stood there, for the policy `oracle` alone.
        """
        size, parts = self.settings.batch_size, []
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            known = None if truth is None else truth[part]
            parts.append(self._sample_batch(ids[part], free[part], rows[part], policy, nfe, trace, known))
        rounds = [
            Round(*(np.concatenate(arrays) for arrays in zip(*(_round(p, i) for p in parts), strict=True)))
            for i in range(max(len(p.rounds) for p in parts))
        ]
        ids, passes = (np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "passes"))
        return Samples(ids, passes, rounds)

    def _sample_batch(self, ids, free, rows, policy: Policy, nfe: int, trace: bool, truth) -> Samples:
        """Block after block; most often one block is the whole text."""
        result = Samples(np.where(free, self.mask_id, ids), np.zeros(len(ids), np.int64))
        rounds = rounds_for(policy, nfe)
        for count, block in enumerate(blocks_of(ids.shape[1], self.settings.block_tokens, self.context)):
            here = np.zeros_like(free)
            here[:, block.start : block.end] = free[:, block.start : block.end]
            seen = slice(block.window, block.end)
            at = np.flatnonzero(here.any(1))
            left = masked_counts_left(
                masked_shares(self.settings, rounds, policy.takes_back), here[at].sum(1)
            ).T
            arrays = (
                result.ids[at, seen],
                here[at, seen],
                ~free[at, seen],
                np.ones((len(at), block.end - block.window)),
                left,
            )
            known = None if truth is None else truth[at, seen]
            self._write(result, _Rows(at, rows[at], *arrays, known), seen, policy, count * rounds, trace)
        return result

    def _write(
        self, result: Samples, rows: _Rows, seen: slice, policy: Policy, first: int, trace: bool
    ) -> None:
        """The rounds of one block, into `result`. `first`: number of its first round, which keys the noise."""
        threshold = self.settings.threshold if self.settings.schedule == "threshold" else None
        choose, stops = rule(policy, threshold), policy.stops or threshold is not None
        rounds = rows.left.shape[1]
        heats = temperatures(self.settings, rounds, policy.takes_back)
        correcting = rounds - held_rounds(self.settings, rounds, policy.takes_back)  # the first held round
        for number in range(rounds):
            if not len(rows.place):
                return
            masked = (rows.ids == self.mask_id) & rows.free
            busy = np.full(len(masked), threshold is not None or policy.takes_back)
            busy |= rows.left[:, number] < masked.sum(1)
            busy &= masked.any(1) | (rows.left[:, number] > 0)  # a single token: written once, then left
            if not busy.any():
                continue  # fewer tokens to write than rounds
            last, held = number + 1 == rounds, number + 1 >= correcting
            after = np.zeros_like(masked)
            if policy.blind and not last:
                after = choose(self._view(number, first, rows, masked, _Draft(rows.ids), held))
            partial = policy.partial and not last
            draft = self._draft(rows, masked & ~after, first + number, partial, float(heats[number]))
            result.passes[rows.place] += busy
            judged = busy & (rows.left[:, number] > 0)  # where anything may stay masked at all
            if not (policy.blind or last) and judged.any():
                after = choose(self._view(number, first, rows, masked, draft, held))
                result.passes[rows.place] += judged * int(policy.extra_pass)
            rows.ids = np.where(after, self.mask_id, draft.ids)
            result.ids[rows.place, seen] = rows.ids
            if trace:
                events = np.where(result.ids == self.mask_id, STILL_MASKED, UNCHANGED).astype(np.int8)
                events[rows.place, seen] = _events(masked, after, policy.drafts)
                result.rounds.append(Round(result.ids.copy(), events))
            if stops:
                rows = rows.only(after.sum(1) > 0)

    def _draft(
        self, rows: _Rows, now: np.ndarray, number: int, partial: bool, temperature: float
    ) -> "_Draft":
        """A token at every position in `now`, one forward pass; `confidence` learns how sure the model was."""
        draft = _Draft(rows.ids.copy(), at=np.flatnonzero(now))
        where = torch.from_numpy(draft.at).to(self.runtime.device)
        output = self._forward(rows.ids, where, "both" if partial else "lm")
        draft.logits = output.logits.float()  # (N, V)
        if partial:
            draft.critic, draft.origin = (
                torch.sigmoid(logits.float()).double().cpu().numpy()
                for logits in (output.critic_logits, output.origin_logits)
            )
        if len(draft.at):
            noise = self._noise("token", number, rows.number, now.shape[1]).reshape(-1)[draft.at]
            tokens, sure = draw(
                draft.logits,
                torch.from_numpy(noise).to(draft.logits.device),
                torch.tensor(self.forbidden, device=draft.logits.device),
                temperature,
                top_p=self.settings.top_p,
            )
            draft.ids.reshape(-1)[draft.at] = tokens.cpu().numpy()
            rows.confidence.reshape(-1)[draft.at] = sure.double().cpu().numpy()
        return draft

    def _view(
        self, number: int, first: int, rows: _Rows, masked: np.ndarray, draft: "_Draft", held: bool
    ) -> View:
        key_number, ids, confidence = first + number, rows.ids, rows.confidence
        noise = self._noise("take back", key_number, rows.number, ids.shape[1])
        share = masked.mean(1)  # of what the critic reads, or of what was drafted just before it reads

        def margin() -> np.ndarray:
            barred = torch.tensor(self.forbidden, device=draft.logits.device)
            shares = torch.softmax(draft.logits.index_fill(1, barred, -torch.inf), -1)
            two = shares.topk(2, dim=-1).values.double().cpu().numpy()
            gaps = np.zeros(ids.shape)
            gaps.reshape(-1)[draft.at] = two[:, 0] - two[:, 1]
            return gaps + 1e-9 * noise

        def wrong() -> np.ndarray:
            if rows.truth is None:
                raise BadConfig(
                    "the policy oracle needs the truth: it is for filling known text, in benchmarks"
                )
            return draft.ids != rows.truth

        return View(
            masked=masked,
            free=rows.free,
            left=rows.left[:, number],
            held=held,
            noise=noise,
            chance=self._noise("take back count", key_number, rows.number, 1)[:, 0],
            confidence=confidence + 1e-9 * noise,
            margin=margin,
            remask_share=self.settings.remask_share,
            remdm_share=self.settings.remdm_share,
            fresh_confidence=lambda: self.fresh_confidence(draft.ids),
            critic_error=lambda: self.calibration(self.raw_error(draft.ids, rows.given), "filled", share),
            blend_error=lambda: self.calibration.blended(self.raw_error(draft.ids, rows.given), confidence),
            partial_error=lambda: self.calibration(draft.critic, "partial", share),
            partial_origin=lambda: draft.origin,
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
        return lowest_k(-(score + 1e-9 * noise), where, count)

    def _forward(self, ids: np.ndarray, at: Tensor | None = None, head: str = "lm", **more: Tensor):
        inputs = torch.from_numpy(ids).to(self.runtime.device)
        with self.runtime.autocast():
            return self.model(input_ids=inputs, logits_at=at, head=head, **more)

    @torch.no_grad()
    def fresh_confidence(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) probability of each token of a whole text, itself in view. One forward pass."""

        def read(part: np.ndarray) -> np.ndarray:
            logits = self._forward(part).logits
            tokens, barred = (torch.as_tensor(x, device=logits.device) for x in (part, self.forbidden))
            return probability_of(tokens, logits, barred).double().cpu().numpy()

        return self._in_windows(read, ids)

    @torch.no_grad()
    def raw_error(self, ids: np.ndarray, given: np.ndarray | None = None) -> np.ndarray:
        """(B, T) the critic's own chance of error, before calibration, of texts that fit into the context.

        `given` (B, T): tokens that are known to be right; None if nothing is known.
        """
        known = {}
        if given is not None:
            known["conditioning_mask"] = torch.from_numpy(given).to(self.runtime.device)
        return torch.sigmoid(self._forward(ids, head="critic", **known).logits.float()).double().cpu().numpy()

    @torch.no_grad()
    def critic_error(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) calibrated chance that each token of a text of which nothing is known is an error: how often one is wrong
        that looks so, in texts of which the generator wrote any share, each equally often. One forward pass."""
        return self.calibration(self._in_windows(self.raw_error, ids))

    def _in_windows(self, read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> np.ndarray:
        """(B, T) of texts of any length: a longer one than the context is read in consecutive windows."""
        width = self.context or ids.shape[1]
        return np.concatenate(
            [read(ids[:, start : start + width]) for start in range(0, ids.shape[1], width)], 1
        )

    def _noise(self, purpose: str, number: int, rows: np.ndarray, columns: int) -> np.ndarray:
        return randomness.uniform(randomness.key(self.seed, f"sample {purpose}", number), rows, columns)


@dataclass
class _Draft:
    """The text with every position of a round written, and what the pass said."""

    ids: np.ndarray  # (B, T)
    at: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # (N,) flat positions written
    logits: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (N, V)
    # (B, T) of the text before the round: raw chance of an error, and that the generator wrote it
    critic: np.ndarray = field(default_factory=lambda: np.empty(0))
    origin: np.ndarray = field(default_factory=lambda: np.empty(0))


def _events(masked: np.ndarray, after: np.ndarray, drafts: bool) -> np.ndarray:
    """(B, T). `drafts`: a masked position that stays masked had a draft, which was taken back."""
    events = np.full(masked.shape, UNCHANGED, np.int8)
    events[masked & ~after] = WRITTEN
    events[after & ~masked] = TAKEN_BACK
    events[masked & after] = TAKEN_BACK if drafts else STILL_MASKED
    return events


def _round(part: Samples, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, events) after a round; after a part's last one nothing happens any more."""
    if number < len(part.rounds):
        return part.rounds[number].ids, part.rounds[number].events
    return part.ids, np.full(part.ids.shape, UNCHANGED, np.int8)
