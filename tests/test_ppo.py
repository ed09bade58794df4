"""PPO over K candidates: sampling, agreement of its mean gradient with the exact one, and exact resume."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lib import randomness
from lib.errors import BadConfig
from lib.ranking.actor_critic import ActorCritic, ValueHead
from lib.ranking.policy_gradient import LoopSettings, PolicyGradient, TrainingPools
from lib.ranking.ppo import (
    PpoSettings,
    SampledActions,
    entropy,
    exact_loss,
    expected_reward,
    kl,
    log_policy,
    ppo_loss,
    sample_actions,
)
from lib.training.objectives.base import batch_losses


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


PLAIN = PpoSettings(entropy_weight=0.0, kl_weight=0.0, value_weight=0.0, normalise_advantages=False)


def pools(seed: int = 0, count: int = 6, width: int = 5):
    """(scores, start scores, rewards, present) in float64, with absent candidates."""
    rng = np.random.default_rng(seed)
    present = rng.random((count, width)) < 0.75
    present[:, 0] = True
    present[0] = True
    scores, start, rewards = rng.normal(size=(3, count, width))
    rewards = np.where(present, 1 / (1 + np.exp(-rewards)), np.nan)
    absent = np.where(present, 0, -np.inf)
    return tuple(torch.from_numpy(x) for x in (scores + absent, start + absent, rewards, present))


# ----------------------------------------------------------------------------------------- distributions


def test_entropy_kl_and_expected_reward_equal_sums_over_those_present():
    scores, start, rewards, present = pools()
    leaf = scores.clone().requires_grad_()
    log_p, log_start = log_policy(leaf, present), log_policy(start, present)
    got = {
        "entropy": entropy(log_p),
        "kl": kl(log_p, log_start),
        "reward": expected_reward(log_p, rewards),
    }
    for n in range(len(scores)):
        s = scores[n][present[n]].clone().requires_grad_()
        p, q = torch.softmax(s, 0), torch.softmax(start[n][present[n]], 0)
        expected = {
            "entropy": -(p * p.log()).sum(),
            "kl": (p * (p / q).log()).sum(),
            "reward": (p * rewards[n][present[n]]).sum(),
        }
        for name, value in expected.items():
            assert got[name][n].item() == pytest.approx(value.item(), abs=1e-12)
            right, ours = gradient(value, s), gradient(got[name][n], leaf)
            torch.testing.assert_close(ours[n][present[n]], right, atol=1e-12, rtol=0)
            assert (ours[n][~present[n]] == 0).all(), name


def test_a_policy_that_is_sure_has_finite_gradients():
    scores = torch.tensor([[200.0, 0.0, -torch.inf], [0.0, -3e4, 3e4]], requires_grad=True)
    present = torch.tensor([[True, True, False], [True, True, True]])
    log_p = log_policy(scores, present)
    total = (entropy(log_p) + kl(log_p, log_policy(scores.detach() * 0.5, present))).sum()
    assert torch.isfinite(gradient(total, scores)).all()


def test_actions_come_as_often_as_their_chances_say_and_absent_ones_never():
    scores, _, _, present = pools(1)
    log_p = log_policy(scores, present)
    draws = 40_000
    uniforms = torch.from_numpy(randomness.uniform(randomness.key(0, "test"), np.arange(len(scores)), draws))
    actions = sample_actions(log_p, uniforms)
    counts = torch.stack([(actions == k).sum(1) for k in range(scores.shape[1])], 1)
    assert (counts[~present] == 0).all()
    p = log_p.exp()
    error = (counts / draws - p) / (p * (1 - p) / draws).sqrt().clamp(min=1e-12)
    assert error[present].abs().max() < 4


def test_no_uniform_reaches_an_absent_candidate():
    scores = torch.tensor([[0.3, -torch.inf, 0.1, -torch.inf], [-torch.inf, -torch.inf, 2.0, -torch.inf]])
    edges = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53], dtype=torch.float64).expand(2, 4)
    for scale in (1.0, 1e-3, 300.0):
        actions = sample_actions(log_policy(scores * scale, scores > -torch.inf), edges)
        assert set(actions[0].tolist()) <= {0, 2} and set(actions[1].tolist()) == {2}
    # In float32 the sum of the probabilities is not exactly 1. The last candidate must not benefit from it
    many = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).masked_fill(
        edges[:1] > 0.9, -torch.inf
    )
    assert sample_actions(log_policy(many, many > -torch.inf), edges[:1].expand(500, 4)).max() == 2


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("baseline", [0.0, 0.6, "per pool"])
def test_sampled_gradients_agree_with_the_exact_one(baseline):
    scores, start, rewards, present = pools(2)
    draws = 200_000
    leaf = scores.clone().requires_grad_()
    log_p, log_start = log_policy(leaf, present), log_policy(start, present)
    uniforms = torch.from_numpy(randomness.uniform(randomness.key(1, "test"), np.arange(len(scores)), draws))
    actions = sample_actions(log_p.detach(), uniforms)
    returns = rewards.gather(1, actions)
    base = torch.linspace(0, 1, len(scores))[:, None] if baseline == "per pool" else baseline
    settings = dataclasses.replace(PLAIN, kl_weight=0.3, entropy_weight=0.2)
    drawn = SampledActions(actions, log_p.detach().gather(1, actions), returns - base, returns)
    terms = ppo_loss(log_p, torch.zeros(len(scores)), drawn, log_start, settings)
    sampled = gradient(terms["loss"], leaf)
    exact = gradient(exact_loss(log_p, rewards, log_start, settings)["loss"], leaf)
    # The gradient of a sample is -advantage * (chosen - probability). Its spread gives the standard error
    p = log_p.detach().exp()
    advantage = returns - base
    for k in range(scores.shape[1]):
        each = -advantage * ((actions == k).double() - p[:, k : k + 1])
        standard_error = each.std(1) / draws**0.5 / len(scores)
        assert ((sampled - exact)[:, k].abs() <= 3 * standard_error + 1e-12).all()
    assert exact[present].abs().max() > 30 * standard_error.max()


def test_clipping_stops_the_gradient_where_a_step_has_gone_far_enough():
    log_p = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)).repeat(6, 1)
    actions = torch.zeros(6, 1, dtype=torch.int64)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9], dtype=torch.float64)[:, None]
    advantages = torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)[:, None]
    leaf = log_p.clone().requires_grad_()
    old = log_p[:, :1] - ratio.log()
    sampled = SampledActions(actions, old, advantages, advantages)
    terms = ppo_loss(leaf, torch.zeros(6), sampled, log_p, PLAIN)
    pull = gradient(terms["loss"], leaf)[:, 0]
    moves = pull != 0
    # No gradient beyond the clip in the direction of the advantage; a gradient in the other direction
    assert moves.tolist() == [False, True, True, False, True, True]
    expected = -(ratio * advantages / 6)[:, 0]
    torch.testing.assert_close(pull[moves], expected[moves])
    assert terms["clip_fraction"].item() == pytest.approx(4 / 6)
    assert terms["ratio_mean"].item() == pytest.approx(1.0)
    assert terms["approx_kl_to_old"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    assert terms["loss"].item() == pytest.approx(-surrogate.item())


def test_terms_are_weighed_as_named():
    scores, start, rewards, present = pools(3)
    settings = PpoSettings(value_weight=0.7, entropy_weight=0.11, kl_weight=0.13)
    log_p, log_start = log_policy(scores, present), log_policy(start, present)
    actions = torch.zeros(len(scores), 2, dtype=torch.int64)
    returns = rewards.gather(1, actions)
    values = torch.linspace(0, 1, len(scores), dtype=torch.float64)
    sampled = SampledActions(actions, log_p.gather(1, actions), returns - 0.5, returns)
    t = ppo_loss(log_p, values, sampled, log_start, settings)
    total = t["policy_loss"] + 0.7 * t["value_loss"] - 0.11 * t["entropy"] + 0.13 * t["kl_to_start"]
    torch.testing.assert_close(t["loss"], total)
    assert t["policy_loss"].item() == pytest.approx(-(returns - 0.5).mean().item())
    assert t["value_loss"].item() == pytest.approx(((values[:, None] - returns) ** 2).mean().item())
    e = exact_loss(log_p, rewards, log_start, settings)
    torch.testing.assert_close(e["loss"], e["policy_loss"] - 0.11 * e["entropy"] + 0.13 * e["kl_to_start"])
    assert torch.equal(e["kl_to_start"], t["kl_to_start"]) and e["kl_to_start"] > 0.1


def test_kl_and_entropy_hold_the_policy_where_theory_says():
    """The optimum is p ~ exp((r + kl_weight log start) / (kl_weight + entropy_weight))."""
    scores, start, rewards, present = pools(4)
    settings = PpoSettings(kl_weight=0.3, entropy_weight=0.2)
    log_start = log_policy(start, present)
    tilted = (rewards + 0.3 * log_start) / 0.5
    for leaf, still in ((tilted, True), (scores, False)):
        leaf = leaf.masked_fill(~present, -torch.inf).requires_grad_()
        loss = exact_loss(log_policy(leaf, present), rewards, log_start, settings)["loss"]
        assert (gradient(loss, leaf).abs().max() < 1e-14) == still


# ----------------------------------------------------------------------------------------- objective

M, WIDTH, D = 48, 4, 6
_rng = np.random.default_rng(5)
FEATURES = _rng.normal(size=(M, WIDTH, D)).astype(np.float32)
PRESENT = _rng.random((M, WIDTH)) < 0.85
PRESENT[:, 0] = True
REWARDS = np.where(PRESENT, 1 / (1 + np.exp(-2 * FEATURES @ _rng.normal(size=D))), np.nan)
LOG_START = np.where(PRESENT, 0.0, -np.inf)  # a uniform policy


class Linear(nn.Module):
    """Scores that are linear in the features, with a dropout that must have no effect."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.score = nn.Linear(D, 1)
        nn.init.normal_(self.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.score.bias)

    def forward(self, features):
        return self.score(self.dropout(features)).squeeze(-1)


def judge(policy, numbers):
    features = torch.from_numpy(FEATURES[numbers])
    scores = policy(features).masked_fill(~torch.from_numpy(PRESENT[numbers]), -torch.inf)
    return scores, features


def mean_reward(model) -> float:
    log_p = log_policy(judge(model.policy.eval(), np.arange(M))[0], torch.from_numpy(PRESENT))
    return expected_reward(log_p, torch.from_numpy(REWARDS).float()).mean().item()


def objective(estimator: Any = "sampled", seed=0, batch_size=8, **changes) -> PolicyGradient:
    settings = dataclasses.replace(PpoSettings(rollout_pools=32, epochs=3), **changes)
    pools = TrainingPools(REWARDS, PRESENT, LOG_START)
    loop = LoopSettings(seed, batch_size, selection="loss", tokens_per_row=1)
    return PolicyGradient(judge, lambda m: {"loss": -mean_reward(m)}, pools, settings, estimator, loop)


def start(rate: float = 0.03):
    model = ActorCritic(Linear(), ValueHead(D, 8))
    return model, torch.optim.Adam(model.parameters(), lr=rate)


def advance(model, optimiser, goal, steps) -> list[dict[str, float]]:
    seen = []
    for step in steps:
        model.train()
        terms = batch_losses(goal, model, step, range(step * goal.batch_size, (step + 1) * goal.batch_size))
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        seen.append({k: v.item() for k, v in terms.items()})
    return seen


def test_ratios_are_one_until_something_is_learnt():
    model, optimiser = start(rate=0.0)
    for terms in advance(model, optimiser, objective(), range(12)):  # a whole rollout, every minibatch order
        assert terms["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert terms["clip_fraction"] == 0 and abs(terms["approx_kl_to_old"]) < 1e-6
    model, optimiser = start()
    seen = advance(model, optimiser, objective(), range(25))
    assert [s for s in (0, 12, 24) if seen[s]["ratio_mean"] != pytest.approx(1, abs=1e-6)] == []
    assert abs(seen[0]["ratio_mean"] - 1) < 1e-7 and max(s["approx_kl_to_old"] for s in seen) > 1e-4


def test_every_pass_of_a_rollout_goes_through_all_its_pools_in_its_own_order():
    goal, exact = objective(), objective("exact")
    steps = [goal.pools_of(s) for s in range(36)]
    passes = np.array(steps).reshape(3, 3, 32)  # rollouts, epochs, pools
    assert (np.sort(passes, 2) == np.sort(passes[:, :1], 2)).all()
    assert (passes[:, 0] != passes[:, 1]).any(1).all() and (passes[:, 1] != passes[:, 2]).any(1).all()
    first = passes[:, 0].reshape(-1)[: 2 * M]
    assert (
        sorted(first[:M]) == sorted(first[M:]) == list(range(M))
    )  # no pool is repeated before all were used
    assert all((exact.pools_of(s) == pools).all() for s, pools in enumerate(steps))
    assert (objective(seed=1).pools_of(0) != steps[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_a_policy_improves(estimator):
    model, optimiser = start()
    before = mean_reward(model)
    seen = advance(model, optimiser, objective(estimator, kl_weight=0.0), range(240))
    best = np.nanmax(REWARDS, 1).mean()
    assert mean_reward(model) > before + 0.75 * (best - before)
    late = np.mean([s["value_loss"] for s in seen[-12:]])
    assert late < 0.5 * seen[0]["value_loss"]
    assert objective().evaluate(model)["loss"] == pytest.approx(-mean_reward(model))


@pytest.mark.parametrize("cut", [0, 1, 5, 12, 17])
def test_cut_off_in_a_rollout_it_goes_on_with_the_same_bits(cut):
    model, optimiser = start()
    whole = advance(model, optimiser, objective(), range(20))
    other, again = start()
    before = objective()
    advance(other, again, before, range(cut))
    saved = {k: v.clone() for k, v in before.state().items()}
    weights = {k: v.clone() for k, v in other.state_dict().items()}
    resumed, third = start()
    resumed.load_state_dict(weights)
    third.load_state_dict(again.state_dict())
    after = objective()
    after.load_state(saved)
    assert advance(resumed, third, after, range(cut, 20)) == whole[cut:]
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_state_is_plain_tensors_that_safetensors_keep(tmp_path):
    from safetensors.torch import load_file, save_file

    model, optimiser = start()
    goal = objective()
    assert goal.state() == {}
    advance(model, optimiser, goal, range(2))
    save_file(goal.state(), str(tmp_path / "rollout.safetensors"))
    other = objective()
    other.load_state(load_file(str(tmp_path / "rollout.safetensors")))
    assert all(torch.equal(v, goal.state()[k]) for k, v in other.state().items())
    with pytest.raises(AssertionError, match="load_state"):
        batch_losses(objective(), model, 2, range(16, 24))


def test_advantages_are_over_the_critic_and_of_one_scale():
    model, _ = start()
    with torch.no_grad():
        model.value.outer.bias.fill_(0.25)
    plain, scaled = objective(normalise_advantages=False), objective()
    for goal in (plain, scaled):
        batch_losses(goal, model, 0, range(8))
    state = plain.state()
    pools = np.concatenate([plain.pools_of(s) for s in range(4)])
    rewards = torch.from_numpy(REWARDS[pools]).float().gather(1, state["actions"])
    torch.testing.assert_close(state["advantages"], rewards - 0.25)
    assert torch.from_numpy(PRESENT[pools]).gather(1, state["actions"]).all()
    values = scaled.state()["advantages"]
    assert abs(values.mean()) < 1e-6 and values.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_normalised_advantages_scale_the_policy_term_of_the_sampled_estimator_alone():
    model, _ = start()
    found: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    for estimator, scaled in itertools.product(("sampled", "exact"), (False, True)):
        goal = objective(estimator, normalise_advantages=scaled)
        found[estimator, scaled] = batch_losses(goal, model, 0, range(8))
        if (estimator, scaled) == ("sampled", False):
            advantages = goal.state()["advantages"]
    for name, value in found["exact", False].items():
        torch.testing.assert_close(found["exact", True][name], value)
    plain, scaled = found["sampled", False], found["sampled", True]
    for name in ("value_loss", "entropy", "kl_to_start"):
        torch.testing.assert_close(scaled[name], plain[name])
    expected = (plain["policy_loss"] + advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(scaled["policy_loss"], expected, rtol=1e-4, atol=1e-4)


def test_a_rollout_must_be_whole_batches():
    with pytest.raises(BadConfig, match="rollout_pools is 32, expected a multiple of the batch size 5"):
        objective(batch_size=5)


# ----------------------------------------------------------------------------------------- critic


def test_the_critic_learns_a_constant_reward():
    head = ValueHead(D, 8)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.02)
    features, present = torch.from_numpy(FEATURES), torch.from_numpy(PRESENT)
    for _ in range(600):
        optimiser.zero_grad()
        (head(features, present) - 0.6).square().mean().backward()
        optimiser.step()
    assert (head(features, present) - 0.6).abs().max() < 0.02


def test_the_critic_ignores_order_and_absent_candidates_and_leaves_features_alone():
    features, present = torch.from_numpy(FEATURES.copy()), torch.from_numpy(PRESENT)
    for detach in (True, False):
        head = ValueHead(D, 8, seed=4, detach=detach)
        nn.init.ones_(head.outer.weight)
        leaf = features.clone().requires_grad_()
        value = head(leaf, present)
        value.sum().backward()
        assert (leaf.grad is None) == detach
        torch.testing.assert_close(head(features.flip(1), present.flip(1)), value)
        junk = features.masked_fill(~present.unsqueeze(-1), torch.nan)
        torch.testing.assert_close(head(junk, present), value)
        for n in np.flatnonzero(~PRESENT.all(1))[:4]:  # as if the tensors had no absent candidates
            alone = features[n : n + 1, present[n]]
            torch.testing.assert_close(head(alone, present[n : n + 1, present[n]]), value[n : n + 1])
    before = torch.random.get_rng_state()
    assert torch.equal(ValueHead(D, 8, seed=4).inner.weight, head.inner.weight)
    assert not torch.equal(ValueHead(D, 8, seed=5).inner.weight, head.inner.weight)
    assert torch.equal(before, torch.random.get_rng_state())
