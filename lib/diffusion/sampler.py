"""Sampling by masked diffusion: unmask all tokens, re-mask the worst, and repeat.

A sample is a function of the seed and its own number, so any batch size gives the same tokens. Tokens that are not free are
never changed and never counted. NFE counts forward passes of the backbone, for each sample on its own. A sample that needs no
pass in a round is not in the batch of that round. A sample is finished early with the schedule `threshold`, as soon as its
policy finds no doubtful token, and with `sampler.stable_rounds`, as soon as corrector steps change nothing any more.

Legend: B samples, T positions, N positions that are drafted in a round, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.blocks import blocks_of
from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw, probability_of
from lib.diffusion.policies import Policy, View, chooser, rounds_for
from lib.diffusion.samples import STILL_MASKED, UNCHANGED, MaskedTexts, Round, Samples, round_events, round_of
from lib.diffusion.schedule import corrector_steps, masked_counts_by_round, masked_shares, temperatures
from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig
from lib.runtime import Runtime
from lib.sections.sampler import SamplerConfig

EPSILON = 1e-9  # of noise, so that positions with equal scores are not chosen by their order


@dataclass
class _Rows:
    """The rows of a block that are not finished."""

    batch_idx: np.ndarray  # (B,) their indices in the batch
    keys: np.ndarray  # (B,) the numbers of the samples, which key their noise
    ids: np.ndarray  # (B, T)
    free: np.ndarray  # (B, T) to be generated in this block
    conditioning: np.ndarray  # (B, T) known to be right; tokens of earlier blocks are not
    confidence: np.ndarray  # (B, T) probability of each token when it was sampled
    targets: np.ndarray  # (B, rounds) positions that are masked after each round
    draft: np.ndarray  # (B, T) the last draft: ids with a token at every position that was drafted
    stable: np.ndarray  # (B,) corrector steps in a row that resampled no other token
    truth: np.ndarray | None  # (B, T)

    def select(self, kept: np.ndarray) -> "_Rows":
        """The rows of a (B,) mask."""
        arrays = {name: array[kept] for name, array in vars(self).items() if array is not None}
        return replace(self, **arrays)

    def put(self, kept: np.ndarray, part: "_Rows") -> None:
        """Write back what a round changes of the rows of a mask."""
        for name in ("ids", "confidence", "draft", "stable"):
            getattr(self, name)[kept] = getattr(part, name)


@dataclass
class _Draft:
    """The text with a token at every position that is drafted in a round, and the model's outputs."""

    ids: np.ndarray  # (B, T)
    flat_idx: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # (N,) flat positions
    logits: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (N, V)
    # (B, T) of the text before the round: raw probabilities of an error, and that the generator sampled the token
    error: np.ndarray = field(default_factory=lambda: np.empty(0))
    origin: np.ndarray = field(default_factory=lambda: np.empty(0))
    # (B, T) probability of each visible token that the generator wrote, in this round's pass; 1 elsewhere
    present: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class Sampler:
    """A masked language model, with a critic head if a policy needs one.

    Attributes:
        model: RemaskGptForMaskedLM or alike: forward(input_ids, logits_at, head) -> .logits. If its attribute
            `separate_critic_pass` is true, the critic needs a forward pass of its own, which counts.
        mask_id, forbidden: the mask, and the special ids that are never sampled.
        calibration: from the critic's raw probabilities to frequencies of errors.
        context: longest text that the model reads. Longer texts are generated block by block. None: no limit.
    """

    model: nn.Module
    mask_id: int
    forbidden: list[int]
    runtime: Runtime
    settings: SamplerConfig
    seed: int
    calibration: Calibration = field(default_factory=Calibration)
    context: int | None = None

    # ------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(self, texts: MaskedTexts, policy: Policy, nfe: int, trace: bool = False) -> Samples:
        """Generate the free positions of (B, T) texts.

        Args:
            nfe: forward passes to spend on each block. A policy with an extra pass has half as many rounds.
            trace: keep every round.
        """
        size = self.settings.batch_size
        parts = [
            self._sample_batch(texts[start : start + size], policy, nfe, trace)
            for start in range(0, len(texts.ids), size)
        ]
        rounds = [
            Round(*(np.concatenate(arrays) for arrays in zip(*(round_of(p, i) for p in parts), strict=True)))
            for i in range(max(len(p.rounds) for p in parts))
        ]
        ids, passes = (np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "passes"))
        return Samples(ids, passes, rounds)

    def _sample_batch(self, texts: MaskedTexts, policy: Policy, nfe: int, trace: bool) -> Samples:
        """Block after block. Most often one block is the whole text."""
        free = texts.free
        result = Samples(np.where(free, self.mask_id, texts.ids), np.zeros(len(free), np.int64))
        rounds = rounds_for(policy, nfe, self._passes_of_partial_critic)
        shares = masked_shares(self.settings, rounds, policy.remasks)  # (rounds,)
        for number, block in enumerate(blocks_of(free.shape[1], self.settings.block_tokens, self.context)):
            in_block = np.zeros_like(free)
            in_block[:, block.start : block.end] = free[:, block.start : block.end]
            batch_idx = np.flatnonzero(in_block.any(1))
            columns = slice(block.window, block.end)  # what the model reads
            rows = _Rows(
                batch_idx=batch_idx,
                keys=texts.rows[batch_idx],
                ids=result.ids[batch_idx, columns],
                free=in_block[batch_idx, columns],
                conditioning=~free[batch_idx, columns],
                confidence=np.ones((len(batch_idx), block.end - block.window)),
                targets=masked_counts_by_round(shares, in_block[batch_idx].sum(1)).T,
                draft=result.ids[batch_idx, columns],
                stable=np.zeros(len(batch_idx), np.int64),
                truth=None if texts.truth is None else texts.truth[batch_idx, columns],
            )
            self._run_block(result, rows, columns, policy, number * rounds, trace)
        return result

    def _run_block(
        self, result: Samples, rows: _Rows, columns: slice, policy: Policy, first: int, trace: bool
    ) -> None:
        """The rounds of one block, into `result`. `first`: number of its first round, which keys the noise."""
        threshold = self.settings.threshold if self.settings.schedule == "threshold" else None
        choose, patience = chooser(policy, threshold), self.settings.stable_rounds
        may_finish = policy.stops or threshold is not None or patience is not None
        rounds = rows.targets.shape[1]
        round_temperatures = temperatures(self.settings, rounds, policy.remasks)
        first_corrector = rounds - corrector_steps(self.settings, rounds, policy.remasks)
        for number in range(rounds):
            if not len(rows.batch_idx):
                return
            # 1. Rows that need a forward pass. A row with fewer tokens than rounds skips some.
            masked = (rows.ids == self.mask_id) & rows.free  # (B, T)
            target = rows.targets[:, number]  # (B,)
            needed = np.full(len(masked), threshold is not None or policy.remasks)
            needed |= target < masked.sum(1)
            needed &= masked.any(1) | (target > 0)  # a row of one token is finished after one round
            if not needed.any():
                continue
            active, masked = rows.select(needed), masked[needed]
            target = target[needed]
            last, is_corrector = number + 1 == rounds, number + 1 >= first_corrector
            # 2. A policy that reads noise alone chooses before the draft: what stays masked needs none.
            masked_after = np.zeros_like(masked)  # (B, T)
            if policy.noise_only and not last:
                masked_after = choose(
                    self._view(first, number, active, masked, _Draft(active.ids), is_corrector)
                )
            # 3. One forward pass drafts the masked positions.
            temperature = float(round_temperatures[number])
            drafted = masked & ~masked_after
            draft = self._draft(active, drafted, first + number, None if last else policy, temperature)
            partial = policy.partial_critic and not last
            result.passes[active.batch_idx] += self._passes_of_partial_critic if partial else 1
            # 4. A row whose last corrector steps resampled the same tokens is finished.
            if number >= first_corrector:
                active.stable = np.where((draft.ids == active.draft).all(1), active.stable + 1, 0)
            active.draft = draft.ids.copy()
            judged = target > 0
            if patience is not None:
                judged &= active.stable < patience
            # 5. The policy reads the draft and chooses what is masked after the round.
            if not (policy.noise_only or last) and judged.any():
                chosen = choose(self._view(first, number, active, masked, draft, is_corrector))
                masked_after = chosen & judged[:, None]
                result.passes[active.batch_idx] += judged * int(policy.extra_pass)
            # 6. The text after the round; finished rows leave.
            active.ids = np.where(masked_after, self.mask_id, draft.ids)
            result.ids[active.batch_idx, columns] = active.ids
            rows.put(needed, active)
            if trace:
                events = np.where(result.ids == self.mask_id, STILL_MASKED, UNCHANGED).astype(np.int8)
                events[active.batch_idx, columns] = round_events(masked, masked_after, policy.drafts_all)
                result.rounds.append(Round(result.ids.copy(), events))
            if may_finish:
                rows = rows.select(((rows.ids == self.mask_id) & rows.free).any(1))

    @property
    def _passes_of_partial_critic(self) -> int:
        """Forward passes of a round in which the critic reads the partly masked text."""
        return 2 if getattr(self.model, "separate_critic_pass", False) else 1

    def _draft(
        self, rows: _Rows, drafted: np.ndarray, number: int, policy: Policy | None, temperature: float
    ) -> _Draft:
        """A token at every position of `drafted` (B, T), by one forward pass. Sets `rows.confidence` there.

        `policy`: reads from the same pass what it needs; None reads nothing.
        """
        draft = _Draft(rows.ids.copy(), np.flatnonzero(drafted))
        partial, present = (False, False) if policy is None else (policy.partial_critic, policy.reads_present)
        visible = rows.free & (rows.ids != self.mask_id) if present else np.zeros_like(drafted)
        visible_idx = np.flatnonzero(visible)
        positions = torch.from_numpy(np.concatenate([draft.flat_idx, visible_idx])).to(self.runtime.device)
        output = self._forward(rows.ids, positions, "both" if partial else "lm")
        draft.logits = output.logits[: len(draft.flat_idx)].float()  # (N, V)
        if partial:
            draft.error, draft.origin = (
                torch.sigmoid(logits.float()).double().cpu().numpy()
                for logits in (output.critic_logits, output.origin_logits)
            )
        if present:
            draft.present = np.ones(visible.shape)
            logits = output.logits[len(draft.flat_idx) :].float()
            tokens, forbidden = (
                torch.as_tensor(x, device=logits.device)
                for x in (rows.ids.reshape(-1)[visible_idx], self.forbidden)
            )
            found = probability_of(tokens, logits, forbidden)
            draft.present.reshape(-1)[visible_idx] = found.double().cpu().numpy()
        if len(draft.flat_idx):
            noise = self._noise("token", number, rows.keys, drafted.shape[1]).reshape(-1)[draft.flat_idx]
            tokens, probability = draw(
                draft.logits,
                torch.from_numpy(noise).to(draft.logits.device),
                torch.tensor(self.forbidden, device=draft.logits.device),
                temperature,
                top_p=self.settings.top_p,
            )
            draft.ids.reshape(-1)[draft.flat_idx] = tokens.cpu().numpy()
            rows.confidence.reshape(-1)[draft.flat_idx] = probability.double().cpu().numpy()
        return draft

    # ------------------------------------------------------------------------------------------ what a policy reads

    def _view(
        self, first: int, number: int, rows: _Rows, masked: np.ndarray, draft: _Draft, is_corrector: bool
    ) -> View:
        key_number, confidence, length = first + number, rows.confidence, rows.ids.shape[1]
        noise = self._noise(purpose="take back", number=key_number, rows=rows.keys, columns=length)
        rounding = self._noise(purpose="take back count", number=key_number, rows=rows.keys, columns=1)
        masked_share = masked.mean(1)  # (B,) of the text that the critic reads, or before it was drafted

        def raw_error() -> np.ndarray:
            return self.raw_error(draft.ids, rows.conditioning)

        def wrong() -> np.ndarray:
            if rows.truth is None:
                raise BadConfig("the policy oracle needs the original text; it is for filling known text")
            return draft.ids != rows.truth

        return View(
            masked=masked,
            free=rows.free,
            target=rows.targets[:, number],
            is_corrector=is_corrector,
            noise=noise,
            rounding_noise=rounding[:, 0],
            confidence=confidence + EPSILON * noise,
            margin=lambda: self._margin(draft) + EPSILON * noise,
            remask_share=self.settings.remask_share,
            remdm_share=self.settings.remdm_share,
            fresh_confidence=lambda: self.fresh_confidence(draft.ids),
            critic_error=lambda: self.calibration(raw_error(), "filled", masked_share),
            blend_error=lambda: self.calibration.blended(raw_error(), confidence),
            partial_error=lambda: self.calibration(draft.error, "partial", masked_share),
            partial_origin=lambda: draft.origin,
            present_confidence=lambda: draft.present,
            wrong=wrong,
            select=lambda scores, eligible, counts: self._select(scores, eligible, counts, noise),
        )

    def _margin(self, draft: _Draft) -> np.ndarray:
        """(B, T) gap between the two most likely tokens of drafted positions, 0 elsewhere."""
        forbidden = torch.tensor(self.forbidden, device=draft.logits.device)
        probabilities = torch.softmax(draft.logits.index_fill(1, forbidden, -torch.inf), -1)
        two = probabilities.topk(2, dim=-1).values.double().cpu().numpy()  # (N, 2)
        margin = np.zeros(draft.ids.shape)
        margin.reshape(-1)[draft.flat_idx] = two[:, 0] - two[:, 1]
        return margin

    def _select(
        self, scores: np.ndarray, eligible: np.ndarray, counts: np.ndarray, noise: np.ndarray
    ) -> np.ndarray:
        """(B, T) bool: `counts[b]` eligible positions of row b, preferably of high score.

        Without a selection temperature, the scores are blended with noise. With one, Gumbel-top-k on the log-odds draws
        without replacement, in proportion to the odds (Kool et al. 2019).
        """
        temperature = self.settings.selection_temperature
        if temperature is None:
            strength = self.settings.randomness_strength
            score = (1 - strength) * scores + strength * noise
        else:
            odds = np.clip(scores, 1e-6, 1 - 1e-6)
            gumbel = np.log(-np.log(np.clip(noise, 1e-12, 1 - 1e-12)))
            score = np.log(odds / (1 - odds)) / temperature - gumbel
        # Equal scores are told apart by noise. Some scores hold EPSILON * noise with the other sign, which must not cancel
        return lowest_k(-(score - EPSILON * noise), eligible, counts)

    # ------------------------------------------------------------------------------------------ scores of texts

    @torch.no_grad()
    def fresh_confidence(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) probability of each token of a whole text that the model reads, too. One forward pass."""

        def read(part: np.ndarray) -> np.ndarray:
            logits = self._forward(part).logits
            tokens, forbidden = (torch.as_tensor(x, device=logits.device) for x in (part, self.forbidden))
            return probability_of(tokens, logits, forbidden).double().cpu().numpy()

        return self._in_windows(read, ids)

    @torch.no_grad()
    def raw_error(self, ids: np.ndarray, conditioning_mask: np.ndarray | None = None) -> np.ndarray:
        """(B, T) the critic's probability of error before calibration, of texts that fit into the context.

        `conditioning_mask` (B, T): tokens that are known to be right; None if nothing is known.
        """
        known = {}
        if conditioning_mask is not None:
            known["conditioning_mask"] = torch.from_numpy(conditioning_mask).to(self.runtime.device)
        return torch.sigmoid(self._forward(ids, head="critic", **known).logits.float()).double().cpu().numpy()

    @torch.no_grad()
    def critic_error(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) calibrated probability that each token of a text is an error, when nothing is known of the text.

        It is the frequency of errors among tokens with the same raw probability. In the texts behind it, all shares of
        generated tokens are equally frequent. One forward pass.
        """
        return self.calibration(self._in_windows(self.raw_error, ids))

    def _in_windows(self, read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> np.ndarray:
        """(B, T) of texts of any length: one longer than the context is read in consecutive windows."""
        width = self.context or ids.shape[1]
        return np.concatenate(
            [read(ids[:, start : start + width]) for start in range(0, ids.shape[1], width)], 1
        )

    def _forward(self, ids: np.ndarray, logits_at: Tensor | None = None, head: str = "lm", **more: Tensor):
        inputs = torch.from_numpy(ids).to(self.runtime.device)
        with self.runtime.autocast():
            return self.model(input_ids=inputs, logits_at=logits_at, head=head, **more)

    def _noise(self, purpose: str, number: int, rows: np.ndarray, columns: int) -> np.ndarray:
        """(B, columns) uniform noise of a round."""
        return randomness.uniform(randomness.key(self.seed, f"sample {purpose}", number), rows, columns)
