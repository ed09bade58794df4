"""Reports of much held-out data read a random sample, say so, and are right about it; less data is read whole."""

import numpy as np
import pytest

from lib.training.objectives import language_model, token_classifier, token_critic
from lib.training.objectives.base import some_of
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.objectives.next_token import NextToken
from tests import test_critic_report, test_likelihoods, test_objectives
from tests.test_likelihoods import known_costs  # noqa: F401 - a fixture that every test uses


def test_all_or_a_keyed_random_sample(capsys):
    assert some_of(1, "m", "held-out windows", 10, 10).tolist() == list(range(10))
    assert not capsys.readouterr().err
    some = some_of(1, "m", "held-out windows", 1000, 300)
    assert "m: the report reads a random sample of 300 of 1,000 held-out windows" in capsys.readouterr().err
    assert len(set(some)) == 300 and (np.diff(some) > 0).all() and abs(some.mean() - 500) < 60
    assert some.tolist() == some_of(1, "m", "held-out windows", 1000, 300).tolist()
    assert some.tolist() != some_of(2, "m", "held-out windows", 1000, 300).tolist()


@pytest.mark.parametrize("kind", [MaskedDiffusion, NextToken])
def test_a_language_model_is_measured_on_the_sampled_windows(monkeypatch, kind):
    monkeypatch.setattr(language_model, "MAX_REPORTED_WINDOWS", 6)
    made, name = test_likelihoods.objective(kind, 16), "nll" if kind is NextToken else "nelbo"
    assert len(made.reported) == 6 < made.splits.held_out.count
    values, rows = made.report(test_likelihoods.PerToken())
    ids, valid = made.splits.held_out.batch(made.reported, np.zeros(6))
    nats = np.where(valid, test_likelihoods.NATS[ids], 0).sum(1)
    assert values[name] == pytest.approx(nats.sum() / valid.sum(), rel=1e-6)
    # The interval is over the groups of these windows
    owners = made.splits.held_out.owner[made.reported]
    expected = made.estimate(nats, valid.sum(1))
    assert len(np.unique(owners)) < 12 and (rows[0].low, rows[0].high) == pytest.approx(
        expected[1:], rel=1e-5
    )


def test_a_critic_is_measured_on_the_sampled_windows(monkeypatch):
    target = test_critic_report.objective(temperature=(1.0, 1.0))
    width, draws = target.tokens_per_row, token_critic.REPORT_DRAWS
    monkeypatch.setattr(token_critic, "MAX_SCORED_TOKENS", 10 * width * draws + 1)
    seen, real = [], target.score_fills

    def spy(model, windows, examples, groups, draws):
        seen.append((examples, groups))
        return real(model, windows, examples, groups, draws)

    monkeypatch.setattr(target, "score_fills", spy)
    values, _, _ = target.report(test_critic_report.Known())
    (selection, same), (held_out, names) = seen
    assert len(selection) == len(held_out) == 10 and selection.tolist() == same.tolist()
    assert names.tolist() == [str(i) for i in held_out] and held_out.tolist() != list(range(10))
    assert values["tokens"] < 10 * width * draws


def test_a_token_classifier_is_measured_on_the_sampled_candidates(monkeypatch):
    target = test_objectives.classes_of()
    count = target.splits.held_out.sequences.count
    monkeypatch.setattr(token_classifier, "MAX_REPORTED", count - 1)
    real, seen = target._predict, []

    def spy(model, split, samples):
        seen.append(samples)
        return real(model, split, samples)

    monkeypatch.setattr(target, "_predict", spy)
    values, _ = test_objectives.report(target, test_objectives.ClassOf())
    (samples,) = seen
    assert len(samples) == count - 1
    lengths = target.splits.held_out.sequences._lengths
    assert np.sum(values["confusion"]) == lengths[samples].sum()
