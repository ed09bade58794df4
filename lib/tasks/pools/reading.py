"""Read files with candidates and rewards into a store of pools. Every row that cannot be read is a problem."""

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.errors import MissingInput
from lib.log import Progress
from lib.sections.pools import PoolFilesConfig
from lib.tasks import Problem
from lib.tasks.pools import builtin
from lib.tasks.pools.layouts import Layout, PoolRow, absent_columns, keys_of, recognise
from lib.tasks.pools.store import SPLITS, PoolStore
from lib.tasks.pools.values import RowFault
from lib.tasks.text import raw
from lib.user_files.decoding import SURROGATE, clean_text
from lib.user_files.faults import Fault, kind_of
from lib.user_files.folders import find_files
from lib.user_files.rows import read_rows

TEXTS_ONLY = (".csv", ".tsv")  # files whose values are all texts
WITH_ROWS = "a file with rows"
REPORTED_EVERY = 2000  # rows
MAX_COLUMN_SETS = 64  # of a file whose rows differ in their columns, that are remembered


def sources(config: Config) -> list[Path]:
    """The files that are read. Raises MissingInput when there are none."""
    if config.data.path in builtin.BUILTIN:
        return [builtin.SOURCE]
    found = [path for path in raw.sources(config) if has_rows(path)]
    if not found:
        path = Path(config.data.path)
        closed = path.is_file() and has_rows(path)
        raise MissingInput(
            f"data.path: {path} cannot be read; check its permissions"
            if closed
            else f"data.path: {path} holds no file with rows that can be read; give a .jsonl, .json, .parquet, .csv or .tsv file, "
            "all but .parquet also as .gz, or a folder of them"
        )
    return found


def has_rows(path: Path) -> bool:
    """Whether the file's ending says that it has rows."""
    return bool(kind_of(path)) and not kind_of(path).startswith(".txt")


def read_into(store: PoolStore, config: Config, all_keys: bool = True) -> Iterator[Problem]:
    """Add all rows of the sources to the store. Yields what is wrong with files and rows.

    Args:
        all_keys: a column that `pools.keys` names and no row has is an error. A file to rank may lack some, and have the usual
            names in their place.
    """
    if config.data.path in builtin.BUILTIN:
        rows = builtin.pool_rows(config.data.path)
        for number, row in enumerate(rows):
            store.add(row, builtin.NAME, f"record {number}")
        return
    files = sources(config)
    root = Path(config.data.path)
    if root.is_dir():
        yield from _not_read(root, files)
    with Progress("bytes of the files", sum(path.stat().st_size for path in files)) as progress:
        before, columns = 0, set[str]()
        for path in files:
            reader = _FileReader(path, config.pools, len(files) == 1, columns, all_keys)
            for faults in reader.rows(store):
                if root.is_dir():
                    faults = [(where, _in_folder(fault)) for where, fault in faults]
                yield from (problem(fault, str(path), location) for location, fault in faults)
                if not reader.count % REPORTED_EVERY:
                    progress.update(min(before + reader.characters, progress.total))
            before += path.stat().st_size
            progress.update(before)
    for fault in absent_columns(columns, config.pools.keys) if columns and all_keys else ():
        yield problem(fault, config.data.path, "")


def problem(fault: Fault, source: str, location: str) -> Problem:
    words = (fault.severity, fault.kind, source, location, fault.found, fault.expected, fault.advice)
    return Problem(*(word.encode("utf-8", "backslashreplace").decode() for word in words))


def _not_read(root: Path, files: list[Path]) -> Iterator[Problem]:
    """What a folder holds beside the files with rows that are read."""
    contents = find_files(root)
    found = list(raw.faults_of_folder(contents))
    for path in sorted({*contents.files} - {*files}):
        closed = OSError(errno.EACCES, os.strerror(errno.EACCES))
        found.append(
            (path, raw.unreadable(closed) if has_rows(path) else raw.other_file("a text", WITH_ROWS))
        )
    for path, fault in found:
        yield problem(fault, str(path), "")


def _in_folder(fault: Fault) -> Fault:
    """The fault of a file in a folder: one without rows may lie beside the others."""
    return (
        raw.other_file("JSON that is not a list of records", WITH_ROWS) if fault.kind == "no list" else fault
    )


class _FileReader:
    """Reads the rows of one file. Its first row decides the layout.

    Args:
        seen: gets the columns of all rows, of `MAX_COLUMN_SETS` different rows at most.

    Attributes:
        count, characters: of the rows read so far.
    """

    def __init__(self, path: Path, settings: PoolFilesConfig, one_file: bool, seen: set[str], all_keys: bool):
        self.path, self.settings, self.seen, self.all_keys = path, settings, seen, all_keys
        self.texts_only = kind_of(path).removesuffix(".gz") in TEXTS_ONLY
        # train.jsonl, dev.jsonl, test.jsonl: the names of several files give the split
        self.split = None if one_file else split_in_name(path)
        self.layout: Layout | None = None
        self._by_columns: dict[tuple[str, ...], Layout] = {}
        self.count = self.characters = 0

    def rows(self, store: PoolStore) -> Iterator[list[tuple[str, Fault]]]:
        """(location, fault) of what is wrong with each row, in its order."""
        try:
            for row in read_rows(self.path):
                self.count += 1
                faults = [row.fault] if row.fault is not None else self._add(row.value, row.location, store)
                yield [(row.location, fault) for fault in faults]
        except OSError as error:
            yield [("", raw.unreadable(error))]

    def _layout_of(self, record: Any) -> Layout:
        """The layout of the first row, with the columns that this row has."""
        columns = tuple(record) if isinstance(record, dict) else ()
        if columns in self._by_columns:
            return self._by_columns[columns]
        if len(self._by_columns) < MAX_COLUMN_SETS:
            self.seen.update(columns)
        self.seen.update(c for c in self.settings.keys.values() if c in columns)
        keys = self.settings.keys if self.all_keys else keys_of(columns, self.settings.keys)
        if self.layout is None or not columns:
            found = recognise(record, keys, self.settings.layout)
            self.layout = self.layout or found
        else:
            try:
                found = recognise(record, keys, self.layout.name)
            except RowFault:
                return self.layout  # it says what the row lacks
        if len(self._by_columns) < MAX_COLUMN_SETS:
            self._by_columns[columns] = found
        return found

    def _add(self, record: Any, location: str, store: PoolStore) -> list[Fault]:
        first = self.layout is None
        try:
            layout = self._layout_of(record)
            row, faults = clean(layout.read(record, self.texts_only))
        except RowFault as error:
            return [error.fault]
        faults += [_unread(column, layout.name) for column in layout.unread if first]
        self.characters += len(row.prompt or "") + sum(len(entry.text) for entry in row.entries)
        if row.split is None and self.split is not None:
            row = replace(row, split=self.split)
        source = str(self.path).encode("utf-8", "backslashreplace").decode()  # a name may be no text
        fault = store.add(row, source, location)
        return [*faults, *([fault] if fault is not None else [])]


def _unread(column: str, layout: str) -> Fault:
    found, advice = f"'{column}' in the layout {layout}", "it is not read; use the layout pools or rows"
    return Fault("unread column", found, "columns that the layout has", advice, "warning")


def clean(row: PoolRow) -> tuple[PoolRow, list[Fault]]:
    """The row with texts without control characters and outer white space, and a warning for each kind of change."""
    found: dict[str, Fault] = {}

    def cleaned(text: str) -> str:
        text, faults = clean_text(text)
        found.update({fault.kind: fault for fault in faults})
        return text.strip()

    def named(name: str | None) -> str | None:
        """A name as it is, unless it has half a character, which no database can store."""
        return cleaned(name) if name is not None and SURROGATE.search(name) else name

    entries = [replace(e, text=cleaned(e.text), kind=named(e.kind)) for e in row.entries]
    prompt = None if row.prompt is None else cleaned(row.prompt)
    tags = tuple(named(tag) or "" for tag in row.tags)
    names = {field: named(getattr(row, field)) for field in ("pool_id", "split", "group")}
    return replace(row, prompt=prompt, entries=entries, tags=tags, **names), list(found.values())


def split_in_name(path: Path) -> str | None:
    """The split that the name of a file begins with, such as train-00000.parquet; None if there is none."""
    stem = os.path.basename(path).lower()
    first = next((name for name in sorted(SPLITS, key=len, reverse=True) if stem.startswith(name)), None)
    return SPLITS[first] if first is not None and not stem[len(first)].isalpha() else None
