"""The measures of stage 06, with models whose probabilities are known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from lib.evaluation.best_of import _scores
from lib.evaluation.quality import (
    SamplingCost,
    characters,
    describe,
    from_first_gap,
    reference_nll,
    sequence_scores,
    valid_words,
)
from lib.evaluation.ranking_evaluator import RankingEvaluator
from lib.evaluation.text_scores import documents_of
from lib.metrics import average_precision, classification, ngram_entropy, regression
from tests.test_objectives import CLS, Bigrams, V
from tests.test_pool_choice import made_table
from tests.trainings import CPU


class Context:
    """A model with a given number of positions, one of them for [CLS]."""

    config = SimpleNamespace(max_position_embeddings=9)


class Reference(Context, Bigrams):
    pass


def test_a_text_s_likelihood_is_that_of_its_counted_tokens_window_by_window():
    """Twenty tokens are read in windows of eight with [CLS] in front; tokens that do not count add no nats."""
    model, rng = Reference(), np.random.default_rng(0)
    ids = rng.integers(4, V, (3, 20))
    table = model.table.detach().numpy().astype(np.float64)
    logs = table - np.log(np.exp(table).sum(1, keepdims=True))
    each = np.zeros(ids.shape)
    for b, t in np.ndindex(ids.shape):
        each[b, t] = -logs[CLS if t % 8 == 0 else ids[b, t - 1], ids[b, t]]
    counted = rng.random(ids.shape) < 0.5
    for which in (np.ones_like(counted), counted):
        found = reference_nll(model, CPU, ids, which, CLS)
        np.testing.assert_allclose(found, (each * which).sum(1), rtol=1e-4)


def test_tokens_from_the_first_generated_one_on_are_measured():
    free = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], bool)
    assert from_first_gap(free).astype(int).tolist() == [[0, 1, 1, 1], [0] * 4, [1] * 4, [0, 0, 0, 1]]


class Mean(Context, nn.Module):
    def forward(self, input_ids, attention_mask=None, **_):
        assert (input_ids[:, 0] == CLS).all()
        return SimpleNamespace(logits=input_ids[:, 1:].float().mean(1, keepdim=True))


def test_a_long_text_s_score_is_the_mean_of_its_windows_by_their_tokens():
    ids = np.random.default_rng(0).integers(4, V, (5, 20))
    np.testing.assert_allclose(sequence_scores(Mean(), CPU, ids, CLS), ids.mean(1), rtol=1e-5)


def test_the_first_and_last_word_of_a_text_do_not_count():
    known = {"the", "cat", "sat"}
    found = valid_words(["xx the cat zz sat yy", "the cat"], known)
    assert found is not None and found.value == pytest.approx(3 / 4)
    assert valid_words(["one two"], known) is None


def test_a_row_of_the_table_is_per_character_over_all_texts():
    texts = ["abab", "ab"]
    row = describe(SamplingCost("ancestral", 4, 3.5, 1.0), texts, {"ab"}, np.array([4.0, 5.0]))
    assert row["reference_nll"]["value"] == pytest.approx(9 / 6)
    assert (
        row["character_entropy"] == pytest.approx(np.log(2)) and row["samples"] == 2 and row["passes"] == 3.5
    )
    assert row["fourgram_entropy"] == pytest.approx(ngram_entropy(characters(texts), 4))
    assert describe(SamplingCost("ancestral", 4, 3.5, 1.0), texts, {"ab"}, None)["reference_nll"] is None


def test_a_document_s_means_are_over_its_tokens():
    def row(name: str, tokens: int, value: float | None) -> dict:
        means = ("critic_error_mean", "inspector_changed_mean", "reference_nll_mean", "judge_score")
        suspicion = None if value is None else 1 - value
        found = {"document_id": name, "token_ids": [5] * tokens, "judge_suspicion": suspicion}
        return found | dict.fromkeys(means, value)

    lines = documents_of([row("a", 10, 1.0), row("b", 4, 0.5), row("a", 30, 2.0), row("c", 3, None)])
    assert [line["document_id"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["tokens"] == 40 and lines[0]["critic_error_mean"] == pytest.approx(70 / 40)
    assert lines[1]["judge_score"] == 0.5 and lines[2]["reference_nll_mean"] is None


def test_scorers_prefer_samples_with_fewer_errors_among_generated_tokens():
    """Only generated tokens count. The lower their probability of error, the higher the score."""
    error = np.array([[0.9, 0.2, 0.4], [0.0, 0.8, 0.8]])
    evaluator: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(cls_token_id=CLS), runtime=CPU, judge=Mean(), ranker=None,
        sampler=SimpleNamespace(critic_error=lambda texts: error[texts[:, 0] - 4]),
        pseudo_likelihood=lambda texts, rows: -error[texts[:, 0] - 4],
    )  # fmt: skip
    pool = np.array([[[4, 5, 6]], [[5, 5, 6]]])
    start: Any = SimpleNamespace(number=np.array([0]), free=np.array([[False, True, True]]))
    found = _scores(evaluator, pool, start)
    for name in ("critic", "generator"):
        np.testing.assert_allclose(found[name], [[-0.3], [-0.8]])
    np.testing.assert_allclose(found["judge"], pool.mean(2))
    assert "ranker" not in found


def test_an_answer_is_the_candidate_of_the_highest_score_and_its_probability_its_share():
    table = made_table()
    rng = np.random.default_rng(0)
    scores = np.where(table.present, rng.normal(size=table.present.shape), -np.inf)
    evaluator: Any = RankingEvaluator.__new__(RankingEvaluator)
    evaluator.config = SimpleNamespace(seed=0)
    evaluator._explain = lambda seen: f"{seen['chosen_kind']} {seen['reward']}"
    evaluator.tables, evaluator.scores, evaluator.trained = (
        {"held_out": table},
        {("r", "held_out"): scores},
        ["r"],
    )
    chosen = scores.argmax(1)
    for n, answer in enumerate(evaluator.answers().to_pylist()):
        ordered = np.sort(scores[n])[::-1]
        shares = np.exp(scores[n]) / np.exp(scores[n]).sum()
        assert (
            answer["chosen"] == table.texts[n, chosen[n]] and answer["reward"] == table.rewards[n, chosen[n]]
        )
        assert answer["probability"] == pytest.approx(shares.max())
        assert answer["lead"] == pytest.approx(ordered[0] - ordered[1]) and answer["best_reward"] == 1
        assert answer["note"] == f"{table.kinds[n, chosen[n]]} {table.rewards[n, chosen[n]]}"
    ranked = evaluator.ranked().to_pylist()
    assert len(ranked) == table.present.sum()
    for row in ranked:
        n = table.example_ids.index(row["example_id"])
        own = scores[n, row["candidate_id"]]
        assert row["score"] == own and row["rank"] == 1 + (scores[n] > own).sum()
        assert row["reward"] == table.rewards[n, row["candidate_id"]]
    right = table.rewards[np.arange(len(table)), chosen] == 1
    assert evaluator.summary("held_out")[0]["accuracy"] == pytest.approx(right.mean())


def test_figures_of_predictions_against_their_formulas():
    target, predicted = np.array([0.0, 0.5, 1.0, 0.25]), np.array([0.3, 0.4, 0.1, 0.3])
    found = regression(predicted, target)
    assert found["mae"] == pytest.approx(np.abs(predicted - target).mean())
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, target)[0, 1]) and found["pearson"] < 0
    table = classification(np.array([[8, 2, 0], [1, 4, 0], [3, 0, 2]]))
    f1 = [2 * 8 / (10 + 12), 2 * 4 / (5 + 6), 2 * 2 / (5 + 2)]
    assert [table[f"f1_{c}"] for c in range(3)] == pytest.approx(f1)
    assert table["macro_f1"] == pytest.approx(np.mean(f1))
    score, happened = np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, False, True, False])
    assert average_precision(score, happened) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(score, happened & False))
