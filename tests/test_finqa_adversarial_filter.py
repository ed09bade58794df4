"""The adversarial filter with fake scorers: which folds they learn from, and what their scores change."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lib import log
from lib.config import load_config
from lib.tasks.finqa import adversarial_filter as module
from lib.tasks.finqa.adversarial_filter import WHOLE_TREES, AdversarialFilter
from lib.tasks.finqa.pool_comparison import MAX_NUMBERS

BANKS, TEMPLATES, SIZE, FOLDS = 24, 30, 6, 3


def made_bank(number: int, group: str = "") -> Any:
    """Two gold programs and templates. All gold programs and every second template have the mark."""
    marks = np.array([1.0, 1.0] + [float(i % 2) for i in range(TEMPLATES)])
    count = len(marks)
    kinds = ["gold", "gold"] + ["template"] * TEMPLATES
    return SimpleNamespace(
        group=group or f"g{number}",
        key=f"train/{number}",
        records=[SimpleNamespace(id=f"q{number}.{i}") for i in range(2)],
        programs=[f"p{i}" for i in range(count)],
        kinds=kinds,
        is_gold=np.array([k == "gold" for k in kinds]),
        golds=[0, 1],
        rivals=[1, 2],
        owner=np.full(count, -1),
        step=np.zeros(count, int),
        operators=np.full(count, "add"),
        near=[1 << i for i in range(count)],
        rows=np.stack([np.full(count, float(number)), marks], 1),
        words=[f"{number} {int(mark)}" for mark in marks],
        numbers=np.zeros((count, MAX_NUMBERS)),
    )


class Scorer:
    """A fake WordScorer and TreeScorer. Scores are a weight times the mark. It records the banks it learned from.

    Attributes:
        single, whole: the weight of scorers of single programs, and of whole pools.
    """

    single = whole = 0.0

    def __init__(self, columns, gold, weight, seed: int = 0, trees: int = 0):
        self.banks = set(np.asarray(columns)[:, 0].astype(int).tolist())
        self.opinion = Scorer.whole if trees == WHOLE_TREES else Scorer.single
        self.asked: list[int] = []

    def score(self, columns) -> np.ndarray:
        columns = np.asarray(columns)
        self.asked += columns[:, 0].astype(int).tolist()
        return self.opinion * columns[:, 1]


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(module, "WordScorer", Scorer)
    monkeypatch.setattr(module, "TreeScorer", Scorer)
    monkeypatch.setattr(
        module, "hashed_words", lambda words: np.array([[float(x) for x in w.split()] for w in words])
    )
    monkeypatch.setattr(module, "in_pool", lambda rows, numbers, extra: np.zeros((*rows.shape[:2], 1)))
    monkeypatch.setattr(Scorer, "single", 0.0)
    monkeypatch.setattr(Scorer, "whole", 0.0)
    changes = {
        "folds": FOLDS,
        "rounds": 2,
        "train_draws": 2,
        "page_golds": 0,
        "same_operators": 0.0,
        "corruption_rate": 0.0,
    }
    return load_config().finqa.pools.model_copy(update=changes)


def marked(bank: Any, drawn: dict[int, np.ndarray]) -> list[float]:
    """For the first pool of each question, the share of its wrong programs with the mark."""
    return [bank.rows[pools[0][1:], 1].mean() for pools in drawn.values()]


def test_a_scorer_never_learned_from_the_fold_that_it_scores(settings):
    banks = [made_bank(i) for i in range(BANKS)]
    made = AdversarialFilter(settings, SIZE, 0)
    made.fit(banks)
    folds = np.array([made.fold(bank.group) for bank in banks])
    assert set(folds) == set(range(FOLDS)) and len(made.single) == 4 and len(made.whole) == 2
    for scorers in (*made.single, *made.whole):
        for fold, scorer in enumerate(scorers):
            assert scorer.banks == set(np.flatnonzero(folds != fold).tolist())
            assert set(scorer.asked) <= set(np.flatnonzero(folds == fold).tolist())


def test_the_progress_of_fitting_counts_every_scorer(settings, monkeypatch, capfd):
    monkeypatch.setattr(log, "HEARTBEAT_SECONDS", 0.0)
    AdversarialFilter(settings, SIZE, 0).fit([made_bank(i) for i in range(BANKS)])
    lines = capfd.readouterr().err.splitlines()
    total = 3 * 2 * FOLDS  # words, trees and whole pools, in two rounds
    assert [line.split("  ")[0] for line in lines] == [
        f"scorers without the question: step {done}/{total}" for done in range(1, total + 1)
    ]


def test_a_page_is_drawn_by_the_scorers_of_its_own_fold(settings):
    made = AdversarialFilter(settings, SIZE, 0)
    made.fit([made_bank(i) for i in range(BANKS)])
    for number in (100, 101, 102, 103):
        bank = made_bank(number)
        made.draw(bank)
        for scorers in (*made.single, *made.whole):
            judged = [fold for fold, scorer in enumerate(scorers) if number in scorer.asked]
            assert judged == [made.fold(bank.group)]


@pytest.mark.parametrize(("kind", "weight", "rise"), [("single", 3.0, 0.15), ("whole", 20.0, 0.08)])
def test_wrong_programs_come_to_look_like_gold_ones(settings, monkeypatch, kind, weight, rise):
    """All gold programs and half of the others have a mark. The larger its weight, the more marked ones are drawn."""
    settings = settings.model_copy(update={"rounds": 5 if kind == "whole" else 2})
    shares = {}
    for opinion in (0.0, weight):
        monkeypatch.setattr(Scorer, kind, opinion)
        banks = [made_bank(i) for i in range(BANKS)]
        made = AdversarialFilter(settings, SIZE, 0)
        taught = [
            share for bank, drawn in zip(banks, made.fit(banks), strict=True) for share in marked(bank, drawn)
        ]
        others = [made_bank(200 + i) for i in range(40)]
        asked = [share for bank in others for share in marked(bank, made.draw(bank))]
        shares[opinion] = np.mean(taught), np.mean(asked)
    for without, with_mark in zip(*shares.values(), strict=True):
        assert without == pytest.approx(0.5, abs=0.07) and with_mark > without + rise, shares


def test_questions_have_as_many_pools_as_asked_with_their_own_gold_program_first(settings):
    banks = [made_bank(i) for i in range(6)]
    made = AdversarialFilter(settings, SIZE, 0)
    for drawn in made.fit(banks):
        assert set(drawn) == {0, 1}
        for question, pools in drawn.items():
            assert pools.shape == (2, SIZE) and (pools[:, 0] == question).all()
            assert all(len(set(pool)) == SIZE for pool in pools.tolist()) and (pools[0] != pools[1]).any()
    assert {pools.shape for pools in made.draw(made_bank(50)).values()} == {(1, SIZE)}
