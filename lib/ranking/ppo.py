"""Policy gradients for a choice among K candidates. The policy is softmax(scores) of a ranker.

One pool is one decision: the state is the pool, the action a candidate, the return its reward. There is no next
state. The advantage is therefore `reward - value of the pool`, and nothing is discounted. Two estimators maximise
expected reward - kl_weight * KL(policy || start) + entropy_weight * entropy:

    sampled  PPO (Schulman et al., 2017): actions sampled from an old policy, clipped ratios, a value baseline
    exact    the gradient of sum_k p_k r_k. All K rewards are known, so it exists: it is the baseline for PPO

In both, KL and entropy are exact sums over the candidates, with gradients. Not implemented: KL estimated from samples,
early stopping of an epoch, clipped values.

Implementations of PPO usually normalise advantages, and `normalise_advantages` does so over a rollout. The sampled estimator
then divides the reward by the standard deviation of the advantages, but not KL, entropy and value error. These count less
than in `exact` where that deviation is below 1. Without normalisation, both estimators have the same objective.

Legend: N pools, K candidates, S sampled actions per pool.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.diffusion.categorical import running_sum
from lib.ranking.losses import log_sum_exp


@dataclass(frozen=True)
class PpoSettings:
    """The settings of both estimators; see `critic.ppo` in configs/default.yaml."""

    clip: float = 0.2  # ratios beyond 1 - clip and 1 + clip have no gradient
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    kl_weight: float = 0.02
    rollout_pools: int = 64
    epochs: int = 4  # per rollout
    samples_per_pool: int = 4
    normalise_advantages: bool = True  # to mean 0 and standard deviation 1 over a rollout


# ----------------------------------------------------------------------------------------- distributions


def log_policy(scores: Tensor, present: Tensor) -> Tensor:
    """(N, K) log probabilities: -inf where there is no candidate. No gradient is NaN."""
    return (scores - log_sum_exp(scores, present).unsqueeze(-1)).masked_fill(~present, -torch.inf)


def _finite(log_p: Tensor) -> Tensor:
    """The logarithms with 0 in place of -inf. A product with probability 0 is then 0, and so is its gradient."""
    return log_p.masked_fill(log_p == -torch.inf, 0)


def entropy(log_p: Tensor) -> Tensor:
    """(N,) entropies in nats."""
    return -(log_p.exp() * _finite(log_p)).sum(-1)


def kl(log_p: Tensor, log_start: Tensor) -> Tensor:
    """(N,) KL(policy || start) in nats. Both distributions have the same candidates."""
    return (log_p.exp() * (_finite(log_p) - _finite(log_start))).sum(-1)


def sample_actions(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """(N, S) int64 candidates, by inversion of the cumulative probabilities.

    A candidate of probability 0 is never sampled: a uniform below 1 times the total stays below the total, also rounded.

    Args:
        uniforms: (N, S) float64 in [0, 1).
    """
    cumulative = running_sum(log_p.double().exp())  # (N, K)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)


# ----------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class SampledActions:
    """Actions that the old policy sampled. No tensor has a gradient.

    Attributes:
        actions: (N, S) int64 candidates.
        old_log_p: (N, S) log probability of each action under the old policy.
        advantages: (N, S) return less the old critic's value.
        returns: (N, S) reward of each action.
    """

    actions: Tensor
    old_log_p: Tensor
    advantages: Tensor
    returns: Tensor


def ppo_loss(
    log_p: Tensor, values: Tensor, sampled: SampledActions, log_start: Tensor, settings: PpoSettings
) -> dict[str, Tensor]:
    """Clipped surrogate + value error + KL to the start - entropy, as named scalars. `loss` is minimised.

    Args:
        log_p, log_start: (N, K) log probabilities now and at the start of training.
        values: (N,) predictions of the critic, in units of reward.
    """
    log_ratio = log_p.gather(1, sampled.actions) - sampled.old_log_p  # (N, S)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    policy_loss = -torch.minimum(ratio * sampled.advantages, clipped * sampled.advantages).mean()
    value_loss = (values.unsqueeze(-1) - sampled.returns).square().mean()
    regularisers = _regularisers(log_p, log_start)
    with torch.no_grad():
        diagnostics = {
            "ratio_mean": ratio.mean(),
            "clip_fraction": ((ratio - 1).abs() > settings.clip).to(ratio.dtype).mean(),
            # Unbiased under the old policy, and never negative
            "approx_kl_to_old": (ratio - 1 - log_ratio).mean(),
        }
    loss = policy_loss + settings.value_weight * value_loss + _weighted(regularisers, settings)
    return {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, **regularisers, **diagnostics}


def exact_loss(log_p: Tensor, rewards: Tensor, log_start: Tensor, settings: PpoSettings) -> dict[str, Tensor]:
    """- expected reward + KL to the start - entropy, weighted as in `ppo_loss`.

    Args:
        log_p, log_start: (N, K) log probabilities now and at the start of training.
        rewards: (N, K), any value where there is no candidate.
    """
    policy_loss = -expected_reward(log_p, rewards).mean()
    regularisers = _regularisers(log_p, log_start)
    return {
        "loss": policy_loss + _weighted(regularisers, settings),
        "policy_loss": policy_loss,
        **regularisers,
    }


def expected_reward(log_p: Tensor, rewards: Tensor) -> Tensor:
    """(N,) sum of probability times reward. The rewards of absent candidates may have any value."""
    return (log_p.exp() * rewards.masked_fill(log_p == -torch.inf, 0)).sum(-1)


def _regularisers(log_p: Tensor, log_start: Tensor) -> dict[str, Tensor]:
    return {"entropy": entropy(log_p).mean(), "kl_to_start": kl(log_p, log_start).mean()}


def _weighted(regularisers: dict[str, Tensor], settings: PpoSettings) -> Tensor:
    return (
        settings.kl_weight * regularisers["kl_to_start"] - settings.entropy_weight * regularisers["entropy"]
    )
