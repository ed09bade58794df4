"""The leaderboard plans steps that fit into a budget; the plain models are what they are said to be."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import leaderboard, provenance
from benchmarks.plain_models import bert, gpt2
from benchmarks.step_clock import StepClock
from lib.config import load_config

SMALL = ("architecture.num_hidden_layers=1", "architecture.hidden_size=32", "architecture.num_attention_heads=2",
         "architecture.context=32", "training.evaluation_examples=32")  # fmt: skip


def test_steps_fit_into_the_budget_with_their_start():
    """A step takes 0.1 s and the start 5 s: 96 % of 100 s have room for 910 steps."""
    calls = []

    def trained(steps: int) -> dict[str, float]:
        calls.append(steps)
        start = 60 if len(calls) == 1 else 5  # the first call compiles
        return {"seconds": start + 0.1 * steps, "seconds_per_step": 0.1}

    steps = leaderboard._steps_within(100.0, trained)
    assert steps == pytest.approx(910, abs=1)
    with pytest.raises(SystemExit, match="no room"):
        leaderboard._steps_within(5.0, trained)


def test_a_clock_times_the_steps_after_the_first_ones(monkeypatch):
    """The first steps take 100 s each, the others 2 s; a step of two parts is one step."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    objective = SimpleNamespace(part=lambda model, step, rows: step)
    clock = StepClock.of(objective)
    for step in range(StepClock.FIRST + 4):
        for rows in (range(2), range(2, 4)):
            assert objective.part(None, step, rows) == step
        now[0] += 100 if step < StepClock.FIRST else 2
    assert clock.seconds_per_step() == 2
    short = StepClock()
    for _ in range(StepClock.FIRST + 1):
        short.step_begins()
    with pytest.raises(ValueError, match="too few"):
        short.seconds_per_step()


@pytest.mark.parametrize(("name", "kind"), [("bert_diffusion", "NELBO"), ("remask_causal", "NLL")])
def test_a_row_is_measured_on_held_out_text(name, kind, tmp_path, monkeypatch):
    """Ten steps on a text that repeats: better than chance. The figure is that of the trained weights."""
    text = tmp_path / "input.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 400)
    monkeypatch.setattr(leaderboard, "shakespeare", lambda: text)
    monkeypatch.setattr("benchmarks.prepared.RESULTS", tmp_path)
    monkeypatch.setattr(leaderboard, "_steps_within", lambda budget, trained: 60)
    row = leaderboard.ROWS[name]
    row = leaderboard.Row(row.configs, (*row.overrides, *SMALL), row.model)
    found = leaderboard.run(row, 30.0, name)
    assert found["kind"] == kind and found["steps"] == 60 and found["seconds"] > 0
    assert 0 < found["value"]["value"] < 2.6  # the frequencies of the characters give 2.75
    assert found["value"]["low"] <= found["value"]["value"] <= found["value"]["high"]


def test_plain_models_have_the_size_of_the_config():
    config = load_config(overrides=list(SMALL))
    ids = torch.arange(64).view(2, 32) % 20
    for build in (gpt2, bert):
        model = build(config, 20).eval()
        output = model(input_ids=ids)
        assert output.logits.shape == (2, 32, 20)
        assert model.config.num_hidden_layers == 1 and model.config.hidden_size == 32
        assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    changed = ids.clone()
    changed[:, -1] = 0
    with torch.no_grad():
        causal, both = gpt2(config, 20).eval(), bert(config, 20).eval()
        assert torch.equal(causal(input_ids=ids).logits[:, :-1], causal(input_ids=changed).logits[:, :-1])
        assert not torch.allclose(both(input_ids=ids).logits[:, 0], both(input_ids=changed).logits[:, 0])
        chosen = torch.tensor([3, 40])
        logits = both(input_ids=ids).logits.flatten(0, 1)[chosen]
        torch.testing.assert_close(both(input_ids=ids, logits_at=chosen).logits, logits)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.compile=on", "compile of the generator is on; expected off"),
        ("models.generator.training.compile=on", "compile of the generator is on; expected off"),
        ("tokenizer.kind=bpe", "tokenizer.kind is bpe"),
        ("data.whitespace=squeeze", "data.whitespace is squeeze"),
        ("data.deduplicate=paragraph", "data.deduplicate is paragraph"),
        ("data.fractions={train: 0.99, held_out: 0.01}", "data.fractions is"),
        ("data.split=hash", "data.split is hash"),
        ("data.path=other.txt", "expected tinyshakespeare"),
        ("device=cuda", "device is cuda; expected cpu"),
        ("models.generator.split=held_out", "split of the generator is held_out; expected train"),
    ],
)
def test_a_config_that_breaks_the_rules_is_refused(override, said, tmp_path, monkeypatch):
    text = tmp_path / "input.txt"
    monkeypatch.setattr(leaderboard, "shakespeare", lambda: text)
    rules = ["training.compile=off", "device=cpu", f"data.path={text}"]
    assert leaderboard.broken_rules(load_config(["configs/nelbo.yaml"], overrides=rules)) == []
    assert (
        leaderboard.broken_rules(
            load_config(["configs/speedrun.yaml", "configs/speedrun_plain.yaml"], overrides=rules)
        )
        == []
    )
    (found,) = leaderboard.broken_rules(load_config(["configs/nelbo.yaml"], overrides=[*rules, override]))
    assert said in found


def test_a_model_that_cannot_be_imported_is_named():
    row = leaderboard.Row((), model="benchmarks.plain_models:nothing")
    with pytest.raises(SystemExit, match=r"plain_models:nothing.*PACKAGE.MODULE:FUNCTION"):
        leaderboard._built(row, load_config(), 20)


class Bare(nn.Module):
    """A model whose forward takes no more than the usual arguments."""

    def forward(self, input_ids, attention_mask):
        return None


@pytest.mark.parametrize(("attention", "missing"), [("bidirectional", "logits_at"), ("causal", "use_cache")])
def test_a_model_whose_forward_takes_no_argument_that_training_gives_is_refused(
    monkeypatch, attention, missing
):
    monkeypatch.setattr(leaderboard, "_function_of", lambda name: lambda config, vocabulary: Bare())
    config = load_config(overrides=[f"models.generator.attention={attention}"])
    with pytest.raises(SystemExit, match=f"forward of Bare takes no {missing}"):
        leaderboard._built(leaderboard.Row((), model="mine:build"), config, 20)


def test_the_code_of_a_models_function_is_part_of_the_provenance(monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.plain_models")
    assert "benchmarks/plain_models.py" not in provenance.files()
    leaderboard._function_of("benchmarks.plain_models:bert")
    assert "benchmarks/plain_models.py" in provenance.files()


def test_a_models_function_of_another_place_is_refused():
    with pytest.raises(SystemExit, match="is not in this repository; put the function into benchmarks/"):
        leaderboard._function_of("json:dumps")
