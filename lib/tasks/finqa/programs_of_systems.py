"""Programs that other systems wrote for FinQA's questions: reading, checking and executing them, and what votes say.

A row of the file (.jsonl, .json or .parquet) has one of these layouts:

    {"id": "AAL/2013/page_15.pdf-1", "programs": ["divide(24800, 15400)", "divide(15400, 24800)"]}
    {"id": "AAL/2013/page_15.pdf-1", "programs": {"system A": "divide(24800, 15400)", "system B": "divide(15400, 24800)"}}
    {"id": "AAL/2013/page_15.pdf-1", "system": "system A", "program": "divide(24800, 15400)"}

Several rows of one question are merged, in any order of the rows. A system has one program, and a question one list.
A program is a text in FinQA's notation, or the list of its tokens: ["divide(", "24800", "15400", ")", "EOF"].
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import BadData, MissingInput
from lib.tasks import Problem
from lib.tasks.finqa.program import ProgramError, as_argument, execute, parse
from lib.tasks.finqa.record import Record
from lib.user_files.faults import KINDS_IN_WORDS, kind_of
from lib.user_files.rows import read_rows

LAYOUTS = '"programs" (a list, or system and program in {...}), or "system" and "program"'
MAX_PROGRAMS = 200  # of one question
_END = ("EOF", "<EOF>", "[EOF]")

Value = float | str


@dataclass
class Written:
    """The programs of one question.

    Attributes:
        systems: system -> its program in FinQA's notation, or None where it cannot run. In files without names the systems are
            "1", "2" and so on, in the order of the list.
    """

    record: Record
    systems: dict[str, str | None] = field(default_factory=dict)

    @property
    def gold(self) -> Value:
        """The value of the gold program."""
        return execute(self.record.program or "", self.record.table)

    @property
    def differ(self) -> bool:
        """Whether there is something to choose: a right and a wrong answer."""
        values = set(self.values())
        return self.gold in values and len(values) > 1

    def votes(self) -> dict[str, int]:
        """Program -> how many systems wrote it, in the order of the file."""
        return dict(Counter(program for program in self.systems.values() if program is not None))

    def values(self) -> list[Value]:
        """The value of each program of `votes`."""
        return [execute(program, self.record.table) for program in self.votes()]


def read_written(path: Path, records: Mapping[str, Record]) -> tuple[list[Written], list[Problem]]:
    """The programs of a file for the questions in `records`, in the order of the file, and all that is wrong with it.

    Raises:
        MissingInput: there is no such file.
        BadData: the file has another ending than those that can be read.
    """
    if not path.is_file():
        raise MissingInput(f"{path} is not a file; give a file of programs, one row per question")
    if not kind_of(path):
        raise BadData(f"{path} has an unknown ending; give a file of one of these kinds: {KINDS_IN_WORDS}")
    reader = _Reader(path, records)
    for row in read_rows(path):
        if row.fault is not None:
            fault = row.fault
            reader.report(fault.kind, row.location, fault.found, fault.expected, fault.advice)
        else:
            reader.read(row.location, row.value)
    return list(reader.written.values()), reader.problems


def program_text(program: Any) -> str:
    """A program in FinQA's notation, from a text or a list of tokens. Raises ProgramError."""
    if isinstance(program, list):
        program = _joined(program)
    if not isinstance(program, str):
        raise ProgramError(f"expected a text or a list of tokens, found {type(program).__name__}")
    text = program.strip()
    for end in _END:
        text = text.removesuffix(end).rstrip(" ,")
    return ", ".join(f"{s.operation}({s.first.text}, {s.second.text})" for s in parse(text))


def _joined(tokens: Sequence[Any]) -> str:
    """Tokens up to the first EOF as a text: `divide(`, `7`, `2`, `)`; also with `(` and `,` as tokens of their own."""
    kept: list[str] = []
    for token in tokens:
        if not isinstance(token, str):
            raise ProgramError(f"expected tokens that are texts, found {str(token)[:40]!r}")
        if token in _END:
            break
        if token == "(" and kept:
            kept[-1] += token
        elif token != ",":
            kept.append(as_argument(token))  # a token is one argument, also with `, ` in it
    steps = [kept[start : start + 4] for start in range(0, len(kept), 4)]
    return ", ".join(f"{step[0]}{', '.join(step[1:3])}{''.join(step[3:])}" for step in steps)


class _Reader:
    """Collects the programs of one file, and its problems."""

    def __init__(self, path: Path, records: Mapping[str, Record]):
        self.path, self.records = path, records
        self.written: dict[str, Written] = {}
        self.problems: list[Problem] = []
        self._listed: set[str] = set()  # questions with a list of programs

    def report(self, kind: str, location: str, found: str, expected: str, advice: str) -> None:
        self.problems.append(Problem("error", kind, str(self.path), location, found, expected, advice))

    def read(self, location: str, row: Any) -> None:
        name = row.get("id") if isinstance(row, dict) else None
        if not isinstance(name, str):
            found = f"{type(row).__name__} {str(row)[:60]}" if not isinstance(row, dict) else f"id {name!r}"
            self.report("no question", location, found, f'{{"id": a text, and {LAYOUTS}}}', "it is left out")
            return
        location = f"{location} ({name})"
        if name not in self.records:
            self.report(
                "unknown question", location, name, "the id of a question of the run that was not learned from",
                "it is left out",
            )  # fmt: skip
            return
        programs = row.get("programs")
        if isinstance(programs, list) and programs:
            found = {str(number): program for number, program in enumerate(programs, 1)}
        elif isinstance(programs, dict) and programs:
            found = programs
        elif programs is None and isinstance(row.get("system"), str) and "program" in row:
            found = {row["system"]: row["program"]}
        else:
            keys = ", ".join(map(str, row)) or "none"
            self.report("no programs", location, f"keys {keys}", LAYOUTS, "it is left out")
            return
        if len(found) > MAX_PROGRAMS:
            self.report(
                "many programs", location, f"{len(found):,}", f"at most {MAX_PROGRAMS}", "it is left out"
            )
            return
        if isinstance(programs, list):
            if name in self._listed:
                expected, advice = "one list of programs per question", "the first one counts"
                self.report("repeated question", location, name, expected, advice)
                return
            self._listed.add(name)
        self._add(location, name, found)

    def _add(self, location: str, name: str, found: Mapping[str, Any]) -> None:
        written = self.written.setdefault(name, Written(self.records[name]))
        for system, program in found.items():
            if system in written.systems:
                self.report(
                    "repeated system", location, system, "one program per system", "the first one counts"
                )
            elif program is None:
                written.systems[system] = None
            else:
                written.systems[system] = self._runnable(location, system, program, written.record)

    def _runnable(self, location: str, system: str, program: Any, record: Record) -> str | None:
        try:
            text = program_text(program)
            execute(text, record.table)
        except ProgramError as error:
            self.report(
                "program cannot run", f"{location}, system {system}", f"{str(program)[:80]!r}: {error}",
                "a program in FinQA's notation", "it counts as wrong",
            )  # fmt: skip
            return None
        return text
