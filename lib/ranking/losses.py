"""Losses that train a ranker to find the best of K candidates, from the rewards of all of them.

Every loss is `f(scores, rewards, present, **settings)` and returns (N,), one loss per pool. Its arguments:

    scores   (N, K) unbounded; any value, also -inf, where there is no candidate
    rewards  (N, K) in [0, 1]; any value, also NaN, where there is no candidate
    present  (N, K) bool, at least one per pool

Absent candidates add neither value nor gradient. Rewards tie when they are exactly equal. The loss is defined when
all rewards of a pool tie; each docstring gives its value.

Legend: N pools, K candidates.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def log_sum_exp(scores: Tensor, among: Tensor) -> Tensor:
    """log sum exp over the last axis, of the scores where `among` (bool, same shape) is set. No gradient is NaN.

    Where none is set, the result is about the lowest finite number. The caller must ignore it.
    """
    # The lowest finite number instead of -inf: its exponential is also 0, and inf - inf cannot arise
    return scores.masked_fill(~among, torch.finfo(scores.dtype).min).logsumexp(-1)


def cross_entropy(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """-log of the probability that one of the best candidates is chosen. 0 if all rewards tie.

    The probabilities of tied best candidates are summed, since each of them is a correct answer. A target of 1/2
    each would instead cost a ranker that is certain of one of them at least log 2.
    """
    known = rewards.masked_fill(~present, -torch.inf)
    best = known == known.amax(-1, keepdim=True)
    return log_sum_exp(scores, present) - log_sum_exp(scores, best)


def listwise(scores: Tensor, rewards: Tensor, present: Tensor, temperature: float = 0.25) -> Tensor:
    """Cross-entropy to softmax(rewards / temperature): ListNet's top-one loss (Cao et al., 2007).

    The minimum is the entropy of the target, not 0. If all rewards tie, it is log K, at equal scores.
    """
    known = (rewards.to(scores.dtype) / temperature).masked_fill(~present, -torch.inf)
    target = torch.softmax(known, -1)  # (N, K), 0 where absent
    return log_sum_exp(scores, present) - (target * scores.masked_fill(~present, 0)).sum(-1)


def list_mle(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """-log likelihood of the order of the rewards under Plackett-Luce (ListMLE, Xia et al., 2008).

    Ties use Efron's approximation (1977). When the l-th of d tied candidates is ranked, each of the d counts as
    removed from the pool by the share l / d. A tie stands for d! orders, and log d! is subtracted for them. The loss is
    never below the exact one, and equals it where tied candidates have equal scores. If all rewards tie, the minimum
    is 0, at equal scores.
    """
    known = rewards.masked_fill(~present, -torch.inf)
    both = present.unsqueeze(-1) & present.unsqueeze(-2)  # (N, K, K)
    tied = both & (known.unsqueeze(-1) == known.unsqueeze(-2))
    below = both & (known.unsqueeze(-1) > known.unsqueeze(-2))  # [i, j]: j is not yet ranked when i is
    ranked = tied.tril(-1).sum(-1, keepdim=True)  # (N, K, 1) candidates tied with i that come before i
    share = 1 - ranked.to(scores.dtype) / tied.sum(-1, keepdim=True).clamp(min=1)
    remaining = log_sum_exp(
        scores.unsqueeze(-2) + torch.where(tied, share, 1.0).log(), tied | below
    )  # (N, K)
    cost = remaining - scores.masked_fill(~present, 0) - (ranked.squeeze(-1) + 1).to(scores.dtype).log()
    return torch.where(present, cost, 0.0).sum(-1)


def pairwise(
    scores: Tensor, rewards: Tensor, present: Tensor, margin: float = 0.0, scale_margin: bool = False
) -> Tensor:
    """Mean of log(1 + exp(margin - (score of the better - score of the worse))) over pairs of different reward.

    Bradley and Terry (1952); RankNet (Burges et al., 2005) without margin. `scale_margin` multiplies the margin
    by the difference of the rewards. If all rewards tie, the loss is 0.
    """
    known = rewards.to(scores.dtype).masked_fill(~present, 0)
    finite = scores.masked_fill(~present, 0)
    lead = finite.unsqueeze(-1) - finite.unsqueeze(-2)  # (N, K, K) score of i less score of j
    gain = known.unsqueeze(-1) - known.unsqueeze(-2)
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2) & (gain > 0)
    cost = F.softplus((margin * gain if scale_margin else margin) - lead)
    return torch.where(pairs, cost, 0.0).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def regression(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """Mean squared error of sigmoid(score) to the reward, pointwise. Ties need no special treatment."""
    predicted = torch.sigmoid(scores.masked_fill(~present, 0))
    error = predicted - rewards.to(scores.dtype).masked_fill(~present, 0)
    return torch.where(present, error**2, 0.0).sum(-1) / present.sum(-1)


def binary_cross_entropy(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """Mean cross-entropy of sigmoid(score) to the reward, pointwise. The minimum is the entropy of the rewards."""
    known = rewards.to(scores.dtype).masked_fill(~present, 0)
    cost = F.binary_cross_entropy_with_logits(scores.masked_fill(~present, 0), known, reduction="none")
    return torch.where(present, cost, 0.0).sum(-1) / present.sum(-1)


def mse(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """Mean squared error of the score itself to the target, pointwise: distillation from a teacher's scores.

    Targets may have any range: see `TEACHER`.
    """
    error = scores.masked_fill(~present, 0) - rewards.to(scores.dtype).masked_fill(~present, 0)
    return torch.where(present, error**2, 0.0).sum(-1) / present.sum(-1)


def margin_mse(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """Mean squared error of the difference of two scores to that of their targets (Hofstaetter et al., 2020), over all pairs.

    A pool with one candidate has no pair, and a loss of 0.
    """
    finite = scores.masked_fill(~present, 0)
    known = rewards.to(scores.dtype).masked_fill(~present, 0)
    error = (finite - known).unsqueeze(-1) - (finite - known).unsqueeze(-2)  # (N, K, K)
    pairs = (present.unsqueeze(-1) & present.unsqueeze(-2)).triu(1)
    return torch.where(pairs, error**2, 0.0).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def bradley_terry(scores: Tensor, rewards: Tensor, present: Tensor, margin: float = 0.0) -> Tensor:
    """`pairwise` with a margin that grows with the difference of the rewards, as in Llama 2 (Touvron et al., 2023)."""
    return pairwise(scores, rewards, present, margin, scale_margin=True)


def p_list_mle(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """ListMLE with a weight of 2^(K - rank) - 1 for each place, divided by their sum (p-ListMLE, Lan et al., 2014).

    The order is that of the rewards; tied candidates are in the order of their scores, the highest first, so that a tie costs
    nothing that its order does not. If all rewards tie, the loss is that of the present order.
    """
    lowest = torch.finfo(scores.dtype).min
    known = rewards.to(scores.dtype).masked_fill(~present, -torch.inf)
    by_score = scores.detach().masked_fill(~present, lowest).argsort(dim=-1, descending=True, stable=True)
    order = by_score.gather(-1, known.gather(-1, by_score).argsort(dim=-1, descending=True, stable=True))
    ranked = scores.masked_fill(~present, lowest).gather(
        -1, order
    )  # (N, K), the best first, absent ones last
    here = present.gather(-1, order)
    remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    count = present.sum(-1, keepdim=True)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    # 2^(K - rank) - 1 over its sum 2^K - 1 - K, computed without the large powers
    power = torch.exp2(-rank.to(scores.dtype)).expand_as(scores)
    weight = (power - torch.exp2(-count.to(scores.dtype))).masked_fill(~here, 0)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return (weight * torch.where(here, remaining - ranked, 0.0)).sum(-1)


def lambda_loss(scores: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """LambdaLoss with the weights NDCG-Loss2++ (Wang et al., 2018), a bound of NDCG, with the rewards as linear gains.

    Each pair of different reward has the logistic loss of RankNet. Its weight is the difference of the gains, times a sum: the
    difference of discounts at their ranks (LambdaRank), plus ten times that at the distance of their ranks.
    Natural logarithm. If all rewards tie, the loss is 0.
    """
    dtype, lowest = scores.dtype, torch.finfo(scores.dtype).min
    finite = scores.masked_fill(~present, 0)
    known = rewards.to(dtype).masked_fill(~present, 0)
    rank = (
        scores.detach()
        .masked_fill(~present, lowest)
        .argsort(dim=-1, descending=True, stable=True)
        .argsort(dim=-1)
        + 1
    )
    ideal_rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=dtype)
    ideal = (known.sort(-1, descending=True).values / torch.log2(1 + ideal_rank)).sum(-1, keepdim=True)
    gain = known / ideal.clamp(min=torch.finfo(dtype).tiny)
    positions = rank.to(dtype)
    distance = (positions.unsqueeze(-1) - positions.unsqueeze(-2)).abs()  # (N, K, K)
    inverse = 1 / torch.log2(1 + positions)
    rank_weight = (inverse.unsqueeze(-1) - inverse.unsqueeze(-2)).abs()
    near = distance.clamp(min=1)
    distance_weight = (1 / torch.log2(1 + near) - 1 / torch.log2(2 + near)).abs()
    lead = gain.unsqueeze(-1) - gain.unsqueeze(-2)
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2) & (lead > 0)
    weight = (rank_weight + LAMBDA_MIX * distance_weight) * lead
    cost = F.softplus(finite.unsqueeze(-2) - finite.unsqueeze(-1))
    return torch.where(pairs, weight * cost, 0.0).sum((-2, -1))


LAMBDA_MIX = 10.0  # mu of NDCG-Loss2++
POINTWISE = (
    "regression",
    "binary_cross_entropy",
    "mse",
)  # they also learn from pools whose rewards are equal
TEACHER = ("mse", "margin_mse")  # their targets are the scores of another model where the data has them

LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "listwise": listwise,
    "list_mle": list_mle,
    "pairwise": pairwise,
    "regression": regression,
    "binary_cross_entropy": binary_cross_entropy,
    "lambda_loss": lambda_loss,
    "p_list_mle": p_list_mle,
    "bradley_terry": bradley_terry,
    "mse": mse,
    "margin_mse": margin_mse,
}
