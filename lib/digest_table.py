"""A table from digests to values that does not grow in memory: it finds what is repeated in data of any size.

It is a temporary SQLite database. Up to `CACHE_BYTES` it is in memory, beyond that in a temporary file, which vanishes
with the process. `TMPDIR` names the folder of such files.
"""

import hashlib
import sqlite3
from typing import Any

from lib.errors import CannotWrite

CACHE_BYTES = 2**24
DIGEST_BYTES = 16


def digest(text: str) -> bytes:
    """The key of a text. Two of a billion different texts have the same key with a probability of 10^-21."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


class DigestTable:
    """Values by digest. A value is a text, an integer or bytes. Threads may use the table one after the other.

    Raises CannotWrite if the temporary file cannot be written.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_BYTES // 1024}"):
            self._run(f"PRAGMA {setting}")
        self._run("CREATE TABLE known (digest BLOB PRIMARY KEY, value) WITHOUT ROWID")
        self._run("BEGIN")

    def __enter__(self) -> "DigestTable":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._database.close()

    def get(self, key: bytes) -> Any:
        """The value of a digest; None if there is none."""
        row = self._run("SELECT value FROM known WHERE digest = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def set(self, key: bytes, value: str | int | bytes) -> None:
        self._run("INSERT OR REPLACE INTO known VALUES (?, ?)", (key, value))

    def add(self, key: bytes, value: str | int | bytes = 1) -> bool:
        """Set the value of a digest that has none. Returns whether it had none."""
        return self._run("INSERT OR IGNORE INTO known VALUES (?, ?)", (key, value)).rowcount == 1

    def _run(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise CannotWrite(
                f"the temporary file that finds repeated texts cannot be written: {error}; make room in the folder of "
                "temporary files, or set TMPDIR to another folder"
            ) from None
