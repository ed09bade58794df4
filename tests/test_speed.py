"""What a training says about its speed, and what trackers receive."""

import json
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.engine.speed import SpeedMeter, flops_per_token, matmul_peak, peak_memory_bytes
from lib.errors import BadConfig
from lib.training import loop
from lib.training.objectives.base import TrainingContext
from lib.training.trackers import PACKAGES, open_tracker
from tests.test_modifiers import V, model_of
from tests.trainings import CPU, MeanOfRows, settings

DEVICE = torch.device("cpu")


def counted(model, ids) -> int:
    """The FLOPs that torch counts in a forward and backward pass, of the matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.float().sum().backward()
    return counter.get_total_flops()


def test_the_formula_is_what_torch_counts():
    model = model_of().train()
    ids = torch.randint(4, V, (2, 16))
    found = flops_per_token(model, 16) * ids.numel()
    assert found == pytest.approx(counted(model, ids), rel=0.15)


def test_frozen_weights_have_no_gradient_of_their_own():
    model: Any = torch.nn.Sequential(torch.nn.Linear(10, 20, bias=False), torch.nn.Linear(20, 5, bias=False))
    assert flops_per_token(model, 7) == 6 * (200 + 100)
    model[0].weight.requires_grad_(False)
    assert flops_per_token(model, 7) == 4 * 200 + 6 * 100
    model.config = SimpleNamespace(num_hidden_layers=3, hidden_size=10)
    assert flops_per_token(model, 7) == 4 * 200 + 6 * 100 + 12 * 3 * 10 * 7


def test_the_peak_is_measured_and_memory_is_in_bytes():
    assert 1e8 < matmul_peak(DEVICE, "fp32") < 1e15
    assert 2**25 < peak_memory_bytes(DEVICE) < 2**40


def test_the_meter_divides_model_flops_by_the_peak(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 10.0, 16.0])  # two steps of 4 and 6 seconds; the first waits for 1
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = SpeedMeter(DEVICE, tokens_per_step=50, flops_per_token=300.0, peak=6000.0)
    for _ in range(2):
        meter.begin()
        meter.data_is_there()
        meter.end()
    found = meter.figures()
    assert found["seconds"] == 10 and found["tokens_per_second"] == 10
    assert found["mfu"] == pytest.approx(10 * 300 / 6000) and found["data_wait"] == pytest.approx(0.1)
    assert "MFU 50.0%" in meter.line() and "10.0% of the time" in meter.line()


class Still(MeanOfRows):
    selection, tokens_per_row = "error", 3

    def loss(self, model, step, rows):
        return {"loss": model.weight.square().sum()}

    def evaluate(self, model):
        return {"error": 1.5}


def train(folder, **changes) -> loop.Result:
    model: Any = torch.nn.Linear(4, 1)
    model.config = SimpleNamespace(model_type="none")
    context = TrainingContext("tiny", 3, settings(steps=4, batch_size=2, evaluate_every=2, **changes), CPU)
    return loop.train(model, Still(), context, folder, lambda model, path: None)


def test_every_training_writes_its_speed(tmp_path):
    result = train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    names = {"seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "data_wait"}
    assert all(line.keys() == {"step", *names} for line in lines) and result.speed.keys() == names
    for name in names:
        assert result.speed[name] > 0


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_gets_every_evaluation(name, tmp_path, monkeypatch):
    calls: list[tuple[str, tuple, dict]] = []
    package: Any = types.ModuleType(name)
    package.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]

    def noted(what):
        return lambda *given, **named: calls.append((what, given, named))

    for what in (
        "init",
        "log",
        "finish",
        "set_experiment",
        "start_run",
        "log_params",
        "log_metrics",
        "end_run",
    ):
        setattr(package, what, noted(what))
    monkeypatch.setitem(sys.modules, name, package)
    writer = types.ModuleType("torch.utils.tensorboard")
    made = SimpleNamespace(add_scalar=noted("add_scalar"), flush=noted("flush"), close=noted("close"))
    writer.SummaryWriter = lambda folder: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    train(tmp_path / "outputs" / "run_007" / "04_train" / "tiny", tracker=name)
    if name == "tensorboard":
        scalars = {given[0]: given[1:] for what, given, _ in calls if what == "add_scalar"}
        assert scalars["selection/error"] == (1.5, 4) and "train/loss" in scalars and "speed/mfu" in scalars
        assert calls[-1][0] == "close"
        return
    [begin] = [c for c in calls if c[0] in ("init", "start_run")]
    assert "run_007/04_train/tiny" in str(begin)
    logged = [c for c in calls if c[0] in ("log", "log_metrics")]
    assert [named["step"] for _, _, named in logged] == [2, 4]
    assert logged[-1][1][0]["selection/error"] == 1.5
    assert calls[-1][0] in ("finish", "end_run")


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        BadConfig, match=r"training\.tracker is wandb, but wandb is not installed; `pip install wandb`"
    ):
        open_tracker("wandb", tmp_path, "judge", {})
    assert open_tracker(None, tmp_path, "judge", {}) is None
