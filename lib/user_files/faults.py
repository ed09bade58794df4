"""What can be wrong with a user's file, and the kinds of files that are read."""

from pathlib import Path
from typing import NamedTuple

COMPRESSIBLE = (".txt", ".jsonl", ".json", ".csv", ".tsv")
KINDS = (*COMPRESSIBLE, ".parquet")
KINDS_IN_WORDS = f"{', '.join(KINDS)} (all but .parquet also as .gz)"


class Fault(NamedTuple):
    """Why there is no text, or how a text had to be changed.

    `severity` is error where a text was expected; warning where the file may be there on purpose, or was corrected.
    """

    kind: str
    found: str
    expected: str
    advice: str
    severity: str = "error"


class UnreadableFile(Exception):
    """A file, or the rest of it, cannot be read. `fault` says why."""

    def __init__(self, fault: Fault):
        super().__init__(f"{fault.kind}: {fault.found}; expected {fault.expected}; {fault.advice}")
        self.fault = fault


def kind_of(path: Path) -> str:
    """The ending that decides how a file is read, in lower case: `.jsonl` or `.csv.gz`. Empty for other files."""
    name = path.name.lower()
    suffix = ".gz" if name.endswith(".gz") else ""
    stem = name.removesuffix(".gz")
    kind = next((k for k in (COMPRESSIBLE if suffix else KINDS) if stem.endswith(k)), "")
    return kind + suffix if kind else ""
