"""Weights in bfloat16, activation checkpointing, and models that leave before others come."""

import gc
import importlib
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lib.config import load_config
from lib.errors import BadConfig
from lib.models import build
from lib.models.build import Checkpoint, heads_of, load_model, save_model, start_model
from lib.models.checkpointing import checkpoint_activations
from lib.models.encoders import open_encoder, with_lora
from lib.models.hugging_face import RemaskGptForMaskedLM
from lib.models.ranker import CandidateRanker, HeadOptions
from lib.models.ranker_files import load_ranker, save_ranker
from lib.ranking.actor_critic import ValueHead
from lib.runs import RunArgs
from lib.training import policy, train_model
from lib.training.ema import Ema
from lib.training.loop import Result
from lib.training.objectives import base
from lib.training.objectives.base import EVALUATION_TOKENS, evaluation_rows
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.objectives.next_token import NextToken
from tests.live_bytes import LiveBytes
from tests.test_policy import Ranker, tokenizer, training
from tests.test_pool_choice import Stub, choice_of, made_table
from tests.test_ranker import make_pools
from tests.test_ranker_files import saved_encoder
from tests.trainings import TOKENIZER, TOKENS, MeanOfRows, context, settings, splits, train_tiny

__all__ = ["tokenizer", "training"]  # fixtures

BF16 = torch.bfloat16


def small(**changes) -> Any:
    return load_config(quick_test=True).architecture.model_copy(update=changes)


def lora_ranker(folder: Path, dtype: torch.dtype, dropout: float = 0.0) -> tuple[CandidateRanker, Any]:
    """A ranker with adapters and a head that matter."""
    backbone, tokenizer = open_encoder(folder, dtype)
    backbone = with_lora(backbone, 2, 4, dropout, seed=3)
    model = CandidateRanker(backbone, seed=0, head=HeadOptions(dropout=dropout))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name == "head.out.weight":
            nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


# --- weights in bfloat16 ---------------------------------------------------------------------------------------------


def test_weights_are_float32_unless_a_config_says_otherwise():
    config = load_config()
    assert config.ranker.dtype == config.architecture.dtype == "float32"
    model, _ = start_model("ranker", small(), "bidirectional", 14, 0, "m")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_learning_encoder_in_bfloat16_is_refused():
    with pytest.raises(BadConfig, match=r"ranker.*set adapter to lora, or dtype to float32"):
        load_config(overrides=["ranker.dtype=bfloat16", "ranker.adapter=none"])
    with pytest.raises(BadConfig, match=r"ranker.dtype is 'float16'"):
        load_config(overrides=["ranker.dtype=float16"])


@pytest.mark.parametrize("family", ["remask_gpt", "ltg_bert"])
@pytest.mark.parametrize("mode", ["language_model", "token_classifier", "sequence_scorer", "ranker"])
def test_own_models_in_bfloat16_are_saved_loaded_and_continued(tmp_path, family, mode):
    architecture = small(family=family, dtype="bfloat16")
    model, _ = start_model(mode, architecture, "bidirectional", len(TOKENIZER), 0, "m")
    assert {p.dtype for p in model.parameters()} == {BF16}
    save_model(model, tmp_path / "m", TOKENIZER)
    loaded = load_model(tmp_path / "m")
    inner = getattr(model, "encoder", model).eval()
    ids = torch.arange(4, 14)[None]
    assert {p.dtype for p in loaded.parameters()} == {BF16}
    assert torch.equal(loaded(input_ids=ids).logits, inner(input_ids=ids).logits)
    for dtype in ("float32", "bfloat16"):  # the new model has the type of its own config
        start = Checkpoint(tmp_path / "m", 0.0, dtype)
        continued, transfer = start_model(mode, start, "bidirectional", len(TOKENIZER), 1, "n")
        assert {p.dtype for p in continued.parameters()} == {getattr(torch, dtype)}
        assert transfer.loaded and not transfer.dropped


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_model_in_bfloat16_learns_and_its_average_is_exact(tmp_path, optimizer):
    model, _ = start_model("language_model", small(dtype="bfloat16"), "bidirectional", len(TOKENIZER), 0, "m")
    training = settings(steps=24, evaluate_every=24, optimizer=optimizer, ema_decay=0.9, parts=2)
    objective = MaskedDiffusion(context(**training.model_dump()), splits(), load_config().diffusion, TOKENS)
    with torch.no_grad():
        before = objective.evaluate(model.eval())["nelbo"]
    result = train_tiny(model, objective, training, tmp_path)
    assert result.metrics["nelbo"] < before - 0.3
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert {p.dtype for p in load_model(tmp_path / "best_model").parameters()} == {BF16}


def test_the_average_of_bfloat16_weights_does_not_ignore_small_changes():
    weight = nn.Parameter(torch.ones(1, dtype=BF16))
    average = Ema({"w": weight}, 0.999)
    weight.data.fill_(1 + 2**-7)  # the next number in bfloat16
    for step in range(1000, 11000):
        average.update(step)
    assert average.params["w"].item() == pytest.approx(1 + 2**-7, abs=1e-4)
    weight.data.fill_(1)
    with average.swapped():
        assert weight.item() == 1 + 2**-7
    assert weight.item() == 1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_adapters_and_head_of_a_bfloat16_encoder_are_float32(tmp_path, name):
    folder = saved_encoder(tmp_path / "base", name)
    model, tokenizer = lora_ranker(folder, BF16)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for n, p in model.named_parameters() if n in learning} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in learning} == {BF16}
    # Adapters keep their exact values in the folder, and scores their bits
    pools = make_pools((2, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-5)  # smaller than bfloat16 resolves
    save_ranker(model.eval(), tmp_path / "ranker", tokenizer)
    loaded, _ = load_ranker(tmp_path / "ranker", learning=True)
    found = dict(loaded.named_parameters())
    for key, value in model.named_parameters():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value)
    small_ids = type(pools)(*(a % 20 if a.dtype != bool else a for a in vars(pools).values()))
    assert torch.equal(loaded(small_ids), model(small_ids))
    # The scores are near those of the same encoder in float32
    exact, _ = lora_ranker(folder, torch.float32)
    here, there = (m.eval()(small_ids).detach() for m in (model, exact))
    scale = there[there.isfinite()].std()
    assert (here - there)[there.isfinite()].abs().max() < 0.2 * scale


# --- activation checkpointing ----------------------------------------------------------------------------------------


def own(mode: str, family: str, dropout: float) -> tuple[Any, Any]:
    """A model of a mode with a function that computes a loss of it."""
    torch.manual_seed(1)
    architecture = small(family=family, num_hidden_layers=6, dropout=dropout, context=64, position_buckets=16)
    heads = {"critic_layers": 1} if mode == "critic" else heads_of(mode)
    named = "language_model" if mode == "critic" else mode
    model, _ = start_model(named, architecture, "bidirectional", 32, 0, "m", **heads)
    ids = torch.randint(4, 32, (8, 32))

    def loss() -> torch.Tensor:
        if mode == "ranker":
            pools = ids.view(2, 4, 32)
            return model(pools, torch.ones_like(pools, dtype=torch.bool)).logsumexp(1).sum()
        arguments = {"head": "both"} if mode == "critic" else {}
        output = model(input_ids=ids, **arguments)
        critic = output.critic_logits.square().mean() if mode == "critic" else 0.0
        return output.logits.float().logsumexp(-1).mean() + critic

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, loss


def gradients(model: nn.Module, loss: Any, training: bool = True) -> tuple[list[torch.Tensor], int]:
    """Gradients of a training step, and the bytes that its forward pass leaves for the backward pass."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(5)
    with LiveBytes() as live:
        value = loss()
        held = live.now
        value.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], held


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["remask_gpt", "ltg_bert"])
@pytest.mark.parametrize(
    "mode", ["language_model", "critic", "token_classifier", "sequence_scorer", "ranker"]
)
def test_checkpointed_layers_have_the_same_gradients_in_less_memory(family, mode, dropout):
    model, loss = own(mode, family, dropout)
    wanted, held = gradients(model, loss)
    again, _ = gradients(model, loss)
    checkpoint_activations(model, "m")
    found, held_now = gradients(model, loss)
    assert len(found) == len(wanted) > 0
    for one, two, other in zip(found, wanted, again, strict=True):
        assert torch.equal(two, other), "the test itself must be reproducible"
        assert torch.equal(one, two)
    assert held_now < 0.45 * held  # six layers keep one tensor each, beside embeddings and head


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "remask_bidirectional"])
def test_adapters_on_a_frozen_encoder_learn_the_same_with_checkpoints(tmp_path, name, dropout):
    model, _ = lora_ranker(saved_encoder(tmp_path / "base", name), torch.float32, dropout)
    pools = make_pools((4, 4, 4, 4))
    pools = type(pools)(*(a % 20 if a.dtype != bool else a for a in vars(pools).values()))

    def loss() -> torch.Tensor:
        return model(pools).square().sum()

    wanted, held = gradients(model, loss)
    checkpoint_activations(model, "m")
    found, held_now = gradients(model, loss)
    assert len(found) == len(wanted) == sum(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert held_now < 0.5 * held  # of two layers


def test_policies_learn_in_evaluation_mode_and_need_less_memory_too(tmp_path):
    model, _ = lora_ranker(saved_encoder(tmp_path / "base", "llama"), torch.float32, 0.3)
    pools = make_pools((4, 4, 4, 4))
    pools = type(pools)(*(a % 20 if a.dtype != bool else a for a in vars(pools).values()))
    wanted, held = gradients(model, lambda: model(pools).square().sum(), training=False)
    checkpoint_activations(model, "m")
    found, held_now = gradients(model, lambda: model(pools).square().sum(), training=False)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert held_now < 0.5 * held


def test_a_training_with_checkpoints_ends_with_the_same_bits(tmp_path):
    found = []
    for checkpointed in (False, True):
        architecture = small(dropout=0.1)
        model, _ = start_model("language_model", architecture, "bidirectional", len(TOKENIZER), 0, "m")
        training = settings(steps=6, activation_checkpointing=checkpointed)
        objective = MaskedDiffusion(context(steps=6), splits(), load_config().diffusion, TOKENS)
        train_tiny(model, objective, training, tmp_path / str(checkpointed))
        found.append((tmp_path / str(checkpointed) / "final_model" / "model.safetensors").read_bytes())
        assert any("forward" in vars(m) for m in model.modules()) == checkpointed
    assert found[0] == found[1]


def test_a_model_without_layers_to_checkpoint_is_named():
    with pytest.raises(BadConfig, match=r"judge: training.activation_checkpointing is true, but Linear"):
        checkpoint_activations(nn.Linear(2, 2), "judge")


# --- a model leaves before another one comes ---------------------------------------------------------------------------


def watch_loads(monkeypatch, module: Any, name: str, kind: type) -> list[int]:
    """The number of models of a class that are alive whenever `module.name` loads another one."""
    load, alive = getattr(module, name), []

    def watched(*args, **kwargs):
        alive.append(sum(isinstance(o, kind) for o in gc.get_objects()))
        return load(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)
    return alive


@pytest.mark.parametrize("frozen", [False, True])
def test_the_trained_model_leaves_before_the_best_one_is_loaded(tmp_path, monkeypatch, frozen):
    """A frozen backbone has a hook on its embedding, which refers to it in a circle."""
    changes = {"steps": 2, "evaluate_every": 2, "activation_checkpointing": True}
    changes |= {"freeze_backbone": True, "unfreeze_at_step": 1} if frozen else {}
    spec = load_config(quick_test=True).models["judge"]
    spec = spec.model_copy(update={"training": settings(**changes)})
    trained: list[Any] = []

    def set_up(context, spec, stage_inputs, folder, start) -> train_model.TrainerSetup:
        model, _ = start_model(
            "sequence_scorer", small(), "bidirectional", len(TOKENIZER), 0, "m", **heads_of("sequence_scorer")
        )
        trained.append(weakref.ref(model))

        def load(path: Path) -> nn.Module:
            assert trained[0]() is None, "the trained model is still in memory"
            return load_model(path)

        objective: Any = Scores()
        return train_model.TrainerSetup(
            model, objective, lambda m, p: save_model(m, p, TOKENIZER), load, {}, {}
        )

    monkeypatch.setattr(train_model, "set_up", set_up)
    monkeypatch.setattr(train_model, "context_of", lambda *args: context(**spec.training.model_dump()))
    record = train_model._train("judge", spec, None, tmp_path, None)  # type: ignore[arg-type]
    assert (
        record["held_out"] == {"checked": True} and 0 < record["learning_parameters"] <= record["parameters"]
    )


class Scores(MeanOfRows):
    selection, tokens_per_row, cls_id = "loss", 8, 3

    def loss(self, model, step, rows):
        return {"loss": model(input_ids=torch.arange(4, 12)[None]).logits.mean()}

    def evaluate(self, model):
        return {"loss": 1.0}

    def report(self, model):
        return {"checked": True}, []


def test_a_policy_leaves_before_its_best_state_is_loaded(training, tokenizer, monkeypatch):
    monkeypatch.setattr(policy, "load_ranker", lambda path, learning=False: (Ranker(path), tokenizer))
    monkeypatch.setattr(policy, "ValueHead", lambda width, seed: ValueHead(4))
    monkeypatch.setattr(policy, "width_of", lambda base: 4)
    monkeypatch.setattr(Ranker, "base", None, raising=False)
    monkeypatch.setattr(Ranker, "packs", True, raising=False)
    monkeypatch.setattr(policy, "train", lambda model, *rest: Result(3, 2, {}, {}, {}))
    alive = watch_loads(monkeypatch, policy, "load_ranker", Ranker)
    training.before()
    training.run("cross_entropy")
    training.run("exact")
    assert alive == [0] * 5  # the start, and for each method the start and its best state


@pytest.mark.slow
def test_the_critic_leaves_before_its_best_state_is_loaded(quick_run, quick_config, tmp_path, monkeypatch):
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    alive = watch_loads(monkeypatch, build, "load_model", RemaskGptForMaskedLM)
    args = RunArgs(run_dir=run, quick_test=True, command=("05_train_critic",), overwrite=True)
    gc.collect()
    before = sum(isinstance(o, RemaskGptForMaskedLM) for o in gc.get_objects())
    importlib.import_module("05_train_critic").main(quick_config, args)
    assert alive == [before]


# --- evaluations by tokens ---------------------------------------------------------------------------------------------


def test_evaluations_read_fewer_long_rows_and_as_many_short_ones_as_before():
    for most, contexts in ((64, (64, 128, 256, 512, 513)), (16, (4 * 129, 4 * 513)), (32, (576, 1024))):
        assert [evaluation_rows(most, tokens) for tokens in contexts] == [most] * len(contexts)
    for tokens in (514, 2048, 8192, 100_000):
        rows = evaluation_rows(64, tokens)
        assert 1 <= rows < 64 and (rows == 1 or rows * tokens <= EVALUATION_TOKENS < (rows + 1) * tokens)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_an_evaluation_of_long_rows_is_cut_by_tokens_and_measures_the_same(monkeypatch, kind):
    attention = "causal" if kind == "causal" else "bidirectional"
    model, _ = start_model("language_model", small(), attention, len(TOKENIZER), 0, "m")
    objective: Any = (
        NextToken(context(evaluation_examples=64), splits(), TOKENIZER.cls_token_id)
        if kind == "causal"
        else MaskedDiffusion(context(evaluation_examples=64), splits(), load_config().diffusion, TOKENS)
    )
    sizes: list[int] = []
    plain = objective.runtime.processes.share

    def share(function, items):
        sizes.extend(len(item) for item in items)
        return plain(function, items)

    monkeypatch.setattr(objective.runtime.processes, "share", share)
    model.eval()
    with torch.no_grad():
        wanted = objective.evaluate(model)
        assert max(sizes) == 64
        monkeypatch.setattr(base, "EVALUATION_TOKENS", 16 * 5)  # windows have 16 tokens
        sizes.clear()
        found = objective.evaluate(model)
    assert max(sizes) == 5 and sum(sizes) == len(objective.evaluated)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_pools_are_counted_with_a_prompt_for_each_candidate_that_is_read_alone(tokenizer):
    table = made_table(missing=False)
    table = replace(table, prompts=[" ".join(["w1"] * 1000)] * len(table))
    choice = choice_of(tokenizer, held_out=table, prompt_tokens=2000, candidate_tokens=100)
    pools = choice.reader.read(table.prompts[:1], table.texts[:1], table.present[:1])
    prompt, candidates = int(pools.prompt_mask.sum()), int(pools.candidate_mask.sum())
    assert prompt > 900
    stub: Any = Stub(lambda *_: 0.0)
    for packs, tokens in ((True, prompt + candidates), (False, table.texts.shape[1] * prompt + candidates)):
        stub.packs = packs
        assert choice.reader.evaluation_pools(stub, table) == EVALUATION_TOKENS // tokens
