"""Losses that teach a ranker which of K candidates is best, from the rewards of all of them.

Every loss is `f(scores, rewards, present, **settings)` -> (N,) a loss per pool, for

    scores   (N, K) unbounded; -inf or anything else where there is no candidate
    rewards  (N, K) in [0, 1]; anything, NaN too, where there is no candidate
    present  (N, K) bool, at least one per pool

Absent candidates add neither value nor gradient. Rewards tie when they are exactly equal. A pool whose rewards
all tie has a defined loss, given in each docstring. Knows nothing of models, text or batches.

Legend: N pools, K candidates.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def log_sum_exp(scores: Tensor, among: Tensor) -> Tensor:
    """log sum exp over the last axis of the scores that `among` (bool, same shape) names; gradients never NaN.

    Nothing named gives about the lowest finite number, for the caller to leave out.
    """
    # The lowest finite number, not -inf: the exponential is 0 as well, and inf - inf cannot arise.
    return scores.masked_fill(~among, torch.finfo(scores.dtype).min).logsumexp(-1)


def cross_entropy(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """-log of the probability that one of the best candidates is chosen. 0 if all rewards tie.

    Tied best candidates count through the sum of their probabilities, not as a target that they share: any of
    them is a right answer, and a target of 1/2 each would punish a ranker that is sure of one, by log 2 at least.
    """
    known = rewards.masked_fill(~present, -torch.inf)
    best = known == known.amax(-1, keepdim=True)
    return log_sum_exp(scores, present) - log_sum_exp(scores, best)


def listwise(scores: Tensor, rewards: Tensor, present: Tensor, temperature: float = 0.25) -> Tensor:
    """Cross-entropy to softmax(rewards / temperature): ListNet's top-one loss (Cao et al., 2007).

    Its least value is the target's entropy, not 0. All rewards tied: least, log K, at equal scores.
    """
    known = (rewards.to(scores.dtype) / temperature).masked_fill(~present, -torch.inf)
    target = torch.softmax(known, -1)  # (N, K), 0 where absent
    return log_sum_exp(scores, present) - (target * scores.masked_fill(~present, 0)).sum(-1)


def list_mle(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """-log likelihood of the order of the rewards under Plackett-Luce (ListMLE, Xia et al., 2008).

    Ties by Efron's approximation (1977): when the l-th of d tied candidates is placed, each of the d is taken to
    have left the pool by l / d. With the log d! orders that a tie stands for, this bounds the exact likelihood of
    all of them: the loss is never below the exact one, and equal to it where tied candidates score the same.
    All rewards tied: least, 0, at equal scores.
    """
    known = rewards.masked_fill(~present, -torch.inf)
    both = present.unsqueeze(-1) & present.unsqueeze(-2)  # (N, K, K)
    tied = both & (known.unsqueeze(-1) == known.unsqueeze(-2))
    below = both & (known.unsqueeze(-1) > known.unsqueeze(-2))  # [i, j]: j is still to be placed when i is
    placed = tied.tril(-1).sum(-1, keepdim=True)  # (N, K, 1) of the candidates tied with i, those before i
    left = 1 - placed.to(scores.dtype) / tied.sum(-1, keepdim=True).clamp(min=1)
    rest = log_sum_exp(scores.unsqueeze(-2) + torch.where(tied, left, 1.0).log(), tied | below)  # (N, K)
    cost = rest - scores.masked_fill(~present, 0) - (placed.squeeze(-1) + 1).to(scores.dtype).log()
    return torch.where(present, cost, 0.0).sum(-1)


def pairwise(
    scores: Tensor, rewards: Tensor, present: Tensor, margin: float = 0.0, scale_margin: bool = False
) -> Tensor:
    """Mean over pairs of different reward of log(1 + exp(margin - (better's score - worse's score))).

    Bradley and Terry (1952); RankNet (Burges et al., 2005) without margin. `scale_margin` multiplies the margin
    by the difference of the rewards. All rewards tied: 0.
    """
    known = rewards.to(scores.dtype).masked_fill(~present, 0)
    ahead = scores.masked_fill(~present, 0)
    ahead = ahead.unsqueeze(-1) - ahead.unsqueeze(-2)  # (N, K, K) by how much i leads j
    gain = known.unsqueeze(-1) - known.unsqueeze(-2)
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2) & (gain > 0)
    cost = F.softplus((margin * gain if scale_margin else margin) - ahead)
    return torch.where(pairs, cost, 0.0).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def regression(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """Mean squared error of sigmoid(score) to the reward, pointwise. All rewards tied: as ever."""
    predicted = torch.sigmoid(scores.masked_fill(~present, 0))
    error = predicted - rewards.to(scores.dtype).masked_fill(~present, 0)
    return torch.where(present, error**2, 0.0).sum(-1) / present.sum(-1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "listwise": listwise,
    "list_mle": list_mle,
    "pairwise": pairwise,
    "regression": regression,
}
