"""Pools on synthetic pages: what every pool must contain, and that it has no shortcut."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from lib.config import load_config
from lib.tasks.finqa.bank import _near, make_bank
from lib.tasks.finqa.builtin import builtin_records
from lib.tasks.finqa.changes import EDITS, edit, walks
from lib.tasks.finqa.equivalence import equivalent
from lib.tasks.finqa.features import NAMES, ProgramFeatures
from lib.tasks.finqa.leak import PoolFeatures, accuracy, label_overlap, measure_leak, question_trees
from lib.tasks.finqa.naive import naive_pools
from lib.tasks.finqa.numbers import numbers_in
from lib.tasks.finqa.page import Page, PageQuestions
from lib.tasks.finqa.pool_comparison import MAX_NUMBERS, in_pool
from lib.tasks.finqa.pools import Candidate, PoolMaker, Unfilled
from lib.tasks.finqa.program import execute, parse
from lib.tasks.finqa.record import Record
from lib.tasks.finqa.templates import Templates, learn_template, operators_of

SIZE = 8


def settings_of(**changes):
    settings = load_config().finqa.pools
    return settings.model_copy(update={"bank": 24, "rounds": 1, "folds": 2, **changes})


def by_page(records) -> dict[str, list[Record]]:
    pages: dict[str, list[Record]] = {}
    for record in records:
        pages.setdefault(record.filename, []).append(record)
    return pages


RECORDS = list(builtin_records("builtin_small", 0))
TRAIN = [r for r in RECORDS if r.split == "train"]
PAGES = by_page(RECORDS)


def fit(seed: int = 0, train=TRAIN, rewrite=None, **changes) -> PoolMaker:
    return PoolMaker.fit(train, [r.filename for r in train], settings_of(**changes), SIZE, seed, rewrite)


def filled(maker: PoolMaker, pages=PAGES, most: int = 1) -> list[tuple[Record, list[Candidate], int]]:
    found = []
    for name, page in pages.items():
        for record, pools in zip(page, maker.pools(page, name), strict=True):
            if not isinstance(pools, Unfilled):
                found += [(record, pool, [c.kind for c in pool].index("gold")) for pool in pools[:most]]
    return found


@pytest.fixture(scope="module")
def maker() -> PoolMaker:
    return fit()


@pytest.fixture(scope="module")
def pools(maker):
    return filled(maker)


@pytest.fixture(scope="module")
def every_draw(maker):
    return filled(maker, most=4)


def numeric(record: Record) -> bool:
    return not isinstance(execute(record.program or "", record.table), str)


# --- what a pool holds -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_candidate_runs_and_no_two_say_the_same(every_draw):
    for record, pool, _ in every_draw:
        assert len(pool) == SIZE
        assert [execute(c.program, record.table) for c in pool] == [c.value for c in pool]
        assert len({c.value for c in pool}) == len({c.program for c in pool}) == SIZE
        assert not any(equivalent(a.program, b.program) for a in pool for b in pool if a is not b)


@pytest.mark.slow
def test_the_gold_program_is_there_once(every_draw):
    for record, pool, place in every_draw:
        assert Counter(c.kind for c in pool)["gold"] == 1
        assert pool[place].program == record.program


@pytest.mark.slow
def test_no_two_values_are_within_the_margin_of_each_other(every_draw):
    least = settings_of().min_difference
    for _, pool, _ in every_draw:
        for a in pool:
            for target in (a.value, -a.value, 100 * a.value, a.value / 100):  # type: ignore[operator]
                assert all(abs(b.value - target) > least * abs(target) for b in pool if b is not a)  # type: ignore[operator]


def test_near_agrees_with_its_definition():
    values = np.array([0.0, 0.5, -0.5, 50.2, 0.005, 0.52, 7.0, 7.000001, 0.00502])
    packed = _near(values, 0.01)
    for i, v in enumerate(values):
        for j, w in enumerate(values):
            close = any(
                abs(a - f * b) <= 0.01 * abs(f * b)
                for a, b in ((v, w), (w, v))
                for f in (1, -1, 100, -100, 0.01, -0.01)
            )
            assert bool(packed[i] >> j & 1) == (close or round(v, 5) == round(w, 5)), (v, w)


@pytest.mark.slow
def test_golds_of_other_questions_are_taken_where_there_are_any(every_draw):
    least, several = settings_of().min_difference, 0
    for record, pool, place in every_draw:
        taken = [c for c in pool if c.kind == "page_gold"]
        others = {r.program: execute(r.program or "", r.table) for r in PAGES[record.filename] if numeric(r)}
        assert all(others[c.program] == c.value for c in taken)
        gold = pool[place].value
        apart = sorted(
            {
                v
                for v in others.values()
                if all(abs(v - f * gold) > least * abs(f * gold) for f in (1, -1, 100, -100, 0.01, -0.01))
            }  # type: ignore[operator]
        )
        if len(apart) > 3 and np.diff(np.log(np.abs(apart) + 1e-9)).min() > 0.05:
            assert len(taken) >= 2
            several += 1
        if not apart:
            assert not taken
    assert several > 20


def test_the_gold_program_of_the_same_question_in_another_record_is_in_no_pool(maker):
    page = next(p for p in PAGES.values() if p[0].split == "dev" and sum(map(numeric, p)) > 3)
    one, other, *rest = (r for r in page if numeric(r))
    both = (one.program, other.program)
    as_two_questions = filled(maker, {one.filename: [one, other, *rest]})
    assert any(
        {c.program for c in pool} >= set(both)
        for record, pool, _ in as_two_questions
        if record in (one, other)
    )
    same = replace(other, question=f" {one.question.upper()}  ?")
    found = filled(maker, {one.filename: [one, same, *rest]})
    assert [record.id for record, *_ in found[:2]] == [one.id, other.id]
    for record, pool, _ in found[:2]:
        assert not {c.program for c in pool} >= set(both), record.id


@pytest.mark.slow
def test_the_gold_program_stands_anywhere(pools):
    spans = [place for made in (pools, filled(fit(1, TRAIN[:60]))) for *_, place in made]
    assert chisquare(np.bincount(spans, minlength=SIZE)).pvalue > 0.001


@pytest.mark.slow
def test_almost_every_numeric_question_has_a_pool_and_the_others_a_reason(maker, pools):
    filled_ids = {record.id for record, _, _ in pools}
    assert len(filled_ids) >= 0.97 * sum(numeric(r) for r in RECORDS)
    for name, page in PAGES.items():
        for record, pool in zip(page, maker.pools(page, name), strict=True):
            if not numeric(record):
                assert isinstance(pool, Unfilled) and "yes/no" in pool.reason


@pytest.mark.slow
def test_reasons_for_no_pool(maker):
    page = next(iter(PAGES.values()))
    programs = ("add(7, const_1)", "divide(7, const_0)", None)
    bare = [replace(page[i], table=(("", "2013"), ("pilots", "7")), pre_text=(), post_text=(), program=program)
            for i, program in enumerate(programs)]  # fmt: skip
    few, broken, missing = maker.pools(bare, "x")
    assert isinstance(few, Unfilled) and "fewer than 8" in few.reason
    assert isinstance(broken, Unfilled) and "cannot run" in broken.reason
    assert isinstance(missing, Unfilled) and missing.reason == "no gold program"
    nothing = PoolMaker.fit([], [], settings_of(), SIZE, 0)
    assert all(isinstance(p, Unfilled) and "templates" in p.reason for p in nothing.pools(page, "x"))


def test_pools_are_made_when_a_fold_has_no_train_page(maker):
    first = [r for r in TRAIN if maker.filter.fold(r.filename) == 0][:60]
    pages = by_page(first)
    found = filled(fit(train=first), pages)
    assert len(pages) > 3 and len(found) > 30


def test_a_train_split_of_too_few_numbers_has_no_pools_and_says_so():
    page = next(iter(by_page(TRAIN).values()))
    bare = replace(
        page[0], table=(("", "2013"), ("pilots", "7")), pre_text=(), post_text=(), program="add(7, const_1)"
    )
    (few,) = fit(train=[bare]).pools([bare], bare.filename)
    assert isinstance(few, Unfilled) and "fewer than 8" in few.reason


@pytest.mark.slow
def test_training_questions_have_several_pools_and_others_one(maker):
    for name, page in PAGES.items():
        for record, pools in zip(page, maker.pools(page, name), strict=True):
            if isinstance(pools, Unfilled):
                continue
            assert len(pools) == (4 if record.split == "train" else 1)
            golds = {next(c.program for c in pool if c.kind == "gold") for pool in pools}
            assert golds == {record.program}
    taught = [
        p for page in PAGES.values() if page[0].split == "train" for p in maker.pools(page, page[0].filename)
    ]
    sets = [
        len({frozenset(c.program for c in pool) for pool in pools})
        for pools in taught
        if not isinstance(pools, Unfilled)
    ]
    assert np.mean(sets) > 3.5


@pytest.mark.slow
def test_fillers_have_the_operators_of_the_golds_in_the_pool():
    matched = {}
    for share in (0.0, 1.0):
        found = []
        for _, pool, _ in filled(fit(train=TRAIN[:100], same_operators=share), by_page(RECORDS[-150:])):
            golds = {operators_of(c.program) for c in pool if c.kind in ("gold", "page_gold")}
            found += [operators_of(c.program) in golds for c in pool if c.kind == "template"]
        matched[share] = np.mean(found)
    assert matched[0.0] < 0.5 and matched[1.0] > 0.8


# --- what a pool depends on ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pools_depend_on_the_seed_and_not_on_any_order(pools):
    shuffled = random.Random(3).sample(TRAIN, len(TRAIN))
    again = fit(train=shuffled)
    backwards = dict(reversed(PAGES.items()))
    assert sorted(map(repr, filled(again, backwards))) == sorted(map(repr, pools))


@pytest.mark.slow
def test_the_pools_of_a_page_depend_on_no_other_page_that_is_asked_for(maker, pools):
    asked = [page for page in PAGES.values() if page[0].split == "dev"]
    alone = maker.pools(asked[0], asked[0][0].filename)
    expected = [[pool] for record, pool, _ in pools if record.filename == asked[0][0].filename]
    assert [p for p in alone if not isinstance(p, Unfilled)] == expected


def test_templates_are_not_put_on_pages_that_taught_them():
    record = TRAIN[0]
    page = Page(record)
    record = next(r for r in PAGES[record.filename] if numeric(r))
    taught = Templates([learn_template(record, page, "here")])
    draw = random.Random(0)
    assert not list(taught.make(page, "here", draw, 50))
    assert list(taught.make(page, "elsewhere", draw, 50))


# --- templates and changes -------------------------------------------------------------------------------------------


def page_of(table, text=()) -> Record:
    return replace(TRAIN[0], table=tuple(map(tuple, table)), pre_text=tuple(text), post_text=())


def test_a_template_keeps_rows_columns_and_habits():
    source = page_of([["", "2013", "2012"], ["loss", "-32 ( 32 )", "-40 ( 40 )"], ["rate", "12%", "11%"]])
    target = page_of(
        [["", "2019", "2018"], ["cost", "-5 ( 5 )", "-9 ( 9 )"], ["gain", "-7 ( 7 )", "-3 ( 3 )"]]
    )
    for program, allowed in (
        (
            "subtract(32, 40), divide(#0, 40)",
            {"subtract(5, 9), divide(#0, 9)", "subtract(7, 3), divide(#0, 3)"},
        ),
        ("add(-32, -40)", {"add(-5, -9)", "add(-7, -3)"}),
        ("table_max(loss, none)", {"table_max(cost, none)", "table_max(gain, none)"}),
    ):
        template = learn_template(replace(source, program=program), Page(source), "a")
        assert set(Templates([template]).make(Page(target), "b", random.Random(0), 100)) == allowed


def test_numbers_of_a_sentence_stay_in_one_sentence():
    source = page_of([["", "2013"]], ["we bought 5 million shares for $ 70 million .", "rates fell 3% ."])
    target = page_of(
        [["", "2013"]], ["it sold 8 million shares at $ 9 million .", "it rented 6 million for $ 2 million ."]
    )
    template = learn_template(replace(source, program="divide(70, 5)"), Page(source), "a")
    made = set(Templates([template]).make(Page(target), "b", random.Random(0), 200))
    assert {"divide(9, 8)", "divide(2, 6)"} <= made
    assert all(numbers_in(p) <= {"8", "9"} or numbers_in(p) <= {"6", "2"} for p in made)


def test_rows_without_cells_are_never_chosen():
    program = "table_max(pilots, none)"
    record = replace(page_of([["", "2013"], [], ["pilots", "7900"], [], ["crews", "60"]]), program=program)
    page, draw = Page(record), random.Random(0)
    template = learn_template(record, page, "a")
    assert set(Templates([template]).make(page, "b", draw, 60)) == {program, "table_max(crews, none)"}
    edited = {edit(program, kind, page, draw) for kind in ("row", "number") for _ in range(30)}
    assert edited == {"table_max(none, none)", program, "table_max(crews, none)"}


def test_edits_change_one_thing():
    records = [r for r in TRAIN if len(parse(r.program or "")) == 2 and "#1" not in (r.program or "")][:40]
    made = dict.fromkeys(EDITS, 0)
    for record, kind in itertools.product(records, EDITS):
        page, draw, old = Page(record), random.Random(0), parse(record.program or "")
        for text in filter(None, (edit(record.program or "", kind, page, draw) for _ in range(3))):
            new = parse(text)
            made[kind] += 1
            steps = {"drop": -1, "scale": 1, "sign": 1}.get(kind, 0)
            assert len(new) == len(old) + steps
            same_operations = [s.operation for s in new[:2]] == [s.operation for s in old][: len(new)]
            assert same_operations == (kind != "operation")
    assert min(made.values()) > 0, made  # each kind occurred


def test_walks_stand_on_both_sides_of_the_gold_program():
    asked: list[int] = []

    def rewrite(programs):
        asked.append(len(programs))
        return [p.replace("1", "2") if i % 2 else "garbage(" for i, p in enumerate(programs)]

    page = next(p for p in PAGES.values() if len(p) > 4)
    weights = settings_of().changes.model_copy(update={"masked_lm": 1.0})
    found = walks(
        PageQuestions(page, Page(page[0]), ""),
        3,
        weights,
        lambda p, r: isinstance(execute_or_none(p, r), float),
        rewrite,
        0,
    )
    for record, changes in zip(page, found, strict=True):
        if numeric(record):
            assert sorted(c[0] for c in changes) == [-3, -2, -1, 1, 2, 3]
            assert all(isinstance(execute(p, record.table), float) for _, p, _ in changes)
    assert asked and "garbage(" not in str(found)


def execute_or_none(program, record):
    try:
        return execute(program, record.table)
    except ValueError:
        return None


@pytest.mark.slow
def test_pools_with_changed_golds():
    made = filled(fit(train=TRAIN[:100], corruption_rate=0.7, changes=settings_of().changes.model_copy(update={"masked_lm": 0.5}),
                      rewrite=lambda programs: [p.replace("3", "7") for p in programs]), by_page(RECORDS[-120:]))  # fmt: skip
    kinds = Counter(c.kind for _, pool, _ in made for c in pool)
    assert kinds["chain"] > kinds["template"] / 2 and kinds["masked_lm"] > 0
    for record, pool, _ in made:
        assert [execute(c.program, record.table) for c in pool] == [c.value for c in pool]
        assert len({c.value for c in pool}) == SIZE


# --- shortcuts -------------------------------------------------------------------------------------------------------


def test_features_within_a_pool_follow_the_candidates():
    record = next(r for r in TRAIN if numeric(r))
    page = Page(record)
    templates = Templates([learn_template(r, Page(r), r.filename) for r in TRAIN])
    settings = settings_of(bank=7, same_operators=1.0, min_difference=0.01)
    bank = make_bank(PageQuestions([record], page, "x"), templates, settings, 0)
    rows, numbers = bank.rows[None, :6], bank.numbers[None, :6]
    assert rows.shape == (1, 6, len(NAMES)) and numbers.shape == (1, 6, MAX_NUMBERS)
    order = np.array([4, 2, 0, 5, 1, 3])
    assert np.allclose(in_pool(rows[:, order], numbers[:, order]), in_pool(rows, numbers)[:, order])


@pytest.mark.slow
def test_naive_pools_give_the_gold_program_away_and_ours_do_not(pools):
    naive = naive_pools(RECORDS, SIZE, 0)
    found = {}
    for name, made in (("naive", naive), ("ours", pools)):
        taught = [item for item in made if item[0].split == "train"]
        others = [item for item in made if item[0].split != "train"]
        leak = measure_leak(taught, others, 0, 0.22)
        assert leak["worst_upper_bound"] == max(row["high"] for row in leak["rows"])
        found[name] = {(r["scorer"], r["sees"]): r["accuracy"] for r in leak["rows"]}
    assert found["naive"]["trees", "whole pool"] > 0.7
    assert np.mean(list(found["ours"].values())) < 0.3 < np.mean(list(found["naive"].values()))


@pytest.mark.slow
def test_the_measurement_finds_a_planted_shortcut_and_none_where_there_is_none(pools):
    fair, planted = [], []
    for i, (record, pool, _) in enumerate(pools):
        place = random.Random(i).randrange(SIZE)
        fair.append((record, pool, place))
        marked = [replace(c, program=c.program.replace("subtract(", "add(")) for c in pool]
        marked[place] = replace(pool[place], program="subtract(11, 12), multiply(#0, const_100)")
        planted.append((record, marked, place))
    for made, low, high in ((fair, 0.0, 0.35), (planted, 0.9, 1.0)):
        taught = [item for item in made if item[0].split == "train"]
        others = [item for item in made if item[0].split != "train"]
        accuracies = [row["accuracy"] for row in measure_leak(taught, others, 0, 0.22)["rows"]]
        assert low <= np.median(accuracies) <= high and max(accuracies) >= low


@pytest.mark.slow
def test_methods_that_see_the_question_find_more(pools):
    taught = [item for item in pools if item[0].split == "train"]
    others = [item for item in pools if item[0].split != "train"]
    known = PoolFeatures.of(others)
    trees, overlap = question_trees(taught, others, 0), label_overlap(others)
    assert trees.shape == overlap.shape == known.gold.shape
    assert accuracy(trees, known.gold, known.pages).low > 0.5
    assert accuracy(overlap, known.gold, known.pages).low > 0.25


def test_a_program_is_described_by_itself_and_its_page_alone():
    record = TRAIN[0]
    program, other = (
        record.program or "",
        replace(record, question="something else?", program="add(1, 2)", answer=""),
    )
    a, b = (ProgramFeatures.of(program, 1.0, Page(r)) for r in (record, other))
    assert np.array_equal(a.row, b.row) and a.words == b.words and a.numbers == b.numbers
