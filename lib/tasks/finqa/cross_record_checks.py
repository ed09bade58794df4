"""What only shows when the records of FinQA are held beside each other, and what is odd about a page they share."""

import hashlib
import json
from collections.abc import Iterator

from lib.tasks.finqa.numbers import numbers_in
from lib.tasks.finqa.record import Record

Found = tuple[str, str, str, str]  # kind, found, expected, what it means


class CrossRecordChecks:
    """What only shows beside the other records. Of two that are the same, the later one has the problem."""

    _TRAINS_LAST = ("test", "dev", "train")

    def __init__(self, records: list[Record]):
        self.splits: dict[bytes, set[str]] = {}  # digest of a name, page or table: the splits that have it
        self.page_of: dict[tuple[str, str], bytes] = {}  # (split, file name): digest of its first page
        self.seen_ids: dict[str, str] = {}  # name: its split
        self.seen_pages: set[tuple[str, bytes]] = set()  # (split, page) whose table was looked at
        self.asked: dict[tuple[str, bytes, str], Record] = {}  # (split, page, question): who asked first
        for record in records:
            for mark in (_name_mark(record), _page_mark(record), _table_mark(record)):
                self.splits.setdefault(mark, set()).add(record.split)

    def faults(self, record: Record) -> Iterator[Found]:
        split, page = record.split, _page_mark(record)
        if record.id in self.seen_ids:
            found = f"a record of this name in {self.seen_ids[record.id]}.json"
            yield "repeated id", found, "a name of its own", ""
        self.seen_ids.setdefault(record.id, split)

        yield from self._question_faults(record, page)
        if leaked := self._other(split, _name_mark(record)) or self._other(split, page):
            found = f"{record.filename} in {leaked} too"
            yield "page in two splits", found, f"in {split} alone", "training would see what is to be judged"
        if (split, page) not in self.seen_pages:  # a row per page, not one for each of its questions
            self.seen_pages.add((split, page))
            yield from _page_faults(record)
            shared = not leaked and record.table and self._other(split, _table_mark(record))
            if shared:
                yield "table in two splits", f"the same table in {shared}", f"in {split} alone", ""
            first = self.page_of.setdefault((split, record.filename), page)
            if first != page:
                found = f"another page of the name {record.filename}"
                yield "differing page", found, "the same text and table in all its records", ""

    def _other(self, split: str, mark: bytes) -> str:
        """The split that is nearer to evaluation and has the same thing, or ""."""
        order = self._TRAINS_LAST
        rank = order.index(split) if split in order else len(order)
        return next((s for s in order[:rank] if s in self.splits[mark]), "")

    def _question_faults(self, record: Record, page: bytes) -> Iterator[Found]:
        question = " ".join(record.question.lower().split()).rstrip(" ?.")
        if not question:
            return
        first = self.asked.setdefault((record.split, page, question), record)
        if first is record:
            return
        if record.exe_ans == first.exe_ans or None in (record.exe_ans, first.exe_ans):
            yield "repeated question", f"asked by {first.id} too", "once on a page", "it counts twice"
        else:
            found = f"{record.exe_ans}, but {first.exe_ans} in {first.id}"
            yield "contradicting questions", found, "one value for one question", "at most one is right"


def page_text(record: Record) -> str:
    """Sentences and cells of the page as they follow each other, a line for each sentence and row."""
    return "\n".join([*record.pre_text, *(" | ".join(row) for row in record.table), *record.post_text])


def _page_faults(record: Record) -> Iterator[Found]:
    """What is odd about a page and its table."""
    widths = sorted({len(row) for row in record.table})
    if not any(cell.strip() for row in record.table for cell in row):
        yield "empty table", f"{len(record.table)} rows without text", "a table", "the text is all there is"
    elif len(record.table) == 1:
        yield "one-row table", " | ".join(record.table[0]), "a header and rows", "it has no columns' names"
    elif len(widths) > 1:
        yield "ragged table", f"rows of {', '.join(map(str, widths))} cells", "rows of one length", ""
    if not numbers_in(page_text(record)):
        yield "no numbers", "none", "numbers in the table or text", "no program can be made of it"


def _mark(kind: str, value: object) -> bytes:
    text = json.dumps([kind, value]).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def _name_mark(record: Record) -> bytes:
    return _mark("name", record.filename)


def _page_mark(record: Record) -> bytes:
    return _mark("page", [record.pre_text, record.table, record.post_text])


def _table_mark(record: Record) -> bytes:
    return _mark("table", record.table)
