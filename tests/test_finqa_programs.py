"""Programs of other systems: reading them, choosing among them by score and votes, near misses, and simulated systems."""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lib.errors import BadData, MissingInput
from lib.tasks.finqa import error_kinds
from lib.tasks.finqa.builtin import builtin_records
from lib.tasks.finqa.error_kinds import error_kind
from lib.tasks.finqa.features import NAMES
from lib.tasks.finqa.grounding import ground
from lib.tasks.finqa.near_misses import near_misses, with_near_misses
from lib.tasks.finqa.numbers import PageNumbers
from lib.tasks.finqa.page import Page
from lib.tasks.finqa.pools import Candidate
from lib.tasks.finqa.program import DECIMALS, execute
from lib.tasks.finqa.programs_of_systems import Written, program_text, read_written
from lib.tasks.finqa.record import Record
from lib.tasks.finqa.simulated_systems import ACCURACY, SimulatedSystems, _choices
from lib.tasks.finqa.votes import (
    BOTH,
    MAJORITY,
    ORACLE,
    RANDOM,
    RANKER,
    VoteWeights,
    answers_of,
    measure_choices,
)

RECORDS = [
    r for r in builtin_records("builtin_small", 0) if not isinstance(execute(r.program or "", r.table), str)
]
ONE = replace(
    RECORDS[0], id="one", program="divide(6, 3)", question="how many ?", table=(("", "2019"), ("pilots", "6"), ("cost (net)", "3"))
)  # fmt: skip
TWO = replace(ONE, id="two", filename="other")
BY_ID = {r.id: r for r in (ONE, TWO)}


def read(tmp_path, *rows, records=BY_ID):
    file = tmp_path / "programs.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return read_written(file, records)


# --- files ------------------------------------------------------------------------------------------------------------

TOKENS = ["subtract(", "6", "3", ")", "divide(", "#0", "3", ")", "EOF", "divide("]
TEXT = "subtract(6, 3), divide(#0, 3)"


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "one", "programs": {"1": TOKENS, "2": "add(6, 3)", "3": None}}],
        [{"id": "one", "programs": [TEXT + ", EOF", "add( 6, 3 )", None]}],
        [{"id": "one", "system": s, "program": p} for s, p in (("1", TEXT), ("2", ["add", "(", "6", ",", "3", ")"]), ("3", None))],
    ],
    ids=["systems", "list", "rows"],
)  # fmt: skip
def test_every_layout_gives_the_same_programs(tmp_path, rows):
    written, problems = read(tmp_path, *rows)
    assert not problems
    assert [w.systems for w in written] == [{"1": TEXT, "2": "add(6, 3)", "3": None}]


def test_row_names_with_spaces_are_one_token():
    assert program_text(["table_max(", "total pilots", "none", ")", "EOF"]) == "table_max(total pilots, none)"


def test_a_token_with_a_comma_and_a_space_is_one_argument(tmp_path):
    """FinQA's evaluator computes these programs from their tokens."""
    name = "balance , december 31 , 2009"
    record = replace(ONE, table=(("", "2019", "2018"), (name, "10", "20"), ("balance", "7", "7")))
    average = ["table_average(", name, "none", ")"]
    programs = [
        [*average, "EOF"],
        [*average, "add(", "#0", "1,000", ")", "EOF"],
        ["add(", "6, 3", "3", ")", "EOF"],
    ]
    (written,), problems = read(tmp_path, {"id": "one", "programs": programs}, records={"one": record})
    assert written.values() == [15.0, 1015.0]
    assert [(p.kind, p.location.split()[-1]) for p in problems] == [("program cannot run", "3")]
    text = next(iter(written.votes()))
    assert program_text(text) == text and execute(text, record.table) == 15.0
    assert ground(text, 15.0, PageNumbers(record)) == f"table_average({name} [2019, 2018]) = 15"


def test_each_bad_row_is_reported_and_the_others_are_read(tmp_path):
    written, problems = read(
        tmp_path, "{", [1], {"id": "elsewhere", "programs": [TEXT]}, {"id": "one"}, {"id": "one", "programs": []},
        {"id": "one", "programs": {"A": "divide(6, 0)", "B": "6 / 3", "C": 5, "D": ["add(", 6], "E": TEXT}},
        {"id": "two", "system": "A", "program": TEXT}, {"id": "two", "system": "A", "program": TEXT},
        {"id": "two", "programs": [TEXT]}, {"id": "two", "programs": ["add(6, 3)", TEXT]},
    )  # fmt: skip
    assert {w.record.id: w.systems for w in written} == {
        "one": {"A": None, "B": None, "C": None, "D": None, "E": TEXT},
        "two": {"A": TEXT, "1": TEXT},
    }
    assert [(p.kind, p.location.split()[1]) for p in problems] == [
        ("not JSON", "1"), ("no question", "2"), ("unknown question", "3"), ("no programs", "4"), ("no programs", "5"),
        *[("program cannot run", "6")] * 4, ("repeated system", "8"), ("repeated question", "10"),
    ]  # fmt: skip
    assert "6 is divided by 0" in problems[5].found and "system A" in problems[5].location


@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_one_question_are_merged_in_any_order(tmp_path, turned):
    rows = [
        {"id": "one", "programs": {"A": TEXT}},
        {"id": "one", "system": "B", "program": "add(6, 3)"},
        {"id": "one", "programs": {"C": None, "D": TEXT}},
    ]
    written, problems = read(tmp_path, *(reversed(rows) if turned else rows))
    assert not problems
    assert [w.systems for w in written] == [{"A": TEXT, "B": "add(6, 3)", "C": None, "D": TEXT}]


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(MissingInput, match="not a file"):
        read_written(tmp_path / "none.jsonl", BY_ID)
    (tmp_path / "programs.xlsx").write_text("x")
    with pytest.raises(BadData, match=r"unknown ending.*\.jsonl"):
        read_written(tmp_path / "programs.xlsx", BY_ID)


# --- choices ----------------------------------------------------------------------------------------------------------


def test_programs_of_equal_value_are_one_answer():
    written = Written(
        ONE, {"A": "divide(6, 3)", "B": "subtract(3, 1)", "C": "add(6, 3)", "D": "add(6, 3)", "E": None}
    )
    answers = answers_of(written, [0.5, 2.0, 1.0])
    assert answers.programs == ["subtract(3, 1)", "add(6, 3)"], "those that have the scores"
    assert answers.values == [2.0, 9.0]
    assert answers.scores.tolist() == [2.0, 1.0] and answers.votes.tolist() == [2, 2]
    assert answers.right.tolist() == [True, False]
    assert answers.systems == {"A": True, "B": True, "C": False, "D": False, "E": False}


def test_the_table_is_what_can_be_counted_by_hand():
    def answers(record, programs, scores):
        return answers_of(Written(record, dict(zip("ABC", programs, strict=True))), scores)

    gold, wrong, other = "divide(6, 3)", "add(6, 3)", "multiply(6, 3)"
    given = [
        answers(ONE, (gold, wrong, wrong), [1, 0]),  # the ranker is right against the majority
        answers(TWO, (gold, gold, wrong), [0, 1]),  # the majority is right against the ranker
        answers(ONE, (wrong, other, gold), [1, 0, 2]),  # a vote without a majority: a third
        answers(TWO, (wrong, wrong, wrong), [0]),
        answers(TWO, (None, None, None), []),
        answers(ONE, (gold, None, gold), [0]),
    ]
    figures = measure_choices(given, VoteWeights(1.0, 10.0), 0)
    rows = {row["method"]: row for row in figures["rows"]}
    assert (figures["questions"], figures["differ"]) == (6, 3)
    of_three = {
        RANKER: 2,
        MAJORITY: 4 / 3,
        BOTH: 2,
        RANDOM: 4 / 3,
        ORACLE: 3,
        "system A": 2,
        "system B": 1,
        "system C": 1,
    }
    for name, hits in of_three.items():
        assert rows[name]["differ"]["value"] == pytest.approx(hits / 3), name
        extra = 0 if name == "system B" else 1  # the last question: B wrote nothing
        assert rows[name]["all"]["value"] == pytest.approx((hits + extra) / 6), name
    assert figures["over_majority"][RANKER]["differ"]["value"] == pytest.approx(2 / 9)


def planted(score: float, votes: float, count: int = 4000) -> list:
    """Questions with three answers, of which one is right by a conditional logit model with these weights."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        answers = answers_of(
            Written(ONE, {"A": "divide(6, 3)", "B": "add(6, 3)", "C": "multiply(6, 3)"}), draw.normal(0, 2, 3)
        )
        answers = replace(answers, votes=draw.integers(1, 6, 3).astype(float))
        utility = score * answers.scores + votes * np.log(answers.votes)
        right = np.zeros(3, bool)
        right[np.argmax(utility + draw.gumbel(size=3))] = True
        made.append(replace(answers, right=right))
    return made


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.5, 0.0)])
def test_planted_weights_are_found(weights):
    found = VoteWeights.fit(planted(*weights))
    assert (found.score, found.votes) == pytest.approx(weights, abs=0.12)


def test_without_anything_to_learn_from_the_votes_do_not_count():
    assert VoteWeights.fit([answers_of(Written(ONE, {"A": "divide(6, 3)"}), [1.0])]) == VoteWeights(1.0, 0.0)


# --- near misses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, kind",
    [
        ("divide(6, 9)", error_kinds.ARGUMENT),
        ("divide(9, 7)", error_kinds.SAME_OPERATORS),
        ("divide(3, 6)", error_kinds.SAME_OPERATORS),
        ("add(3, 6)", error_kinds.OPERATORS),
        ("divide(-6, 3.0)", error_kinds.SIGN),
        ("divide(6, 3), multiply(#0, const_100)", error_kinds.SCALE),
        ("add(6, 3), divide(#0, 7)", error_kinds.OTHER),
    ],
)
def test_kinds_of_errors(other, kind):
    assert error_kind("divide(6, 3)", other, 2.0, float(execute(other, ONE.table))) == kind


def test_a_number_that_is_used_twice_is_one_argument():
    kind = error_kind("subtract(9, 6), divide(#0, 6)", "subtract(9, 7), divide(#0, 7)", 0.5, 0.28571)
    assert kind == error_kinds.ARGUMENT


def misses(record: Record, count: int = 12, seed: int = 0):
    return list(near_misses(record, Page(record), count, random.Random(seed)))


def test_near_misses_run_differ_in_value_and_have_all_kinds_of_errors():
    kinds: Counter[str] = Counter()
    for record in RECORDS[:60]:
        gold = execute(record.program or "", record.table)
        found = misses(record)
        assert [execute(program, record.table) for program, _ in found] == [value for _, value in found]
        assert len({gold, *(value for _, value in found)}) == len(found) + 1
        kinds.update(error_kind(record.program or "", p, gold, value) for p, value in found)
    assert set(kinds) == set(error_kinds.KINDS)
    assert kinds[error_kinds.ARGUMENT] > 0.35 * kinds.total()


def test_near_misses_replace_templates_only():
    record = RECORDS[0]
    gold = float(execute(record.program or "", record.table))
    pool = [
        Candidate("add(1, 1)", 2.0, "page_gold"), Candidate(record.program or "", gold, "gold"),
        *(Candidate(f"add({n}, 0.123)", n + 0.123, "template") for n in range(6)),
    ]  # fmt: skip
    kept, mixed, whole = (
        with_near_misses([pool, pool], record, Page(record), share, seed=0) for share in (0.0, 0.5, 1.0)
    )
    assert kept == [pool, pool]
    assert whole[0][:2] == pool[:2] and {c.kind for c in whole[0][2:]} == {"near_miss"}
    assert whole[0] != whole[1]  # each draw has others
    count = sum(c.kind == "near_miss" for one in mixed for c in one)
    assert 0 < count < 12
    assert all(len({c.value for c in one}) == len(one) for one in whole)
    right = [c.program for c in whole[0] if c.kind == "near_miss"]
    (other,) = with_near_misses([pool], record, Page(record), 1.0, 0, also_right=right)
    values = {round(float(c.value), DECIMALS) for c in whole[0][2:]}
    assert not values & {round(float(c.value), DECIMALS) for c in other if c.kind == "near_miss"}


# --- simulated systems ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems() -> SimulatedSystems:
    return SimulatedSystems.fit(RECORDS[:80], OTHERS, 0)


# Gold programs of other questions of the page
OTHERS = {
    r.id: [other.program for other in RECORDS if other.filename == r.filename and other.id != r.id and other.program]
    for r in RECORDS
}  # fmt: skip


def test_simulated_systems_are_right_as_often_as_they_should_be_and_err_together(systems):
    asked = RECORDS[80:140]
    written, again = systems.write(asked, OTHERS, draws=2)
    assert [written] == systems.write(asked, OTHERS) and set(written) == {r.id for r in asked}
    assert written != again
    gold = {r.id: r.program for r in asked}
    right = np.array([[program == gold[name] for program in of.values()] for name, of in written.items()])
    assert right.mean(0) == pytest.approx(list(ACCURACY.values()), abs=0.02)
    # Errors are shared: independent systems would all be right on a fifth of the questions, and all wrong on a hundredth
    assert right.all(1).mean() > 0.4 and (~right).all(1).mean() > 0.1
    repeated = [
        len(set(of.values()) - {gold[name]}) < sum(p != gold[name] for p in of.values())
        for name, of in written.items()
    ]
    assert np.mean(repeated) > 0.1


def test_one_of_two_models_reads_the_question(systems):
    """With the question of another page, the gold program is less often the best of the page."""
    asked = RECORDS[80:140]
    strange = [replace(r, question=RECORDS[i].question) for i, r in enumerate(asked)]
    found, blind = [], []
    for records in (asked, strange):
        choices = list(_choices(records, OTHERS, 0, 0, ""))
        scores = [systems.question.decision_function(c.rows) for c in choices]
        found.append(np.mean([s[0] >= s.max() for s in scores]))
        blind.append([systems.prior.decision_function(c.rows[:, : len(NAMES)]).tolist() for c in choices])
    assert found[0] > found[1] + 0.1
    assert blind[0] == blind[1]
