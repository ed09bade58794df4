"""Detection: thresholds keep their promise on new text, joins and figures follow their definitions, detectors see what is planted."""

import importlib
import itertools
import json
import math
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from lib.config import load_config
from lib.detection import (
    Calibration,
    Scored,
    Windows,
    best_f1_threshold,
    change_point,
    choose_join,
    f1_estimate,
    measure,
    threshold_for,
)
from lib.errors import BadConfig
from lib.evaluation import detectors
from lib.evaluation.detection_results import JUDGE, _Detection
from lib.evaluation.detectors import STRENGTHS, bag_of_words, likelihoods, with_sign
from lib.evaluation.labelled_documents import LabelledDocuments, _count_documents, _groups
from lib.evaluation.parts_of_text import LabelledTokens, measure_parts, tokens_of
from lib.evaluation.text_scores import about_windows, documents_of, measured_rates, windows
from lib.evaluation.user_texts import read_user_texts
from lib.metrics import SHARE, auroc, ratio
from lib.models.publish import publish
from lib.report.detection import detection_html, detection_tables, thresholds_in_words
from lib.report.text_scores import verdict
from lib.runs import RANK, STAGES, RunArgs, load_manifest, score_stage
from lib.runtime import Runtime
from lib.tokenization import train_tokenizer
from lib.training.objectives.sequence_scorer import documents_of as documents_of_table
from tests.conftest import run_stages


@pytest.mark.parametrize("fpr", [0.01, 0.05])
def test_a_threshold_keeps_the_rate_of_false_alarms_on_new_text(fpr):
    """Averaged over draws, the share of new originals above it is at most the target, and hardly below."""
    draws = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        seen, new = draws.normal(size=199), draws.normal(size=2000)
        rates.append((new > threshold_for(seen, fpr)).mean())
    assert fpr - 0.004 < np.mean(rates) <= fpr + 0.0015


def test_few_originals_give_their_highest_suspicion():
    assert threshold_for(np.array([3.0, 1.0, 2.0]), 0.01) == 3.0
    assert threshold_for(np.arange(99.0), 0.01) == 98.0 and threshold_for(np.arange(100.0), 0.01) == 99.0
    assert threshold_for(np.arange(19.0), 0.05) == 18.0 and threshold_for(np.arange(39.0), 0.05) == 37.0


def scored(seed: int, count: int, shift: float) -> Scored:
    draws = np.random.default_rng(seed)
    synthetic = np.arange(count) % 2 == 1
    return Scored(draws.normal(size=count) + shift * synthetic, synthetic, np.arange(count) // 2)


def test_thresholds_and_calibration_come_from_the_chosen_texts_alone():
    chosen, reported = scored(1, 4000, 2.0), scored(2, 4000, 2.0)
    found = measure(chosen, reported)
    for rates in found["thresholds"]:
        above = reported.suspicion > threshold_for(chosen.suspicion[~chosen.synthetic], rates["target"])
        assert rates["tpr"]["value"] == pytest.approx(above[reported.synthetic].mean())
        assert rates["fpr"]["value"] == pytest.approx(above[~reported.synthetic].mean())
        assert (
            rates["tpr"]["low"] < rates["tpr"]["value"] < rates["tpr"]["high"] and rates["enough_originals"]
        )
        assert abs(rates["fpr"]["value"] - rates["target"]) < 0.015
    # For two normal distributions of distance 2, the log-odds are 2 x - 2
    assert found["calibration"]["slope"] == pytest.approx(2, abs=0.2)
    assert found["ece"] < 0.03 and found["auroc"]["value"] == pytest.approx(0.921, abs=0.02)
    other = Scored(reported.suspicion + 9, reported.synthetic, reported.groups)
    again = measure(chosen, other)
    assert [t["threshold"] for t in again["thresholds"]] == [t["threshold"] for t in found["thresholds"]]
    assert again["thresholds"][0]["fpr"]["value"] == 1.0, "shifted text is flagged: nothing was chosen on it"
    assert again["calibration"] == found["calibration"], "the calibration, too"


def test_texts_at_the_threshold_are_no_alarm():
    """19 originals that all look alike are enough for 5 %, and none of them is flagged."""
    flat = Scored(np.zeros(38), np.arange(38) % 2 == 1, np.arange(38))
    one, five = measure(flat, flat)["thresholds"]
    assert [rates[key]["value"] for rates in (one, five) for key in ("fpr", "tpr")] == [0, 0, 0, 0]
    assert not one["enough_originals"] and five["enough_originals"]


def test_a_calibration_without_a_signal_gives_the_share():
    chosen = scored(3, 300, -1.0)
    assert Calibration.fit(chosen).slope < 0
    flat = Calibration.fit(chosen, rising=True)
    assert flat(np.array([-5.0, 5.0])) == pytest.approx([0.5, 0.5])


def test_windows_are_joined_as_named():
    of = Windows(np.array([0, 0, 1, 2, 2, 2]), np.array([1, 3, 2, 1, 1, 2]))
    suspicion = np.array([0.0, 1.0, 0.5, 0.2, 0.9, 0.4])
    assert of.join(suspicion, suspicion, "mean") == pytest.approx([0.75, 0.5, (0.2 + 0.9 + 0.8) / 4])
    assert of.join(suspicion, suspicion, "max") == pytest.approx([1.0, 0.5, 0.9])
    assert of.join(suspicion, suspicion, "first") == pytest.approx([0.0, 0.5, 0.2])
    rows = np.stack([suspicion, 1 - suspicion], 1)
    assert of.join(rows, suspicion, "max")[:, 1] == pytest.approx([0.0, 0.5, 0.1])


def test_the_windows_of_a_document_are_found_by_its_name():
    config = load_config(["configs/your_labels.yaml"])
    names = ["a:b:0", "a:b:1", "x:1:0", "x:10:0", "x:10:1"]
    table = pa.table(
        {"example_id": pa.chunked_array([names[:2], names[2:]]), "token_ids": [[1], [1, 2], [], [3], [4]]}
    )
    found = documents_of_table(table, config)
    assert found.document.tolist() == [0, 0, 1, 2, 2] and found.tokens.tolist() == [1, 2, 1, 1, 1]


def test_a_sample_of_documents_is_counted_in_documents():
    """Not in their windows: a detector that learns from fewer documents than the judge would look worse than it is."""
    names = [f"d{n}:{window}" for n in range(40) for window in range(10)]
    records = [json.dumps({"label": 0, "behind_space": True}) if n % 10 else None for n in range(400)]
    rows = pa.table({"example_id": names, "group": names, "split": ["train"] * 400, "record": records})
    stage: Any = SimpleNamespace(tables=lambda *arguments: [rows[:155], rows[155:]])
    labelled = load_config(["configs/your_labels.yaml"], overrides=["data.path=x.jsonl"])
    assert _count_documents(stage, labelled, "train") == 40
    groups, behind_space = _groups(stage, labelled, "train", lambda name: name == "d7")
    assert set(groups) == set(names[70:80]) and behind_space == set(names[71:80])
    every = load_config(overrides=["candidates.per_example=3"])
    assert _count_documents(stage, every, "train") == 1200


def test_the_join_is_chosen_by_what_separates_documents():
    draws = np.random.default_rng(4)
    of = Windows(np.arange(800) // 8, np.ones(800, int))
    synthetic = np.arange(100) % 2 == 1
    suspicion = draws.uniform(0, 0.8, 800)
    at = np.flatnonzero(synthetic) * 8 + draws.integers(1, 8, 50)
    one = suspicion.copy()
    one[at] = 0.95  # one window of a synthetic document gives it away
    assert choose_join(of, one, synthetic) == "max"
    everywhere = draws.normal(size=800) + 0.7 * np.repeat(synthetic, 8)
    assert choose_join(of, everywhere, synthetic) == "mean"
    start = draws.normal(size=800)
    start[::8] += 3 * synthetic
    start[1::8] -= 3 * synthetic  # and the second window misleads
    assert choose_join(of, start, synthetic) == "first"
    assert choose_join(of, start, np.zeros(100, bool)) == "mean", "of one kind only, nothing can be chosen"


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12))
def test_the_turn_is_the_most_likely_one(shares):
    p = np.array(shares)
    likelihood = [np.log1p(-p[:k]).sum() + np.log(p[k:]).sum() for k in range(len(p) + 1)]
    assert likelihood[change_point(p)] == pytest.approx(max(likelihood))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20))
@settings(max_examples=25)
def test_f1_and_its_best_threshold(pairs):
    score, happened = np.array([s for s, _ in pairs], float), np.array([h for _, h in pairs])
    threshold = best_f1_threshold(score, happened)
    if not happened.any():
        assert threshold == math.inf
        return
    best = max(f1_score(happened, score >= t) for t in score)
    assert f1_score(happened, score >= threshold) == pytest.approx(best)
    estimate = f1_estimate(score >= threshold, happened, np.arange(len(score)))
    assert estimate.value == pytest.approx(best)


def documents(texts: list[str], synthetic, ids=None, classes=None) -> LabelledDocuments:
    ids = ids or [np.array([ord(c) % 50 + 4 for c in text]) for text in texts]
    classes = classes or [np.zeros(len(i), int) for i in ids]
    names = [f"d{i}" for i in range(len(texts))]
    return LabelledDocuments(
        names, np.array(names), np.array(synthetic), texts, ids, classes, np.arange(len(texts))
    )


def test_a_bag_of_words_finds_a_planted_word_and_nothing_else():
    draws = np.random.default_rng(5)

    def made(count: int, planted: bool) -> LabelledDocuments:
        synthetic = np.arange(count) % 2 == 1
        texts = [
            " ".join(f"w{j}" for j in draws.integers(0, 30, 20)) + (" delve" if planted and s else "")
            for s in synthetic
        ]
        return documents(texts, synthetic)

    for planted in (True, False):
        splits = [made(n, planted) for n in (200, 60, 200)]
        for analyzer in ("word", "char"):
            on_chosen, on_reported = bag_of_words(splits[0], splits[1], splits[2], analyzer)
            found = measure(
                *(
                    Scored(s, d.synthetic, d.groups)
                    for s, d in ((on_chosen, splits[1]), (on_reported, splits[2]))
                )
            )
            value = found["auroc"]["value"]
            assert value > 0.8 if planted else 0.35 < value < 0.65


def test_the_strength_of_regularisation_is_the_best_one_for_the_chosen_texts(monkeypatch):
    """Also where another one is the best for the reported texts."""
    draws = np.random.default_rng(6)

    def made(count: int) -> LabelledDocuments:
        synthetic = np.arange(count) % 2 == 1
        words = [draws.integers(0, 40 - 10 * s, 12) for s in synthetic]
        return documents([" ".join(f"w{j}" for j in of) for of in words], synthetic)

    train, one, other = (made(count) for count in (60, 40, 40))
    alone = []
    for strength in STRENGTHS:
        monkeypatch.setattr(detectors, "STRENGTHS", (strength,))
        alone.append(bag_of_words(train, one, other, "word"))
    monkeypatch.setattr(detectors, "STRENGTHS", STRENGTHS)
    quality = [[auroc(on, d.synthetic) for on, d in zip(found, (one, other), strict=True)] for found in alone]
    best = np.argmax(quality, 0)
    assert best[0] != best[1]
    np.testing.assert_array_equal(bag_of_words(train, one, other, "word"), alone[best[0]])
    np.testing.assert_array_equal(bag_of_words(train, other, one, "word"), alone[best[1]][::-1])


class Fixed(torch.nn.Module):
    """A causal model whose distribution depends on the previous token only: `table` (V, V) of log-probabilities."""

    def __init__(self, seed: int, context: int, size: int = 7):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=context + 1)
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.log_softmax(2 * torch.randn(size, size, generator=generator), -1)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("contexts", [(9, 9), (2, 9), (9, 3)])
def test_likelihoods_follow_the_formulas_of_the_papers(contexts):
    """A window longer than the shorter context is read in parts."""
    performer, observer = Fixed(1, contexts[0]), Fixed(2, contexts[1])
    tokenizer = SimpleNamespace(pad_token_id=0, cls_token_id=2)
    ids = [np.array([4, 5, 6, 4]), np.array([5]), np.array([6, 6, 5])]
    docs = LabelledDocuments(
        ["a", "b"],
        np.array(["a", "b"]),
        np.array([True, False]),
        ["wxyz", "a", "bcd"],
        ids,
        ids,
        np.array([0, 0, 1]),
    )
    runtime = Runtime.detect(load_config(overrides=["device=cpu", "precision=fp32"]))
    found = likelihoods(performer, observer, runtime, docs, tokenizer)
    scores = found.detectors(docs)
    for number, windows_of in enumerate(([ids[0], ids[1]], [ids[2]])):
        logs, expected, variance, cross = [], [], [], []
        context = min(contexts)
        for window in [w[at : at + context] for w in windows_of for at in range(0, len(w), context)]:
            for before, token in zip([2, *window[:-1]], window, strict=True):
                p, q = performer.table[before].double(), observer.table[before].double()
                logs.append(float(p[token]))
                expected.append(float((p.exp() * p).sum()))
                variance.append(float((p.exp() * (p - expected[-1]) ** 2).sum()))
                cross.append(-float((q.exp() * p).sum()))
        assert scores["log-likelihood"][number] == pytest.approx(np.mean(logs), rel=1e-5)
        assert scores["Fast-DetectGPT"][number] == pytest.approx(
            (sum(logs) - sum(expected)) / math.sqrt(sum(variance)), rel=1e-4
        )
        assert scores["Binoculars"][number] == pytest.approx(-sum(-x for x in logs) / sum(cross), rel=1e-5)
    assert [len(n) for n in found.nll] == [4, 1, 3]
    context = min(contexts)
    for nats, window in zip(found.nll, ids, strict=True):
        before = [2 if i % context == 0 else window[i - 1] for i in range(len(window))]
        assert nats == pytest.approx(
            [-float(performer.table[b, t]) for b, t in zip(before, window, strict=True)]
        )
    assert "Binoculars" not in likelihoods(performer, None, runtime, docs, tokenizer).detectors(docs)


def test_a_batch_of_parts_of_one_token_has_likelihoods():
    """A context of three divides windows of four tokens into three and one, and the short parts come in batches of their own."""
    ids = [np.array([4, 5, 6, 4])] * 70
    names, number = [str(n) for n in range(70)], np.arange(70)
    docs = LabelledDocuments(names, np.array(names), number % 2 == 0, ["wxyz"] * 70, ids, ids, number)
    runtime = Runtime.detect(load_config(overrides=["device=cpu", "precision=fp32"]))
    tokenizer = SimpleNamespace(pad_token_id=0, cls_token_id=2)
    found = likelihoods(Fixed(1, 3), None, runtime, docs, tokenizer)
    table = Fixed(1, 3).table
    wanted = [-float(table[before, token]) for before, token in ((2, 4), (4, 5), (5, 6), (2, 4))]
    assert all(nats == pytest.approx(wanted) for nats in found.nll)


def test_words_at_the_border_of_windows_stay_apart():
    """A tokenizer dropped the space between the first two windows; the third begins inside a word."""
    texts, ids = ["the dog", "runs aw", "ay"], [np.array([4, 5])] * 3
    classes = [np.array([0, 0]), np.array([0, 1]), np.array([1])]
    docs = LabelledDocuments(["a"], np.array(["a"]), np.array([True]), texts, [*ids[:2], ids[2][:1]], classes,
                             np.zeros(3, int), ["", " ", ""])  # fmt: skip
    assert docs.whole_texts == ["the dog runs away"]
    bounds = [np.array([[0, 3], [4, 7]]), np.array([[0, 4], [5, 7]]), np.array([[0, 2]])]
    (found,) = tokens_of(docs, [np.zeros(len(c)) for c in classes], lambda texts: bounds)
    assert [found.text[a:b] for a, b in found.bounds] == ["the", "dog", "runs", "aw", "ay"]


def test_the_sign_of_a_detector_is_chosen_on_the_chosen_texts():
    synthetic = np.array([True, True, False, False])
    first, second = with_sign(np.array([0.0, 1, 2, 3]), np.array([5.0, 6]), synthetic)
    assert first.tolist() == [0, -1, -2, -3] and second.tolist() == [-5, -6]


class ReadsFirstToken(torch.nn.Module):
    """A judge whose (B, C) logits are those of the token behind [CLS]: `table` (V, C)."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = table

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table[input_ids[:, 1]])


def detection_of(**evaluator: Any) -> Any:
    """The work of stage 06 on two documents of two windows and one, which are both chosen and reported."""
    ids = [np.array([4, 5, 6]), np.array([5]), np.array([6, 4])]
    docs = LabelledDocuments(["a", "b"], np.array(["a", "b"]), np.array([True, False]), ["abc", "d", "ef"], ids, ids,
                             np.array([0, 0, 1]))  # fmt: skip
    runtime = Runtime.detect(load_config(overrides=["device=cpu", "precision=fp32"]))
    tokenizer = SimpleNamespace(pad_token_id=0, cls_token_id=2)
    models = SimpleNamespace(runtime=runtime, tokenizer=tokenizer, **evaluator)
    return SimpleNamespace(chosen=docs, reported=docs, suspicions={}, evaluator=models)


def test_an_inspector_suspects_the_text_whose_tokens_it_takes_for_changed():
    inspector = Fixed(3, 9)
    work = detection_of(inspector=inspector)
    of_tokens, _ = _Detection._of_inspector(work)
    unchanged = inspector.table.exp()[:, 0].numpy()
    changed = [1 - unchanged[ids] for ids in work.chosen.ids]
    for found, wanted in zip(of_tokens, changed, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)
    shares = np.array([np.concatenate(changed[:2]).mean(), changed[2].mean()])
    assert work.suspicions["inspector"][1] == pytest.approx(np.log(shares / (1 - shares)), abs=1e-4)


@pytest.mark.parametrize("classes", [1, 3])
def test_a_judge_suspects_the_text_to_which_it_gives_a_low_score(classes):
    """Or a low probability of its first class."""
    table = torch.rand(7, classes, generator=torch.Generator().manual_seed(0))
    work = detection_of(judge=ReadsFirstToken(table), judge_figures={"join": "max"})
    assert _Detection._judge(work)["join"] == "max"
    score = (table if classes == 1 else torch.softmax(table, -1))[[4, 5, 6], 0].numpy()
    suspicion = np.array([max(1 - score[0], 1 - score[1]), 1 - score[2]])
    assert work.suspicions[JUDGE][1] == pytest.approx(np.log(suspicion / (1 - suspicion)), abs=1e-4)


def test_the_lead_of_the_judge_is_positive_where_it_separates_better():
    count = 40
    synthetic = np.arange(count) % 2 == 1
    scores = {JUDGE: synthetic * 1.0, "length": np.arange(count) % 7 * 1.0}
    reported = SimpleNamespace(synthetic=synthetic, groups=np.arange(count))
    work: Any = SimpleNamespace(
        suspicions={n: (np.zeros(count), s) for n, s in scores.items()}, reported=reported
    )
    lead = _Detection._difference(work, "length")
    assert lead["value"] == pytest.approx(1 - auroc(scores["length"], synthetic)) and lead["low"] > 0


def letters(text: str) -> np.ndarray:
    return np.array([[i, i + 1] for i in range(len(text))])


def test_words_and_turns_of_a_text():
    text = "ab cde fgh"
    labelled = np.array([False] * 5 + [True] * 5)
    tokens = LabelledTokens(text, letters(text), labelled, labelled * 0.8 + 0.1)
    score, truth = tokens.words()
    assert truth.tolist() == [False, False, True], "one of three letters of the second word is labelled"
    assert score == pytest.approx([0.1, (0.1 + 0.1 + 0.9) / 3, 0.9])
    assert tokens.turn() == 5 and tokens.predicted_turn(None) == 5
    assert LabelledTokens(text, letters(text), ~labelled, labelled).turn() is None, "from machine to human"
    assert LabelledTokens(text, letters(text), np.ones(10, bool), labelled).turn() is None


def test_white_space_that_no_span_covers_is_no_turn():
    text = "ab. cd.\n"
    labelled = np.array([False] * 4 + [True] * 3 + [False])
    assert LabelledTokens(text, letters(text), labelled, labelled * 1.0).turn() == 4
    text = "ab. cd. ef"
    labelled = np.array([False] * 4 + [True] * 3 + [False] + [True] * 2)
    assert LabelledTokens(text, letters(text), labelled, labelled * 1.0).turn() == 4


def test_parts_are_measured_beside_answers_that_read_nothing():
    draws = np.random.default_rng(6)
    sets = []
    for count in (40, 80):
        texts, classes, good, nats = [], [], [], []
        for _ in range(count):
            text = " ".join("".join(draws.choice(list("abc"), 4)) for _ in range(12))
            place = int(draws.integers(5, len(text) - 5))
            texts.append(text)
            classes.append((np.arange(len(text)) >= place).astype(int))
            good.append(np.clip(classes[-1] + draws.normal(0, 0.2, len(text)), 0.01, 0.99))
            nats.append(draws.normal(size=len(text)))
        ids = [np.zeros(len(t), int) for t in texts]
        sets.append((documents(texts, [True] * count, ids, classes), good, nats))
    (chosen, g1, n1), (reported, g2, n2) = sets
    found = measure_parts(
        chosen,
        reported,
        {"inspector": (g1, g2), "log-likelihood": (n1, n2)},
        lambda texts: [letters(t) for t in texts],
    )
    assert found["words"]["inspector"]["value"] > 0.95 > 0.8 > found["words"]["log-likelihood"]["value"]
    share = np.concatenate([LabelledTokens(t, letters(t), c > 0, c).words()[1] for t, c in zip(reported.texts, reported.classes, strict=True)]).mean()  # fmt: skip
    assert found["words"]["every word"]["value"] == pytest.approx(2 * share / (1 + share))
    assert found["num_turns"] == 80 and found["turns"]["inspector"]["value"] < 1
    assert found["turns"]["constant share of the text"]["value"] > 5
    lines = detection_tables(
        {"detectors": {"judge": measure(scored(1, 60, 1), scored(2, 60, 1))}, "parts": found}
    )
    assert "every word" in lines and "TPR at 1% FPR" in lines


def test_verdicts_of_documents():
    rows = [
        {"document_id": d, "token_ids": [1] * n, "judge_score": 1 - s, "judge_suspicion": s, "critic_error_mean": 0.1,
         "inspector_changed_mean": None, "reference_nll_mean": None}
        for d, n, s in (("a", 3, 0.1), ("a", 1, 0.9), ("b", 2, 0.6), ("c", 2, 0.01))
    ]  # fmt: skip
    thresholds = [
        {"target": target, "threshold": at, "enough_originals": True}
        for target, at in ((0.01, 1.0), (0.05, 0.0))
    ]
    judge = {
        "join": "max",
        "detection": {"thresholds": thresholds, "calibration": {"slope": 1.0, "offset": 0.0}},
    }
    found = documents_of(rows, judge)
    assert [d["alarm_at"] for d in found] == [0.01, 0.05, None]
    assert [d["judge_score"] for d in found] == pytest.approx([0.1, 0.4, 0.99])
    assert [d["synthetic_probability"] for d in found] == pytest.approx([0.9, 0.6, 0.01])
    assert [verdict(d) for d in found] == ["synthetic (at 1% FPR)", "synthetic (at 5% FPR)", "not flagged"]
    thresholds[0]["enough_originals"] = False
    known = [verdict(d) for d in documents_of(rows, judge)]
    assert known == ["synthetic (at 5% FPR)", "synthetic (at 5% FPR)", "not flagged"], (
        "too few originals for 1 %"
    )
    mean = documents_of(rows)
    assert mean[0]["judge_score"] == pytest.approx((0.9 * 3 + 0.1) / 4) and verdict(mean[0]) == "-"


def test_rates_on_labelled_documents():
    alarms = [0.01, 0.05, None, 0.05, None]
    rows = [{"document_id": str(i), "alarm_at": at} for i, at in enumerate(alarms)]
    synthetic = {"0": True, "1": True, "2": True, "3": False, "x": False}  # the last row has no label
    one, five = measured_rates(rows, synthetic, {"thresholds": [{"target": 0.01}, {"target": 0.05}]})
    assert (one["originals"], one["synthetic"]) == (1, 3)
    assert [r[k]["value"] for r in (one, five) for k in ("fpr", "tpr")] == pytest.approx([0, 1 / 3, 1, 2 / 3])
    assert measured_rates(rows, {"0": True}, {"thresholds": [{"target": 0.01}]})[0]["fpr"] is None


def test_rates_have_intervals_over_groups():
    """Five authors with twenty texts each, one of them always flagged: that is one of five, not twenty of a hundred."""
    rows = [{"document_id": str(i), "alarm_at": 0.01 if i < 20 else None} for i in range(100)]
    truth, figures = {str(i): False for i in range(100)}, {"thresholds": [{"target": 0.01}]}
    alone, grouped = (
        measured_rates(rows, truth, figures, groups)[0]["fpr"]
        for groups in (None, {str(i): f"author {i // 20}" for i in range(100)})
    )
    assert alone["value"] == grouped["value"] == pytest.approx(0.2)
    assert grouped["high"] - grouped["low"] > 3 * (alone["high"] - alone["low"])


def test_rates_of_none_and_all_have_intervals():
    """No false alarm among 20 says little about a rate of 5 %: Clopper and Pearson, with a group as one trial."""
    rows = [{"document_id": str(i), "alarm_at": None if i < 20 else 0.01} for i in range(22)]
    (rates,) = measured_rates(rows, {str(i): i >= 20 for i in range(22)}, {"thresholds": [{"target": 0.01}]})
    for name, value, count in (("fpr", 0.0, 20), ("tpr", 1.0, 2)):
        exact = binomtest(int(value * count), count).proportion_ci(0.95, "exact")
        assert [rates[name][k] for k in ("value", "low", "high")] == pytest.approx(
            [value, exact.low, exact.high]
        )
    grouped = ratio(np.zeros(2), np.array([10.0, 10.0]), limits=SHARE)  # two authors, not twenty texts
    assert grouped.high == pytest.approx(binomtest(0, 2).proportion_ci(0.95, "exact").high)


def test_labels_of_a_scored_file_belong_to_their_rows(tmp_path):
    """A row without a label keeps its score; wrong labels are said; ids may repeat."""
    rows = [{"id": "q7", "text": "No label here."}, {"id": "q7", "text": "Made by a machine.", "label": "machine"},
            {"id": "a", "text": "Made by a person.", "label": "human"}, {"id": "b", "text": "Who knows?", "label": "Alien"},
            {"id": "c", "text": "Made by a person.", "label": "machine"}]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(["configs/your_labels.yaml"], overrides=["data.path=unused.jsonl", "data.id_key=id"])
    found = read_user_texts(config, tmp_path / "x.jsonl")
    by_text = [(text, found.synthetic.get(name)) for name, text in found.texts]
    assert by_text == [("No label here.", None), ("Made by a machine.", True), ("Made by a person.", False),
                       ("Who knows?", None), ("Made by a person.", True)]  # fmt: skip
    (problem,) = (p for p in found.problems if p.kind == "label")
    assert problem.kind == "label" and "1 labels cannot be used" in problem.found and "Alien" in problem.found
    (tmp_path / "y.csv").write_text("text\nNo column of labels.\n")
    assert (
        read_user_texts(
            config.model_copy(update={"data": config.data.model_copy(update={"id_key": None})}),
            tmp_path / "y.csv",
        ).synthetic
        == {}
    )


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        (["data.label_classes=[human, machine, edited]", "models.judge.num_classes=3"], ["human", "machine", "edited"]),
        (["data.label_classes=null", "models.judge.target_type=score"], [1, 0, 0.9]),
    ],
    ids=["classes", "scores"],
)  # fmt: skip
def test_every_label_but_that_of_an_original_is_synthetic(tmp_path, settings, labels):
    """The first class, or a score of 1."""
    rows = [{"text": f"Text number {n}.", "label": label} for n, label in enumerate(labels)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(["configs/your_labels.yaml"], overrides=["data.path=unused.jsonl", *settings])
    found = read_user_texts(config, tmp_path / "x.jsonl")
    assert [found.synthetic[name] for name, _ in found.texts] == [False, True, True] and not found.problems
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0]))
    assert not read_user_texts(config, tmp_path / "x.jsonl").problems, "there may be texts of one kind only"


def test_a_bad_first_row_and_a_folder_do_not_hide_labels_and_groups(tmp_path):
    config = load_config(
        ["configs/your_labels.yaml"], overrides=["data.path=unused.jsonl", "data.group_key=author"]
    )
    (tmp_path / "x.csv").write_text("text,label,author\nhello, there,human,A\nfine,human,A\nmade,machine,B\n")
    for path in (tmp_path / "x.csv", tmp_path):
        found = read_user_texts(config, path)
        by_text = {text: (found.synthetic.get(name), found.groups.get(name)) for name, text in found.texts}
        assert by_text["fine"] == (False, "A") and by_text["made"] == (True, "B")


def test_too_few_originals_are_said():
    figures = measure(scored(1, 40, 1.0), scored(2, 40, 1.0))
    one, five = thresholds_in_words(figures)
    assert "has only 20 originals, and 1% needs 99" in one and "has only" not in five
    found = {"detectors": {"judge": figures}}
    for output in (detection_tables(found), detection_html(found)):
        assert "has only 20 original documents, and 1% needs 99" in output and "up to 4.8%" in output
    enough = {"detectors": {"judge": measure(scored(1, 400, 1.0), scored(2, 40, 1.0))}}
    assert "has only" not in detection_tables(enough) + detection_html(enough)


def test_windows_are_as_long_as_those_that_the_judge_learned_from():
    tokenizer = train_tokenizer("character", ["abc"], 300)
    found = [len(w.ids) for w in windows([("d", "a" * 130), ("e", "b")], tokenizer, 100, "unk", 50)]
    assert found == [43, 43, 44, 1]
    assert [len(w.ids) for w in windows([("d", "a" * 130)], tokenizer, 100, "unk")] == [100, 30]
    for of_judge, may_not_hold in ((101, False), (201, True)):
        judge = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=of_judge))
        evaluator = SimpleNamespace(min_context=100, judge=judge, judge_figures={"join": "max"})
        said = about_windows(list(windows([("d", "a" * 130)], tokenizer, 100, "unk")), 1, evaluator)
        assert said is not None and "1 of 1" in said and "joined for the judge by: max" in said
        assert ("learned from up to 200, so its thresholds may not hold" in said) == may_not_hold
        assert about_windows(list(windows([("e", "b")], tokenizer, 100, "unk")), 1, evaluator) is None


# --- in the pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A quick run of all stages on documents with labels that the project makes itself."""
    folder = tmp_path_factory.mktemp("labels") / "run_001"
    small = [
        "models.judge.training.steps=60",
        "models.inspector.training.steps=60",
        "sampler.policies=[ancestral]",
        "critic.method=token_critic",
    ]
    config = load_config(["configs/your_labels.yaml"], quick_test=True, overrides=small)
    run_stages(folder, config)
    return folder, config


def test_the_models_have_the_users_classes(labelled, tmp_path):
    folder, _ = labelled
    published = publish(folder, "judge", tmp_path / "judge")
    assert json.loads((published / "config.json").read_text())["label2id"] == {"human": 0, "machine": 1}
    assert "`human`, `machine`" in (published / "README.md").read_text(encoding="utf-8")
    names = {}
    for model in ("judge", "inspector"):
        names[model] = json.loads((folder / "04_train" / model / "best_model" / "config.json").read_text())[
            "id2label"
        ]
    assert names == {
        "judge": {"0": "human", "1": "machine"},
        "inspector": {"0": "unlabelled", "1": "machine"},
    }


def test_documents_are_reported_beside_windows_and_detectors(labelled):
    folder, _ = labelled
    held_out = (load_manifest(folder / "04_train") or {})["stats"]["judge"]["held_out"]
    examples = pq.read_table(
        folder / "01_prepare_dataset" / "examples", columns=["example_id", "split"]
    ).to_pylist()
    of_held_out = [e["example_id"].rpartition(":")[0] for e in examples if e["split"] == "held_out"]
    assert held_out["detection"]["documents"] == len(set(of_held_out)) < len(of_held_out)
    assert held_out["join"] in ("mean", "max", "first") and "accuracy" in held_out["documents"]
    found = json.loads((folder / "06_sample" / "metrics.json").read_text())["detection"]
    names = {
        "judge",
        "inspector",
        "TF-IDF, words",
        "TF-IDF, characters",
        "length",
        "log-likelihood",
        "Fast-DetectGPT",
        "Binoculars",
    }
    assert set(found["detectors"]) == names and set(found["differences"]) == names - {"judge"}
    for rates, stored in zip(
        found["detectors"]["judge"]["thresholds"], held_out["detection"]["thresholds"], strict=True
    ):
        assert rates["threshold"] == pytest.approx(stored["threshold"], abs=1e-4), "stages 04 and 06 agree"
        assert rates["fpr"]["value"] == pytest.approx(stored["fpr"]["value"], abs=1e-6)
    assert found["windows"]["documents"] == len(of_held_out)
    assert (
        set(found["parts"]["words"]) == {"inspector", "log-likelihood", "every word"}
        and found["parts"]["num_turns"] > 0
    )
    page = (folder / "06_sample" / "report.html").read_text(encoding="utf-8")
    assert "Fast-DetectGPT" in page and detection_html(found) in page


def test_a_run_without_generator_finds_the_same(labelled, tmp_path):
    """Judge and inspector are those of the other run. The generator and the critic are gone, so nothing can read them."""
    folder, config = labelled
    alone = config.model_copy(update={"critic": config.critic.model_copy(update={"method": "none"})})
    run = shutil.copytree(folder, tmp_path / "run_001")
    for gone in (run / "04_train" / "generator", run / "05_train_critic", *run.glob("06_sample*")):
        shutil.rmtree(gone)
    mine = tmp_path / "mine.txt"
    mine.write_text(" ".join(["Some text that is to be examined."] * 20))
    run_stages(run, alone, STAGES[5:])
    found, other = (
        json.loads((r / "06_sample" / "metrics.json").read_text())["detection"] for r in (run, folder)
    )
    assert found == other
    page = (run / "06_sample" / "report.html").read_text(encoding="utf-8")
    assert (
        detection_html(found) in page
        and ". Samples</h2>" not in page
        and ". Samples</h2>" in (folder / "06_sample" / "report.html").read_text(encoding="utf-8")
    )
    rows = []
    for of, settings_of in ((run, alone), (folder, config)):
        run_stages(of, settings_of, STAGES[6:], score=mine)
        rows.append(pq.read_table(of / score_stage(mine) / "scores.parquet"))
    assert rows[0]["critic_error"].null_count == len(rows[0]) and rows[1]["critic_error"].null_count == 0
    for column in ("token_ids", "inspector_changed", "reference_nll", "judge_score"):
        assert rows[0][column].equals(rows[1][column])
    candidates = tmp_path / "mine.jsonl"
    pool = {"prompt": "", "candidates": [mine.read_text(), "Some other text."]}
    candidates.write_text(json.dumps(pool) + "\n")
    ranked = []
    for of, settings_of in ((run, alone), (folder, config)):
        run_stages(of, settings_of, STAGES[6:], rank=candidates)
        ranked.append(pq.read_table(of / score_stage(candidates, RANK) / "ranking.parquet"))
    assert ranked[0].equals(ranked[1]) and len(ranked[0]) == 2
    judge = (load_manifest(run / "04_train") or {})["stats"]["judge"]["held_out"]
    (document,) = documents_of(rows[0].to_pylist(), judge)
    assert len(rows[0]) > 1, "windows, which --rank joins as --score does"
    long = next(row for row in ranked[0].to_pylist() if row["candidate_id"] == 0)
    assert long["score"] == pytest.approx(document["judge_score"], abs=1e-6)
    with pytest.raises(
        BadConfig, match=r"--score needs critic\.method token_critic, or labels beside the text"
    ):
        read_user_texts(load_config(["configs/pools.yaml"], overrides=["data.path=x.jsonl"]), mine)
    no_readers = [f"models.{name}=null" for name in ("judge", "inspector", "reference_lm")]
    with pytest.raises(BadConfig, match="needs a judge whose score says how synthetic a text is"):
        read_user_texts(load_config(["configs/your_labels.yaml"], overrides=no_readers), mine)


def test_a_users_text_gets_a_verdict_in_words(labelled, capsys):
    folder, config = labelled
    mine = folder.parent / "mine.jsonl"
    mine.write_text(
        "".join(
            json.dumps({"text": f"Some text number {i} that is to be examined. " * 4, "label": i % 2}) + "\n"
            for i in range(3)
        )
    )
    importlib.import_module("06_sample").main(config, RunArgs(run_dir=folder, quick_test=True, score=mine))
    said = capsys.readouterr().err
    assert said.count("chosen on the selection split") == 2 and "documents above a threshold:" in said
    assert "of its 2 original documents" in said and "of its 1 synthetic documents" in said
    stage = folder / score_stage(mine)
    rows = pq.read_table(stage / "scores.parquet").to_pylist()
    manifest = load_manifest(stage)
    assert manifest is not None
    judge = (load_manifest(folder / "04_train") or {})["stats"]["judge"]["held_out"]
    assert manifest["stats"]["documents"] == documents_of(rows, judge)
    assert all(row["judge_suspicion"] == pytest.approx(1 - row["judge_score"]) for row in rows)
    for _, of in itertools.groupby(rows, key=lambda row: row["document_id"]):
        assert len({len(row["token_ids"]) for row in of}) <= 2
