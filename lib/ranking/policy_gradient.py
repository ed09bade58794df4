"""The objective that trains a ranker as a policy: which pools belong to a step, rollouts, and their resume.

The two estimators and their losses are in `lib/ranking/ppo.py`.

Legend: B pools of a batch, K candidates, S sampled actions per pool, D features, M pools in all, P pools of a rollout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.engine.parts import Part
from lib.engine.processes import Processes
from lib.errors import BadConfig
from lib.ranking.actor_critic import ActorCritic
from lib.ranking.ppo import (
    PpoSettings,
    SampledActions,
    exact_loss,
    expected_reward,
    log_policy,
    ppo_loss,
    sample_actions,
)

# Purposes of the random orders. They do not depend on the label, so that both estimators take the same pools in a step
POOL_ORDER, MINIBATCH_ORDER = "ppo pools", "ppo minibatches"


@dataclass
class _Rollout:
    """The actions of the old policy. `number` says which rollout it is: a step uses the current one only."""

    number: int
    old_log_p: Tensor  # (P, S) log probabilities of the actions
    actions: Tensor  # (P, S) int64
    advantages: Tensor  # (P, S) reward less the old critic's value


@dataclass(frozen=True)
class TrainingPools:
    """The pools to learn from.

    Attributes:
        rewards: (M, K), any value where there is no candidate.
        present: (M, K) bool.
        log_start: (M, K) log probabilities (or scores) of the starting policy.
    """

    rewards: np.ndarray
    present: np.ndarray
    log_start: np.ndarray


@dataclass(frozen=True)
class LoopSettings:
    """What the training loop and the objective share.

    Attributes:
        seed, label: the sampled actions are keyed by them; messages start with the label.
        batch_size: pools of a step.
        parts: equal parts of a step's pools; each is one forward pass.
        processes: those among which the forward passes are divided.
        selection: the number of `evaluate` that chooses the best step; it is minimised.
        tokens_per_row: mean number of tokens of a pool, for the logged speed.
    """

    seed: int
    batch_size: int
    selection: str
    tokens_per_row: int
    label: str = "ppo"
    parts: int = 1
    processes: Processes = field(default_factory=Processes)


class PolicyGradient:
    """An objective of the training loop with either estimator. The model is an `ActorCritic`.

    A rollout takes `epochs * rollout_pools / batch_size` steps. At the first of them the policy scores all pools of the
    rollout and samples actions. Each epoch then takes the pools in minibatches. Which pools belong to a step is a
    function of seed and step alone, and the same for both estimators and every label. The checkpoint of a run must hold
    `state()`, so that an interrupted run continues with its rollout.

    The policy runs in eval mode, in the loss too. With dropout, the updated policy would differ from the one that
    sampled, and ratios would differ from 1 before any update.

    Args:
        scores_and_features: (policy, (B,) pool indices) -> ((B, K) float scores, (B, K, D) features).
        evaluate: model -> named numbers, of which `loop.selection` is minimised.
    """

    def __init__(
        self,
        scores_and_features: Callable[[nn.Module, np.ndarray], tuple[Tensor, Tensor]],
        evaluate: Callable[[nn.Module], dict[str, float]],
        pools: TrainingPools,
        settings: PpoSettings,
        estimator: Literal["sampled", "exact"],
        loop: LoopSettings,
    ):
        if settings.rollout_pools % loop.batch_size:
            raise BadConfig(
                f"{loop.label}: rollout_pools is {settings.rollout_pools}, expected a multiple of the batch size "
                f"{loop.batch_size}, since every epoch of a rollout consists of whole batches"
            )
        self.scores_and_features, self.evaluate, self.settings = scores_and_features, evaluate, settings
        self.estimator, self.seed, self.label = estimator, loop.seed, loop.label
        self.batch_size, self.part_size = loop.batch_size, loop.batch_size // loop.parts
        self.selection, self.tokens_per_row = loop.selection, loop.tokens_per_row
        self.processes = loop.processes
        self.rewards = torch.from_numpy(np.asarray(pools.rewards, np.float32))
        self.present = torch.from_numpy(np.asarray(pools.present, bool))
        # log_policy leaves log probabilities as they are, normalises scores, and sets absent candidates to -inf
        self.log_start = log_policy(torch.from_numpy(np.asarray(pools.log_start, np.float32)), self.present)
        self._rollout: _Rollout | None = None

    # ------------------------------------------------------------------ which pools

    def _minibatch(self, step: int) -> tuple[int, np.ndarray]:
        """(number of the rollout, (B,) positions in it) of a step."""
        size = self.settings.rollout_pools
        epoch, start = divmod(step * self.batch_size, size)
        number, epoch_of_rollout = divmod(epoch, self.settings.epochs)
        # The first epoch has the batches in which the old policy scored: ratios at its first step are exactly 1
        order = np.arange(size)
        if epoch_of_rollout:
            order = randomness.permutation(self.seed, MINIBATCH_ORDER, epoch, size)
        return number, order[start : start + self.batch_size]

    def _pools(self, number: int) -> np.ndarray:
        """(P,) pools of a rollout. Pools follow one permutation until all were used, then the next permutation."""
        draws = self._draws(number)
        epochs = draws // len(self.rewards)
        pools = np.empty_like(draws)
        for epoch in np.unique(epochs):
            order = randomness.permutation(self.seed, POOL_ORDER, int(epoch), len(self.rewards))
            pools[epochs == epoch] = order[draws[epochs == epoch] % len(self.rewards)]
        return pools

    def _draws(self, number: int) -> np.ndarray:
        """(P,) counters of the pools of a rollout, unique in the whole training, also when a pool is used again."""
        return number * self.settings.rollout_pools + np.arange(self.settings.rollout_pools)

    def pools_of(self, step: int) -> np.ndarray:
        """(B,) pools of a step."""
        number, positions = self._minibatch(step)
        return self._pools(number)[positions]

    # ------------------------------------------------------------------ loss

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The mean loss of the batch's pools. The model stays in eval mode."""
        assert len(rows) == self.part_size, "the loop's parts are not the objective's"
        assert isinstance(model, ActorCritic)
        model.eval()
        number, positions = self._minibatch(step)
        first = rows.start - step * self.batch_size
        positions = positions[first : first + len(rows)]
        rollout = self._current_rollout(model, step, number) if self.estimator == "sampled" else None

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            pools, share = self._pools(number)[positions], len(rows) / totals["pools"]
            terms = (
                self._exact(model, pools)
                if rollout is None
                else self._sampled(model, pools, rollout, positions)
            )
            return {name: mean * share for name, mean in terms.items()}  # all are means over pools

        return Part({"pools": len(rows)}, losses)

    def _current_rollout(self, model: ActorCritic, step: int, number: int) -> _Rollout:
        """The rollout that a step belongs to. It is collected at its first step."""
        if self._rollout is None or self._rollout.number != number:
            first = step * self.batch_size % (self.settings.rollout_pools * self.settings.epochs) == 0
            assert first, f"step {step} continues a rollout that is missing: load_state() was not called"
            self._rollout = self._collect(model, number)
        return self._rollout

    def _exact(self, model: ActorCritic, pools: np.ndarray) -> dict[str, Tensor]:
        log_p, values = self._forward(model, pools)
        rewards, log_start = self.rewards[pools].to(log_p), self.log_start[pools].to(log_p)
        terms = exact_loss(log_p, rewards, log_start, self.settings)
        expected = expected_reward(log_p.detach(), rewards)
        value_loss = (values - expected).square().mean()  # both estimators train a critic
        return terms | {
            "loss": terms["loss"] + self.settings.value_weight * value_loss,
            "value_loss": value_loss,
            "expected_reward": expected.mean(),
        }

    def _sampled(
        self, model: ActorCritic, pools: np.ndarray, rollout: _Rollout, positions: np.ndarray
    ) -> dict[str, Tensor]:
        log_p, values = self._forward(model, pools)
        rewards, log_start = self.rewards[pools].to(log_p), self.log_start[pools].to(log_p)
        actions = rollout.actions[positions].to(log_p.device)  # (B, S)
        old_log_p, advantages = (t[positions].to(log_p) for t in (rollout.old_log_p, rollout.advantages))
        sampled = SampledActions(actions, old_log_p, advantages, returns=rewards.gather(1, actions))
        terms = ppo_loss(log_p, values, sampled, log_start, self.settings)
        return terms | {"expected_reward": expected_reward(log_p.detach(), rewards).mean()}

    def _forward(self, model: ActorCritic, pools: np.ndarray) -> tuple[Tensor, Tensor]:
        """((B, K) log probabilities, (B,) values)."""
        scores, features = self.scores_and_features(model.policy, pools)
        present = self.present[pools].to(scores.device)
        return log_policy(scores, present), model.value(features, present)

    # ------------------------------------------------------------------ rollouts

    def _collect(self, model: ActorCritic, number: int) -> _Rollout:
        """Score all pools of a rollout with the current policy, and sample its actions."""
        pools, draw_key = self._pools(number), randomness.key(self.seed, f"{self.label} actions", number)

        @torch.no_grad()
        def score(batch: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(values.cpu().numpy() for values in self._forward(model, batch))

        # In the batches of the first steps, so that the ratios there are exactly 1
        found = self.processes.share(score, list(pools.reshape(-1, self.part_size)))
        log_p, values = (torch.from_numpy(np.concatenate(column)) for column in zip(*found, strict=True))
        uniforms = randomness.uniform(draw_key, self._draws(number), self.settings.samples_per_pool)  # (P, S)
        actions = sample_actions(log_p, torch.from_numpy(uniforms))
        advantages = self.rewards[pools].gather(1, actions) - values.unsqueeze(-1)
        if self.settings.normalise_advantages:  # over the rollout: its minibatches have one scale
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)
        return _Rollout(number, log_p.gather(1, actions), actions, advantages)

    def state(self) -> dict[str, Tensor]:
        """The current rollout, for a checkpoint. Empty before the first."""
        if self._rollout is None:
            return {}
        return {**vars(self._rollout), "number": torch.tensor(self._rollout.number)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a rollout from `state()`. An empty state means none."""
        tensors = {name: value for name, value in state.items() if name != "number"}
        self._rollout = _Rollout(int(state["number"]), **tensors) if state else None
