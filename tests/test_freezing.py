"""A frozen backbone: which weights are trained before and after unfreezing, and that a resume in between changes no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lib.config import load_config
from lib.errors import BadConfig
from lib.models.build import heads_of, start_model
from lib.models.ranker import CandidateRanker, SequenceRanker
from lib.ranking.actor_critic import ActorCritic, ValueHead
from lib.sections.models import TrainingConfig
from lib.training.freezing import head_parameters
from lib.training.loop import train
from lib.training.optimizer import Optimizer
from tests.trainings import Killed, MeanOfRows, context, fingerprint, train_tiny

CLS = 2
UNFREEZE, STEPS = 6, 12


def settings(**changes) -> TrainingConfig:
    base = load_config(quick_test=True).training.model_dump()
    small = {"steps": STEPS, "evaluate_every": 3, "checkpoint_every": 2, "batch_size": 4}
    return TrainingConfig.model_validate(base | small | changes)


def model_of(mode: str = "sequence_scorer", family: str = "remask_gpt") -> Any:
    small = {"hidden_size": 32, "context": 12, "family": family, "position_buckets": 8}
    architecture = load_config(quick_test=True).architecture.model_copy(update=small)
    return start_model(mode, architecture, "bidirectional", 14, 3, "tiny", **heads_of(mode))[0]


class Scores(MeanOfRows):
    """Squared error of scores that depend on the ids; records the weights before each step."""

    selection, tokens_per_row = "loss", 9

    def __init__(self, cls_id: int | None = CLS):
        self.cls_id = cls_id
        self.seen: list[dict[str, torch.Tensor]] = []

    def loss(self, model, step, rows):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        ids = torch.randint(4, 14, (4, 9), generator=torch.Generator().manual_seed(step))
        ids[:, 0] = CLS
        wanted = (ids[:, 1] % 2).float().unsqueeze(1)
        return {"loss": (model(input_ids=ids).logits - wanted).square().mean()}

    def evaluate(self, model):
        return {"loss": float(self.loss(model, 10_000, range(4))["loss"])}


def run(folder: Path, fault: int | None = None, objective: Scores | None = None, **changes) -> Scores:
    objective = objective or Scores()
    train_tiny(model_of(), objective, settings(**changes), folder, fault)
    return objective


def by_step(objective: Scores) -> list[dict[str, torch.Tensor]]:
    """Weights before each step; without those recorded in evaluations."""
    steps = [weights for i, weights in enumerate(objective.seen) if (i + 1) % 4]
    assert len(steps) == STEPS
    return steps


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {n for n in before if not torch.equal(before[n], after[n])}


def test_while_frozen_the_head_and_cls_learn_and_nothing_else(tmp_path):
    weights = by_step(run(tmp_path, freeze_backbone=True, head_learning_rate=0.01))
    names = changed(weights[0], weights[-1])
    heads = head_parameters(model_of())
    assert names == heads | {"model.embed_tokens.weight"}
    before, after = (w["model.embed_tokens.weight"] for w in (weights[0], weights[-1]))
    assert (before != after).any(1).nonzero().flatten().tolist() == [CLS]


def test_from_the_given_step_everything_learns(tmp_path):
    weights = by_step(run(tmp_path, freeze_backbone=True, unfreeze_at_step=UNFREEZE))
    heads = head_parameters(model_of())
    assert changed(weights[0], weights[UNFREEZE]) == heads | {"model.embed_tokens.weight"}
    assert changed(weights[UNFREEZE], weights[UNFREEZE + 1]) == set(weights[0])
    rows = (weights[UNFREEZE]["model.embed_tokens.weight"] != weights[-1]["model.embed_tokens.weight"]).any(1)
    assert rows[4:].all()


@pytest.mark.slow
def test_killed_around_the_unfreezing_it_ends_with_the_same_bits(tmp_path):
    given = {"freeze_backbone": True, "unfreeze_at_step": UNFREEZE, "head_learning_rate": 0.01}
    run(tmp_path / "whole", **given)
    for step in range(UNFREEZE - 2, UNFREEZE + 4):
        with pytest.raises(Killed):
            run(tmp_path / str(step), step, **given)
        run(tmp_path / str(step), **given)
        assert fingerprint(tmp_path / str(step)) == fingerprint(tmp_path / "whole"), f"killed before {step}"


def test_heads_have_their_own_rate():
    model = model_of()
    optimizer = Optimizer(model, settings(head_learning_rate=0.5, learning_rate=0.001, warmup_fraction=0))
    names = {id(p): n for n, p in model.named_parameters()}
    for part in optimizer.optimizers:
        for group in part.param_groups:
            inside = {names[id(p)] for p in group["params"]} & head_parameters(model)
            assert not inside or group["lr"] == 0.5
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=torch.tensor([[CLS, 5, 6]])).logits.sum().backward()
    optimizer.step(0)
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()}
    assert all(moved[n] == pytest.approx(0.5, rel=1e-3) for n in head_parameters(model))
    assert moved["model.embed_tokens.weight"] == pytest.approx(0.001, rel=1e-3)


def test_what_is_frozen_by_others_stays_so(tmp_path):
    model = model_of()
    model.model.embed_tokens.requires_grad_(False)
    objective = Scores()
    train_tiny(model, objective, settings(freeze_backbone=True, unfreeze_at_step=3), tmp_path)
    weights = by_step(objective)
    assert "model.embed_tokens.weight" not in changed(weights[0], weights[-1])


@pytest.mark.parametrize("family", ["remask_gpt", "ltg_bert"])
@pytest.mark.parametrize("mode", ["token_classifier", "sequence_scorer", "ranker"])
def test_every_mode_knows_its_head(mode, family):
    model = model_of(mode, family)
    heads = head_parameters(model)
    backbone = {n for n, _ in model.named_parameters()} - heads
    assert heads and all("classifier" in name or "score" in name for name in heads), heads
    assert backbone and not any("classifier" in name or "score" in name for name in backbone), backbone
    assert len(head_parameters(SequenceRanker(model) if mode != "ranker" else model)) == len(heads)


def test_the_candidate_ranker_and_the_actor_know_their_heads():
    ranker = CandidateRanker(model_of().model, seed=0)
    assert head_parameters(ranker) == {f"head.{n}" for n, _ in ranker.head.named_parameters()}
    value = ValueHead(32)
    assert head_parameters(ActorCritic(ranker, value)) == {f"value.{n}" for n, _ in value.named_parameters()}


def test_a_model_without_a_head_cannot_be_frozen(tmp_path):
    with pytest.raises(BadConfig, match="nothing would learn"):
        train(
            model_of("language_model"), Scores(None), context(freeze_backbone=True), tmp_path, lambda m, path: None
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"unfreeze_at_step": 3}, "without freeze_backbone"),
        ({"unfreeze_at_step": STEPS, "freeze_backbone": True}, "between 0 and steps"),
        ({"unfreeze_at_step": 0, "freeze_backbone": True}, "between 0 and steps"),
    ],
)
def test_settings_without_effect_are_refused(changes, named):
    with pytest.raises(ValidationError, match=named):
        settings(**changes)


@pytest.mark.parametrize("model", ["judge", "ranker"])
def test_random_weights_are_not_frozen(model):
    with pytest.raises(BadConfig, match="would keep random weights"):
        load_config(
            overrides=[f"models.{model}.start=scratch", f"models.{model}.training.freeze_backbone=true"]
        )
