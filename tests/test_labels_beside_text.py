"""Labels beside the text: read from every format, every fault named, and carried to windows, tokens, rewards and class names."""

import csv
import gzip
import io
import itertools
import json
import re
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import schema
from lib.config import load_config
from lib.errors import BadConfig, BadData
from lib.examples import ExampleCounters
from lib.label_values import InvalidLabel, class_of, plain, spans_of
from lib.labels import LabelCounts
from lib.models.build import heads_of
from lib.tasks import Document, Example, Problem
from lib.tasks.text import candidates, check, prepare, rewards
from lib.tasks.text.check import squeeze
from lib.tasks.text.labelled import moved
from lib.tokenization import encode_batch, train_tokenizer
from lib.user_files.decoding import clean_text
from tests.conftest import run_stages

SETTINGS = ["data.min_document_characters=1", "data.passage_characters=40", "data.block_characters=1024"]
ROWS = [
    {"text": "The first text, which a human wrote.", "label": "human", "spans": []},
    {"text": "The second text, of which a part is not theirs.", "label": "machine", "spans": [[4, 15, "machine"]]},
    {"text": "Ein dritter Text: größer, mit Ümlauten.", "label": 1, "spans": [{"start": 0, "end": 3, "class": 1}]},
    {"text": 'A "fourth" text,\nof two lines.', "label": "human", "spans": []},
]  # fmt: skip


def config_for(path, *more: str):
    return load_config(["configs/your_labels.yaml"], overrides=[f"data.path={path}", *SETTINGS, *more])


def checked(path, *more: str) -> tuple[list[Document], list[Problem]]:
    items = list(check(config_for(path, *more)))
    problems = [i for i in items if isinstance(i, Problem) and i.kind != "too little text"]
    return [i for i in items if isinstance(i, Document)], problems


def write_rows(path: Path, rows: list[dict], **fixed) -> Path:
    rows = [row | fixed for row in rows]
    if ".csv" in path.name:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
        text = out.getvalue()
    elif path.suffix == ".parquet":
        spans = [
            [list(s) if isinstance(s, list) else [s["start"], s["end"], s["class"]] for s in r["spans"]]
            for r in rows
        ]
        spans = [[{"start": a, "end": b, "class": 1} for a, b, _ in of] for of in spans]
        table = pa.table(
            {"text": [r["text"] for r in rows], "label": [str(r["label"]) for r in rows], "spans": spans}
        )
        pq.write_table(table, path)
        return path
    elif ".jsonl" in path.name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_every_format_gives_the_same_labels(tmp_path, name):
    documents, problems = checked(write_rows(tmp_path / name, ROWS))
    assert not problems
    assert [d.content for d in documents] == [row["text"] for row in ROWS]
    assert [d.label for d in documents] == [0, 1, 1, 0]
    found = [[(s["start"], s["end"], s["class"]) for s in d.spans or ()] for d in documents]
    assert found == [[], [(4, 15, 1)], [(0, 3, 1)], []]


GOOD = {"text": "Some text of a human.", "label": "human", "spans": []}
OTHER = {"text": "Some text of a machine.", "label": "machine", "spans": []}


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"label": "alien"}, "unknown class", "human, machine"),
        ({"label": 2}, "unknown class", "from 0 to 1"),
        ({"label": "0000000001"}, "unknown class", "from 0 to 1"),
        ({"label": 0.5}, "unknown class", "from 0 to 1"),
        ({"label": None}, "no label", "label"),
        ({"label": " "}, "no label", "label"),
        ({"spans": None}, "no label", r"\[\] if there is nothing"),
        ({"spans": [[0, 4, "alien"]]}, "unknown class", "machine"),
        ({"spans": [[0, 4, 2]]}, "malformed span", "from 1 to 1"),
        ({"spans": [[0, 99, 1]]}, "malformed span", "21 characters"),
        ({"spans": [[4, 4, 1]]}, "malformed span", "start < end"),
        ({"spans": [[0, 4, 1], [3, 5, 1]]}, "malformed span", "overlap"),
        ({"spans": "machine"}, "malformed span", "list"),
        ({"spans": [[0, 4.5, 1]]}, "malformed span", "whole numbers"),
        ({"text": OTHER["text"]}, "contradicting labels", "same label"),
        (
            {"text": OTHER["text"], "label": "machine", "spans": [[0, 1, 1]]},
            "contradicting labels",
            "same label",
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_every_fault_is_named_with_its_row(tmp_path, name, row, kind, words):
    rows = [GOOD | {"text": "Another text of a human."}, OTHER, GOOD | row]
    documents, problems = checked(write_rows(tmp_path / name, rows))
    (problem,) = problems
    assert problem.kind == kind and problem.severity == "error", problem
    assert problem.location.startswith("line 3" if name == "a.jsonl" else "row 2")
    assert re.search(words, problem.expected), problem
    assert len(documents) == 2, "the other rows are kept"


def test_scores_are_checked_and_names_of_classes_get_advice(tmp_path):
    score = ["data.label_classes=null", "models.judge.target_type=score"]
    rows = [
        GOOD | {"label": value, "text": f"{i} text"}
        for i, value in enumerate([0.25, 1, "human", 2, "nan", True])
    ]
    documents, problems = checked(write_rows(tmp_path / "a.jsonl", rows), *score)
    assert [d.label for d in documents] == [0.25, 1.0]
    assert [p.kind for p in problems] == [
        "label not a number",
        "label out of range",
        "label not a number",
        "label not a number",
    ]
    assert all("data.label_classes" in p.advice for p in problems[:2])
    rows = [GOOD | {"label": value, "text": f"{i} text"} for i, value in enumerate([0.25, 1, "nan", "1_0"])]
    documents, problems = checked(write_rows(tmp_path / "a.csv", rows), *score)
    assert [d.label for d in documents] == [0.25, 1.0]
    assert [p.kind for p in problems] == ["label not finite", "label not a number"]


def test_names_of_classes_in_cells_may_have_any_characters(tmp_path):
    rows = [
        {"text": "A text of nobody, really.", "label": "an author", "spans": [[0, 6, 'made_up, by: "x"']]},
        {"text": "Another text of nobody.", "label": "a_machine", "spans": []},
    ]
    names = ["data.label_classes=[an author, a_machine]", """data.span_classes=['made_up, by: "x"']"""]
    documents, problems = checked(write_rows(tmp_path / "a.csv", rows), *names)
    assert not problems and [d.label for d in documents] == [0, 1]
    assert documents[0].spans == [{"start": 0, "end": 6, "class": 1}]


def test_a_missing_column_names_its_setting(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,labels,spans\nsome text,human,[]\n")
    (problem,) = checked(path)[1]
    assert "set data.label_key" in problem.advice and "labels" in problem.advice


def test_texts_without_fields_have_no_label(tmp_path):
    (tmp_path / "a.txt").write_text("Some text without a label.")
    (problem,) = checked(tmp_path / "a.txt")[1]
    assert (problem.kind, problem.severity) == ("no label", "error") and ".csv" in problem.advice


def test_texts_without_fields_have_no_group(tmp_path):
    (tmp_path / "a.txt").write_text("Some text without a group.")
    no_labels = [f"data.{name}=null" for name in ("label_key", "label_classes", "spans_key", "span_classes")]
    config = config_for(tmp_path / "a.txt", *no_labels, "models.judge=null", "data.group_key=author")
    problem = next(p for p in check(config) if isinstance(p, Problem))
    assert (problem.kind, problem.expected) == ("no group", "a row with text and group")


def test_no_advice_is_a_setting_that_labels_forbid(tmp_path):
    config = config_for(write_rows(tmp_path / "a.jsonl", [GOOD, OTHER]))
    (problem,) = [p for p in check(config) if isinstance(p, Problem)]
    assert (problem.kind, problem.advice) == ("too little text", "give more documents")
    with pytest.raises(BadData, match="no examples in split train") as caught:
        ExampleCounters(None).check(config)
    assert "split_unit" not in str(caught.value) and "block_characters" not in str(caught.value)


def test_rows_without_labels_can_be_dropped_and_equal_rows_are_kept_once(tmp_path):
    rows = [GOOD, GOOD, OTHER, GOOD | {"label": None, "text": "Nobody knows."}]
    documents, problems = checked(write_rows(tmp_path / "a.jsonl", rows), "data.drop=[no label]")
    assert len(documents) == 2
    assert [(p.kind, p.severity) for p in problems] == [("duplicate", "warning"), ("no label", "warning")]


def test_a_class_without_documents_is_an_error(tmp_path):
    _, problems = checked(write_rows(tmp_path / "a.jsonl", [GOOD]))
    assert [(p.kind, p.found) for p in problems] == [("class without documents", "machine")]


@given(st.text(alphabet="ab \n\r\t\x00\x0b\ufeff\u2003\x1f", max_size=40), st.data())
def test_spans_keep_their_visible_characters_when_white_space_changes(before, data):
    after = squeeze(clean_text(before)[0])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(before)), max_size=6)))
    spans = tuple((a, b, 1) for a, b in zip(cuts[::2], cuts[1::2], strict=False))
    found = moved(spans, before, after)

    def ink(text: str) -> str:
        return "".join(c for c in text if c in "ab")

    visible = [ink(before[a:b]) for a, b, _ in spans]
    assert [ink(after[a:b]) for a, b, _ in found] == [v for v in visible if v]
    assert all(x[1] <= y[0] for x, y in itertools.pairwise(found))
    assert all(0 <= a < b <= len(after) for a, b, _ in found)


def test_a_span_on_unchanged_words_keeps_the_space_beside_it():
    assert moved(((3, 8, 1),), "One  two three", "One two three") == ((3, 7, 1),)
    assert moved(((5, 9, 1),), "One  two three", "One two three") == ((4, 8, 1),)


def test_windows_carry_their_part_of_the_labels(tmp_path):
    text = "".join(f"word{i:02d} " for i in range(20)).strip()  # 139 characters, 4 windows
    rows = [
        {"text": text + str(i), "label": i % 2, "spans": [[30, 80, 1]] if i % 2 else []} for i in range(30)
    ]
    config = config_for(write_rows(tmp_path / "a.jsonl", rows))
    documents = [i for i in check(config) if isinstance(i, Document)]
    examples = [e for e in prepare(config, documents) if isinstance(e, Example)]
    assert len({e.split for e in examples}) == 4
    for number, document in enumerate(documents):
        of = [e for e in examples if e.example_id.rpartition(":")[0] == document.document_id]
        assert (
            "".join(e.target for e in of) == document.content and len({(e.split, e.group) for e in of}) == 1
        )
        assert len({len(e.target) for e in of}) <= 2, "windows have equal lengths"
        records = [json.loads(e.record or "") for e in of]
        assert {r["label"] for r in records} == {number % 2}
        marked = "".join(e.target[a:b] for e, r in zip(of, records, strict=True) for a, b, _ in r["spans"])
        assert marked == (text[30:80] if number % 2 else "")


def test_windows_of_a_document_longer_than_a_block_have_equal_lengths_too(tmp_path):
    rows = [
        {"text": f"{'x' * 1_060}{i}", "label": i % 2, "spans": []} for i in range(8)
    ]  # blocks have 1,024 characters
    config = config_for(write_rows(tmp_path / "a.jsonl", rows))
    documents = [i for i in check(config) if isinstance(i, Document)]
    lengths = {len(e.target) for e in prepare(config, documents) if isinstance(e, Example)}
    assert lengths == {39, 40}


def test_groups_stay_together_in_one_split(tmp_path):
    rows = [GOOD | {"text": f"Text number {i}.", "label": i % 2, "author": f"a{i // 4}"} for i in range(80)]
    config = config_for(write_rows(tmp_path / "a.jsonl", rows), "data.group_key=author")
    documents = [i for i in check(config) if isinstance(i, Document)]
    examples = [e for e in prepare(config, documents) if isinstance(e, Example)]
    splits = {}
    for example, document in zip(examples, documents, strict=True):
        splits.setdefault(document.group, set()).add(example.split)
    assert len(splits) == 20 and all(len(of) == 1 for of in splits.values())


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_candidates_and_rewards_have_the_labels(tmp_path, kind):
    config = config_for(write_rows(tmp_path / "a.jsonl", ROWS))
    documents = [i for i in check(config) if isinstance(i, Document)]
    examples = [e for e in prepare(config, documents) if isinstance(e, Example)]
    tokenizer = train_tokenizer(kind, [e.target for e in examples], 300)
    rows = [vars(e) | {"token_ids": ids} for e, ids in zip(examples, encode_batch(tokenizer, [e.target for e in examples]), strict=True)]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema.EXAMPLES.arrow)
    context = SimpleNamespace(
        config=config, tokenizer=tokenizer, engines=[], key=lambda purpose: 1, same_tokenizer=False
    )
    made = schema.conform(candidates(table, context), schema.CANDIDATES)  # type: ignore[arg-type]
    marked = {}
    for row in made.to_pylist():
        chosen = [i for i, c in zip(row["token_ids"], row["token_labels"], strict=True) if c == 1]
        name = row["example_id"].rpartition(":")[0]
        marked[name] = marked.get(name, "") + tokenizer.decode(chosen)
    assert [text.replace(" ", "") for text in marked.values()] == ["", "secondtext", "Ein", ""]
    reward, terms = rewards(config, made)
    assert set(zip(reward.tolist(), terms["class"].tolist(), strict=True)) == {(1.0, 0.0), (0.0, 1.0)}


def test_class_names_reach_the_models():
    config = config_for(
        "x.jsonl", "data.label_classes=[human, edited, machine]", "models.judge.num_classes=3"
    )
    judge, inspector = (config.models[name] for name in ("judge", "inspector"))
    assert config.class_names(judge) == ("human", "edited", "machine")
    assert config.class_names(inspector) == ("unlabelled", "machine")
    heads = heads_of(judge.mode, judge.target_type, judge.num_classes, True, config.class_names(judge))
    assert heads["id2label"] == {0: "human", 1: "edited", 2: "machine"} and heads["num_labels"] == 3
    made = pa.table({"label": [0.0, 1.0, 2.0]})
    reward, terms = rewards(config, made)
    assert reward.tolist() == [1.0, 0.5, 0.0] and terms["class"].tolist() == [0, 1, 2]


def test_names_and_numbers_of_classes():
    assert [class_of(v, ["human", "machine"]) for v in ("human", "machine", 0, 1, "1", 1.0)] == [
        0,
        1,
        0,
        1,
        1,
        1,
    ]
    assert class_of(True, ["false", "true"]) == 1
    assert [class_of(v, ["1", "0"]) for v in (0, 1, "0")] == [1, 0, 1], "a name goes before a number"
    for wrong in (-1, 2, 0.5, "Human", None, [], float("nan")):
        with pytest.raises(InvalidLabel):
            class_of(wrong, ["human", "machine"])
    assert spans_of([[5, 6], [0, 2, "a"]], ["a"]) == ((0, 2, 1), (5, 6, 1))
    for names in (None, ["a", "b"]):  # of which class?
        with pytest.raises(InvalidLabel):
            spans_of([[0, 2]], names)


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", " 1 ", np.float64(1)])
def test_a_label_means_the_same_in_every_format(value):
    """pandas writes whole numbers with a fraction where a value is missing. A name that is a number is no position."""
    assert class_of(value, ["1", "0"]) == 0
    assert class_of(value, ["5", "4", "3", "2", "1"]) == 4
    assert class_of(value, ["human", "machine"]) == 1
    with pytest.raises(InvalidLabel):
        class_of(value, ["2", "3"])
    assert plain(value) == "1"


def test_truth_values_of_tables_are_those_of_json():
    assert [class_of(v, ["false", "true"]) for v in (True, "True", "true", False, "False")] == [1, 1, 1, 0, 0]
    assert class_of("True", ["False", "True"]) == class_of(True, ["False", "True"]) == 1


def test_groups_are_equal_in_every_format(tmp_path):
    """A rewritten text and its original stay in one split, also if one file has whole numbers and the other has fractions."""
    (tmp_path / "a.jsonl").write_text('{"text": "One text.", "label": 0, "spans": [], "g": 7}\n')
    (tmp_path / "b.csv").write_text("text,label,spans,g\nOther text.,1.0,[],7.0\n")
    config = config_for(tmp_path, "data.group_key=g")
    assert {d.group for d in check(config) if isinstance(d, Document)} == {"7"}


def test_contradictions_are_found_behind_the_message_and_not_in_white_space(tmp_path):
    spans = [[3 * i, 3 * i + 2, "machine"] for i in range(12)]
    text = "ab " * 12
    rows = [{"text": text, "label": "machine", "spans": s} for s in (spans, spans[:-1])]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kinds = [p.kind for p in check(config_for(tmp_path / "x.jsonl")) if isinstance(p, Problem)]
    assert "contradicting labels" in kinds
    rows = [
        {"text": "One  two", "label": "machine", "spans": [[5, 8]]},
        {"text": "One two", "label": "machine", "spans": [[4, 7]]},
    ]
    (tmp_path / "y.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kinds = [p.kind for p in check(config_for(tmp_path / "y.jsonl")) if isinstance(p, Problem)]
    assert "contradicting labels" not in kinds


def test_a_contradiction_names_both_files_and_the_key(tmp_path):
    for name, label in (("a.jsonl", "human"), ("b.jsonl", "machine")):
        (tmp_path / name).write_text(
            json.dumps({"text": "The same text.", "label": label, "spans": []}) + "\n"
        )
    (fault,) = [
        p for p in check(config_for(tmp_path)) if isinstance(p, Problem) and p.kind == "contradicting labels"
    ]
    assert fault.source.endswith("b.jsonl") and "a.jsonl, line 1, has the same text" in fault.found
    assert "under 'label' and 'spans'" in fault.expected


def test_the_advice_names_the_setting_and_the_column(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "A text.", "label": "human", "spans": [[0, 1, "alien"]]}\n')
    problem = next(p for p in check(config_for(tmp_path / "x.jsonl")) if isinstance(p, Problem))
    assert problem.kind == "unknown class" and "data.span_classes" in problem.advice
    assert "under 'spans'" in problem.expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["candidates.source=masked_lm"], "original_only"),
        (["labels.path=x.json"], r"labels\.path"),
        (["data.deduplicate=paragraph"], "deduplicate: document"),
        (["data.split_unit=block"], "split_unit to document"),
        (["data.split=contiguous"], r"data\.split to hash"),
        (
            ["data.split=contiguous", "data.label_key=null", "data.label_classes=null", "models.judge=null"],
            r"data\.split to hash",
        ),
        (["data.passages=paragraph"], "set passages: fixed"),
        (["data.label_classes=null"], r"set models\.judge\.target_type to score"),
        (["data.label_key=null"], "label_classes names the classes"),
        (["data.label_classes=[human]"], "at least 2 different names"),
        (["data.label_classes=[a, a]"], "at least 2 different names"),
        (["data.label_classes=[a, b, c]"], "set it to 3"),
        (["data.spans_key=null", "data.span_classes=null"], r"models\.inspector to null"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(BadConfig, match=words):
        config_for("x.jsonl", *settings)


def test_memory_stays_flat_with_many_rows(tmp_path):
    """The checks of labels hold one row at a time: 7,800 more rows need less than 16 bytes each."""
    peaks = []
    for count in (200, 8_000):
        path = tmp_path / f"{count}.csv"
        with path.open("w") as file:
            file.write("text,label,spans\n")
            file.writelines(f"Text number {i} of a file.,{i % 2},[]\n" for i in range(count))
        config = config_for(path)
        tracemalloc.start()
        assert sum(isinstance(item, Document) for item in check(config)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 16 * 7_800


def test_stage_00_lists_wrong_labels_and_ends(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, GOOD | {"label": "alien"}])
    with pytest.raises(BadData, match="the data has 1 error"):
        run_stages(tmp_path / "run_001", config_for(path), ("00_check_data",))
    (problem,) = pq.read_table(tmp_path / "run_001" / "00_check_data" / "problems.parquet").to_pylist()
    assert problem["kind"] == "unknown class" and problem["location"] == "line 5"


def test_counts_of_labels():
    counts = LabelCounts(("human", "machine"), ("machine",))
    for document in ROWS:
        counts.add(class_of(document["label"], counts.classes or ()), [{"class": 1}] * len(document["spans"]))
    assert counts.line() == "labels: human 2, machine 2, spans of machine: 2"
    assert counts.summary() == {
        "documents_by_class": {"human": 2, "machine": 2},
        "spans_by_class": {"machine": 2},
    }
