"""Stage 05's three methods to train a ranker further: what each minimises, how it is measured, and which gain is reported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.config import load_config
from lib.models.packing import Pools
from lib.ranking.actor_critic import ActorCritic, ValueHead
from lib.ranking.metrics import ranking_metrics
from lib.training import policy
from lib.training.data import Splits
from lib.training.loop import Result
from lib.training.policy import START, PolicyTraining, compare
from tests.test_pool_choice import Stub, made_table, reader_of, reads_candidate, reads_prompt, tokenizer
from tests.trainings import CPU

__all__ = ["tokenizer"]  # a fixture


@pytest.fixture
def training(tmp_path) -> PolicyTraining:
    config = load_config(quick_test=True)
    changes = {
        "loss": "listwise",
        "word_dropout": 0.3,
        "sampled_candidates": 3,
        "hard_negatives": 1.0,
        "best_by": "map",
    }
    ranker = config.ranker.model_copy(update=changes)
    config = config.model_copy(update={"ranker": ranker})
    tables = made_table(1), made_table(2), made_table(3)
    return PolicyTraining(config, CPU, tmp_path / "start", tmp_path / "05", Splits(*tables))


def by_candidate(table) -> np.ndarray:
    """(N, K) what `reads_candidate` scores."""
    numbers = [[(int(t[1:]) + 4) / 7 if t else -np.inf for t in row] for row in table.texts]
    return np.array(numbers)


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def actor_critic(rule) -> Any:
    return ActorCritic(Stub(rule), ValueHead(4))


def test_ppo_samples_and_the_exact_method_sums(training, tokenizer):
    for method, estimator in (("ppo", "sampled"), ("exact", "exact")):
        goal: Any = training._policy_gradient(method, Stub(reads_candidate), reader_of(tokenizer))
        assert goal.estimator == estimator and goal.selection == "regret"
        np.testing.assert_array_equal(goal.rewards.numpy(), training.pools.train.rewards.astype(np.float32))
        np.testing.assert_array_equal(goal.present.numpy(), training.pools.train.present)


def test_ppo_and_the_exact_method_take_the_same_pools_in_every_step(training, tokenizer):
    ppo = training.config.critic.ppo.model_copy(update={"rollout_pools": 12, "epochs": 2})
    steps = training.config.critic.training.model_copy(update={"batch_size": 4})
    critic = training.config.critic.model_copy(update={"ppo": ppo, "training": steps})
    training.config = training.config.model_copy(update={"critic": critic})
    pools = [
        [goal.pools_of(step).tolist() for step in range(18)]  # three rollouts of two epochs
        for goal in (
            training._policy_gradient(method, Stub(reads_candidate), reader_of(tokenizer))
            for method in ("ppo", "exact")
        )
    ]
    assert pools[0] == pools[1] and pools[0][:3] != pools[0][3:6]


def test_the_policy_is_held_to_the_chances_that_it_had_at_its_start(training, tokenizer):
    goal: Any = training._policy_gradient("ppo", Stub(reads_candidate), reader_of(tokenizer))
    np.testing.assert_allclose(goal.log_start.exp(), softmax(by_candidate(training.pools.train)), atol=1e-6)


def test_all_methods_choose_the_best_step_by_the_same_regret_of_the_same_pools(training, tokenizer):
    steps = training.config.critic.training.model_copy(update={"evaluation_examples": 10})
    critic = training.config.critic.model_copy(update={"training": steps})
    training.config = training.config.model_copy(update={"critic": critic})
    reader, table = reader_of(tokenizer), training.pools.selection
    plain: Any = training._choice("cross_entropy", reader)
    expected = plain.evaluate(Stub(reads_candidate))
    chosen = table.rewards[np.arange(len(table)), by_candidate(table).argmax(1)]
    assert len(plain.evaluated) == 10
    assert expected["regret"] == pytest.approx((table.rewards.max(1) - chosen)[plain.evaluated].mean())
    assert expected.pop("loss") > 0  # the plain loss, which a policy does not minimise
    for method in ("ppo", "exact"):
        goal: Any = training._policy_gradient(method, Stub(reads_candidate), reader)
        assert goal.selection == plain.selection == "regret"
        assert goal.evaluate(actor_critic(reads_candidate)) == expected
        sure = goal.evaluate(actor_critic(reads_prompt))
        assert sure["regret"] < 1e-6 < expected["regret"] and sure["accuracy"] == 1


class Ranker(torch.nn.Module):
    """Stands for a saved ranker: the best model reads the candidate, the start reads the prompt."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.stub = path, Stub(reads_candidate if path.name == "best_model" else reads_prompt)

    def forward(self, pools: Pools) -> torch.Tensor:
        return self.stub(pools)


def test_plain_cross_entropy_is_trained_whatever_the_ranker_s_loss_and_the_best_model_is_measured(
    training, tokenizer, monkeypatch
):
    caught: dict[str, Any] = {}

    def train(model, objective, context, folder, save) -> Result:
        caught.update(objective=objective, settings=context.settings, folder=folder)
        return Result(3, 2, {}, {}, {})

    monkeypatch.setattr(policy, "train", train)
    monkeypatch.setattr(policy, "load_ranker", lambda path, learning=False: (Ranker(path), tokenizer))
    found = training.run("cross_entropy")
    settings = caught["objective"].reader.settings
    assert settings.loss == "cross_entropy" and settings.word_dropout == 0
    assert settings.sampled_candidates is None and settings.hard_negatives == 0
    assert caught["objective"].selection == "regret"
    splits = caught["objective"].splits
    assert splits.held_out is training.pools.held_out and splits.train == [training.pools.train]
    assert caught["settings"].head_learning_rate is None
    table = training.pools.held_out
    wanted = ranking_metrics(by_candidate(table), table.rewards, table.present)["accuracy"]
    np.testing.assert_array_equal(found["accuracy"], wanted)
    assert found["best_step"] == 2 and found["held_out"]["accuracy"]["value"] == pytest.approx(wanted.mean())
    assert training.before()["accuracy"].mean() == 1  # the start reads the prompt


@pytest.mark.parametrize(("method", "compiles"), [("ppo", "off"), ("exact", "off"), ("cross_entropy", "on")])
def test_ppo_learns_with_the_plain_layers_that_score_its_rollouts(
    training, tokenizer, monkeypatch, method, compiles
):
    """Compiled layers round differently, so ratios would not begin at 1."""
    caught: dict[str, Any] = {}

    def train(model, objective, context, folder, save) -> Result:
        caught.update(compile=context.settings.compile)
        return Result(3, 2, {}, {}, {})

    monkeypatch.setattr(policy, "train", train)
    monkeypatch.setattr(policy, "load_ranker", lambda path, learning=False: (Ranker(path), tokenizer))
    monkeypatch.setattr(Ranker, "base", None, raising=False)
    monkeypatch.setattr(policy, "width_of", lambda base: 1)
    monkeypatch.setattr(PolicyTraining, "_policy_gradient", lambda self, method, ranker, reader: None)
    critic = training.config.critic
    on = critic.model_copy(update={"training": critic.training.model_copy(update={"compile": "on"})})
    training.config = training.config.model_copy(update={"critic": on})
    training.run(method)
    assert caught["compile"] == compiles


def test_a_gain_is_the_method_s_accuracy_less_that_of_its_start():
    def figures(hits) -> dict[str, Any]:
        estimate = {"value": float(np.mean(hits)), "low": 0.0, "high": 1.0}
        return {"accuracy": np.array(hits, float), "held_out": {"accuracy": estimate}}

    found = {START: figures([0, 0, 1, 0] * 10), "ppo": figures([1, 1, 1, 0] * 10), "exact": figures([0] * 40)}
    gains, rows = compare(found, np.arange(40), 0)
    assert (
        gains["ppo"]["value"] == 0.5 and gains["exact"]["value"] == -0.25 and set(gains) == {"ppo", "exact"}
    )
    assert 0.3 < gains["ppo"]["low"] < 0.5 < gains["ppo"]["high"] < 0.7 and gains["exact"]["high"] < 0
    assert [(r.model, r.value, r.baseline_value, r.lower_is_better) for r in rows] == [
        ("ppo", 0.75, 0.25, False), ("exact", 0.0, 0.25, False)
    ]  # fmt: skip
    for row in rows:
        assert {"low": row.difference_low, "high": row.difference_high}.items() <= gains[row.model].items()
    assert [row.beats_baseline for row in rows] == [True, False]  # the interval of the value is 0 to 1
