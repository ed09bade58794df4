"""Rewards of candidate programs: the terms, symmetries, ties; and common mistakes of such rewards."""

import math
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lib.config import load_config
from lib.errors import BadData
from lib.sections.data import RewardWeights
from lib.tasks.finqa.program import ProgramError, execute
from lib.tasks.finqa.rewards import FORMS, TERMS, closeness, pool_rewards, read_value, rewards

WEIGHTS = RewardWeights(execution=0.7, program=0.1, closeness=0.15, format=0.05)
NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False).map(lambda x: round(x, 5) + 0.0)
POSITIVE = st.floats(0.01, 1e6, allow_subnormal=False)
TABLE = (("", "2013", "2012"), ("pilots", "7900", "4100"), ("total", "9000", "7900"))


def value_of(program: str) -> str | None:
    try:
        value = execute(program, TABLE)
    except ProgramError:
        return None
    return value if isinstance(value, str) else f"{value:.5f}"


def pool(*programs: str, gold: int = 0, weights: RewardWeights = WEIGHTS):
    return pool_rewards(list(programs), [value_of(p) for p in programs], gold, weights)


# Closeness


@given(NUMBERS, NUMBERS)
def test_closeness_is_a_share_and_full_only_for_the_same(value, gold):
    found = closeness(value, gold)
    assert 0 <= found <= 1
    assert (found == 1) == (value == gold) or abs(value - gold) < 1e-12 * abs(gold)


@given(NUMBERS, NUMBERS)
def test_closeness_has_no_side(value, gold):
    assert closeness(value, gold) == pytest.approx(closeness(gold, value), rel=1e-9)
    assert closeness(value, gold) == closeness(-value, -gold)


@given(POSITIVE, st.floats(0, 1, allow_subnormal=False), st.floats(0, 1, allow_subnormal=False))
def test_nearer_is_never_worth_less(gold, one, other):
    near, far = sorted((one, other))
    assert closeness(gold * (1 + near), gold) >= closeness(gold * (1 + far), gold)
    assert closeness(gold * (1 - near / 2), gold) >= closeness(gold * (1 - far / 2), gold)


def test_closeness_falls_smoothly():
    assert closeness(90.0, 100.0) == pytest.approx(math.exp(-1))
    assert closeness(99.0, 100.0) == pytest.approx(math.exp(-0.1))
    grid = [closeness(float(x), 1000.0) for x in range(500, 1001)]
    assert max(np.diff(grid)) < 0.011 and min(np.diff(grid)) > 0


@given(st.floats(0.5, 1e4, allow_subnormal=False), st.sampled_from([form for form in FORMS if form[0] != 1]))
def test_percent_sign_and_scale_errors_have_the_stated_credit(size, form):
    factor, credit = form
    gold, value = round(size, 5), round(size / factor, 5)
    assume(abs(value) >= 0.001)
    assert closeness(value, gold) == pytest.approx(credit, rel=0.02)
    assert closeness(round(size / factor, 5), gold) > closeness(round(2 * size / factor, 5), gold)


@pytest.mark.parametrize(
    ("value", "gold", "found"),
    [
        (14.264, 0.14264, 0.5), (0.14264, 14.26422, 0.5), (-0.5, 0.5, 0.5), (1234.0, 1.234, 0.25), (1.0, 1e6, 0.25),
        ("yes", "yes", 1.0), ("yes", "no", 0.0), ("yes", 1.0, 0.0), (1.0, "yes", 0.0), (None, 1.0, 0.0), (0.0, 0.0, 1.0),
        (5.0, 0.0, pytest.approx(math.exp(-10))), (0.0, 5.0, pytest.approx(math.exp(-10))), (0.0004, 0.0, pytest.approx(math.exp(-10))),
    ],
)  # fmt: skip
def test_closeness_by_hand(value, gold, found):
    assert closeness(value, gold) == found


# A pool


def test_the_terms_of_a_pool():
    reward, terms = pool(
        "divide(4100, 7900)",
        "divide(4100, 7900), multiply(#0, const_100)",
        "divide(4100, 9000)",
        "divide(4100, 0)",
        "greater(4100, 7900)",
    )
    assert terms["execution"].tolist() == [1, 0, 0, 0, 0]
    assert terms["program"].tolist() == [1, 0, 0, 0, 0]
    error = (0.51899 - 0.45556) / 0.51899
    assert terms["closeness"].tolist() == pytest.approx([1, 0.5, math.exp(-10 * error), 0, 0], rel=1e-4)
    assert terms["format"].tolist() == [1, 1, 1, 0, 1]
    assert reward.tolist() == pytest.approx(
        [1, 0.125, 0.15 * math.exp(-10 * error) + 0.05, 0, 0.05], rel=1e-4
    )


def test_a_value_has_the_program_term_of_its_best_program():
    reward, terms = pool("add(4100, 7900)", "subtract(7900, 4100)", "add(3800, 0)", "subtract(0, #0)", gold=1)
    assert terms["program"].tolist() == [0, 1, 1, 0]
    assert reward[1] == reward[2] == 1


PROGRAMS = st.lists(
    st.builds(
        "{}({}, {})".format, st.sampled_from(["add", "subtract", "divide", "greater", "table_max", "nonsense"]),
        st.sampled_from(["7900", "4100", "0", "pilots", "const_2"]), st.sampled_from(["7900", "4100", "0", "1%"]),
    ), min_size=1, max_size=8,
)  # fmt: skip
PARTS = st.tuples(*[st.floats(0, 10, allow_subnormal=False)] * 4).filter(lambda w: sum(w) > 1e-6)


@given(PROGRAMS, PARTS, st.randoms(use_true_random=False))
def test_every_pool_has_rewards_in_order(programs, parts, draw: random.Random):
    values = [value_of(p) for p in programs]
    weights = RewardWeights(**dict(zip(TERMS, parts, strict=True)))
    runs = [i for i, value in enumerate(values) if value is not None]
    assume(runs)
    gold = runs[0]
    reward, terms = pool_rewards(programs, values, gold, weights)
    assert list(terms) == list(TERMS)
    for found in (reward, *terms.values()):
        assert found.shape == (len(programs),) and found.dtype == np.float64
        assert (found >= 0).all() and (found <= 1 + 1e-12).all()
    assert reward[gold] == pytest.approx(1) and (reward <= reward[gold]).all()
    # Equal values: equal rewards, to the last bit
    for value in set(values):
        rows = [i for i, other in enumerate(values) if other == value]
        assert len(set(reward[rows])) == 1 and all(len(set(t[rows])) == 1 for t in terms.values())
    # In any order
    order = draw.sample(range(len(programs)), len(programs))
    again, _ = pool_rewards(
        [programs[i] for i in order], [values[i] for i in order], order.index(gold), weights
    )
    assert again.tolist() == reward[order].tolist()


def test_values_are_numbers_or_words():
    assert read_value("1.000004") == 1.0 and read_value("-0") == 0.0 and str(read_value("-0.000001")) == "0.0"
    for text in ("nan", "inf", "maybe", ""):
        with pytest.raises(ValueError, match="is not a number"):
            read_value(text)


# The task's function


def table(rows: list[tuple]) -> pa.Table:
    names = ("example_id", "candidate_id", "kind", "program", "value")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def test_rows_of_several_pools():
    rows = [
        ("a", 0, "chain", "add(1, 3)", "4"), ("a", 1, "gold", "add(1, 2)", "3"), ("a", 2, "filler", None, None),
        ("b", 0, "gold", "greater(1, 2)", "no"), ("b", 1, "filler", "greater(2, 1)", "yes"), ("b", 2, "filler", "add(1, 1)", "2"),
    ]  # fmt: skip
    reward, terms = rewards(load_config(), table(rows))
    assert reward.tolist() == pytest.approx([0.15 * math.exp(-2.5) + 0.05, 1, 0, 1, 0.05, 0.05])
    assert terms["format"].tolist() == [1, 1, 0, 1, 1, 1]
    only_format = load_config(
        overrides=["rewards.weights={execution: 0, program: 0, closeness: 0, format: 2}"]
    )
    assert rewards(only_format, table(rows))[0].tolist() == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 0, "gold", "add(1, 2)", "3"), ("q7", 0, "filler", "add(1, 2)", "3")], "candidates of q7: 0 of 1"),
        ([("q7", 0, "gold", "add(1, 2)", "3"), ("q7", 1, "gold", "add(2, 1)", "3")], "candidates of q7: 2 of 2"),
        ([("q7", 0, "gold", "add(1, 2)", None)], "candidates of q7: the gold program .* does not run"),
        ([("q7", 0, "gold", "add(1", "3")], "candidates of q7: the gold program .* does not run"),
        ([("q7", 0, "gold", "add(1, 2)", "3"), ("q7", 1, "x", "add(1, 2)", "many")], "candidates of q7: the value 'many'"),
    ],
)  # fmt: skip
def test_a_broken_pool_is_named(rows, message):
    with pytest.raises(BadData, match=message):
        rewards(load_config(), table(rows))


# Common mistakes of reward functions for such pools


def test_a_copy_of_the_gold_or_another_way_to_write_it_is_as_good():
    gold = "subtract(7900, 4100), divide(#0, 4100)"
    reward, _ = pool(
        gold, gold, "subtract(7900,  4100), divide(#0, 4100 )", "subtract(7,900, 4100.0), divide(#0, 4100)"
    )
    assert reward.tolist() == [1, 1, 1, 1]


def test_the_gold_has_no_place_of_its_own():
    programs = ["add(1, 2)", "add(7900, 1)", "subtract(7900, 4100)", "divide(1, 3)"]
    for gold in range(4):
        reward, _ = pool(*programs, gold=gold)
        assert reward.argmax() == gold and (reward == 1).sum() == 1


def test_programs_are_compared_as_programs():
    # Similar text with one other operand; and different text with the same formula
    _, terms = pool("add(4100, 7900)", "add(4100, 7901)", "add(7900, 4100)")
    assert terms["program"].tolist() == [1, 0, 1]
    reward, terms = pool("table_max(pilots, none)", "table_max(total, none)", "table_sum(pilots, none)")
    assert terms["program"].tolist() == [1, 0, 0]
    assert reward[0] == 1 and (reward[1:] < 0.5).all()


def test_a_wrong_program_is_never_worth_as_much_as_the_right_value():
    # Only the text is similar
    reward, terms = pool("subtract(7900, 4100)", "subtract(4100, 7900)", "add(7900, 4100)")
    assert terms["execution"].tolist() == [1, 0, 0] and reward[1] == pytest.approx(0.15 * 0.5 + 0.05)
    assert reward[2] < reward[1] < 0.2


def test_every_term_varies():
    _, terms = pool(
        "add(1, 2)", "add(1, 2", "exp(1, 2)", "divide(1, 0)", "add(1, unknown)", "table_max(nobody, none)"
    )
    assert terms["format"].tolist() == [1, 0, 1, 0, 0, 0]
    assert all(len(set(values)) > 1 for values in terms.values())


def test_a_value_beside_an_unreadable_program_counts_for_nothing():
    reward, terms = pool_rewards(["add(1, 2)", "add(1, 2", "remove everything"], ["3", "3", "3"], 0, WEIGHTS)
    assert reward.tolist() == [1, 0, 0] and terms["execution"].tolist() == [1, 0, 0]
