"""Policy gradients for a choice among K candidates: a ranker as policy, softmax(scores) its chances.

One pool is one decision: the state is the pool, the action a candidate, the return its reward. There is no next
state, so an advantage is `reward - value of the pool` and nothing is discounted. Two estimators of the same
objective, expected reward - kl_weight * KL(policy || start) + entropy_weight * entropy:

    sampled  PPO (Schulman et al., 2017): actions sampled by an old policy, clipped ratios to it, a value baseline
    exact    the gradient of sum_k p_k r_k, which is known because all K rewards are: what PPO should be held against

KL and entropy are exact sums over the candidates in both, with gradients. Left out on purpose: estimates of KL
from samples, stopping an epoch early, clipped values. Knows no text, tokens or files.

Legend: N or B pools, K candidates, S sampled actions per pool, D features, M pools in all, P pools of a rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.categorical import running_sum
from lib.errors import BadConfig
from lib.ranking.losses import log_sum_exp


@dataclass(frozen=True)
class PpoSettings:
    clip: float = 0.2  # how far a ratio to the old policy may pay
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    kl_weight: float = 0.02
    rollout_pools: int = 64
    epochs: int = 4  # passes over a rollout
    samples_per_pool: int = 4
    normalise_advantages: bool = True  # mean 0 and deviation 1 over a rollout


# ----------------------------------------------------------------------------------------- distributions


def log_policy(scores: Tensor, present: Tensor) -> Tensor:
    """(N, K) log chances; -inf where there is no candidate, without NaN in any gradient."""
    return (scores - log_sum_exp(scores, present).unsqueeze(-1)).masked_fill(~present, -torch.inf)


def _finite(log_p: Tensor) -> Tensor:
    """The logarithms with 0 in place of -inf, so that chance 0 times it is 0, and its gradient too."""
    return log_p.masked_fill(log_p == -torch.inf, 0)


def entropy(log_p: Tensor) -> Tensor:
    """(N,) nats."""
    return -(log_p.exp() * _finite(log_p)).sum(-1)


def kl(log_p: Tensor, log_start: Tensor) -> Tensor:
    """(N,) nats of KL(policy || start); both over the same candidates."""
    return (log_p.exp() * (_finite(log_p) - _finite(log_start))).sum(-1)


def sample_actions(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """(N, S) int64 candidates by inversion of the cumulative chances, from (N, S) float64 numbers in [0, 1).

    A candidate of chance 0 is never taken: a number below 1 times the total is below the total, rounded too.
    """
    cumulative = running_sum(log_p.double().exp())  # (N, K)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)


# ----------------------------------------------------------------------------------------- losses


def ppo_loss(
    log_p: Tensor,
    old_log_p_of_action: Tensor,
    actions: Tensor,
    advantages: Tensor,
    values: Tensor,
    returns: Tensor,
    log_start: Tensor,
    settings: PpoSettings,
) -> dict[str, Tensor]:
    """Clipped surrogate + value error + KL to the start - entropy, as named scalars; `loss` is to be minimised.

    Args:
        log_p, log_start: (N, K) log chances now and at the start of training.
        old_log_p_of_action: (N, S) log chance that the old policy gave to each action, no gradient.
        actions: (N, S) candidates sampled from the old policy.
        advantages, returns: (N, S), no gradient.
        values: (N,) the critic's, in units of reward.
    """
    log_ratio = log_p.gather(1, actions) - old_log_p_of_action  # (N, S)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    value_loss = (values.unsqueeze(-1) - returns).square().mean()
    drift = _regularisers(log_p, log_start)
    with torch.no_grad():
        shown = {
            "ratio_mean": ratio.mean(),
            "clip_fraction": ((ratio - 1).abs() > settings.clip).to(ratio.dtype).mean(),
            "approx_kl_to_old": (
                ratio - 1 - log_ratio
            ).mean(),  # unbiased under the old policy, never negative
        }
    loss = policy_loss + settings.value_weight * value_loss + _weighed(drift, settings)
    return {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, **drift, **shown}


def exact_loss(log_p: Tensor, rewards: Tensor, log_start: Tensor, settings: PpoSettings) -> dict[str, Tensor]:
    """- expected reward + KL to the start - entropy, weighed as in `ppo_loss`. (N, K) each; rewards where present."""
    policy_loss = -expected_reward(log_p, rewards).mean()
    drift = _regularisers(log_p, log_start)
    return {"loss": policy_loss + _weighed(drift, settings), "policy_loss": policy_loss, **drift}


def expected_reward(log_p: Tensor, rewards: Tensor) -> Tensor:
    """(N,) sum of chance times reward; the rewards of absent candidates may be anything."""
    return (log_p.exp() * rewards.masked_fill(log_p == -torch.inf, 0)).sum(-1)


def _regularisers(log_p: Tensor, log_start: Tensor) -> dict[str, Tensor]:
    return {"entropy": entropy(log_p).mean(), "kl_to_start": kl(log_p, log_start).mean()}


def _weighed(drift: dict[str, Tensor], settings: PpoSettings) -> Tensor:
    return settings.kl_weight * drift["kl_to_start"] - settings.entropy_weight * drift["entropy"]


# ----------------------------------------------------------------------------------------- critic


class ValueHead(nn.Module):
    """What reward to expect in a pool, in units of reward, from the mean of its candidates' features.

    The mean does not depend on their order. With `detach` the critic learns without moving the features, so that
    policies trained with and without one differ in nothing else. The weights are a function of `seed`.
    """

    def __init__(self, hidden: int, width: int = 64, seed: int = 0, detach: bool = True):
        super().__init__()
        self.detach = detach
        with torch.random.fork_rng():
            torch.manual_seed(randomness.key(seed, "value head weights") % 2**63)
            self.norm = nn.LayerNorm(hidden)
            self.inner = nn.Linear(hidden, width)
            self.outer = nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """(N,) values of (N, K, D) features; those of absent candidates may be anything."""
        features = (features.detach() if self.detach else features).to(self.inner.weight.dtype)
        kept = features.masked_fill(~present.unsqueeze(-1), 0)
        mean = kept.sum(1) / present.sum(1, keepdim=True)  # (N, D)
        return self.outer(nn.functional.gelu(self.inner(self.norm(mean)))).squeeze(-1)


class ActorCritic(nn.Module):
    """A policy, which is any ranker, and its value head: one model for the optimiser and the checkpoint."""

    backbone_names = (
        "policy.",
    )  # all but the value head, which starts from nothing and may want its own learning rate

    def __init__(self, policy: nn.Module, value: ValueHead):
        super().__init__()
        self.policy, self.value = policy, value


# ----------------------------------------------------------------------------------------- objective


@dataclass
class _Rollout:
    """What the old policy did: numbered, since only the rollout of the present step is of use."""

    number: int
    old_log_p: Tensor  # (P, S) of its actions
    actions: Tensor  # (P, S) int64
    advantages: Tensor  # (P, S) over the old critic


class PolicyGradient:
    """Either estimator as objective of the training loop; the model is an `ActorCritic`.

    Steps are grouped by rollouts of `epochs * rollout_pools / batch_size` steps. At its first step the policy
    judges all pools of the rollout and samples; then every pass takes them in minibatches. Which pools belong to
    a step is a function of the step alone, and the same for both estimators. The checkpoint of a run must hold
    `state()`, so that a run cut off in the middle of a rollout goes on with it.

    The policy runs in eval mode, in the loss too: dropout would make the policy that is updated another one than
    the one that sampled, and ratios would differ from 1 before anything was learned. In eval mode transformers
    recompute no activations, so gradient checkpointing saves nothing here.

    Args:
        scores_and_features: (policy, (B,) pool numbers) -> ((B, K) float scores, (B, K, D) features).
        rewards, present, log_start: (M, K); log_start are log chances (or scores) of the starting policy.
        evaluate: model -> named numbers, of which `selection` is minimised.
    """

    def __init__(self, scores_and_features: Callable[[nn.Module, np.ndarray], tuple[Tensor, Tensor]],
                 rewards: np.ndarray, present: np.ndarray, log_start: np.ndarray,
                 evaluate: Callable[[nn.Module], dict[str, float]], settings: PpoSettings,
                 estimator: Literal["sampled", "exact"], seed: int, batch_size: int, *, selection: str,
                 tokens_per_row: int, label: str = "ppo"):  # fmt: skip
        if settings.rollout_pools % batch_size:
            raise BadConfig(
                f"{label}: rollout_pools is {settings.rollout_pools}, expected a multiple of the batch size "
                f"{batch_size}, since a rollout is gone through in whole batches"
            )
        self.scores_and_features, self.evaluate, self.settings = scores_and_features, evaluate, settings
        self.estimator, self.seed, self.batch_size, self.label = estimator, seed, batch_size, label
        self.selection, self.tokens_per_row = selection, tokens_per_row
        self.rewards = torch.from_numpy(np.asarray(rewards, np.float32))
        self.present = torch.from_numpy(np.asarray(present, bool))
        # Log chances are their own log softmax; this makes them sure to be that, and -inf where absent.
        self.log_start = log_policy(torch.from_numpy(np.asarray(log_start, np.float32)), self.present)
        self._rollout: _Rollout | None = None

    # ------------------------------------------------------------------ which pools

    def _place(self, step: int) -> tuple[int, np.ndarray]:
        """(number of the rollout, (B,) places in it) of a step."""
        size = self.settings.rollout_pools
        epoch, start = divmod(step * self.batch_size, size)
        number, again = divmod(epoch, self.settings.epochs)
        # The first pass takes the batches in which the old policy judged: ratios at its first step are 1 to the bit.
        order = np.arange(size)
        if again:
            order = randomness.permutation(self.seed, f"{self.label} minibatches", epoch, size)
        return number, order[start : start + self.batch_size]

    def _pools(self, number: int) -> np.ndarray:
        """(P,) pools of a rollout: the next ones of an order of all that is new each time it is used up."""
        rows = self._rows(number)
        passes = rows // len(self.rewards)
        pools = np.empty_like(rows)
        for one in np.unique(passes):
            order = randomness.permutation(self.seed, f"{self.label} pools", int(one), len(self.rewards))
            pools[passes == one] = order[rows[passes == one] % len(self.rewards)]
        return pools

    def _rows(self, number: int) -> np.ndarray:
        """(P,) numbers that no two pools of the whole training share, also when a pool comes again."""
        return number * self.settings.rollout_pools + np.arange(self.settings.rollout_pools)

    def pools_of(self, step: int) -> np.ndarray:
        """(B,) pools of a step."""
        number, places = self._place(step)
        return self._pools(number)[places]

    # ------------------------------------------------------------------ loss

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        """Named terms, as the training loop asks for them. Leaves the model in eval mode."""
        assert len(rows) == self.batch_size, "the loop's batch size is not the objective's"
        assert isinstance(model, ActorCritic)
        model.eval()
        number, places = self._place(step)
        if self.estimator == "exact":
            return self._exact(model, self._pools(number)[places])
        if self._rollout is None or self._rollout.number != number:
            first = step * self.batch_size % (self.settings.rollout_pools * self.settings.epochs) == 0
            assert first, f"step {step} goes on with a rollout that is not there: load_state() was not called"
            self._rollout = self._collect(model, number)
        return self._sampled(model, self._pools(number)[places], self._rollout, places)

    def _exact(self, model: ActorCritic, pools: np.ndarray) -> dict[str, Tensor]:
        log_p, values = self._judge(model, pools)
        rewards, log_start = self.rewards[pools].to(log_p), self.log_start[pools].to(log_p)
        terms = exact_loss(log_p, rewards, log_start, self.settings)
        expected = expected_reward(log_p.detach(), rewards)
        value_loss = (values - expected).square().mean()  # so that both estimators end with a critic
        return terms | {
            "loss": terms["loss"] + self.settings.value_weight * value_loss,
            "value_loss": value_loss,
            "expected_reward": expected.mean(),
        }

    def _sampled(
        self, model: ActorCritic, pools: np.ndarray, rollout: _Rollout, places: np.ndarray
    ) -> dict[str, Tensor]:
        log_p, values = self._judge(model, pools)
        rewards, log_start = self.rewards[pools].to(log_p), self.log_start[pools].to(log_p)
        actions = rollout.actions[places].to(log_p.device)  # (B, S)
        old, advantages = (t[places].to(log_p) for t in (rollout.old_log_p, rollout.advantages))
        returns = rewards.gather(1, actions)
        terms = ppo_loss(log_p, old, actions, advantages, values, returns, log_start, self.settings)
        return terms | {"expected_reward": expected_reward(log_p.detach(), rewards).mean()}

    def _judge(self, model: ActorCritic, pools: np.ndarray) -> tuple[Tensor, Tensor]:
        """((B, K) log chances, (B,) values)."""
        scores, features = self.scores_and_features(model.policy, pools)
        present = self.present[pools].to(scores.device)
        return log_policy(scores, present), model.value(features, present)

    # ------------------------------------------------------------------ rollouts

    def _collect(self, model: ActorCritic, number: int) -> _Rollout:
        """The policy as it is now judges all pools of a rollout and samples its actions."""
        pools, draw_key = self._pools(number), randomness.key(self.seed, f"{self.label} actions", number)
        with torch.no_grad():
            parts = [self._judge(model, part) for part in pools.reshape(-1, self.batch_size)]
        log_p, values = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        uniforms = randomness.uniform(draw_key, self._rows(number), self.settings.samples_per_pool)  # (P, S)
        actions = sample_actions(log_p, torch.from_numpy(uniforms))
        advantages = self.rewards[pools].gather(1, actions) - values.unsqueeze(-1)
        if self.settings.normalise_advantages:  # over the rollout, so that its minibatches share one scale
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)
        return _Rollout(number, log_p.gather(1, actions), actions, advantages)

    def state(self) -> dict[str, Tensor]:
        """The rollout that is under way, for a checkpoint; empty before the first."""
        if self._rollout is None:
            return {}
        return {**vars(self._rollout), "number": torch.tensor(self._rollout.number)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up a rollout from `state()`; an empty one means none."""
        tensors = {name: value for name, value in state.items() if name != "number"}
        self._rollout = _Rollout(int(state["number"]), **tensors) if state else None
