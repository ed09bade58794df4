"""FinQA's records, the check of stage 00, and pages: fitted into a budget, and made by the project.

`python -m tests.test_finqa_check [dev]` prints how much of the gold programs' evidence survives in a budget,
beside the first words of the page.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import Config, load_config
from lib.errors import BadConfig, MissingInput
from lib.tasks import Document, Problem
from lib.tasks.finqa.builtin import make_page, make_pages
from lib.tasks.finqa.check import check, compare_answer, sources
from lib.tasks.finqa.cross_record_checks import page_text
from lib.tasks.finqa.numbers import numbers_in, operands
from lib.tasks.finqa.page_text import page_lines, plain_cell, score_lines, serialise
from lib.tasks.finqa.program import OPERATIONS, execute, parse
from lib.tasks.finqa.record import Record, find_files, parse_record, read_records
from tests.conftest import SHARED

ROOT = Path(__file__).parent.parent
FINQA = SHARED / "finqa"


def raw(**changes) -> dict[str, Any]:
    """A valid record. Arguments such as `qa_program=...` change keys of `qa`."""
    qa = {"question": "what is the sum?", "program": "add(10, 20)", "answer": "30", "exe_ans": 30.0}
    data = {
        "id": "AB/2010/page_1.pdf-1",
        "filename": "AB/2010/page_1.pdf",
        "pre_text": ["costs were 10 ."],
        "post_text": ["and nothing else ."],
        "table": [["", "2010", "2009"], ["sales", "$ 20", "$ 15"], ["costs", "10", "9"]],
        "qa": qa,
    }
    for key, value in changes.items():
        if key.startswith("qa_"):
            qa[key.removeprefix("qa_")] = value
        else:
            data[key] = value
    return data


def record_of(data: Any, split: str = "train") -> Record:
    record = parse_record(data, split, "a.json", "record 0")
    assert isinstance(record, Record), record
    return record


DROP = frozenset(load_config().finqa.drop)


def configured(path: Path | str, seed: int = 1, drop: frozenset[str] = DROP) -> Config:
    """The part of a config that the check reads."""
    finqa = SimpleNamespace(drop=tuple(drop))
    return cast(
        Config, SimpleNamespace(seed=seed, data=SimpleNamespace(path=str(path), drop=()), finqa=finqa)
    )


def checked(folder: Path, drop: frozenset[str] = DROP, **splits: list) -> tuple[list[str], list[Problem]]:
    """Names of the documents and the problems of records in files of these splits."""
    for split, records in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(records))
    items = list(check(configured(folder, drop=drop)))
    return (
        [item.document_id for item in items if isinstance(item, Document)],
        [item for item in items if isinstance(item, Problem)],
    )


def kinds(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(p.severity, p.kind) for p in problems]


# Records


def test_a_record_survives_its_document():
    record = record_of(raw(qa_answer="30 € “”", gold_inds=["table_1"]), "dev")
    again = Record.from_json(record.to_json())
    assert again == record
    assert again.split == "dev" and again.report == "AB/2010"
    assert "gold_inds" not in record.to_json()
    for text in ("[]", "{}", "1", '{"id": 1}', "not JSON"):
        with pytest.raises(ValueError):
            Record.from_json(text)


def test_every_faulty_field_is_named_at_once():
    data = raw(id=7, pre_text="one sentence", table=[["a"], ["b", 2]], qa_exe_ans=True, qa_answer=[])
    del data["filename"], data["qa"]["question"]
    problems = parse_record(data, "train", "train.json", "record 3")
    assert isinstance(problems, list)
    said = {p.location: p.found for p in problems}
    assert said == {
        "record 3: id": "a number, 7",
        "record 3: filename": "nothing",
        "record 3: pre_text": "a text, 'one sentence'",
        "record 3: table": "row 1: cell 1 is a number, 2",
        "record 3: qa.question": "nothing",
        "record 3: qa.answer": "a list",
        "record 3: qa.exe_ans": "a truth value, True",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"qa": None},
        {"qa": []},
        {"qa_exe_ans": float("nan")},
        {"qa_exe_ans": 10**400},
        {"qa_exe_ans": "30"},
        {"qa_exe_ans": [1]},
        {"qa_question": "half of \ud83d"},
        {"table": [["a", "\udc00"]]},
        {"table": {"a": 1}},
        {"table": ["ab"]},
        {"id": "  "},
        {"post_text": [None]},
    ],
)
def test_hostile_fields_are_problems(changes):
    problems = parse_record(raw(**changes), "train", "train.json", "record 0")
    assert isinstance(problems, list) and [p.kind for p in problems] == ["malformed record"]
    json.dumps([vars(p) for p in problems]).encode()
    str(problems).encode()  # messages about half a surrogate pair can be encoded


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*raw(), *(f"qa_{key}" for key in raw()["qa"])]), json_values)
def test_no_json_value_breaks_the_parser(key, value):
    parsed = parse_record(raw(**{key: value}), "train", "train.json", "record 0")
    if isinstance(parsed, Record):
        assert Record.from_json(parsed.to_json()) == parsed
    else:
        assert parsed and all(p.kind == "malformed record" for p in parsed)
    assert isinstance(parse_record(value, "train", "", ""), list)


def test_the_rule_of_the_other_task_is_refused(tmp_path):
    config = load_config([ROOT / "configs" / "finqa.yaml"], overrides=["data.drop=[null text]"])
    with pytest.raises(BadConfig, match=r"data\.drop is for task text.*finqa\.drop"):
        next(check(config))


def test_a_split_behind_a_dead_link_is_not_left_out(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "dev.json").symlink_to("gone.json")
    with pytest.raises(MissingInput, match=r"dev\.json is a link to gone\.json, which is not a file"):
        find_files(tmp_path)
    (tmp_path / "dev.json").unlink()
    (tmp_path / "dev.json").symlink_to("train.json")
    assert [file.name for file in find_files(tmp_path)] == ["train.json", "dev.json"]


def test_a_missing_folder_says_where_finqa_is(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(MissingInput, match=r"train\.json, dev\.json, test\.json.*czyssrs/FinQA"):
            list(read_records(folder))
        with pytest.raises(MissingInput):
            sources(configured(folder))


@pytest.mark.parametrize(
    ("text", "records", "where", "found"),
    [
        ("", 0, "", "the end of the file (line 1, column 1)"),
        ('{"id": 1}', 0, "", "'{\"id\": 1}' (line 1, column 1)"),
        ("[{good},\n {good}, {bad}, {good}]", 2, "record 2", "line 2"),
        ("[{good}, {good", 1, "record 1", "the end of the file"),
        ("[{good} {good}]", 1, "record 0", "line 1"),
        ("[{good}] more", 1, "record 0", "'more'"),
        ("[{good}, " + "[" * 200_000, 1, "record 1", ""),
        ("[{good}, " + "9" * 10_000 + "]", 1, "record 1", ""),
    ],
)
def test_broken_json_names_the_record(tmp_path, text, records, where, found):
    good = json.dumps(raw())
    text = text.replace("{good}", good).replace("{good", good[:-1]).replace("{bad}", '{"id": oops}')
    (tmp_path / "train.json").write_text(text)
    items = list(read_records(tmp_path))
    assert [isinstance(item, Record) for item in items] == [True] * records + [False]
    problem = items[-1]
    assert isinstance(problem, Problem)
    assert (problem.kind, problem.location) == ("not JSON", where)
    assert found in problem.found


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "dev.json").write_bytes(b'[{"id": "\xff\xfe"}]')
    (tmp_path / "train.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([raw(), 5]).encode())
    items = list(read_records(tmp_path))
    assert [type(item) for item in items] == [Record, Problem, Problem]
    assert [p.kind for p in items if isinstance(p, Problem)] == ["malformed record", "unreadable file"]


# The check

SEVEN = "add(10, 20), add(#0, 7), subtract(#1, 7)"  # a number that is not on the page


def test_a_good_record_is_a_document(tmp_path):
    documents, problems = checked(tmp_path, train=[raw()])
    assert (documents, problems) == (["AB/2010/page_1.pdf-1"], [])


@pytest.mark.parametrize(
    "given, right", [(1234567, True), (1234567.00001, True), (1234567.001, False), (1234570, False)]
)
def test_large_values_are_compared_to_five_decimals_too(tmp_path, given, right):
    data = raw(
        qa_program="add(1234567, const_0)", qa_exe_ans=given, qa_answer="1234567", pre_text=["1234567 ."]
    )
    _, problems = checked(tmp_path, train=[data])
    assert ("wrong exe_ans" not in {p.kind for p in problems}) == right


@pytest.mark.parametrize(
    ("changes", "severity", "kind", "kept"),
    [
        ({"qa_program": None}, "warning", "missing program", False),
        ({"qa_program": "  "}, "warning", "missing program", False),
        ({"qa_program": "divide(10, 0)"}, "warning", "program cannot run", False),
        ({"qa_program": "add(10, 20"}, "warning", "program cannot run", False),
        ({"qa_program": "table_sum(profit, none)"}, "warning", "program cannot run", False),
        ({"qa_exe_ans": -30}, "warning", "wrong exe_ans", False),
        ({"qa_exe_ans": "yes"}, "warning", "wrong exe_ans", False),
        ({"qa_exe_ans": None}, "warning", "missing exe_ans", True),
        ({"qa_question": " "}, "error", "missing question", False),
        ({"qa_answer": ""}, "warning", "missing answer", True),
        ({"qa_answer": "31"}, "warning", "answer rounding", True),
        ({"qa_answer": "-30"}, "warning", "answer sign", True),
        ({"qa_answer": "55"}, "warning", "answer differs", True),
        ({"qa_program": "add(10, 20.0)"}, None, None, True),
        ({"qa_program": SEVEN}, "warning", "operand not on page", True),
        ({"qa_program": SEVEN, "qa_question": "in 7 years?"}, "warning", "operand in question", True),
        ({"table": []}, "warning", "empty table", True),
        ({"table": [["", " "]]}, "warning", "empty table", True),
        ({"table": [["sales", "20"]]}, "warning", "one-row table", True),
        ({"table": [["", "2010"], ["sales", "20", "3"]]}, "warning", "ragged table", True),
        ({"id": 5}, "error", "malformed record", False),
    ],
)
def test_each_fault_is_a_row(tmp_path, changes, severity, kind, kept):
    data = raw(**changes)
    if kind == "empty table":
        data["pre_text"] = ["10 and 20 ."]
    documents, problems = checked(tmp_path, train=[data, raw(id="other", qa_question="what else?")])
    expected = {(severity, kind)} if kind else set()
    assert {k for k in kinds(problems) if k[1] != "differing page"} == expected
    assert (data["id"] in documents) == kept
    for problem in problems:
        assert problem.source.endswith("train.json") and problem.location and problem.found
        assert problem.expected and problem.advice


def test_the_caller_names_what_is_dropped(tmp_path):
    records = [raw(qa_program=None), raw(id="2", qa_question="?", qa_answer="55")]
    documents, problems = checked(tmp_path, frozenset(), train=records)
    assert documents == ["2"]
    assert kinds(problems) == [("error", "missing program"), ("warning", "answer differs")]

    documents, problems = checked(tmp_path, frozenset({"missing program", "answer differs"}), train=records)
    assert documents == []
    assert kinds(problems) == [
        ("warning", "missing program"),
        ("warning", "answer differs"),
        ("error", "no records"),
    ]
    with pytest.raises(BadConfig, match="did you mean 'missing program'"):
        checked(tmp_path, frozenset({"mising program"}), train=records)


def test_all_problems_of_a_record_are_said(tmp_path):
    hopeless = raw(qa_program=None, qa_answer=None, qa_question="")
    assert [kind for _, kind in kinds(checked(tmp_path, train=[hopeless])[1])] == [
        "missing question",
        "missing answer",
        "missing program",
    ]


def test_an_empty_list_is_an_error(tmp_path):
    assert kinds(checked(tmp_path, train=[])[1]) == [("error", "no records")]


def test_questions_asked_twice(tmp_path):
    again = raw(id="2", qa_question="What is  the sum")
    other = raw(id="3", qa_program="add(10, 15)", qa_exe_ans=25, qa_answer="25")
    off_page = raw(id="4", filename="B/2010/page_2.pdf", pre_text=["10 of a sort ."])
    documents, problems = checked(tmp_path, train=[raw(), again, other, off_page])
    assert [(p.kind, p.location) for p in problems] == [
        ("repeated question", "2"),
        ("contradicting questions", "3"),
    ]
    assert len(documents) == 4


def test_repeated_names(tmp_path):
    documents, problems = checked(tmp_path, train=[raw(), raw(qa_question="what else?")])
    assert kinds(problems) == [("error", "repeated id")]
    assert len(documents) == 1


def test_pages_in_two_splits_are_dropped_on_the_training_side(tmp_path):
    same_name = raw(id="2", pre_text=["10 of another page ."])
    same_page = raw(id="3", filename="C/2011/page_3.pdf")
    same_table = raw(id="4", filename="D/2011/page_4.pdf", pre_text=["10 more ."])
    splits = {"train": [same_name, same_page, same_table], "dev": [raw()]}
    documents, problems = checked(tmp_path, DROP, **splits)
    assert [(p.severity, p.kind, p.location) for p in problems] == [
        ("error", "page in two splits", "2"),
        ("error", "page in two splits", "3"),
        ("warning", "table in two splits", "4"),
    ]
    assert documents == ["4", raw()["id"]]
    documents, problems = checked(tmp_path, DROP | {"page in two splits"}, **splits)
    assert documents == ["4", raw()["id"]]
    assert {p.severity for p in problems} == {"warning"}


def test_a_page_that_differs_and_a_row_name_that_repeats(tmp_path):
    table = [["", "2010"], ["total", "10"], ["total", "20"]]
    program = {"qa_program": "table_sum(total, none)", "qa_exe_ans": 20, "qa_answer": "20"}
    _, problems = checked(tmp_path, train=[raw(), raw(id="2", table=table, **program)])
    assert kinds(problems) == [("warning", "repeated row name"), ("warning", "differing page")]
    words = {"pre_text": [], "post_text": ["none"], "table": [["", "a"], ["b", "-"]]}
    program = {"qa_program": "add(const_1, const_2)", "qa_exe_ans": 3, "qa_answer": "3"}
    assert kinds(checked(tmp_path, train=[raw(**words, **program)])[1]) == [("warning", "no numbers")]


@pytest.mark.parametrize(
    ("answer", "value", "kind"),
    [
        ("18.3%", 0.18342, None),
        ("18%", 0.18342, None),
        ("33.%", 0.33333, None),
        ("$ 2,458.3 million", 2458.3, None),
        ("265% increase", 2.64706, None),
        ("$ 386797190 or $ 386.8 million", 386797189.66, None),
        ("-7.3 %", -0.073, None),
        ("- $ 12", -12.0, None),
        ("110\\n", 110.0, None),
        ("no", "no", None),
        ("yes , it did", "yes", None),
        ("23.1%", 0.23028, "answer rounding"),
        ("10.6%", 0.10693, "answer rounding"),
        ("9.1%", -0.09091, "answer sign"),
        ("14", -14.0, "answer sign"),
        ("18.3", 0.18342, "answer times 100"),
        ("6.8%", 6.8, "answer times 100"),
        ("-59.6", 0.59618, "answer times 100"),
        ("2.58", 0.00258, "answer times 1000"),
        ("4000000", 4.0, "answer times 1000"),
        ("56.7%", 141.0, "answer differs"),
        ("0", 12.0, "answer differs"),
        ("no", "yes", "answer differs"),
        ("about half", 0.5, "answer unreadable"),
        ("12", "yes", "answer unreadable"),
        ("in 2010 , 2009 and 2008 , fees were 7.6", 7.6, "answer unreadable"),
        ("9" * 400, 1.0, "answer differs"),
        ("", 3.0, "answer unreadable"),
    ],
)
def test_written_answers_against_values(answer, value, kind):
    assert [fault[0] for fault in compare_answer(answer, value)] == ([kind] if kind else [])


odd_texts = st.text(alphabet="1290.,-$%()# \n\x00aeé٣²∞", max_size=12) | st.sampled_from(
    ["total", "9" * 400, "-"]
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    table=st.lists(st.lists(odd_texts, max_size=4), max_size=4),
    text=st.lists(odd_texts, max_size=3),
    question=odd_texts,
    answer=odd_texts,
    program=odd_texts
    | st.builds("add({}, {})".format, odd_texts, odd_texts)
    | st.just("table_sum(total, none)"),
    budget=st.integers(-1, 30),
)
def test_no_page_breaks_the_check(tmp_path_factory, table, text, question, answer, program, budget):
    asked = {"qa_question": question, "qa_answer": answer, "qa_program": program}
    data = raw(table=table, pre_text=text, post_text=text[::-1], **asked)
    documents, problems = checked(tmp_path_factory.getbasetemp(), train=[data])
    assert documents or problems
    json.dumps([vars(problem) for problem in problems], ensure_ascii=False).encode()
    assert words(serialise(record_of(data), question, budget, words)) <= max(budget, 0)


def test_numbers_of_a_text():
    assert numbers_in("$ 1,234.50 , -32 ( 32 ) and 12.5 % in three years") == {
        "1234.5", "32", "12.5", "0.125", "3",
    }  # fmt: skip
    assert numbers_in("12%") & numbers_in("0.12")
    assert numbers_in(".5 to 7. and no .") == {"0.5", "7"}
    assert operands("add(const_1, 5%), table_max(sales, none), subtract(#0, 1,000)") == ["5%", "1,000"]


# Pages in a budget


def words(text: str) -> int:
    return len(text.split())


def test_rows_become_sentences():
    lines = page_lines(
        record_of(raw(table=[["", "2010", "2009"], ["sales", "$ 20", "-3 ( 3 )"], ["costs", "", "5"]]))
    )
    assert [line.text for line in lines] == [
        "costs were 10 .",
        "the sales of 2010 is $20 ; of 2009 is -3",
        "the costs of 2009 is 5",
        "and nothing else .",
    ]
    assert plain_cell("22% ( 22 % )") == "22%"
    assert plain_cell("24.5 ( 1 )") == "24.5 ( 1 )"
    assert plain_cell("( 32 )") == "( 32 )"


def test_the_page_fits_the_budget_and_keeps_its_order():
    for data in make_pages(seed=3, count=6):
        record = record_of(data)
        lines = [line.text for line in page_lines(record)]
        question = record.question
        assert serialise(record, question, 10_000, words) == "\n".join(lines)
        for budget in (0, 1, 5, 20, 60, 120):
            text = serialise(record, question, budget, words)
            assert words(text) <= budget
            if budget >= 60:
                spans = [lines.index(line) for line in text.split("\n")]
                assert spans == sorted(set(spans)) and spans
        # a tokenizer that counts more for the whole than for the parts
        assert len(serialise(record, question, 300, lambda t: len(t) + t.count("\n"))) <= 300


def test_a_line_that_is_longer_than_the_budget_is_cut():
    record = record_of(raw(table=[], post_text=[], pre_text=["the sum of 1 2 3 4 5 6 7 8 9"]))
    assert serialise(record, "what is the sum?", 6, words) == "the sum of 1 2 3"


def test_what_the_question_asks_about_comes_first():
    record = record_of(make_pages(seed=5, count=1)[0])
    lines = page_lines(record)
    for line in (line for line in lines if line.is_row):
        scores = score_lines(lines, f"what was the {line.name}?")
        assert scores.index(max(scores)) == lines.index(line)
    assert score_lines([], "what?") == []


def test_prompts_that_hold_a_part_of_the_page_are_tagged():
    from lib.tasks import SHORTENED, Document, Example
    from lib.tasks.finqa.examples import prepare

    record = record_of(raw())
    document = Document(record.id, record.to_json(), "x")

    def tagged(*overrides: str) -> bool:
        config = load_config(["configs/finqa.yaml"], quick_test=True, overrides=overrides)
        (example,) = (item for item in prepare(config, [document]) if isinstance(item, Example))
        return SHORTENED in (example.tags or [])

    assert not tagged()  # the question alone
    assert not tagged("ranker.prompt=question_page", "ranker.prompt_tokens=500")
    assert tagged("ranker.prompt=question_page", "ranker.prompt_tokens=20")


def test_odd_pages_are_written_too():
    for table in (
        [],
        [[]],
        [["a"]],
        [["", "x"], [], ["b"]],
        [["a", "b"], ["c", "1", "2", "3"]],
        [["sales", "20"]],
    ):
        record = record_of(raw(table=table))
        whole = serialise(record, "sales?", 1_000, words)
        assert set(numbers_in(page_text(record))) <= set(numbers_in(whole))
        assert words(serialise(record, "", 3, words)) <= 3
    empty = record_of(raw(table=[], pre_text=[], post_text=[]))
    assert serialise(empty, "sales?", 10, words) == ""
    assert serialise(empty, "sales?", 10, lambda text: 11) == ""


# Pages that the project writes


def test_made_pages_are_good_records(tmp_path):
    pages = make_pages(seed=1, count=40)
    documents, problems = checked(tmp_path, train=pages)
    assert problems == []
    assert len(documents) == len(pages)


def test_made_pages_depend_on_seed_and_number_alone():
    pages = make_pages(seed=1, count=12)
    assert make_pages(seed=1, count=5) == pages[: len(make_pages(seed=1, count=5))]
    assert pages[-1] == make_page(1, 11)[-1]
    assert make_pages(seed=2, count=1) != make_pages(seed=1, count=1)


def test_made_questions_are_varied():
    pages = make_pages(seed=0, count=60)
    steps = [parse(data["qa"]["program"]) for data in pages]
    assert {step.operation for program in steps for step in program} == set(OPERATIONS)
    assert {len(program) for program in steps} == {1, 2, 3}
    assert {data["qa"]["exe_ans"] for data in pages} > {"yes", "no"}
    per_page = Counter(data["filename"] for data in pages)
    assert len(per_page) == 60 and 4 <= min(per_page.values()) <= max(per_page.values()) <= 7
    for data in pages:
        assert execute(data["qa"]["program"], data["table"]) == data["qa"]["exe_ans"]


def test_the_builtin_pages_have_three_splits():
    items = list(check(configured("builtin_small")))
    assert all(isinstance(item, Document) for item in items)
    records = [Record.from_json(item.content) for item in items if isinstance(item, Document)]
    assert [path.name for path in sources(configured("builtin"))] == ["builtin.py"]
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.split, set()).add(record.filename)
    assert {split: len(names) for split, names in splits.items()} == {"train": 48, "dev": 6, "test": 6}


# FinQA itself

published = pytest.mark.data("finqa/train.json", "finqa/dev.json")


@pytest.fixture(scope="module")
def finqa() -> list[Document | Problem]:
    return list(check(configured(FINQA)))


@pytest.mark.slow
@published
def test_finqa_has_these_problems(finqa):
    problems = [item for item in finqa if isinstance(item, Problem)]
    assert {p.severity for p in problems} == {"warning"}
    counts = Counter((Path(p.source).stem, p.kind) for p in problems)
    assert counts["train", "missing program"] == 100
    assert counts["train", "wrong exe_ans"] == 1
    assert not counts["dev", "wrong exe_ans"] and not counts["dev", "missing program"]
    assert not any(kind in ("program cannot run", "page in two splits") for _, kind in counts)
    documents = [Record.from_json(item.content) for item in finqa if isinstance(item, Document)]
    assert Counter(record.split for record in documents) == {"train": 3000, "dev": 883}
    # 6 % of the answers are other numbers; most agree, so the comparison is not too strict either
    assert 0.03 < counts["dev", "answer differs"] / 883 < 0.09
    assert sum(n for (_, kind), n in counts.items() if kind.startswith("answer")) < 0.2 * len(documents)


@pytest.mark.slow
@published
def test_evidence_survives_the_budget(finqa):
    records = [Record.from_json(item.content) for item in finqa if isinstance(item, Document)]
    dev = [record for record in records if record.split == "dev"]
    share, _ = evidence_recall(dev, lambda r: serialise(r, r.question, 256, words))
    plain, _ = evidence_recall(dev, lambda r: first_words(r, 256))
    assert share > 0.94 and share > plain + 0.3


def first_words(record: Record, budget: int, rows_first: bool = False) -> str:
    """The page cut after a number of words, with its table in page order or before the text."""
    lines = page_lines(record)
    lines = sorted(lines, key=lambda line: not line.is_row) if rows_first else lines
    return " ".join(" ".join(line.text for line in lines).split()[:budget])


def evidence_recall(records: list[Record], text_of, min_digits: int = 0) -> tuple[float, float]:
    """(share of the programs' operands, share of the questions with all of them) that are in the text.

    Operands are the numbers that the page has, and the names of rows that table operations read.
    `min_digits` excludes short numbers, which often match by chance.
    """
    found = expected = complete = 0
    for record in records:
        text, whole = text_of(record), serialise(record, "", 10**9, words)
        numbers, all_numbers = numbers_in(text), numbers_in(whole)
        hits = [
            bool(forms & numbers)
            for operand in operands(record.program or "")
            if (forms := numbers_in(operand)) & all_numbers and sum(map(str.isdigit, operand)) >= min_digits
        ]
        rows = [step.first.text for step in parse(record.program or "") if step.reads_table]
        hits += [f"the {' '.join(name.split())} " in text for name in rows]
        found, expected, complete = found + sum(hits), expected + len(hits), complete + all(hits)
    return found / expected, complete / len(records)


def print_evidence_recall(split: str) -> None:
    items = [item for item in check(configured(FINQA)) if isinstance(item, Document)]
    records = [r for r in (Record.from_json(item.content) for item in items) if r.split == split]
    print(
        f"{len(records)} questions of {split}: operands kept, operands of 3 or more digits, all of a question's"
    )
    for budget in (128, 256, 512):
        for name, text_of in {
            "ranked for the question": lambda r, b=budget: serialise(r, r.question, b, words),
            "first words": lambda r, b=budget: first_words(r, b),
            "first words, table before text": lambda r, b=budget: first_words(r, b, rows_first=True),
        }.items():
            share, complete = evidence_recall(records, text_of)
            long, _ = evidence_recall(records, text_of, min_digits=3)
            print(f"{budget:4} words  {name:32} {share:6.1%} {long:6.1%} {complete:6.1%}")


if __name__ == "__main__":
    print_evidence_recall(sys.argv[1] if len(sys.argv) > 1 else "dev")
