"""Programs as text: which words describe a number, from which of its occurrences, and how long the text is."""

import json
import re

import pytest

from lib.tasks.finqa.builtin import BUILTIN, make_page
from lib.tasks.finqa.grounding import ground
from lib.tasks.finqa.numbers import PageNumbers, operands
from lib.tasks.finqa.program import ProgramError, execute, parse
from lib.tasks.finqa.record import Record, parse_record
from lib.tasks.finqa.sentence import year_of
from tests.conftest import SHARED


def page(table=(), pre=(), post=()) -> PageNumbers:
    rows = tuple(tuple(row) for row in table)
    return PageNumbers(
        Record("id", "train", "A/2013/p.pdf", tuple(pre), tuple(post), rows, "", None, "", None)
    )


STAFF = page(
    [
        ["( in millions )", "2013", "2012 ( restated )"],
        ["pilots ( a )", "7900", "4100"],
        ["cost of sales", "$ -32 ( 32 )", "$ 1,234.5"],
        ["margin", "12.5% ( 12.5 % )", "11%"],
        ["total", "7900", "9100"],
    ],
    pre=["rent was $ 15.6 million in 2012 and $ 25.4 million for the year ended december 31 , 2013 .", "4100 people left ."],
    post=["the company 2019s taxes were $ 3 million , $ 5 million and $ 8.1% ( 8.1 % ) in 2013 , 2012 and 2011 , respectively ."],
)  # fmt: skip


@pytest.mark.parametrize(
    ("program", "value", "text"),
    [
        ("subtract(4100, 9100)", -5000.0, "subtract(4100 [pilots, 2012 restated], 9100 [total, 2012 restated]) = -5000"),
        # Of the same row, then of the same column, and else the first in the table
        ("subtract(7900, 4100)", 3800.0, "subtract(7900 [pilots, 2013], 4100 [pilots, 2012 restated]) = 3800"),
        ("divide(7900, 9100)", 0.86813, "divide(7900 [total, 2013], 9100 [total, 2012 restated]) = 0.86813"),
        ("add(7900, 1)", 7901.0, "add(7900 [pilots, 2013], 1) = 7901"),
        ("add(32, const_m1)", 31.0, "add(32 [cost of sales, 2013], -1) = 31"),
        ("add(-32, 1,234.5)", 1202.5, "add(-32 [cost of sales, 2013], 1,234.5 [cost of sales, 2012 restated]) = 1202.5"),
        ("add(12.5%, 0.11)", 0.235, "add(12.5% [margin, 2013], 0.11 [margin, 2012 restated]) = 0.235"),
        # Described once
        (
            "subtract(7900, 4100), divide(#0, 4100), multiply(#1, const_100)",
            92.68293,
            "subtract(7900 [pilots, 2013], 4100 [pilots, 2012 restated]), divide(#0, 4100), multiply(#1, 100) = 92.68293",
        ),
        ("subtract(25.4, 15.6)", 9.8, "subtract(25.4 [rent, 2013], 15.6 [rent, 2012]) = 9.8"),
        ("add(5, 8.1%)", 5.081, "add(5 [company taxes, 2012], 8.1% [company taxes, 2011]) = 5.081"),
        ("subtract(2013, 2012)", 1.0, "subtract(2013 [year], 2012 [restated]) = 1"),
        ("table_max(total, none)", 9100.0, "table_max(total [2013, 2012 restated]) = 9100"),
        ("greater(4100, 77)", "yes", "greater(4100 [pilots, 2012 restated], 77) = yes"),
        ("multiply(0.00001, 1)", 1e-05, "multiply(0.00001, 1) = 0.00001"),
    ],
)  # fmt: skip
def test_numbers_are_called_what_the_page_calls_them(program, value, text):
    assert ground(program, value, STAFF) == text


def test_a_sentence_is_chosen_when_it_holds_the_other_numbers():
    both = page([["", "2013"], ["claims", "250"], ["pools", "12"]], ["wages rose to $ 250 from $ 180 ."])
    assert ground("subtract(250, 180)", 70.0, both) == "subtract(250 [wages rose], 180 [wages rose]) = 70"
    assert ground("add(250, 12)", 262.0, both) == "add(250 [claims, 2013], 12 [pools, 2013]) = 262"


def test_a_first_row_of_numbers_is_no_header():
    assert ground("subtract(355, 373)", -18.0, page([["january 1 2007", "$ 373"], ["december 31 2007", "355"]])) == (
        "subtract(355 [december 31 2007], 373 [january 1 2007]) = -18"
    )  # fmt: skip


@pytest.mark.parametrize(
    "table", [[], [[]], [["5"]], [["", "2013"], [], ["a", "5", "6", "7"]], [["x"], ["", "5"]]]
)
def test_ragged_tables_are_read(table):
    for program in ("add(5, 7)", "table_max(a, none)", "add(2013, 6)"):
        text = ground(program, 12.0, page(table))
        assert text.startswith(program[:5]) and text.endswith(" = 12") and "[]" not in text
        ground(program, 12.0, page(table), STAFF)
        ground(program, 12.0, STAFF, page(table))


def test_long_names_are_cut_but_keep_their_years():
    name, title = "very " * 30 + "long row of 2001", "a column that has no end , " * 9 + "2013 ( unaudited )"
    text = ground("add(5, 6)", 11.0, page([["", title], [name, "5"], ["other", "6"]]))
    first = re.findall(r"\[(.*?)\]", text)[0].replace(",", "").split()
    assert len(first) <= 10 and "2001" in first and "2013" in first
    assert len(re.findall(r"\[(.*?)\]", ground("add(5, 6)", 11.0, STAFF, words=4))[0].split()) <= 4


def test_a_row_is_cut_at_its_end_and_a_column_at_its_start():
    row, column = (
        "cost of goods sold by segment and region and country",
        "fair value at the end using observable inputs",
    )
    text = ground("add(5, 6)", 11.0, page([["", column], [row, "5"], ["other", "6"]]))
    assert (
        text
        == "add(5 [cost of goods sold by segment and, using observable inputs], 6 [other, "
        + column
        + "]) = 11"
    )


def test_footnotes_and_days_in_names_are_no_numbers():
    table = page([["", "price paid per share 2", "december 31 2013"], ["notes due in 31 days", "40", "50"]])
    assert (
        ground("divide(40, 2)", 20.0, table)
        == "divide(40 [notes due in 31 days, price paid per share 2], 2) = 20"
    )
    assert "31 [" not in ground("add(40, 31)", 71.0, table)


def test_the_table_goes_before_the_text():
    both = page([["", "2013"], ["rate", "12%"]], ["some 12 people ."])
    assert ground("add(12, 1)", 13.0, both) == "add(12 [rate, 2013], 1) = 13"
    assert ground("add(12, 1)", 13.0, page(pre=["some 12 people ."])) == "add(12 [some people], 1) = 13"


def test_programs_of_many_numbers_have_fewer_words_each():
    sentences = [f"the amount of kind number ab{i} cd{i} ef{i} gh{i} was $ {1000 + i} ." for i in range(6)]
    program = "add(1000, 1001), " + ", ".join(f"add(#{i}, {1002 + i})" for i in range(4))
    described = re.findall(r"\[(.*?)\]", ground(program, 6015.0, page(pre=sentences)))
    assert len(described) == 6 and all(len(words.split()) == 5 for words in described)


def test_a_malformed_program_is_refused():
    with pytest.raises(ProgramError):
        ground("add(1", 1.0, STAFF)


@pytest.mark.parametrize(
    ("sentence", "number", "year"),
    [
        ("it was $ 3 million , $ 5 million and $ 9 million in 2012 , 2011 and 2010 , respectively .", "5", "2011"),
        ("in 2012 and 2011 , we paid $ 3 million and $ 5 million .", "5", "2011"),
        ("we paid $ 7 and $ 8 for years ended december 31 , 2012 and 2011 , not $ 1 and $ 2 as in 2001 and 2000", "8", "2011"),
        ("from $ 15.6 million in 2001 to $ 25.4 million for the year ended december 31 , 2002 .", "15.6", "2001"),
        ("from $ 15.6 million in 2001 to $ 25.4 million for the year ended december 31 , 2002 .", "25.4", "2002"),
        ("rates were 8.5% ( 8.5 % ) and 9% ( 9 % ) in 2012 and 2011", "9", "2011"),
        ("rates were 8.5% ( 8.5 % ) and 9.1% ( 9.1 % ) in 2012 and 2011", "9.1 %", "2011"),  # the one in brackets
        ("unlike in 2001 and 2000 , we paid $ 7 and $ 8 for 2012 and 2011", "8", "2011"),
        ("costs were $ 1995 and $ 2001 in 2013 and 2012", "1995", "2013"),
        ("costs were $ 2536 million and $ 1995 million in 2013 and 2012", "1995", "2012"),
        ("in 2012 the company 2019s cost was $ 77 , among others", "77", "2012"),
        ("between 2012 and 2013 we spent $ 77 on it", "77", None),
        ("three numbers , 1 , 2 and 3 , but 2012 and 2011", "2", None),
        ("since 2012 and 2011", "2012", None),
        ("nothing but 12", "12", None),
    ],
)  # fmt: skip
def test_the_year_of_a_number_in_a_sentence(sentence, number, year):
    assert year_of(sentence, sentence.index(number)) == year


def test_the_words_of_another_page_say_nothing_of_this_one():
    other = page([["", "east", "west"], ["apples", "1", "2"], ["pears", "3", "4"]], ["we ate 44 cherries ."])
    text = ground("subtract(7900, 4100), divide(#0, 25.4)", 149.6, STAFF, other)
    assert (
        text == "subtract(7900 [apples, east], 4100 [apples, west]), divide(#0, 25.4 [ate cherries]) = 149.6"
    )
    assert ground("table_max(total, none)", 9100.0, STAFF, other) == "table_max(pears [east, west]) = 9100"
    # The first and the third number of the text
    more = page(pre=["we ate 44 cherries .", "of 55 bottles", "lost 66 games ."])
    assert ground("add(15.6, 25.4)", 41.0, STAFF, more) == "add(15.6 [ate cherries], 25.4 [lost games]) = 41"
    # The numbers that have words are the same
    assert ground("add(77, 4100)", 4177.0, STAFF, other) == "add(77, 4100 [apples, west]) = 4177"


def test_built_in_pages_have_words_for_every_number():
    for number in range(BUILTIN["builtin_small"]):
        for data in make_page(0, number):
            record = parse_record(data, "train", "", "")
            assert isinstance(record, Record) and record.program
            numbers = PageNumbers(record)
            text = ground(record.program, execute(record.program, record.table), numbers)
            assert text == ground(record.program, execute(record.program, record.table), numbers)
            on_page = {o for o in operands(record.program) if numbers.find(o)}
            tables = sum(step.reads_table for step in parse(record.program))
            assert text.count("[") == len(on_page) + tables, text


@pytest.mark.data("finqa/dev.json")
def test_nearly_every_gold_number_of_the_real_data_has_words():
    file = SHARED / "finqa" / "dev.json"
    on_page = described = 0
    lengths = []
    for data in json.loads(file.read_text()):
        record = parse_record(data, "dev", "", "")
        assert isinstance(record, Record) and record.program
        numbers = PageNumbers(record)
        steps = parse(record.program)
        text = ground(record.program, execute(record.program, record.table), numbers)
        table_steps = sum(step.reads_table for step in steps)
        on_page += len({o for o in operands(record.program) if numbers.find(o)})
        described += text.count(" [") - min(table_steps, text.count(" ["))
        if len(steps) == 1:
            lengths.append(len(re.findall(r"\w+|[^\w\s]", text)))
    assert on_page > 1500 and described / on_page >= 0.99
    assert sorted(lengths)[int(0.95 * len(lengths))] <= 60
