"""FinQA's records, read from the published files. A record is one question with its page.

A folder holds `train.json`, `dev.json` and `test.json`, or some of them; each is one list of records:

    {"id": "AAL/2013/page_15.pdf-1", "filename": "AAL/2013/page_15.pdf", "pre_text": ["a sentence ."],
     "table": [["", "2013"], ["pilots", "7900"]], "post_text": ["another ."],
     "qa": {"question": "...", "program": "divide(24800, 15400)", "answer": "1.61", "exe_ans": 1.61039}}

`exe_ans` is the value of the gold program. `answer` was written by a person and is less reliable. Other keys, such as
the evidence labels `gold_inds`, are not read, because they do not exist for new questions.

This module checks the format of the files. `check` verifies the numbers and programs in them.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import MissingInput
from lib.tasks import Problem

SPLITS = ("train", "dev", "test")
FILES = tuple(f"{split}.json" for split in SPLITS)

# Kinds of problems without a record
MALFORMED = "malformed record"
NOT_JSON = "not JSON"
UNREADABLE = "unreadable file"

_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One question on one page. `program`, `answer` and `exe_ans` can be missing; `check` reports it."""

    id: str
    split: str
    filename: str
    pre_text: tuple[str, ...]
    post_text: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    question: str
    program: str | None
    answer: str
    exe_ans: float | str | None

    @property
    def report(self) -> str:
        """The report that contains the page: company and year, such as `AAL/2013`."""
        return self.filename.rpartition("/")[0] or self.filename

    @property
    def question_key(self) -> str:
        """The question without capitals, repeated spaces and the mark at its end. The same question has the same key."""
        return " ".join(self.question.lower().split()).rstrip(" ?.")

    def to_json(self) -> str:
        """The record in FinQA's format, with its split. This is the content of a document of stage 00."""
        return json.dumps(
            {
                "id": self.id,
                "split": self.split,
                "filename": self.filename,
                "pre_text": self.pre_text,
                "post_text": self.post_text,
                "table": self.table,
                "qa": {
                    "question": self.question,
                    "program": self.program,
                    "answer": self.answer,
                    "exe_ans": self.exe_ans,
                },
            },
            ensure_ascii=False,
        )

    @staticmethod
    def from_json(text: str) -> "Record":
        """The record that `to_json` wrote. Raises ValueError for anything else."""
        data = json.loads(text)
        split = data.get("split") if isinstance(data, dict) else None
        record = parse_record(data, split if isinstance(split, str) else "", "", "")
        if not isinstance(record, Record):
            raise ValueError("; ".join(f"{p.location}: {p.found}, expected {p.expected}" for p in record))
        return record


def find_files(path: str | Path) -> list[Path]:
    """The files of the splits in the folder `path`.

    Raises:
        MissingInput: there are none, or one of the names is not a file.
    """
    folder = Path(path)
    for file in (folder / name for name in FILES):
        # An error, because without dev.json every split would change
        if os.path.lexists(file) and not file.is_file():
            what = (
                f"a link to {os.readlink(file)}, which is not a file" if file.is_symlink() else "not a file"
            )
            raise MissingInput(f"data.path: {file} is {what}; fix it, or remove it from the folder")
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not files:
        state = "has none of them" if folder.is_dir() else "is not a folder"
        raise MissingInput(
            f"data.path: expected FinQA's {', '.join(FILES)} (one or more) in {folder}, which {state}. They are "
            "published at https://github.com/czyssrs/FinQA (MIT licence) in the folder dataset/: clone it and "
            "set data.path to that folder, or use --quick_test, which needs no data"
        )
    return files


def read_records(path: str | Path) -> Iterator[Record | Problem]:
    """The records of the folder's files. For a record that cannot be read, its problems instead.

    Raises MissingInput when the folder has none of the files.
    """
    for file in find_files(path):
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[Record | Problem]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        advice = "check the file's permissions, or remove it from the folder"
        yield Problem("error", UNREADABLE, str(file), "", str(error.strerror), "a readable file", advice)
        return
    except UnicodeDecodeError as error:
        found = f"byte {error.start}: {error.object[max(0, error.start - 10) : error.start + 10]!r}"
        advice = "download it again, or save it as UTF-8"
        yield Problem("error", UNREADABLE, str(file), "", found, "UTF-8", advice)
        return
    for number, data in _split_list(text, file):
        if isinstance(data, Problem):
            yield data
            continue
        record = parse_record(data, file.stem, str(file), f"record {number}")
        yield from [record] if isinstance(record, Record) else record


def _split_list(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of each value in the JSON list. The first invalid one is replaced by a Problem and ends the list.

    Values are read one by one: an error then names its record, and the records before it are kept.
    """

    def skip_space(at: int) -> int:
        match = _SPACE.match(text, at)
        return match.end() if match else at

    def problem(number: int, at: int, expected: str, what: str = "") -> tuple[int, Problem]:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        found = repr(text[at : at + 40]) if at < len(text) else "the end of the file"
        found = f"{found}{': ' if what else ''}{what} (line {line}, column {column})"
        advice = "download the file again, or fix it there; the rest of the file was not read"
        where = f"record {number}" if number >= 0 else ""
        return number, Problem("error", NOT_JSON, str(file), where, found, expected, advice)

    decoder = json.JSONDecoder()
    at = skip_space(0)
    if text[at : at + 1] != "[":
        yield problem(-1, at, "a list of records, [{...}, ...]")
        return
    number, at = 0, skip_space(at + 1)
    while text[at : at + 1] != "]":
        try:
            data, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield problem(number, error.pos, "JSON", error.msg)
            return
        except (ValueError, RecursionError) as error:
            # A number with thousands of digits, or deeply nested brackets
            yield problem(number, at, "JSON of a reasonable size", str(error)[:80])
            return
        yield number, data
        number, at = number + 1, skip_space(end)
        if text[at : at + 1] == ",":
            at = skip_space(at + 1)
        elif text[at : at + 1] != "]":
            yield problem(number - 1, at, "a comma or the end of the list after the record")
            return
    if skip_space(at + 1) < len(text):
        yield problem(number - 1, skip_space(at + 1), "the end of the file after the list")


def parse_record(data: Any, split: str, source: str, location: str) -> Record | list[Problem]:
    """The record in a JSON value, or one problem for each field that is missing or has the wrong type."""
    problems: list[Problem] = []
    if not isinstance(data, dict):
        return [_malformed(source, location, _described(data), "a record, {...}")]
    qa = data.get("qa")
    name = data.get("id")
    where = f"{location} ({_printable(name[:80])})" if isinstance(name, str) and name else location

    def field(key: str, expected: str, read, inside: bool = False):
        """The value of a key as `read` returns it. Where that raises _InvalidField, None and a problem."""
        owner = qa if inside else data
        path = f"qa.{key}" if inside else key
        try:
            if not isinstance(owner, dict) or key not in owner:
                raise _InvalidField("nothing")
            return read(owner[key])
        except _InvalidField as error:
            problems.append(_malformed(source, f"{where}: {path}".removeprefix(": "), str(error), expected))
            return None

    id_ = field("id", "a text", _name)
    filename = field("filename", "a text such as AAL/2013/page_15.pdf", _name)
    pre_text = field("pre_text", "a list of sentences", _sentences)
    post_text = field("post_text", "a list of sentences", _sentences)
    table = field("table", "a list of rows, each a list of texts", _rows)
    if not isinstance(qa, dict):
        field("qa", "question, program, answer and exe_ans in {...}", _refuse)
    else:
        question = field("question", "a text", _text, inside=True)
        program = field("program", "a program, or null", _text_or_none, inside=True)
        answer = field("answer", "a text, or null", _text_or_none, inside=True)
        exe_ans = field("exe_ans", 'a number, "yes", "no", or null', _value, inside=True)
        if not problems:
            content = (pre_text, post_text, table, question, program or None, answer or "", exe_ans)
            return Record(id_, split, filename, *content)  # type: ignore[arg-type]
    return problems


class _InvalidField(Exception):
    """A value of the wrong type for its field. The message says what was found."""


def _malformed(source: str, location: str, found: str, expected: str) -> Problem:
    advice = "the record is dropped; compare it with the published file"
    return Problem("error", MALFORMED, source, location, found, expected, advice)


def _described(value: Any) -> str:
    kinds = {type(None): "null", bool: "a truth value", str: "a text", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), "a number")
    return kind if isinstance(value, (list, dict, type(None))) else f"{kind}, {_printable(ascii(value)[:60])}"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _refuse(value: Any):
    raise _InvalidField(_described(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _InvalidField(_described(value))
    if half := _HALF_PAIR.search(value):  # UTF-8 cannot encode it
        raise _InvalidField(f"half of a surrogate pair, U+{ord(half[0]):04X}")
    return value


def _name(value: Any) -> str:
    if not _text(value).strip():
        raise _InvalidField("an empty text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value).strip()


def _sentences(value: Any, what: str = "sentence") -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _InvalidField(_described(value))
    texts = []
    for number, text in enumerate(value):
        try:
            texts.append(_text(text))
        except _InvalidField as error:
            raise _InvalidField(f"{what} {number} is {error}") from None
    return tuple(texts)


def _rows(value: Any) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list):
        raise _InvalidField(_described(value))
    rows = []
    for number, row in enumerate(value):
        try:
            rows.append(_sentences(row, "cell"))
        except _InvalidField as error:
            raise _InvalidField(f"row {number}: {error}") from None
    return tuple(rows)


def _value(value: Any) -> float | str | None:
    if value is None or value in ("yes", "no"):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _InvalidField(_described(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _InvalidField(_described(value))
    return number
