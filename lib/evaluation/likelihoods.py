"""Log-likelihoods of answers under a masked-diffusion model, with standard errors.

The estimate is that of the bound on the log-likelihood (Nie et al., LLaDA, 2025): of the L tokens of an answer, k are masked,
k uniform in 1 .. L, and the log-probabilities of these k tokens, given the rest, count L / k times. Its mean over all masks is
the bound itself.

Masks are stratified in two ways. The n draws divide 1 .. L into n equal parts. And they take the tokens in turn, from one random
order: each draw masks those that follow the draw before, so all tokens are masked equally often. Noise is keyed by the question, so all options
of one question have common random numbers: draw j masks about the same share of each, at the same positions. So the noise of
their differences, which decide between them, is smaller than that of each.

Legend: R requests, N rows of a forward pass, T tokens, L tokens of an answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import nn

from lib import randomness
from lib.errors import BadData
from lib.runtime import Runtime
from lib.training.objectives.base import tensor


@dataclass(frozen=True)
class Request:
    """An answer whose likelihood is wanted, given a prompt. `question`: requests of the same number share their noise."""

    prompt: np.ndarray  # (P,) ids
    answer: np.ndarray  # (L,) ids, at least one
    question: int


def standard_error(draws: np.ndarray) -> float:
    """Standard error of the mean of (n,) draws from consecutive strata, from the differences of neighbours.

    It is scaled so that two of them are half of a 95 % interval (Student's t): neighbouring differences have about two thirds as
    many degrees of freedom as there are.
    """
    count = len(draws)
    variance = float((np.diff(draws) ** 2).mean()) / 2
    return float(np.sqrt(variance / count) * stdtrit(max(1.0, 2 * (count - 1) / 3), 0.975) / 2)


@dataclass(frozen=True)
class Likelihood:
    """An estimate in nats.

    Attributes:
        value: log-likelihood of the answer.
        standard_error: of the estimate; see `standard_error`.
        draws: the values of the draws, whose mean is the estimate.
        is_greedy: every token of the answer is the most likely one when the whole answer is masked.
    """

    value: float
    standard_error: float
    draws: np.ndarray
    is_greedy: bool


@dataclass
class LikelihoodEstimator:
    """Estimates log-likelihoods under a masked LM.

    Attributes:
        model: forward(input_ids, attention_mask, logits_at) -> .logits.
        mask_id, pad_id: ids.
        context: tokens that the model reads. Of a longer prompt it reads the end.
        draws: n, the number of masks for each answer.
        common: the options of a question share their noise.
        batch_size: rows of a forward pass.
    """

    model: nn.Module
    mask_id: int
    pad_id: int
    context: int
    runtime: Runtime
    seed: int = 0
    draws: int = 32
    common: bool = True
    batch_size: int = 64

    def estimate(self, requests: Sequence[Request]) -> Iterator[Likelihood]:
        """The likelihood of each request, in order. Raises BadData for an answer that is longer than the context."""
        if self.draws < 2:
            raise ValueError(f"a standard error needs at least two draws, got {self.draws}")
        size = max(1, self.batch_size // (self.draws + 1))
        for start in range(0, len(requests), size):
            yield from self._of_some(requests[start : start + size], start)

    def masks(self, length: int, question: int) -> np.ndarray:
        """(n, L) bool, the masks of the draws for an answer of L tokens."""
        rows = np.arange(self.draws)
        shift = randomness.uniform(
            randomness.key(self.seed, "likelihood share", question), np.zeros(1, int), 1
        )[0, 0]
        shares = (rows + shift) / self.draws
        counts = np.minimum(np.floor(shares * length).astype(np.int64) + 1, length)
        noise = randomness.uniform(
            randomness.key(self.seed, "likelihood mask", question), np.zeros(1, int), length
        )[0]
        rank_of = np.argsort(
            np.argsort(noise, kind="stable"), kind="stable"
        )  # (L,) of each token in a random order
        start = np.cumsum(counts) - counts
        return (rank_of - start[:, None]) % length < counts[:, None]

    @torch.no_grad()
    def _of_some(self, requests: Sequence[Request], first: int) -> Iterator[Likelihood]:
        # 1. A row for each draw, and one with the whole answer masked
        texts, masks = [], []
        for number, request in enumerate(requests):
            answer = request.answer
            if len(answer) > self.context:
                raise BadData(
                    f"an answer has {len(answer):,} tokens, but the model reads {self.context:,} at most; give a model with a longer "
                    "context, or leave the question out"
                )
            prompt = request.prompt[max(0, len(request.prompt) + len(answer) - self.context) :]
            text = np.concatenate([prompt, answer]).astype(np.int64)
            key = request.question if self.common else (first + number) * 2**20 + request.question
            masked = np.concatenate([self.masks(len(answer), key), np.ones((1, len(answer)), bool)])
            texts.append(np.broadcast_to(text, (len(masked), len(text))))
            masks.append(np.pad(masked, ((0, 0), (len(prompt), 0))))
        width = max(text.shape[1] for text in texts)

        def padded(arrays: list[np.ndarray], fill: int) -> np.ndarray:
            return np.concatenate(
                [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays]
            )

        ids, masked = padded(texts, self.pad_id), padded(masks, 0).astype(bool)
        valid = padded([np.ones(text.shape, bool) for text in texts], 0).astype(bool)
        # 2. Log-probabilities at the masked positions, (N, T)
        log_probabilities, is_best = np.zeros(ids.shape), np.ones(ids.shape, bool)
        for start in range(0, len(ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            flat_idx = np.flatnonzero(masked[part])
            inputs = np.where(masked[part], self.mask_id, ids[part])
            given = None if valid[part].all() else tensor(valid[part], self.runtime)
            with self.runtime.autocast():
                logits = self.model(
                    input_ids=tensor(inputs, self.runtime),
                    attention_mask=given,
                    logits_at=tensor(flat_idx, self.runtime),
                ).logits.float()
            targets = tensor(ids[part].reshape(-1)[flat_idx], self.runtime)
            values = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
            for array, found in ((log_probabilities, values), (is_best, logits.argmax(-1) == targets)):
                block = array[part]
                block.reshape(-1)[flat_idx] = found.cpu().numpy()
                array[part] = block
        # 3. Each draw counts L / k times
        sums = log_probabilities.sum(1) * (self._lengths(masks) / masked.sum(1))
        for number in range(len(requests)):
            row = number * (self.draws + 1)
            draws = sums[row : row + self.draws]
            yield Likelihood(
                float(draws.mean()), standard_error(draws), draws, bool(is_best[row + self.draws].all())
            )

    def _lengths(self, masks: list[np.ndarray]) -> np.ndarray:
        """(N,) tokens of the answer of each row: all of them are masked in the last row of a request."""
        return np.concatenate([np.full(len(mask), mask[-1].sum()) for mask in masks])
