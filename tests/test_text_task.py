"""The text task: every fault of raw data is named, and passages are exact pieces of it in clean splits."""

import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import Config, load_config
from lib.errors import MissingInput
from lib.tasks import Document, Dropped, Example, Problem, get_task
from lib.tasks.text import check, prepare, sources
from lib.tasks.text.check import squeeze
from lib.user_files import decoding

PROSE = "A sentence that is long enough to stand on its own as a paragraph, number {}.\n\n"


def config(**data) -> Config:
    base = load_config()
    return base.model_copy(update={"data": base.data.model_copy(update=data)})


def checked(path: Path, **data) -> tuple[list[Document], list[Problem]]:
    items = list(check(config(path=str(path), **data)))
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Problem)]


# -------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    ("name", "content", "severity", "kind", "found"),
    [
        ("a.txt", b"", "warning", "empty", "no text"),
        ("a.txt", b"   \n\n ", "warning", "empty", "no text"),
        ("a.txt", b"short", "warning", "too short", "5 characters"),
        ("a.txt", b"text \xff text" * 9, "error", "encoding", "byte 5"),
        ("a.txt", b"text\x00text" * 9, "error", "binary", "byte 4"),
        ("a.txt", b"\xef\xbb\xbf" + b"words " * 9, "warning", "byte order mark", "EF BB BF"),
        ("a.txt", b"line one\r\nline two\r\n" * 3, "warning", "line ends", "6 carriage returns"),
        ("a.txt", b"beep \x07 and \x1b[0m " * 4, "warning", "control characters", "U+0007, U+001B"),
        ("a.txt", b"one line that is long enough to keep", "error", "too little text", "36 characters"),
        ("a.jsonl", b'{"text": "fine and long enough to keep"}\n{oops\n', "error", "not JSON", "oops"),
        ("a.jsonl", b'{"txt": "fine and long enough"}\n', "error", "no text", "txt"),
        ("a.jsonl", b'{"text": 5}\n', "error", "not text", "int 5"),
        ("a.jsonl", b'"just text"\n', "error", "no text", "str just text"),
        ("a.jsonl", b'{"text": null}\n', "error", "null text", "no value"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', "error", "encoding", "byte 27"),
        ("a.jsonl", b'{"text": "' + b"words " * 9 + b'\\ud83d"}\n', "warning", "lone surrogates", "1 lone"),
        ("a.txt", "lost \ufffd ".encode() * 9, "warning", "replacement characters", "9 x U+FFFD"),
        ("a.txt", ("words " * 9).encode("utf-16"), "error", "encoding", "byte 0"),
        ("a.txt", ("words " * 9).encode("utf-16-le"), "error", "encoding", "byte 1"),
        ("a.parquet", b"PAR1 nonsense", "error", "damaged", "arquet"),
    ],
)
def test_each_fault_is_a_problem_with_its_place(tmp_path, name, content, severity, kind, found):
    (tmp_path / name).write_bytes(content)
    _, problems = checked(tmp_path / name)
    match = [p for p in problems if p.kind == kind]
    assert match and match[0].severity == severity and found in match[0].found, problems
    assert match[0].expected and match[0].advice


@pytest.mark.parametrize(("split", "least"), [("hash", 2 * 100 * 4), ("contiguous", 2 * 30 * 4)])
def test_text_is_enough_if_the_smallest_split_gets_two_blocks(tmp_path, split, least):
    """Or two passages, where no blocks are divided among the splits. A split without a share gets nothing."""
    shares = {"train": 0.75, "held_out": 0.25, "reference": 0.0}
    path = tmp_path / "a.txt"
    for length, wanted in ((least, []), (least - 1, ["too little text"])):
        path.write_text("x" * length)
        _, problems = checked(
            path,
            split=split,
            block_characters=100,
            passage_characters=30,
            fractions=shares,
            split_unit="block",
        )
        assert [p.kind for p in problems] == wanted


def test_documents_are_enough_if_there_are_two_for_each_split(tmp_path):
    """Each is as long as it must be, and no longer."""
    shares = {"train": 0.75, "held_out": 0.25, "reference": 0.0}
    for count, wanted in ((4, []), (3, ["too little text"])):
        rows = [json.dumps({"text": f"{n} {'x' * 18}"}) for n in range(count)]
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        found, problems = checked(tmp_path / "a.jsonl", split_unit="document", split="hash", fractions=shares)
        assert len(found) == count and [p.kind for p in problems] == wanted


def test_all_problems_of_a_folder_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("{oops\n" + json.dumps({"txt": 1}) + "\n")
    (tmp_path / "b.txt").write_bytes(b"\xff" * 50)
    (tmp_path / "c.txt").write_text("".join(PROSE.format(i) for i in range(2000)))
    (tmp_path / "d.txt").write_text("".join(PROSE.format(i) for i in range(2000)))
    documents, problems = checked(tmp_path)
    assert sorted(p.kind for p in problems) == ["duplicate", "encoding", "no text", "not JSON"]
    assert [d.document_id for d in documents] == ["c"]
    assert next(p for p in problems if p.kind == "no text").location == "line 2"


def test_columns_and_ids_of_records(tmp_path):
    table = pa.table(
        {"body": ["a text that is long enough " * 3, "another text, also long " * 3], "name": ["x", "x"]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    documents, problems = checked(
        tmp_path / "a.parquet", text_key="body", id_key="name", split_unit="document"
    )
    assert [d.document_id for d in documents] == ["x", "x~2"]
    assert {p.kind for p in problems} == {"repeated id", "too little text"}
    _, problems = checked(tmp_path / "a.parquet", text_key="bodi")
    assert "did you mean 'body'?" in problems[0].advice


def test_other_files_of_a_folder_are_named_and_hidden_files_are_not_read(tmp_path):
    (tmp_path / "A.TXT").write_text("".join(PROSE.format(i) for i in range(2000)))
    for name in ("notes.md", "more.txt.xz", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    documents, problems = checked(tmp_path)
    assert [d.document_id for d in documents] == ["A"]
    assert [(p.kind, p.severity) for p in problems] == [
        ("packed", "warning"),
        ("other file", "warning"),
        ("hidden", "warning"),
    ]
    assert "unxz --keep" in problems[0].advice


def test_a_folder_of_packed_files_says_how_to_unpack_them(tmp_path):
    (tmp_path / "a.txt.xz").write_text("x")
    with pytest.raises(MissingInput, match=r"a\.txt\.xz is packed; unpack it first: unxz --keep"):
        sources(config(path=str(tmp_path)))


def test_names_and_texts_that_utf8_cannot_hold_become_something_that_it_can(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("".join(PROSE.format(i) for i in range(2000)))
    (tmp_path / "b.jsonl").write_bytes(b'{"\\ud800": 1}\n{"text": "' + b"words " * 9 + b'\\ud800 end"}\n')
    documents, problems = checked(tmp_path)
    for value in [v for item in (*documents, *problems) for v in vars(item).values()]:
        str(value).encode("utf-8")
    assert documents[0].content.endswith("words \ufffd end")


@pytest.mark.slow
def test_many_records_of_one_name_take_no_longer_than_others(tmp_path):
    lines = [json.dumps({"id": "same", "text": f"{i} a text that is long enough"}) for i in range(20_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    begin = time.process_time()
    documents, _ = checked(tmp_path, id_key="id")
    assert len({d.document_id for d in documents}) == len(documents) == 20_000
    assert time.process_time() - begin < 6


def test_a_damaged_page_of_a_parquet_file_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [PROSE.format(i) for i in range(5000)]}), path, row_group_size=500)
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + 200):
        data[i] ^= 0x55
    path.write_bytes(data)
    documents, problems = checked(path)
    assert [p.kind for p in problems] == ["damaged"] and problems[0].location.startswith("row ")
    assert documents


def test_unreadable_files_are_named_beside_other_problems(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(PROSE.format(name) * 2000)
    (tmp_path / "c.jsonl").write_text("{oops\n")
    first_bytes = decoding.first_bytes

    def refuse(path, count):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return first_bytes(path, count)

    monkeypatch.setattr("lib.user_files.decoding.first_bytes", refuse)
    documents, problems = checked(tmp_path)
    assert sorted(p.kind for p in problems) == ["not JSON", "unreadable"] and len(documents) == 1


@given(st.text(alphabet="ab \n\t", max_size=200))
def test_squeezing_equals_its_plain_meaning(text):
    lines = [re.sub(r"[ \t]+", " ", line).strip(" ") for line in text.split("\n")]
    assert squeeze(text) == re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def test_the_digest_of_a_text_ignores_white_space(monkeypatch):
    module = sys.modules["lib.tasks.text.check"]
    text = "one two\n\nthree  four five\n" * 50
    whole = module.text_digest([text])
    assert whole[1] == len(" ".join(text.split())) and module.text_digest([text.replace(" ", "  ")]) == whole
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert module.text_digest([text]) == whole


@pytest.mark.parametrize("name", ["nothing.txt", "folder", "a.docx", "a.txt.xz"])
def test_missing_input_is_reported_first(tmp_path, name):
    if name != "nothing.txt":
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).write_text("x")
    with pytest.raises(MissingInput, match=r"data\.path"):
        sources(config(path=str(tmp_path / name)))


def test_white_space_can_be_squeezed(tmp_path):
    (tmp_path / "a.txt").write_text("    def  f():\n\n\n\n        return  1   \n" * 400)
    documents, _ = checked(tmp_path / "a.txt", whitespace="squeeze", deduplicate="none")
    assert documents[0].content.startswith("def f():\n\nreturn 1\ndef f()")
    documents, _ = checked(tmp_path / "a.txt", whitespace="keep", deduplicate="none")
    assert documents[0].content.startswith("    def  f()")


def test_builtin_text_is_there_and_its_small_form_is_its_beginning():
    whole, problems = checked(Path("builtin"))
    small, _ = checked(Path("builtin_small"))
    assert sum(len(d.content) for d in whole) > 300_000 and not [p for p in problems if p.severity == "error"]
    assert [d.document_id for d in small] == [d.document_id for d in whole][: len(small)]


# ------------------------------------------------------------------------------------------ prepare

PARAGRAPHS = st.lists(
    st.text(alphabet="abc .\n", min_size=1, max_size=300).map(lambda t: t + "\n\n"), min_size=1, max_size=12
).map("".join)


def prepared(text: str, **data) -> tuple[list[Example], list[Dropped]]:
    items = list(prepare(config(**data), [Document("d", text, "f")]))
    return [i for i in items if isinstance(i, Example)], [i for i in items if isinstance(i, Dropped)]


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(PARAGRAPHS, st.integers(5, 60), st.integers(60, 200), st.sampled_from(["hash", "contiguous"]))
def test_fixed_passages_are_the_whole_text_in_order(text, size, block, split):
    examples, dropped = prepared(
        text, passage_characters=size, block_characters=block, deduplicate="none", split=split
    )
    assert not dropped and "".join(e.target for e in examples) == text
    assert [e.example_id for e in examples] == [f"d:{i}" for i in range(len(examples))]
    assert all(len(e.target) <= size for e in examples) and not examples[0].continues
    for before, after in itertools.pairwise(examples):
        assert after.continues == (before.split == after.split)


def test_the_line_ends_behind_a_block_are_no_passage_of_their_own():
    text = "a" * 64 + "b" * 64 + "\n\n"
    examples, dropped = prepared(text, passage_characters=64, block_characters=1024, deduplicate="none")
    assert [len(e.target) for e in examples] == [64, 33, 33] and "".join(e.target for e in examples) == text
    assert all(e.target.strip() for e in examples) and not dropped


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(PARAGRAPHS, st.integers(10, 80), st.integers(80, 400))
def test_paragraph_passages_start_at_paragraphs_and_nothing_but_blanks_vanishes(text, size, block):
    examples, dropped = prepared(
        text, passages="paragraph", passage_characters=size, block_characters=block, deduplicate="none"
    )
    starts = [0] + [m.end() for m in re.finditer(r"\n(?:[ \t]*\n)+", text)]
    end = 0
    for e in examples:
        position = next(at for at in starts if at >= end and text.startswith(e.target, at))
        assert len(e.target) <= size
        assert not e.continues or position == end
        end = position + len(e.target)
    pieces = sorted([(int(d.example_id.split("@")[1]), d.text) for d in dropped])
    left = "".join(e.target for e in examples) + "".join(text for _, text in pieces)
    assert sorted(left.replace("\n", "").replace(" ", "")) == sorted(text.replace("\n", "").replace(" ", ""))


def test_a_paragraph_longer_than_a_block_never_makes_a_passage_start_in_its_middle():
    text = "word " * 2000 + "\n\n" + PROSE.format(1) + "tail " * 100
    examples, dropped = prepared(text, passages="paragraph", passage_characters=100, block_characters=400)
    assert [e.target[:10] for e in examples] == ["word word ", "A sentence", "tail tail "]
    assert sum(len(d.text) for d in dropped) > 10_000


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60),
    st.integers(20, 100),
    st.integers(100, 300),
    st.sampled_from(["fixed", "paragraph"]),
    st.sampled_from(["hash", "contiguous"]),
)
def test_without_repeats_no_long_text_is_in_two_splits(numbers, size, block, passages, split):
    texts = ["".join(PROSE.format(n) for n in numbers[start::2]) for start in (0, 1)]
    documents = [Document(f"d{i}", text, "f") for i, text in enumerate(texts) if text]
    settings_of_data = config(passages=passages, passage_characters=size, block_characters=block, split=split)
    items = list(prepare(settings_of_data, documents))
    examples = [i for i in items if isinstance(i, Example)]
    split_of: dict[str, set[str]] = {}
    for e in examples:
        split_of.setdefault(e.group, set()).add(e.split)
        if len(e.target) >= 40:
            split_of.setdefault("text " + " ".join(e.target.split()), set()).add(e.split)
    assert all(len(s) == 1 for s in split_of.values())
    together = "".join(i.target if isinstance(i, Example) else i.text for i in items)
    assert passages == "paragraph" or sorted(together) == sorted("".join(texts))


def test_a_repeated_paragraph_is_left_out_once_it_stood_somewhere():
    text = "".join(PROSE.format(i % 5) for i in range(10))
    examples, dropped = prepared(text, block_characters=200)
    assert len(dropped) == 5 and {d.reason for d in dropped} == {"repeated paragraph"}
    assert "".join(e.target for e in examples) == text[: len(text) // 2]


def test_no_long_text_is_in_two_splits_and_groups_are_whole():
    text = "".join(PROSE.format(i % 40) for i in range(400))
    examples, _ = prepared(text, deduplicate="paragraph", block_characters=400, passage_characters=80)
    split_of: dict[str, set] = {}
    for e in examples:
        split_of.setdefault(e.target.strip(), set()).add(e.split)
        split_of.setdefault("group " + e.group, set()).add(e.split)
    assert all(len(s) == 1 for s in split_of.values())


def test_a_passage_that_begins_where_a_split_ends_is_of_the_next():
    text = "".join(chr(97 + i // 4) for i in range(40))  # ten passages of four characters
    config = load_config(overrides=[
        "data.split=contiguous", "data.fractions={train: 0.5, held_out: 0.3, reference: 0.2}", "data.passages=fixed",
        "data.passage_characters=4", "data.block_characters=40", "data.deduplicate=none",
    ])  # fmt: skip
    found = [e.split for e in prepare(config, [Document("d", text, "t")]) if isinstance(e, Example)]
    assert found == ["train"] * 4 + ["selection"] + ["held_out"] * 3 + ["reference"] * 2


def test_contiguous_splits_lie_behind_each_other_in_their_shares():
    text = "".join(PROSE.format(i) for i in range(2000))
    fractions = {"train": 0.9, "held_out": 0.1}
    examples, _ = prepared(
        text, split="contiguous", fractions=fractions, deduplicate="none", block_characters=1024
    )
    order = [e.split for e in examples]
    assert order == sorted(order, reverse=True)  # train before selection before held_out
    share = sum(len(e.target) for e in examples if e.split != "held_out") / len(text)
    assert share == pytest.approx(0.9, abs=0.002)
    share = sum(len(e.target) for e in examples if e.split == "selection") / len(text)
    assert share == pytest.approx(0.9 * load_config().data.selection_fraction, abs=0.002)
    for split in fractions:  # intervals resample groups: one long document must not be a single one
        assert len({e.group for e in examples if e.split == split}) > 5
    assert len({e.group for e in examples}) == len({(e.group, e.split) for e in examples})


def test_the_hash_split_depends_on_the_name_and_keeps_its_shares():
    text = "".join(PROSE.format(i) for i in range(20_000))
    first, _ = prepared(text, block_characters=400, deduplicate="none")
    again, _ = prepared(text, block_characters=400, deduplicate="none")
    assert [e.split for e in first] == [e.split for e in again]
    data = load_config().data
    chosen = data.selection_fraction * data.fractions["train"]
    shares = data.fractions | {"train": data.fractions["train"] - chosen, "selection": chosen}
    for split, share in shares.items():
        assert sum(e.split == split for e in first) / len(first) == pytest.approx(share, abs=0.03)


def test_tasks_are_found_by_name_and_typos_are_answered():
    from lib.errors import BadConfig

    assert get_task("text").__name__ == "lib.tasks.text"
    with pytest.raises(BadConfig, match="did you mean 'text'"):
        get_task("txt")
