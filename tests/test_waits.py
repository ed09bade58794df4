"""Trainings that do not wait for a GPU: losses read later, data drawn ahead. The CPU computes the same here."""

import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch

from lib.config import load_config
from lib.devices import to_device
from lib.errors import NonFiniteLoss
from lib.models.build import heads_of, start_model
from lib.models.hugging_face import shared_modeling
from lib.training import loop
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.objectives.next_token import NextToken
from lib.training.prefetch import Prefetcher
from lib.training.step_terms import SETTLE_EVERY, UnreadSteps
from tests import late_reading
from tests.process_runs import run_jobs
from tests.trainings import TOKENIZER, TOKENS, MeanOfRows, context, fingerprint, settings, splits, train_tiny

WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


def model_of(kind: str) -> Any:
    architecture = load_config(quick_test=True).architecture
    attention = "causal" if kind == "causal" else "bidirectional"
    named = "sequence_scorer" if kind == "mean" else "language_model"
    return start_model(named, architecture, attention, len(TOKENIZER), 0, "m", **heads_of(named))[0]


def objective_of(kind: str, training: Any) -> Any:
    if kind == "causal":
        return NextToken(context(**training.model_dump()), splits(), TOKENIZER.cls_token_id)
    return MaskedDiffusion(context(**training.model_dump()), splits(), load_config().diffusion, TOKENS)


@pytest.fixture
def later(monkeypatch):
    """Trainings run as on a GPU."""
    gpu, read, draw = torch.device("cuda"), loop.may_read_later, loop.may_draw_ahead
    monkeypatch.setattr(loop, "may_read_later", lambda device, objective: read(gpu, objective))
    monkeypatch.setattr(loop, "may_draw_ahead", lambda device, objective: draw(gpu, objective))
    monkeypatch.setattr(shared_modeling, "may_read", lambda tensor: False)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_training_that_reads_later_and_draws_ahead_has_the_same_bits(tmp_path, request, kind, parts):
    training = settings(steps=SETTLE_EVERY + 7, evaluate_every=20, checkpoint_every=20, parts=parts)
    train_tiny(model_of(kind), objective_of(kind, training), training, tmp_path / "plain")
    request.getfixturevalue("later")
    threads = set()
    objective = objective_of(kind, training)
    plain = objective.part
    objective.part = lambda *args: threads.add(threading.current_thread().name) or plain(*args)
    train_tiny(model_of(kind), objective, training, tmp_path / "later")
    assert len(threads) == 1 and threads.pop().startswith("prefetch")
    assert fingerprint(tmp_path / "later") == fingerprint(tmp_path / "plain")


@pytest.mark.slow
def test_two_processes_that_read_later_have_the_bits_of_one_that_does_not(tmp_path):
    late_reading.train(tmp_path / "plain")
    (done,) = run_jobs([{"size": 2, "module": "tests.late_reading", "argv": ["-", str(tmp_path / "later")]}])
    assert done["codes"] == [0, 0], done["errors"]
    assert fingerprint(tmp_path / "later") == fingerprint(tmp_path / "plain")


def test_an_interrupted_training_that_reads_later_ends_with_the_same_bits(tmp_path, later):
    training = settings(steps=12, evaluate_every=8, checkpoint_every=3)
    train_tiny(model_of("masked"), objective_of("masked", training), training, tmp_path / "whole")

    def fault(step: int) -> None:
        if step == 8:
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        train_tiny(model_of("masked"), objective_of("masked", training), training, tmp_path / "cut", fault)
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())
    train_tiny(model_of("masked"), objective_of("masked", training), training, tmp_path / "cut")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


def counted(name: str, waits: Counter) -> Any:
    """A method of tensors that counts its calls."""
    plain = getattr(torch.Tensor, name)

    def method(tensor, *args):
        waits[name] += 1
        return plain(tensor, *args)

    return method


def waits_of(monkeypatch, steps: int, folder: Any, optimizer: str) -> Counter:
    """Calls that let a program wait for a GPU, in a training without evaluations before its end."""
    training = settings(steps=steps, evaluate_every=steps, checkpoint_every=steps, optimizer=optimizer)
    model, objective, waits = model_of("masked"), objective_of("masked", training), Counter()
    monkeypatch.setattr(objective, "evaluate", lambda model: {"nelbo": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, counted(name, waits))
        patch.setattr(loop._Run, "_save_model", lambda *args: None)
        train_tiny(model, objective, training, folder)
    return waits


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_reads_later_waits_for_nothing(tmp_path, request, monkeypatch, optimizer):
    few, many = (
        waits_of(monkeypatch, steps, tmp_path / f"plain {steps}", optimizer).total() for steps in (4, 12)
    )
    assert many - few >= 2 * 8  # a loss and a norm in each step
    request.getfixturevalue("later")
    few, many = (waits_of(monkeypatch, steps, tmp_path / f"{steps}", optimizer) for steps in (4, 12))
    assert many == few
    third = waits_of(monkeypatch, SETTLE_EVERY + 4, tmp_path / "third", optimizer)
    assert third.total() - few.total() == 1


class BadLoss(MeanOfRows):
    selection, tokens_per_row, cls_id = "loss", 8, 3

    def __init__(self, bad_step: int):
        self.bad_step = bad_step

    def loss(self, model, step, rows):
        loss = model(input_ids=torch.arange(4, 12)[None]).logits.mean()
        return {"loss": loss * float("nan") if step == self.bad_step else loss}

    def evaluate(self, model):
        return {"loss": 1.0}


def test_a_loss_that_is_not_finite_is_noticed_before_anything_is_saved(tmp_path, later):
    training = settings(steps=12, evaluate_every=12, checkpoint_every=6)
    with pytest.raises(
        NonFiniteLoss, match=r"loss at step 7 is nan; training stopped before anything was saved"
    ):
        train_tiny(model_of("mean"), BadLoss(7), training, tmp_path)
    assert (tmp_path / "checkpoint").is_dir() and not (tmp_path / "best_model").exists()
    with pytest.raises(
        NonFiniteLoss, match=r"loss at step 7"
    ):  # from the checkpoint of step 6, which is finite
        train_tiny(model_of("mean"), BadLoss(7), training, tmp_path)


def test_objectives_that_scale_their_loss_are_read_in_each_step():
    gpu, training = torch.device("cuda"), settings()
    plain = objective_of("masked", training)
    assert loop.may_read_later(gpu, plain) and not loop.may_read_later(torch.device("cpu"), plain)
    plain.modifiers = object()
    assert not loop.may_read_later(gpu, plain)
    assert loop.may_draw_ahead(gpu, plain) and not loop.may_draw_ahead(torch.device("cpu"), plain)
    assert not loop.may_draw_ahead(gpu, BadLoss(0))
    plain.state, plain.load_state = dict, print  # as of stages of masking, which an evaluation may end
    assert not loop.may_draw_ahead(gpu, plain)


def test_unread_numbers_are_those_of_the_parts_in_double_precision():
    class Sums:
        own = range(2)

        def sum(self, values):
            return {name: sum(part[name] for part in values) for name in values[0]}

    unread, parts = UnreadSteps(torch.device("cpu")), Sums()
    assert unread.read(parts) == []  # type: ignore[arg-type]
    for step in (3, 4):
        terms = [{"loss": torch.tensor(step + n), "x": torch.tensor(1 / 3)} for n in (0.0, 0.25)]
        unread.add(step, terms, torch.tensor(7.0))
    first, second = unread.read(parts)  # type: ignore[arg-type]
    assert (first.step, first.terms["loss"], first.norm) == (3, 6.25, 7.0)
    assert (second.step, second.terms["loss"]) == (4, 8.25)
    assert second.terms["x"] == 2 * float(torch.tensor(1 / 3))
    assert unread.read(parts) == [] and unread.steps == []  # type: ignore[arg-type]


def test_data_is_drawn_one_step_ahead_in_order():
    drawn: list[int] = []
    with Prefetcher(lambda step: drawn.append(step) or step * 10, 5, 9) as ahead:
        for step in range(5, 9):
            assert ahead.take(step) == step * 10
            for _ in range(200):
                if len(drawn) == min(step - 3, 4):
                    break
                time.sleep(0.01)
            assert drawn == list(range(5, min(step + 2, 9)))
        with pytest.raises(AssertionError, match="step 9 is not the next one"):
            ahead.take(9)


def test_an_error_of_the_thread_is_raised_at_its_own_step():
    def draw(step: int) -> int:
        if step == 2:
            raise ValueError(f"no data of step {step}")
        return step

    with pytest.raises(ValueError, match="no data of step 2"), Prefetcher(draw, 0, 5) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        ahead.take(2)
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())


def test_a_copy_to_the_same_device_is_the_same_tensor():
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor, torch.device("meta")).device.type == "meta"
