"""Checks over several FinQA records: repetitions, pages in two splits, and problems of shared pages."""

import hashlib
import json
from collections.abc import Iterator

from lib.tasks.finqa.numbers import numbers_in
from lib.tasks.finqa.record import Record

Finding = tuple[str, str, str, str]  # kind, found, expected, consequence


class CrossRecordChecks:
    """Problems that involve several records. Of two equal records, the later one has the problem."""

    _ORDER = ("test", "dev", "train")  # evaluation first

    def __init__(self, records: list[Record]):
        self.splits: dict[bytes, set[str]] = {}  # digest of a name, page or table -> the splits that have it
        self.page_of: dict[tuple[str, str], bytes] = {}  # (split, file name) -> digest of its first page
        self.split_of_id: dict[str, str] = {}  # id -> its split
        self.checked_pages: set[tuple[str, bytes]] = set()  # (split, page) whose table was checked
        # (split, page, question) -> its first record
        self.first_record: dict[tuple[str, bytes, str], Record] = {}
        for record in records:
            for digest in (_name_digest(record), page_digest(record), _table_digest(record)):
                self.splits.setdefault(digest, set()).add(record.split)

    def problems(self, record: Record) -> Iterator[Finding]:
        """The problems of a record. Records must come in order, each once."""
        split, page = record.split, page_digest(record)
        if record.id in self.split_of_id:
            found = f"a record with the same id in {self.split_of_id[record.id]}.json"
            yield "repeated id", found, "a unique id", ""
        self.split_of_id.setdefault(record.id, split)

        yield from self._question_problems(record, page)
        if leaked := self._leaks_into(split, _name_digest(record)) or self._leaks_into(split, page):
            found = f"{record.filename} in {leaked} too"
            yield (
                "page in two splits",
                found,
                f"in {split} only",
                "training would see pages of the evaluation",
            )
        if (split, page) not in self.checked_pages:  # one row per page, not per question
            self.checked_pages.add((split, page))
            yield from _page_problems(record)
            shared = not leaked and record.table and self._leaks_into(split, _table_digest(record))
            if shared:
                yield "table in two splits", f"the same table in {shared}", f"in {split} only", ""
            first = self.page_of.setdefault((split, record.filename), page)
            if first != page:
                found = f"a different page named {record.filename}"
                yield "differing page", found, "the same text and table in all records of the page", ""

    def _leaks_into(self, split: str, digest: bytes) -> str:
        """The split closer to the evaluation that has the same digest, or ""."""
        order = self._ORDER
        rank = order.index(split) if split in order else len(order)
        return next((s for s in order[:rank] if s in self.splits[digest]), "")

    def _question_problems(self, record: Record, page: bytes) -> Iterator[Finding]:
        question = record.question_key
        if not question:
            return
        first = self.first_record.setdefault((record.split, page, question), record)
        if first is record:
            return
        if record.exe_ans == first.exe_ans or None in (record.exe_ans, first.exe_ans):
            yield "repeated question", f"the same question in {first.id}", "once per page", "it counts twice"
        else:
            found = f"{record.exe_ans}, but {first.exe_ans} in {first.id}"
            yield "contradicting questions", found, "one value per question", "at most one is right"


def page_text(record: Record) -> str:
    """Sentences and table rows of the page in order, one line each."""
    return "\n".join([*record.pre_text, *(" | ".join(row) for row in record.table), *record.post_text])


def _page_problems(record: Record) -> Iterator[Finding]:
    """The problems of a page and its table."""
    widths = sorted({len(row) for row in record.table})
    if not any(cell.strip() for row in record.table for cell in row):
        yield "empty table", f"{len(record.table)} rows without text", "a table", "only the text has content"
    elif len(record.table) == 1:
        yield "one-row table", " | ".join(record.table[0]), "a header and rows", "it has no column names"
    elif len(widths) > 1:
        yield "ragged table", f"rows of {', '.join(map(str, widths))} cells", "rows of one length", ""
    if not numbers_in(page_text(record)):
        yield "no numbers", "none", "numbers in the table or text", "no program can use it"


def _digest(kind: str, value: object) -> bytes:
    text = json.dumps([kind, value]).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def _name_digest(record: Record) -> bytes:
    return _digest("name", record.filename)


def page_digest(record: Record) -> bytes:
    """Equal for records whose pages have the same text and table, whatever the names of their files."""
    return _digest("page", [record.pre_text, record.table, record.post_text])


def _table_digest(record: Record) -> bytes:
    return _digest("table", record.table)
