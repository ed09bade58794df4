"""FinQA programs: the published evaluator's answers on 5,890 programs, the language by hand, and a fuzz test.

`python -m tests.test_finqa_program 1000000` runs the fuzz test at length and prints the slowest program.
"""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lib.tasks.finqa.equivalence import equivalent, formula
from lib.tasks.finqa.program import (
    ARITHMETIC,
    MAX_CHARACTERS,
    MAX_STEPS,
    OPERATIONS,
    ProgramError,
    execute,
    parse,
)
from tests.conftest import SHARED

ROOT = Path(__file__).parent.parent
FINQA = SHARED / "finqa"

TABLE = [
    ["( in millions )", "2018", "2017"],
    ["revenue", "$ 1,234.5", "$ -32 ( 32 )"],
    ["margin", "12.5% ( 12.5 % )", "10%"],
    ["notes", "n/a", "5"],
    ["total", "1", "2"],
    ["total", "3", "5"],
    ["nothing"],
    [],
]


# The published evaluator

published = pytest.mark.data("finqa/official_execution.parquet", "finqa/dev.json")


@pytest.fixture(scope="module")
def official() -> list[dict]:
    """The evaluator's answers, each with the page's table and the question's gold program."""
    answers, pages = FINQA / "official_execution.parquet", FINQA / "dev.json"
    rows = pq.read_table(answers).to_pylist()
    tables = {record["id"]: record["table"] for record in json.loads(pages.read_text())}
    gold = {row["id"]: row["program"] for row in rows if row["is_gold"]}
    return [row | {"table": tables[row["id"]], "gold": gold[row["id"]]} for row in rows]


@published
def test_execution_agrees_with_the_published_evaluator(official):
    found = Counter(compare_execution(row) for row in official)
    assert found == {
        "same value": 5598,
        "both refuse": 261,
        # The evaluator drops `divide(1, 2` and calls the rest valid, with the value n/a
        "not closed": 30,
        # exp(2, 900)
        "beyond the limit of magnitude": 1,
    }


def compare_execution(row: dict) -> str:
    try:
        value = execute(row["program"], row["table"])
    except ProgramError as error:
        if row["invalid"]:
            return "both refuse"
        if row["result"] == "n/a" and not row["program"].endswith(")"):
            return "not closed"
        return "beyond the limit of magnitude" if "beyond" in error.what else f"refused: {row['program']}"
    if row["invalid"]:
        return f"not refused: {row['program']}"
    result = row["result"] if row["result"] in ("yes", "no") else float(row["result"])
    same = type(value) is type(result) and value == result
    return "same value" if same else f"{value}, not {row['result']}: {row['program']}"


@published
def test_equivalence_agrees_with_the_published_evaluator(official):
    found = Counter(compare_equivalence(row) for row in official)
    assert found == {
        "both say yes": 1077,
        "both say no": 4808,
        # For the evaluator, `table_sum( total, none)` and `table_sum(total, none)` are two symbols
        "a blank before the name of a row": 5,
    }


def compare_equivalence(row: dict) -> str:
    mine, theirs = equivalent(row["gold"], row["program"]), row["equal_to_gold"]
    if mine == theirs:
        return "both say yes" if mine else "both say no"
    if mine and row["program"] != row["gold"] and row["program"].replace("( ", "(") == row["gold"]:
        return "a blank before the name of a row"
    return f"{mine}, not {theirs}: {row['program']} for {row['gold']}"


@published
def test_gold_programs_give_the_answers_of_the_data(official):
    answers = {r["id"]: r["qa"]["exe_ans"] for r in json.loads((FINQA / "dev.json").read_text())}
    gold = [row for row in official if row["is_gold"]]
    assert len(gold) == len(answers) == 883
    assert [execute(row["gold"], row["table"]) for row in gold] == [answers[row["id"]] for row in gold]


# Running


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("add(5829, 5735)", 11564.0),
        ("subtract(5829, 5735), divide(#0, 5735)", 0.01639),
        ("subtract(1, 2), multiply(#0, const_m1)", 1.0),
        ("multiply(1,234.5, const_1000000)", 1234500000.0),
        ("add(12%, 12 %)", 0.24),
        ("add(-.5, +2.)", 1.5),
        ("divide( 15, 37)", 0.40541),
        ("exp(1.05, const_3)", 1.15763),
        ("exp(-2, 3)", -8.0),
        ("exp(4, 0.5)", 2.0),
        ("exp(0.5, 900)", 0.0),
        ("divide(-1, const_1000000)", 0.0),
        ("greater(2, 1)", "yes"),
        ("greater(1, 1)", "no"),
        ("greater(2, 1), add(3, 4)", 7.0),
        ("table_max(revenue, none)", 1234.5),
        ("table_min(revenue, none)", -32.0),
        ("table_sum(margin, none), table_average(margin, none), subtract(#0, #1)", 0.1125),
        ("table_sum(total, none)", 8.0),  # the last of two rows of that name
        ("table_max(revenue, 7)", 1234.5),  # the second argument is ignored
        ("add(1, 2)subtract(#0, 1)", 2.0),  # cut at brackets too
    ],
)
def test_execute(program, value):
    result = execute(program, TABLE)
    assert result == value
    assert str(result) != "-0.0"


@pytest.mark.parametrize(
    ("program", "step", "what"),
    [
        ("", None, "empty"),
        (", ", None, "empty"),
        ("9" * (MAX_CHARACTERS + 1), None, "2001 characters"),
        (", ".join(["add(1, 2)"] * (MAX_STEPS + 1)), None, "more than 32 steps"),
        ("divid(1, 2)", 0, "'divid(' is none of add"),
        ("add(1, 2), ADD(#0, 1)", 1, "'ADD(' is none of"),
        ("add", 0, "expected `add(argument, argument)`, found 'add'"),
        ("add, 1, 2, )", 0, "expected `add(argument, argument)`"),
        ("add(1, 2", 0, "expected `add(argument, argument)`, found 'add( 1 2'"),
        ("add(1, 2, add(#0, 3)", 0, "expected `add("),
        ("add(5,3)", 0, "expected `add("),  # no space: one number, as in 5,300
        ("add(1, 2, 3)", 0, "expected `add("),
        ("add(1, add(2, 3))", 0, "expected `add("),
        ("add(), 1)", 0, "an argument of add is missing or holds a bracket"),
        ("add( , 1)", 0, "an argument of add is missing or holds a bracket"),
        ("add(1, #0)", 0, "#0 is not an earlier step"),
        ("add(1, 2), add(#0, #5)", 1, "#5 is not an earlier step"),
        ("add(1, #-1)", 0, "'#-1' is no number"),
        ("add(1, $5)", 0, "'$5' is no number"),
        ("add(1, 1e5)", 0, "'1e5' is no number"),
        ("add(1, nan)", 0, "'nan' is no number"),
        ("add(1, 1_000)", 0, "'1_000' is no number"),
        ("add(1, \u0663)", 0, "is no number"),  # a digit to float(), in Arabic script
        ("add(1, const_m2)", 0, "'const_m2' is no number"),
        ("add(1, const_5%)", 0, "'const_5%' is no number"),
        ("add(1|2, 3)", 0, "'1|2' is no number"),
        ("add(1, none)", 0, "'none' is no number"),
        ("add(1, " + "9" * 40 + ")", 0, "the value 1e+40 is beyond 1e+30"),
        ("multiply(" + "9" * 20 + ", " + "9" * 20 + ")", 0, "the value 1e+40 is beyond 1e+30"),
        ("divide(1, const_0)", 0, "1 is divided by 0"),
        ("exp(2, 1001)", 0, "the exponent 1001 is beyond 1000"),
        ("exp(2, 900)", 0, "beyond 1e+30"),
        ("exp(99, 999)", 0, "99 to the power 999 is too large"),
        ("exp(-8, 0.5)", 0, "-8 to the power 0.5 is not a real number"),
        ("exp(0, -1)", 0, "0 to the power -1"),
        ("greater(2, 1), add(#0, 1)", 1, '#0 is "yes" and not a number'),
        ("table_sum(#0, none)", 0, "table_sum takes the name of a row, found '#0'"),
        ("table_sum(profit, none)", 0, "the table has no row 'profit'"),
        ("table_sum(( in millions ), none)", 0, "missing or holds a bracket"),
        ("table_sum(notes, none)", 0, "the cell 'n/a' of the row 'notes' is no number"),
        ("table_sum(nothing, none)", 0, "the row 'nothing' has no cells"),
        ("table_sum(, none)", 0, "expected `table_sum("),
    ],
)
def test_what_cannot_run_is_refused_with_its_place(program, step, what):
    with pytest.raises(ProgramError) as caught:
        execute(program, TABLE)
    assert what in caught.value.what
    assert caught.value.step == step
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 200


def test_parse_gives_the_steps_with_their_arguments():
    first, second, third = parse("subtract(1,500, 12%), divide(#0, const_m1), table_max(net income, none)")
    assert (first.operation, first.first.text, first.first.value, first.second.value) == (
        ("subtract", "1,500", 1500.0, 0.12)
    )
    assert (second.first.reference, second.first.value, second.second.value) == (0, None, -1.0)
    assert (third.reads_table, third.first.text, third.second.text) == (True, "net income", "none")


# Comparing


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        ("add(1, 2)", "add(2, 1)"),
        ("multiply(3, 2)", "multiply( 2, 3)"),
        ("subtract(5, 3), divide(#0, 3)", "divide(5, 3), divide(3, 3), subtract(#0, #1)"),
        ("add(1, 2), add(#0, 3)", "add(3, 2), add(1, #0)"),
        ("add(1, 2), multiply(#0, 3)", "multiply(1, 3), multiply(2, 3), add(#1, #0)"),
        ("divide(1, 2), divide(#0, 3)", "multiply(3, 2), divide(1, #0)"),
        ("subtract(1, 2), subtract(3, #0)", "subtract(3, 1), add(#0, 2)"),
        ("add(1, 2), subtract(#0, 2)", "multiply(1, 2), divide(#0, 2)"),
        ("add(1, 2)", "multiply(1, 2), add(1, 2)"),  # an idle step over the same numbers
        ("greater(1, 2)", "add(1, 1), add(1, 2), greater(#0, #1)"),
        ("add(2, 3), exp(1, #0)", "add(3, 2), exp(1, #0)"),
        ("table_max(a, x), table_min(a, x), add(#0, #1)", "table_min(a, x), table_max(a, x), add(#0, #1)"),
        ("table_max(a, none)", "table_max( a , none)"),
    ],
)
def test_the_same_formula_is_equivalent(gold, other):
    assert equivalent(gold, other)
    assert equivalent(gold, gold)
    assert equivalent(other, gold)


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        ("subtract(1, 2)", "subtract(2, 1)"),
        ("divide(1, 2)", "divide(2, 1)"),
        ("exp(1, 2)", "exp(2, 1)"),
        ("greater(1, 2)", "greater(2, 1)"),
        ("subtract(1, 2)", "greater(1, 2)"),
        ("add(2, 2)", "multiply(2, 2)"),  # equal only in value
        ("add(1, 2)", "add(1.0, 2)"),  # numbers are what is written
        ("divide(1, 100)", "divide(1, const_100)"),
        ("multiply(5%, 3)", "multiply(0.05, 3)"),
        ("add(1, 2)", "add(1, 3), subtract(#0, 3), add(#0, 2)"),
        ("add(1, 2)", "add(3, 3), add(1, 2)"),  # 3 is not in the gold program, though it has no part
        ("add(1, 2), subtract(#0, 2)", "add(1, 3), subtract(#0, 3)"),
        ("table_max(a, none)", "table_max(b, none)"),
        ("table_max(a, none)", "table_min(a, none)"),
        ("table_max(a, none)", "table_max(a, x)"),
        ("add(1, 2)", "add(1, 2"),
        ("add(1, 2)", ""),
        ("add(1, 2)", "add(1, 2), greater(#0, 1), add(#1, 1)"),
        ("add(1, 2)", "subtract(1, 1), divide(2, #0), add(1, 2)"),
    ],
)
def test_another_formula_is_not_equivalent(gold, other):
    assert not equivalent(gold, other)


@pytest.mark.parametrize("gold", ["add(1, 2", "divid(1, 2)", "subtract(1, 1), divide(2, #0)"])
def test_a_gold_program_that_cannot_run_is_an_error(gold):
    with pytest.raises(ProgramError):
        equivalent(gold, "add(1, 2)")


def test_equivalence_cannot_be_fooled_by_small_whole_numbers():
    """A program can construct whole numbers, starting with a / a = 1. Modulo the prime they differ from each other."""
    steps = ["divide(1, 1)", "add(#0, #0)", *(f"multiply(#{k}, #{k})" for k in range(1, MAX_STEPS - 1))]
    residues = [formula(", ".join(steps[: count + 1])).residue for count in range(len(steps))]
    assert residues[:6] == [1, 2, 4, 16, 256, 65536]
    assert len(set(residues)) == len(residues)


def test_results_do_not_depend_on_the_process():
    """Symbols are hashed with a fixed key, not with Python's own salted hash."""
    assert formula("add(5829, 5735)").residue == 57479789841069912386443123591903688526


# Fuzzing

NUMBERS = ("1", "2", "3.5", "1,234", "12%", "-7", ".5", "0", "900", "const_100", "const_m1", "9" * 29)
ROWS = ("revenue", "margin", "notes", "total", "nothing", "( in millions )", "a, b", "")
SYMBOLS = ("(", ")", ", ", ",", "#", "%", "$", "-", ".", "|", " ", "\n", "\0", "\ud800", "\u0663")
WORDS = ("#0", "#99", "e9", "nan", "inf", "const_", "const_m", "none", "EOF", "add(", "exp(", "table_sum(")
SCRAPS = (*SYMBOLS, *WORDS, "9" * 400, "(" * 300)


def random_program(draw: random.Random) -> str:
    """A well-formed program, usually with few steps."""

    def argument(number: int) -> str:
        if number and draw.random() < 0.5:
            return f"#{draw.randrange(number)}"
        return draw.choice(NUMBERS)

    steps = []
    for number in range(draw.choice((1, 1, 2, 2, 3, 4, 6, MAX_STEPS))):
        operation = draw.choice(ARITHMETIC if draw.random() < 0.8 else OPERATIONS)
        if operation in ARITHMETIC:
            steps.append(f"{operation}({argument(number)}, {argument(number)})")
        else:
            steps.append(f"{operation}({draw.choice(ROWS)}, none)")
    return ", ".join(steps)


def mutated(program: str, draw: random.Random) -> str:
    """The program with some pieces deleted, inserted, doubled or moved."""
    for _ in range(draw.choice((0, 0, 1, 1, 2, 5, 20))):
        start, stop = sorted((draw.randrange(len(program) + 1), draw.randrange(len(program) + 1)))
        stop = min(stop, start + draw.choice((0, 1, 3, 30)))
        piece = draw.choice(("", program[start:stop] * 2, draw.choice(SCRAPS), chr(draw.randrange(0x11000))))
        program = program[:start] + piece + program[stop:]
    return program


def fuzz(count: int) -> tuple[Counter, float, str]:
    """Execute and compare `count` programs: (their outcomes, the slowest time in seconds, its program)."""
    draw = random.Random(20)
    ended, slowest, slowest_program = Counter(), 0.0, ""
    for _ in range(count):
        original = random_program(draw)
        program = mutated(original, draw)
        seconds, outcome, same = run_and_compare(original, program)
        for _ in range(2):  # measured twice, since other processes may have delayed the first
            if seconds > 0.002:
                seconds = min(seconds, run_and_compare(original, program)[0])
        ended.update((outcome, same))
        if seconds > slowest:
            slowest, slowest_program = seconds, program
    return ended, slowest, slowest_program


def run_and_compare(original: str, program: str) -> tuple[float, str, str]:
    """(seconds of processor time, outcome of execution, outcome of comparison). Other errors are raised."""
    begun = time.process_time()
    try:
        result = execute(program, TABLE)
        assert result in ("yes", "no") or abs(float(result)) <= 1e30
        outcome = "yes or no" if isinstance(result, str) else "number"
    except ProgramError as error:
        assert len(str(error)) < 300
        outcome = "refused"
    try:
        same = "equivalent" if equivalent(original, program) else "not equivalent"
    except ProgramError:
        same = "original has no formula"
    return time.process_time() - begun, outcome, same


@pytest.mark.slow
def test_any_text_gives_a_value_or_a_program_error_and_soon():
    ended, slowest, program = fuzz(20_000)
    assert slowest < 0.010, program
    assert set(ended) == {
        "number",
        "yes or no",
        "refused",
        "equivalent",
        "not equivalent",
        "original has no formula",
    }
    assert min(ended.values()) > 300, ended


@pytest.mark.slow
def test_equivalent_programs_have_the_same_value():
    """With two numbers and few steps, many random programs are equivalent but not equal."""
    draw = random.Random(21)
    by_formula: dict[tuple[str, int], set[str]] = {}
    for _ in range(20_000):
        steps = []
        for number in range(draw.choice((2, 3))):
            earlier = [f"#{k}" for k in range(number)]
            first, second = draw.choice(["3.7", "11", *earlier]), draw.choice(["3.7", "11", *earlier])
            steps.append(f"{draw.choice(ARITHMETIC)}({first}, {second})")
        program = ", ".join(steps)
        try:
            found = formula(program)
            execute(program, [])
        except ProgramError:
            continue
        by_formula.setdefault((found.kind, found.residue), set()).add(program)
    shared = [programs for programs in by_formula.values() if len(programs) > 1]
    assert len(shared) > 300
    for programs in shared:
        values = [execute(program, []) for program in programs]
        if not isinstance(values[0], str):
            values = [pytest.approx(values[0], rel=1e-9, abs=2e-5), *values[1:]]
        assert all(values[0] == value for value in values), programs


if __name__ == "__main__":
    begun = time.perf_counter()
    print(*fuzz(int(sys.argv[1])), f"{time.perf_counter() - begun:.1f} seconds", sep="\n")
