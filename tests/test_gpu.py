"""Every mode trains on a GPU as on the CPU. Without a GPU these tests are skipped: `pytest -m gpu` on a machine that has one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.config import load_config
from lib.models.block_attention import on_a_gpu
from lib.models.build import heads_of, start_model
from lib.models.packing import Pools
from lib.runtime import Runtime
from lib.training.loop import train
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.objectives.next_token import NextToken
from tests.test_big_models import lora_ranker
from tests.test_ranker import make_pools
from tests.test_ranker_files import saved_encoder
from tests.trainings import CPU, TOKENIZER, TOKENS, MeanOfRows, settings, splits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

TRAINED = settings(steps=20, evaluate_every=20, checkpoint_every=20, learning_rate=1e-3)
HEADS = ("token_classifier", "sequence_scorer", "ranker", "critic")


@pytest.fixture
def gpu(monkeypatch):
    """The GPU in fp32. The switches of its determinism are put back at the end."""
    before = torch.are_deterministic_algorithms_enabled()
    yield Runtime.detect(load_config(overrides=["device=cuda", "precision=fp32"]))
    torch.use_deterministic_algorithms(before)


class Outputs(MeanOfRows):
    """A loss of the outputs of a model, of any mode."""

    selection, tokens_per_row, cls_id = "loss", 16, TOKENIZER.cls_token_id
    draws_ahead = True

    def __init__(self, mode: str, context: TrainingContext):
        self.mode, self.device = mode, context.runtime.device

    def loss(self, model: Any, step: int, rows: range) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[4 + (row * 7 + place) % 10 for place in range(16)] for row in rows]).to(
            self.device
        )
        if self.mode == "ranker":
            scores = model(ids.view(2, 4, 16), torch.ones_like(ids.view(2, 4, 16), dtype=torch.bool))
            return {"loss": -scores.log_softmax(1)[:, 0].mean()}
        if self.mode == "critic":
            output = model(input_ids=ids, head="both")
            return {"loss": output.critic_logits.sub(1).square().mean() + output.logits.logsumexp(-1).mean()}
        logits = model(input_ids=ids).logits
        return {
            "loss": (logits - 0.3 * torch.arange(logits.shape[-1], device=logits.device) - 1).square().mean()
        }

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"loss": float(self.loss(model, 0, range(8))["loss"])}


class PromptPools(MeanOfRows):
    selection, tokens_per_row, draws_ahead = "loss", 16, True

    def loss(self, model: Any, step: int, rows: range) -> dict[str, torch.Tensor]:
        pools = make_pools((4, 3, 4, 2))
        pools = Pools(*(a % 20 if a.dtype != bool else a for a in vars(pools).values()))
        return {"loss": -model(pools).log_softmax(1)[:, 0].mean()}

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"loss": float(self.loss(model, 0, range(4))["loss"])}


def started(mode: str, family: str, context: TrainingContext) -> tuple[Any, Any]:
    """A tiny model of a mode, and its objective."""
    architecture = load_config(quick_test=True).architecture.model_copy(
        update={"family": family, "dropout": 0.0}
    )
    attention = "causal" if mode == "causal" else "bidirectional"
    heads = {"critic_layers": 1} if mode == "critic" else {}
    named = mode if mode in HEADS[:3] else "language_model"
    heads |= heads_of(named)
    model, _ = start_model(named, architecture, attention, len(TOKENIZER), 0, "m", **heads)
    if mode == "masked":
        return model, MaskedDiffusion(context, splits(), load_config().diffusion, TOKENS)
    if mode == "causal":
        return model, NextToken(context, splits(), TOKENIZER.cls_token_id)
    return model, Outputs(mode, context)


def losses(model: Any, objective: Any, context: TrainingContext, folder: Path) -> tuple[float, float]:
    """The mean loss of a training, and the metric that chooses at its end."""
    train(model, objective, context, folder, lambda model, path: (path / "saved").touch())
    line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return line["train"]["loss"], line["selection"][objective.selection]


@pytest.mark.parametrize("family", ["remask_gpt", "ltg_bert"])
@pytest.mark.parametrize("mode", ["masked", "causal", *HEADS])
def test_a_mode_trains_on_a_gpu_as_on_the_cpu(tmp_path, gpu, mode, family):
    if (mode, family) == ("causal", "ltg_bert"):
        pytest.skip("ltg_bert is bidirectional")
    found = {}
    for name, runtime in (("cpu", CPU), ("gpu", gpu), ("again", gpu)):
        context = TrainingContext("m", 3, TRAINED, runtime)
        found[name] = losses(*started(mode, family, context), context, tmp_path / name)
    assert found["gpu"] == pytest.approx(found["cpu"], rel=1e-2)
    assert found["gpu"] == found["again"]  # the same bits


@pytest.mark.parametrize("mask", ["dense", "blocks"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_ranker_of_prompts_trains_on_a_gpu_as_on_the_cpu(tmp_path, gpu, name, mask):
    folder, found = saved_encoder(tmp_path / "base", name), {}
    for place, runtime in (("cpu", CPU), ("gpu", gpu), ("again", gpu)):
        context = TrainingContext("m", 3, TRAINED, runtime)
        model, _ = lora_ranker(folder, torch.float32)
        on_a_gpu(mask, model, runtime.device)
        found[place] = losses(model, PromptPools(), context, tmp_path / place)
    assert found["gpu"] == pytest.approx(found["cpu"], rel=1e-2)
    assert found["gpu"] == found["again"]
