"""Benchmarks of speed: they read what trainings write, and publish only what they say that they measured."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import nelbo, speed, speed_neighbours, speed_sampling
from lib.engine.speed import SpeedMeter
from lib.training.metrics_log import MetricsLog


def logged(folder, step: int, seconds: float, steps: int) -> None:
    """A line of speed.jsonl by a process that has made `steps` steps of 50 tokens when it is at `step`."""
    import torch

    meter = SpeedMeter(torch.device("cpu"), 50, 1.0, 1.0, seconds=seconds, steps=steps)
    log = MetricsLog(folder, None)
    log.write({"step": step, "train": {}, "selection": {}}, meter.figures())
    log.close()


def test_a_step_beside_a_neighbour_is_timed_from_what_a_training_writes(tmp_path, monkeypatch):
    """Alone, a step takes 0.5 s; beside a program of lower priority 1.0 s, and 1.5 s beside one of the same."""
    seconds = {None: 0.5, 10: 1.0, 0: 1.5}
    nice: list[int | None] = []

    def train(model, run, flags):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        logged(folder, 40, 40 * seconds[nice[-1]], 40)
        return folder

    class Busy:
        def __init__(self, value):
            nice.append(value)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(speed_neighbours, "_script", lambda name, flags: None)
    monkeypatch.setattr(speed_neighbours, "_train", train)
    monkeypatch.setattr(speed_neighbours, "busy", Busy)
    found = speed_neighbours.compare_neighbours(40)
    for figures in found["modes"].values():
        assert figures["seconds"] == {"alone": 0.5, "nice 10": 1.0, "nice 0": 1.5}
        assert figures["ratios"] == {"nice 10": 2.0, "nice 0": 3.0}
    assert found["worst"] == 2.0 and len(found["modes"]) == len(speed_neighbours.MODELS) + 1


def test_the_minutes_of_a_training_count_the_steps_before_an_interruption(tmp_path, monkeypatch):
    """6,000 tokens in all at 10 tokens/s are 10 minutes, although the last process trained for two."""
    folder = tmp_path / "04_train" / "generator"
    folder.mkdir(parents=True)
    logged(folder, 120, seconds=120.0, steps=24)
    training = SimpleNamespace(steps=120, batch_size=5)
    spec = SimpleNamespace(training=training, architecture=SimpleNamespace(context=10))
    record: dict[str, Any] = {
        "parameters": 1, "table": [{"value": 1.0, "low": 0.9, "high": 1.1}],
        "held_out": {"train_nelbo": 1.0, "masked_accuracy": 0.5, "unigram_nll": 3.0},
    }  # fmt: skip
    monkeypatch.setattr(nelbo, "prepare", lambda *_: (SimpleNamespace(models={"generator": spec}), tmp_path))
    monkeypatch.setattr(nelbo, "train_one", lambda *_, again: record)
    assert nelbo.measure("name", [])["minutes"] == pytest.approx(10)


def test_plain_layers_are_not_published_as_compiled_ones(monkeypatch):
    sampler = SimpleNamespace(mask_id=1, sample=lambda texts, policy, nfe: None)
    layers = SimpleNamespace(compiled=False)
    monkeypatch.setattr(speed_sampling, "sampler_of", lambda compiled: (sampler, layers))
    with pytest.raises(SystemExit, match="not compiled here"):
        speed_sampling.compare_sampling()


def test_too_few_steps_to_time_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed", "trainer", "--steps", "4"])
    with pytest.raises(SystemExit) as stop:
        speed.main()
    assert stop.value.code == 2 and "--steps 4 is too few to time: at least 5" in capsys.readouterr().err
