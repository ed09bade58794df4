"""Files of users: found, decompressed, decoded and cut into rows. Every fault is named."""

import csv
import gzip
import io
import json
import os
import random
import socket
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.config import load_config
from lib.errors import BadConfig, MissingInput
from lib.evaluation.infilling import read_infill_file
from lib.evaluation.starts import check_starts, starting_ids
from lib.tasks import Document, Problem
from lib.tasks.text import check, sources
from lib.tokenization import decode_batch, train_tokenizer
from lib.user_files import decoding
from lib.user_files.decoding import HEAD_BYTES, clean_text, decode, utf8_fault, wide_encoding
from lib.user_files.faults import kind_of
from lib.user_files.folders import find_files
from lib.user_files.rows import read_rows

PROSE = "A sentence that is long enough to stand on its own as a paragraph, number {}.\n\n"
NOVEL = "".join(PROSE.format(i) for i in range(2000))
RUSSIAN = "Каждая строка этого текста написана кириллицей, и в ней есть пробелы.\n" * 4
CHINESE = "一个人在路上走,看见一只鸟。The bird sings.\n他说:今天天气很好,我们去公园散步吧。\n" * 20


def config_of(path, **data):
    base = load_config()
    return base.model_copy(update={"data": base.data.model_copy(update={"path": str(path), **data})})


def checked(path, **data) -> tuple[list[Document], list[Problem]]:
    items = list(check(config_of(path, **data)))
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Problem)]


def kinds(problems) -> list[tuple[str, str]]:
    return sorted((p.kind, p.severity) for p in problems)


# ---------------------------------------------------------------------------------------- folders and links


@pytest.fixture
def far(tmp_path) -> Path:
    """A folder elsewhere that holds two texts."""
    folder = tmp_path / "far"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.txt").write_text(NOVEL + "one")
    (folder / "deep" / "two.txt").write_text(NOVEL + "two")
    return folder


def test_linked_folders_are_read_and_dead_links_are_named(tmp_path, far):
    root = tmp_path / "sym"
    root.mkdir()
    (root / "ascii.txt").write_text(NOVEL)
    (root / "more").symlink_to(far)
    (root / "gone.txt").symlink_to("nowhere.txt")
    documents, problems = checked(root)
    assert [d.document_id for d in documents] == ["ascii", "more/deep/two", "more/one"]
    assert kinds(problems) == [("dead link", "error")]
    assert problems[0].source == str(root / "gone.txt") and "nowhere.txt" in problems[0].found
    hashed = [p.relative_to(root).as_posix() for p in sources(config_of(root))]
    assert hashed == ["ascii.txt", "more/deep/two.txt", "more/one.txt"]


def test_a_folder_that_holds_only_a_linked_folder_is_read(tmp_path, far):
    (tmp_path / "sym").mkdir()
    (tmp_path / "sym" / "more").symlink_to(far)
    documents, problems = checked(tmp_path / "sym")
    assert len(documents) == 2 and not problems
    (tmp_path / "direct").symlink_to(far)
    assert [d.document_id for d in checked(tmp_path / "direct")[0]] == ["deep/two", "one"]


def test_links_in_a_circle_end_and_each_folder_is_read_once_under_its_real_name(far):
    (far / "again").symlink_to(far)
    (far / "deep" / "up").symlink_to("..")
    (far / "a_link_that_sorts_first").symlink_to("deep")
    (far / "self").symlink_to("self")
    documents, problems = checked(far)
    assert [d.document_id for d in documents] == ["deep/two", "one"]
    assert kinds(problems) == [("dead link", "error"), *3 * [("repeated folder", "warning")]]


def test_pipes_sockets_and_links_that_were_no_text_are_named(far):
    os.mkfifo(far / "pipe")
    os.mkfifo(far / "pipe.txt")
    (far / "notes.md").symlink_to("nothing.md")
    (far / "folder").symlink_to("no_such_folder")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(far)  # the path of a socket has at most 108 bytes
        try:
            server.bind("s")
        finally:
            os.chdir(here)
        documents, problems = checked(far)
    assert len(documents) == 2
    assert sorted((Path(p.source).name, p.kind, p.severity) for p in problems) == [
        ("folder", "dead link", "error"),
        ("notes.md", "dead link", "warning"),
        ("pipe", "no file", "warning"),
        ("pipe.txt", "no file", "error"),
        ("s", "no file", "warning"),
    ]


def test_folders_that_cannot_be_read_are_named(far, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    documents, problems = checked(far)
    assert [d.document_id for d in documents] == ["one"]
    assert kinds(problems) == [("unreadable", "error")] and problems[0].source == str(far / "deep")
    (far / "one.txt").unlink()
    with pytest.raises(MissingInput, match=r"deep: unreadable, Permission denied"):
        sources(config_of(far))


def test_files_of_a_folder_that_can_only_be_listed_are_named(far, monkeypatch):
    real = os.stat

    def refuse(path, *rest, **options):
        if Path(path).parent.name == "deep":
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        patch.setattr(os, "lstat", refuse)
        found = find_files(far)
    assert [p.name for p in found.files] == ["one.txt"]
    assert [(p.name, fault.kind, fault.severity) for p, fault in found.faults] == [
        ("two.txt", "unreadable", "error")
    ]


def test_a_path_that_is_a_dead_link_or_a_pipe_is_said_to_be_one(tmp_path):
    (tmp_path / "a.txt").symlink_to("gone.txt")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(MissingInput, match=r"a\.txt is a link to gone\.txt, which does not exist"):
        sources(config_of(tmp_path / "a.txt"))
    with pytest.raises(MissingInput, match=r"b\.txt is a socket, pipe or device"):
        sources(config_of(tmp_path / "b.txt"))


def test_hidden_files_and_folders_are_named_and_not_read(far):
    (far / ".git").mkdir()
    (far / ".git" / "a.txt").write_text("x")
    (far / ".b.txt").write_text("x")
    documents, problems = checked(far)
    assert len(documents) == 2 and kinds(problems) == 2 * [("hidden", "warning")]


# --------------------------------------------------------------------------------------------- white space


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85"])
def test_control_characters_that_part_words_become_white_space(mark):
    text, faults = clean_text(f"Page 0 ends here{mark}New page starts\x07")
    white = " " if mark == "\x1f" else "\n"
    assert text == f"Page 0 ends here{white}New page starts"
    assert [(f.kind, f.found, f.advice) for f in faults] == [
        ("control characters", f"1: U+{ord(mark):04X}", "they became white space"),
        ("control characters", "1: U+0007", "they were removed"),
    ]


def test_every_character_that_python_takes_for_space_still_is_one():
    """No two words are ever glued: U+2028 and the like stay as they are."""
    for code in range(0x3001):
        if chr(code).isspace():
            text, _ = clean_text(f"a{chr(code)}b")
            assert len(text.split()) == 2, hex(code)
    assert clean_text("a\u2028b\u2029c") == ("a\u2028b\u2029c", [])
    assert clean_text("a\r\nb\rc")[0] == "a\nb\nc"


def test_pages_of_a_file_stay_apart(tmp_path):
    (tmp_path / "a.txt").write_text("\x0c".join(f"Page {i} ends here" for i in range(40)) + NOVEL)
    documents, problems = checked(tmp_path / "a.txt")
    assert "herePage" not in documents[0].content and "ends here\nPage 7 ends" in documents[0].content
    assert problems[0].found == "39: U+000C" and problems[0].advice == "they became white space"


def test_gaps_and_prompts_are_cleaned_as_the_data_is(tmp_path):
    data = "one line\nand another\nmore\n"
    tokenizer = train_tokenizer("character", [data], 0)
    table = {"id": ["a\r"], "text": ["one line\r\nand [MASK]nother\x0cmore"], "target": ["one line\r\nand another\x0cmore"]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "gaps.parquet")
    (start,) = read_infill_file(tmp_path / "gaps.parquet", tokenizer, 64)
    assert start.truth is not None and start.names == ["a\r"]
    assert decode_batch(tokenizer, start.truth) == ["one line\nand another\nmore"]
    settings = load_config(overrides=["sampler.length=20"]).sampler
    for name, text in (("prompt", "one line\r\nmore"), ("infill", "one line\r\nm[MASK]re")):
        row = starting_ids(settings.model_copy(update={name: text}), tokenizer, 32)
        wanted = "one line\nm" if name == "infill" else "one line\nmore"
        assert decode_batch(tokenizer, [row])[0].startswith(wanted)


# ---------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("text", [NOVEL, RUSSIAN, CHINESE, "aaaa", "Überblick über alles 🙂 und mehr"])
@pytest.mark.parametrize("name", ["utf-16le", "utf-16be", "utf-32le", "utf-32be", "utf-16", "utf-32"])
def test_wide_encodings_are_called_by_their_names(text, name):
    data = text.encode(name)
    for head in (data, data[: len(data) // 2 + 1]):  # as the first bytes of a longer file, cut anywhere
        assert wide_encoding(head) == name
    found, fault = decode(data)
    assert found is None and fault is not None and fault.kind == "encoding"
    assert f"`iconv -f {name} -t utf-8`" in fault.advice


@pytest.mark.parametrize(
    "data",
    [
        b"text\x00text" * 9,
        b"one zero byte \x00 in a plain English text, which has as many letters in odd as in even places",
        bytes(range(256)) * 20,
        random.Random(0).randbytes(5000),
        b"\x00" * 100,
        b"".join(i.to_bytes(2, "little") for i in range(200)),
    ],
)
def test_other_zero_bytes_are_no_encoding(data):
    assert wide_encoding(data) is None


def test_files_without_a_mark_are_named_too_where_they_have_rows(tmp_path):
    (tmp_path / "a.txt").write_bytes(NOVEL.encode("utf-16-be"))
    (tmp_path / "b.jsonl").write_bytes(('{"text": "some words"}\n' * 9).encode("utf-16"))
    (tmp_path / "c.csv").write_bytes("text\nsome words\n".encode("utf-16-le"))
    (tmp_path / "d.json").write_bytes(b'[{"text": "caf\xe9"}]')
    _, problems = checked(tmp_path)
    advice = {Path(p.source).name: p.advice for p in problems}
    assert len(problems) == 4  # one for a file, not one for each line
    for name, encoding in (
        ("a.txt", "utf-16be"),
        ("b.jsonl", "utf-16"),
        ("c.csv", "utf-16le"),
        ("d.json", "latin1"),
    ):
        assert f"`iconv -f {encoding} -t" in advice[name], name  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"caf\xe9 au lait", "iconv -f latin1"),
        (b"\x93quoted\x94 words", "iconv -f cp1252"),
        ("naïve café ".encode() * 9 + b"caf\xe9 " + "déjà vu".encode(), "do not convert the whole"),
    ],
)
def test_eight_bit_encodings_are_distinguished(data, words):
    with pytest.raises(UnicodeDecodeError) as error:
        data.decode("utf-8")
    assert words in utf8_fault(error.value).advice


@pytest.mark.parametrize(
    ("data", "words"),
    [(gzip.compress(b"x", mtime=0), ".gz"), (b"%PDF-1.7 x", "text"), (b"PK\x03\x04x", "text"), (b"PAR1\x15\x04", ".parquet")],
)  # fmt: skip
def test_files_of_other_formats_are_called_by_their_names(data, words):
    text, fault = decode(data)
    assert text is None and fault is not None and fault.kind == "binary" and words in fault.advice


# ------------------------------------------------------------------------------------------- packed and rows

RECORDS = [{"text": f"{i}, a text; with \"quotes\",\ttabs\nand two lines", "id": f"n{i}"} for i in range(40)]  # fmt: skip


def delimited(records, delimiter=",", mark="", **options) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(records)
    return (mark + file.getvalue()).encode()


FORMS = {
    "a.jsonl": "\n".join(map(json.dumps, RECORDS)).encode(),
    "marked.jsonl": ("\ufeff" + "\n".join(map(json.dumps, RECORDS))).encode(),
    "a.json": json.dumps(RECORDS).encode(),
    "marked.json": ("\ufeff" + json.dumps(RECORDS)).encode(),
    "a.csv": delimited(RECORDS),
    "marked.csv": delimited(RECORDS, mark="\ufeff"),
    "semicolons.csv": delimited(RECORDS, ";"),
    "tabs.csv": delimited(RECORDS, "\t"),
    "unix.tsv": delimited(RECORDS, "\t", lineterminator="\n"),
    "blank_lines.csv": b"\r\n\n" + delimited(RECORDS) + b"\n\n",
    "A.CSV": delimited(RECORDS, quoting=csv.QUOTE_ALL),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_rows_of_every_form_are_the_records(tmp_path, name, packed):
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(FORMS[name]) if packed else FORMS[name])
    found = list(read_rows(path, {"text": "data.text_key", "id": "data.id_key"}))
    assert [row.value for row in found] == RECORDS and all(row.fault is None for row in found)
    assert len({row.location for row in found}) == len(found)
    documents, _ = checked(path, id_key="id", deduplicate="none")
    assert [d.document_id for d in documents] == [r["id"] for r in RECORDS]


def test_parquet_is_read_as_the_other_forms(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert [r.value for r in read_rows(tmp_path / "a.parquet")] == RECORDS
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert kind_of(tmp_path / "a.parquet.gz") == ""
    _, problems = checked(tmp_path)
    assert [(p.kind, p.advice.split()[0]) for p in problems if p.kind == "packed"] == [("packed", "gunzip")]


def test_a_packed_text_is_read_and_named_by_its_stem(tmp_path):
    with gzip.open(tmp_path / "novel.TXT.gz", "wt") as file:
        file.write(NOVEL)
    documents, problems = checked(tmp_path)
    assert [(d.document_id, d.content) for d in documents] == [("novel", NOVEL.strip())] and not problems


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.json.gz"])
def test_damaged_compressed_files_are_named_and_earlier_texts_are_kept(tmp_path, name):
    (tmp_path / "whole.txt").write_text(NOVEL)
    form = NOVEL.encode() if name == "a.txt.gz" else FORMS[name.removesuffix(".gz")]
    for data in (gzip.compress(form)[:-20], gzip.compress(form)[:40] + b"x" * 60, b"no gzip"):
        (tmp_path / name).write_bytes(data)
        documents, problems = checked(tmp_path)
        assert [p.kind for p in problems if p.severity == "error"] == ["damaged"], problems
        assert documents[-1].document_id == "whole"


def test_a_compressed_file_is_never_decompressed_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_BYTES", 2**20)
    bomb = gzip.compress(b"word " * 2**22)  # 20 MB
    record = gzip.compress(b'{"text": "' + b"word " * 2**22 + b'"}\n')
    for name, data in (("a.txt.gz", bomb), ("b.jsonl.gz", record), ("c.csv.gz", gzip.compress(b"text\n") + bomb), ("d.json.gz", record)):  # fmt: skip
        (tmp_path / name).write_bytes(data)
    (tmp_path / "zeros.txt.gz").write_bytes(gzip.compress(bytes(2**24)))
    tracemalloc.start()
    _, problems = checked(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p.kind for p in problems] == 4 * ["too long"] + ["binary"] and peak < 2**23, peak
    with gzip.open(tmp_path / "many.jsonl.gz", "wt") as file:  # rows may be as many as they like
        for i in range(3000):
            file.write(json.dumps({"text": f"{i} " + "word " * 100}) + "\n")
    assert sum(row.fault is None for row in read_rows(tmp_path / "many.jsonl.gz")) == 3000


@pytest.mark.parametrize(
    ("content", "kind", "found"),
    [
        (b"txt,id\na text,1\n", "no text", "txt"),
        (b"text,id\na text, with a comma,1\n", "malformed row", "3 fields"),
        (b"text,id\na text\n", "malformed row", "1 fields"),
        (b'text,id\n"a text" more,1\n', "damaged", "line 2"),
        (b'text,id\n"a text that never ends,1\n', "damaged", "line 2"),
        (b"text,id\n" + b"caf\xe9,1\n", "encoding", "byte 11"),
        (b"text,text\na,b\n", "repeated column", "text"),
        (b"text,id\n", "empty", "no rows"),
        (b"", "empty", "no rows"),
    ],
)
def test_each_fault_of_a_table_of_text_is_named(tmp_path, content, kind, found):
    (tmp_path / "a.csv").write_bytes(content)
    _, problems = checked(tmp_path / "a.csv")
    assert problems[0].kind == kind and found in problems[0].found, problems[0]
    assert problems[0].advice and problems[0].expected


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (pa.array([9, 4_000_000], pa.int32()).cast(pa.date32()), "column 'when' of type date32"),
        (pa.array([9, 2**62], pa.duration("s")), "column 'when' of type duration"),
        (pa.array([[9], [2**62]], pa.list_(pa.timestamp("us"))), "column 'when' of type list"),
        (
            pa.array([9, 9], pa.timestamp("us", "Mars/Phobos")),
            "column 'when' of type timestamp[us, tz=Mars/Phobos]",
        ),
    ],
)
def test_a_column_that_python_cannot_hold_is_named(tmp_path, column, found):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [PROSE, NOVEL], "when": column}), path)
    (row,) = read_rows(path)
    assert row.fault is not None and row.fault.kind == "unreadable column" and found in row.fault.found
    assert [row.fault for row in read_rows(path, {"text": "data.text_key"})] == [None, None], "it is not read"


def test_files_of_one_name_are_to_be_renamed_and_equal_ids_to_be_changed(tmp_path):
    (tmp_path / "a.txt").write_text(NOVEL)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((NOVEL + "more").encode()))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}{NOVEL}", "id": "x"}) + "\n" for i in range(2))
    )
    _, problems = checked(tmp_path, id_key="id")
    advice = {p.found: p.advice for p in problems if p.kind == "repeated id"}
    assert advice["a"].endswith("rename one of the files") and advice["x"].endswith("in data.id_key")


def test_a_length_that_a_text_with_gaps_does_not_have_is_said(capsys):
    tokenizer = train_tokenizer("character", ["abc"], 0)
    for more, is_said in (([], False), (["sampler.length=3"], True)):
        check_starts(load_config(overrides=["sampler.infill=a[MASK]b[MASK]", *more]).sampler, tokenizer, 32)
        assert ("sampler.length has no effect" in capsys.readouterr().err) == is_said


def test_a_wrong_byte_far_in_a_table_is_counted_from_the_start_of_the_file(tmp_path):
    text = "text\n" + ("é" * 41 + "\r\n") * 1000  # pieces of the file end in mid-character
    assert (HEAD_BYTES - 5) % 84 % 2 and HEAD_BYTES < len(text.encode()) < 2 * HEAD_BYTES
    (tmp_path / "a.csv").write_bytes(text.encode() + b"caf\xe9\n")
    found = list(read_rows(tmp_path / "a.csv"))
    assert found[-1].fault is not None and f"byte {len(text.encode()) + 3}:" in found[-1].fault.found
    assert sum(row.fault is None for row in found) > 800


def test_json_that_is_no_list_is_another_file_in_a_folder_and_an_error_alone(tmp_path):
    (tmp_path / "novel.txt").write_text(NOVEL)
    (tmp_path / "settings.json").write_text('{"text": "a setting"}')
    documents, problems = checked(tmp_path)
    assert len(documents) == 1 and kinds(problems) == [("other file", "warning")]
    _, problems = checked(tmp_path / "settings.json")
    assert kinds(problems) == [("no list", "error")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_files_without_rows_are_said_to_be_empty(tmp_path, name):
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("" if name == "a.jsonl" else "[]")
    _, problems = checked(tmp_path / name)
    assert ("empty", "warning") in kinds(problems)


@given(st.lists(st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"))}), min_size=1, max_size=5))  # fmt: skip
def test_any_text_comes_back_from_a_table_as_it_was(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("any") / "a.csv"
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["number", "text"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows({"number": i, **record} for i, record in enumerate(records))
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    assert [row.value["text"] for row in read_rows(path)] == [record["text"] for record in records]


# ------------------------------------------------------------------------------------------------ rows left out


def test_rows_without_a_text_are_left_out_by_a_rule_and_counted(tmp_path):
    lines = [json.dumps({"text": NOVEL}), '{"text": null}', '{"text": NaN}', '{"text": 7}', "{oops"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    _, problems = checked(tmp_path)
    assert kinds(problems) == [
        ("not JSON", "error"), ("not text", "error"), ("null text", "error"), ("null text", "error")
    ]  # fmt: skip
    null = next(p for p in problems if p.kind == "null text")
    assert "'text'" in null.expected and "data.drop=[null text]" in null.advice and null.location == "line 2"
    documents, problems = checked(tmp_path, drop=("null text", "not JSON"))
    assert len(documents) == 1
    assert kinds(problems) == [
        ("not JSON", "warning"), ("not text", "error"), ("null text", "warning"), ("null text", "warning")
    ]  # fmt: skip
    assert all("data.drop" in p.advice for p in problems if p.severity == "warning")


def test_a_rule_for_nothing_that_can_be_dropped_is_answered(tmp_path):
    (tmp_path / "a.txt").write_text(NOVEL)
    with pytest.raises(BadConfig, match=r"data\.drop: 'null_text' .*did you mean 'null text'"):
        checked(tmp_path, drop=("null_text",))
    with pytest.raises(BadConfig, match="too little text"):
        checked(tmp_path, drop=("too little text",))
