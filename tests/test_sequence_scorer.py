"""The oracle and the confidence baseline in a sequence scorer's report."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.report.critic import _classifiers
from lib.training.data import Sequences
from lib.training.objectives.candidates import CandidateSplits
from lib.training.objectives.sequence_scorer import ScoredSequences, SequenceScore
from tests.trainings import context


class Constant(torch.nn.Module):
    """The same score for every text."""

    def forward(self, input_ids, attention_mask=None):
        return type("Output", (), {"logits": torch.full((len(input_ids), 1), 0.5)})


def objective(targets: np.ndarray, changed: np.ndarray | None, confidence=None) -> SequenceScore:
    ids = Sequences(pa.chunked_array([pa.array([[5, 6, 7]] * len(targets), pa.list_(pa.int32()))]), 8, 0)
    split = ScoredSequences(ids, targets, changed)
    splits = CandidateSplits(split, split, split, np.arange(len(targets)), confidence)
    return SequenceScore(context("judge", seed=0, evaluation_examples=10), splits, cls_id=2)


def test_the_irreducible_error_is_what_the_changed_tokens_leave_open():
    rng = np.random.default_rng(0)
    changed = rng.uniform(0, 0.8, 2000)
    noise = rng.normal(0, 0.05, 2000)
    values, _ = objective(np.clip(1 - changed + noise, 0, 1), changed).report(Constant())
    assert values["irreducible_mse"] == pytest.approx(0.05**2, rel=0.15)
    assert values["best_r2"] == pytest.approx(1 - 0.05**2 / np.var(1 - changed + noise), abs=0.02)
    assert values["mse"] > values["irreducible_mse"]


def test_nothing_is_said_where_it_is_not_known():
    values, _ = objective(np.linspace(0, 1, 50), None).report(Constant())
    assert "irreducible_mse" not in values


def test_the_generators_mean_confidence_is_a_baseline():
    rng = np.random.default_rng(0)
    target = np.round(rng.uniform(0.2, 1, 400), 2)
    target[:80] = 1
    telling = [np.full(5, -3 + 2 * t) + rng.normal(0, 0.01, 5) for t in target]
    values, rows = objective(target, 1 - target, telling).report(Constant())
    assert values["confidence"]["r2"] > 0.95 and values["confidence"]["auroc_untouched"] > 0.95
    assert rows[1].baseline == "mean confidence" and rows[1].baseline_value == values["confidence"]["r2"]
    silent, _ = objective(target, None, [rng.normal(-1, 1, 5) for _ in target]).report(Constant())
    assert abs(silent["confidence"]["r2"]) < 0.1


def test_no_r2_is_claimed_where_all_targets_are_the_same():
    values, rows = objective(np.ones(50), None).report(Constant())
    assert [row.metric for row in rows] == ["MSE"] and "rewritten" not in values


def test_rewritten_sequences_are_judged_alone_too():
    target = np.concatenate([np.ones(20), np.linspace(0.2, 0.8, 60)])
    values, _ = objective(target, 1 - target).report(Constant())
    assert values["auroc_untouched"] == 0.5
    assert values["rewritten"]["mse"] == pytest.approx(((target[20:] - 0.5) ** 2).mean())


def test_scores_of_a_user_s_own_are_not_called_unchanged_and_rewritten():
    """The highest of any scores says nothing about the original text. The report names neither."""
    target = np.concatenate([np.ones(20), np.linspace(0.2, 0.8, 60)])
    telling = [np.full(5, t) for t in target]
    values, _ = objective(target, None, telling).report(Constant())
    assert (
        not {"auroc_untouched", "rewritten"} & values.keys() and "auroc_untouched" not in values["confidence"]
    )
    known, _ = objective(target, 1 - target, telling).report(Constant())
    for held_out, is_known in ((values, False), (known, True)):
        manifests = {"04_train": {"stats": {"judge": {"held_out": held_out}}}}
        data: Any = SimpleNamespace(manifests=manifests)
        (html,) = _classifiers(data)
        for words in ("AUROC, unchanged", "rewritten texts only", "unchanged text scores higher"):
            assert (words in html) == is_known, words
