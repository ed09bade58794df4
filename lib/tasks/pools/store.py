"""Pools put together from rows in any order, in a temporary SQLite database: memory does not grow with the file.

`TMPDIR` names the folder of the database's file, which vanishes with the process.
"""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lib.digest_table import CACHE_BYTES, digest
from lib.errors import CannotWrite
from lib.tasks.pools.layouts import Entry, PoolRow
from lib.user_files.faults import Fault

_TABLES = (
    "CREATE TABLE pool (number INTEGER PRIMARY KEY, key BLOB UNIQUE, id TEXT, prompt TEXT, prompt_key BLOB, split TEXT,"
    " grp TEXT, tags TEXT, source TEXT, location TEXT)",
    "CREATE TABLE entry (pool INTEGER, row INTEGER, text TEXT, reward REAL, kind TEXT, teacher REAL, repeats INTEGER,"
    " location TEXT)",
)
# Names of splits in files -> splits of the project. `test` is reported beside held_out
SPLITS = {
    "train": "train", "training": "train",
    "selection": "selection",
    "held_out": "held_out", "dev": "held_out", "validation": "held_out", "valid": "held_out", "val": "held_out",
    "eval": "held_out",
    "test": "test",
}  # fmt: skip
_ENTRIES = "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


def split_name(given: str | None) -> str | None:
    """The project's name of a split; an unknown name as it is."""
    return None if given is None else SPLITS.get(given.lower(), given)


@dataclass(frozen=True)
class FoundPool:
    """A pool as the files state it. `places` has the location of each entry in its file."""

    number: int
    pool_id: str
    prompt: str
    entries: list[Entry]
    places: list[str]
    split: str | None
    group: str | None
    tags: tuple[str, ...]
    source: str
    location: str


class PoolStore:
    """Pools by id or, where rows have no id, by prompt.

    Raises CannotWrite if the temporary file cannot be written.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_BYTES // 1024}"):
            self._run(f"PRAGMA {setting}")
        for table in _TABLES:
            self._run(table)
        self._run("BEGIN")
        self.num_pools = self.num_entries = 0

    def __enter__(self) -> "PoolStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self._database.close()

    def add(self, row: PoolRow, source: str, location: str) -> Fault | None:
        """Add a row to its pool. A row that contradicts the others of its pool is not added: its fault is returned."""
        named = f"id/{row.pool_id}" if row.pool_id is not None else f"prompt/{row.prompt}"
        key = digest(named)
        prompt_key = None if row.prompt is None else digest(row.prompt)
        known = self._run(
            "SELECT number, prompt_key, split, grp, tags FROM pool WHERE key = ?", (key,)
        ).fetchone()
        if known is None:
            number, self.num_pools = self.num_pools, self.num_pools + 1
            pool_id = row.pool_id if row.pool_id is not None else f"pool-{key.hex()[:16]}"
            values = (
                number,
                key,
                pool_id,
                row.prompt,
                prompt_key,
                row.split,
                row.group,
                json.dumps(row.tags),
            )
            self._run("INSERT INTO pool VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, source, location))
        else:
            number, its_prompt, split, group, tags = known
            if its_prompt is not None and prompt_key is not None and its_prompt != prompt_key:
                found = f"{(row.prompt or '')[:60]!r} for id {row.pool_id}, which has another prompt in an earlier row"
                return Fault(
                    "contradicting prompts", found, "one prompt per id", "give each prompt an id of its own"
                )
            of = row.pool_id or "the same prompt"
            if None not in (row.split, split) and split_name(row.split) != split_name(split):
                found = f"split {row.split}, and {split} in an earlier row of {of}"
                return Fault(
                    "prompt in two splits", found, "one split per prompt", "remove it from one of them"
                )
            if None not in (row.group, group) and row.group != group:
                found = f"group {row.group}, and {group} in an earlier row of {of}"
                return Fault("contradicting groups", found, "one group per prompt", "keep one of them")
            all_tags = json.dumps(list(dict.fromkeys([*json.loads(tags), *row.tags]))) if row.tags else tags
            stated = (split or row.split, group or row.group, all_tags)
            if stated != (split, group, tags):
                self._run("UPDATE pool SET split = ?, grp = ?, tags = ? WHERE number = ?", (*stated, number))
            if its_prompt is None and prompt_key is not None:
                self._run(
                    "UPDATE pool SET prompt = ?, prompt_key = ? WHERE number = ?",
                    (row.prompt, prompt_key, number),
                )
        rows = []
        for entry in row.entries:
            values = (entry.text, entry.reward, entry.kind, entry.teacher, entry.repeats)
            rows.append((number, self.num_entries, *values, location))
            self.num_entries += 1
        self._run_many(rows)
        return None

    def prompts(self) -> Iterator[tuple[str, str | None, str | None]]:
        """(prompt, split, the user's group) of every pool, by number."""
        for prompt, split, group in self._run("SELECT prompt, split, grp FROM pool ORDER BY number"):
            yield prompt or "", split, group

    def numbers_with_teacher(self) -> Iterator[int]:
        """The numbers of the pools with a candidate that has a teacher's score."""
        for (number,) in self._run("SELECT DISTINCT pool FROM entry WHERE teacher IS NOT NULL"):
            yield number

    def id_of(self, number: int) -> str:
        return self._run("SELECT id FROM pool WHERE number = ?", (number,)).fetchone()[0]

    def prompt_and_group_of(self, number: int) -> tuple[str, str | None]:
        """The prompt of a pool and the group that the user gave it."""
        prompt, group = self._run("SELECT prompt, grp FROM pool WHERE number = ?", (number,)).fetchone()
        return prompt or "", group

    def place_of(self, number: int) -> tuple[str, str]:
        """(file, location in it) of the first row of a pool."""
        return self._run("SELECT source, location FROM pool WHERE number = ?", (number,)).fetchone()

    def pools(self) -> Iterator[FoundPool]:
        """The pools in the order of the files. SQLite sorts the entries on the disk."""
        self._run("CREATE INDEX IF NOT EXISTS of_pool ON entry (pool, row)")
        pools = self._run(
            "SELECT number, id, prompt, split, grp, tags, source, location FROM pool ORDER BY number"
        )
        for number, pool_id, prompt, split, group, tags, source, location in pools:
            rows = self._run(
                "SELECT text, reward, kind, teacher, repeats, location FROM entry WHERE pool = ? ORDER BY row",
                (number,),
            ).fetchall()
            entries = [Entry(*row[:-1]) for row in rows]
            places = [row[-1] for row in rows]
            yield FoundPool(
                number, pool_id, prompt or "", entries, places, split, group, tuple(json.loads(tags)), source, location
            )  # fmt: skip

    def _run(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise self._cannot_write(error) from None

    def _run_many(self, rows: list[tuple]) -> None:
        try:
            self._database.executemany(_ENTRIES, rows)
        except sqlite3.OperationalError as error:
            raise self._cannot_write(error) from None

    @staticmethod
    def _cannot_write(error: Exception) -> CannotWrite:
        return CannotWrite(
            f"the temporary file that puts pools together cannot be written: {error}; make room in the folder of temporary "
            "files, or set TMPDIR to another folder"
        )
