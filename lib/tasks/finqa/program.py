"""FinQA's program language: parsing and executing programs.

A program is a sequence of steps, `subtract(5829, 5735), divide(#0, 5735)`. Its value is the value of the last step.

| operation                                   | arguments                                               |
|---------------------------------------------|---------------------------------------------------------|
| add subtract multiply divide exp            | two values                                              |
| greater                                     | two values; its value is "yes" or "no"                  |
| table_max table_min table_sum table_average | the name of a table row, and a second that is ignored   |

A value is a number (`1,234.5`, `-7`, `12%` for 0.12), a constant (`const_100`, `const_m1` for -1) or `#k`, the value of
step k counted from 0. A cell of a row may have FinQA's formats `$ 1,234` and `-32 ( 32 )`; the part before the bracket
counts. Of several rows with the same name the last one counts. The text is split at `, ` and at brackets: `1,234` is
one number. A row name with a bracket in it cannot be written. FinQA cannot write `, ` in a row name either, except in
lists of tokens. Here the space of it becomes a no-break space, see `as_argument`.

`execute` is FinQA's execution accuracy, reimplemented from the answers of its evaluator. `equivalence.equivalent` is its
program accuracy. Both differ from the published evaluator on purpose. The numbers in brackets say how many of its 5,890
published answers (`official_execution.parquet`) differ; on all others both agree.

- A last step without a closing bracket is an error. The evaluator drops it, and a program without steps is valid there
  and has the value n/a (30).
- Complex numbers, infinity, values beyond `MAX_MAGNITUDE` and exponents beyond `MAX_EXPONENT` are errors where they
  arise. Programs beyond `MAX_CHARACTERS` or `MAX_STEPS` are not parsed (1, with the value 8e270).
- "yes" and "no" are no numbers, so no later step can use them. In the evaluator, "yes" > "no" and "yes" + "no" have values.
- Numbers are plain decimals. The evaluator accepts all that Python's float() and int() accept (`1e5`, `nan`, `# 0`), and
  reads `1|2` as 1.
- Table operations take no `#k` and no empty row. In the evaluator, `#k` fails or uses the row of an earlier step.

No text is ever evaluated as code.
"""

import functools
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

ARITHMETIC = ("add", "subtract", "multiply", "divide", "exp", "greater")
TABLE_OPERATIONS = ("table_max", "table_min", "table_sum", "table_average")
OPERATIONS = ARITHMETIC + TABLE_OPERATIONS

DECIMALS = 5
MAX_CHARACTERS = 2_000  # FinQA's longest has 132
MAX_STEPS = 32  # FinQA's longest has 6
MAX_MAGNITUDE = 1e30  # of every intermediate value; fits a float32
MAX_EXPONENT = 1_000.0

_TOKEN = re.compile(r"[^()]*\(|[^()]+|\)")
_NUMBER = re.compile(r"[+-]?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)")
_REFERENCE = re.compile(r"#([0-9]{1,4})")


class ProgramError(ValueError):
    """A program that is malformed or cannot run.

    Attributes:
        what: the error.
        step: the step with the error, counted from 0 as in `#k`. None for the whole program.
    """

    def __init__(self, what: str, step: int | None = None):
        super().__init__(what if step is None else f"step #{step}: {what}")
        self.what = what
        self.step = step


@dataclass(frozen=True)
class Argument:
    """An argument: `text` as written, and the `value` of a number or the `reference` to an earlier step."""

    text: str
    value: float | None = None
    reference: int | None = None


@dataclass(frozen=True)
class Step:
    """One operation. A table operation has the row name in `first.text`, and no value or reference."""

    operation: str
    first: Argument
    second: Argument

    @property
    def reads_table(self) -> bool:
        return self.operation in TABLE_OPERATIONS


def as_argument(row_name: str) -> str:
    """The name of a row as programs write it: the text of a program is split at `, `, so that no name may contain it."""
    return row_name.replace(", ", ",\N{NO-BREAK SPACE}")


def parse(program: str) -> list[Step]:
    """The steps of a program. All numbers are valid, and all references are to earlier steps. Raises ProgramError."""
    return list(_parse(program))


# A candidate is read several times: to run it, to describe it, to compare it
@functools.lru_cache(maxsize=16384)
def _parse(program: str) -> tuple[Step, ...]:
    if len(program) > MAX_CHARACTERS:
        raise ProgramError(f"the program has {len(program)} characters, more than {MAX_CHARACTERS}")
    tokens = [token for piece in program.split(", ") for token in _TOKEN.findall(piece)]
    if not tokens:
        raise ProgramError("the program is empty")
    steps = []
    for start in range(0, len(tokens), 4):
        number = start // 4
        if number == MAX_STEPS:
            raise ProgramError(f"the program has more than {MAX_STEPS} steps")
        steps.append(_parse_step(tokens[start : start + 4], number))
    return tuple(steps)


def _parse_step(tokens: list[str], number: int) -> Step:
    """One step from its tokens `operation(`, argument, argument, `)`."""
    operation = tokens[0].removesuffix("(")
    if operation not in OPERATIONS:
        raise ProgramError(f"{_quote(tokens[0])} is none of {', '.join(OPERATIONS)}", number)
    if operation == tokens[0] or len(tokens) < 4 or tokens[3] != ")":
        written = _quote(" ".join(tokens))
        raise ProgramError(f"expected `{operation}(argument, argument)`, found {written}", number)
    texts = [token.strip() for token in tokens[1:3]]
    if any(text == "" or "(" in text or ")" in text for text in texts):
        raise ProgramError(f"an argument of {operation} is missing or holds a bracket", number)
    if operation in TABLE_OPERATIONS:
        if "#" in texts[0]:
            raise ProgramError(f"{operation} takes the name of a row, found {_quote(texts[0])}", number)
        return Step(operation, Argument(texts[0]), Argument(texts[1]))
    return Step(operation, _parse_value(texts[0], number), _parse_value(texts[1], number))


def _parse_value(text: str, number: int) -> Argument:
    """An argument of step `number`: a number, constant or reference."""
    if reference := _REFERENCE.fullmatch(text):
        index = int(reference[1])
        if index >= number:
            raise ProgramError(f"{text} is not an earlier step", number)
        return Argument(text, reference=index)
    constant = text.removeprefix("const_")
    value = -1.0 if text == "const_m1" else _to_number(constant)
    if value is None or (constant != text and "%" in text):
        raise ProgramError(f"{_quote(text)} is no number, constant or #k", number)
    return Argument(text, value=_within_limits(value, number))


def _to_number(text: str) -> float | None:
    """The value of a text such as `1,234.5` or `12%`, or None."""
    digits = text.removesuffix("%").rstrip()
    if not _NUMBER.fullmatch(digits):
        return None
    value = float(digits.replace(",", ""))
    return value / 100 if text.endswith("%") else value


def _quote(text: str) -> str:
    """The text in quotes, shortened for a message, in ASCII."""
    quoted = ascii(text[:60])
    return quoted if len(text) <= 60 and len(quoted) <= 62 else f"{quoted[:57]}...'"


# ----------------------------------------------------------------------------------------- execution


def execute(program: str, table: Sequence[Sequence[str]]) -> float | str:
    """The value of the last step: a number rounded to five decimals, or "yes" or "no".

    Args:
        table: rows of cells as in FinQA. The first cell of a row is its name.

    Raises:
        ProgramError: the program is malformed, or a step cannot be computed, even if it is not used.
    """
    values: list[float | str] = []
    for number, step in enumerate(parse(program)):
        if step.reads_table:
            value = _compute_on_row(step.operation, _row(table, step.first.text, number))
        else:
            first, second = (_value(argument, values, number) for argument in (step.first, step.second))
            value = _compute(step.operation, first, second, number)
        values.append(value if isinstance(value, str) else _within_limits(value, number))
    result = values[-1]
    return result if isinstance(result, str) else round(result, DECIMALS) + 0.0  # -0.0 becomes 0.0


def _value(argument: Argument, values: Sequence[float | str], number: int) -> float:
    if argument.reference is None:
        assert argument.value is not None  # `parse` ensures it
        return argument.value
    value = values[argument.reference]
    if isinstance(value, str):
        raise ProgramError(f'{argument.text} is "{value}" and not a number', number)
    return value


def _compute(operation: str, first: float, second: float, number: int) -> float | str:
    if operation == "add":
        return first + second
    if operation == "subtract":
        return first - second
    if operation == "multiply":
        return first * second
    if operation == "divide":
        if second == 0:
            raise ProgramError(f"{first:g} is divided by 0", number)
        return first / second
    if operation == "greater":
        return "yes" if first > second else "no"
    return _power(first, second, number)


def _power(base: float, exponent: float, number: int) -> float:
    if abs(exponent) > MAX_EXPONENT:
        raise ProgramError(f"the exponent {exponent:g} is beyond {MAX_EXPONENT:g}", number)
    if base < 0 and exponent != int(exponent):
        raise ProgramError(f"{base:g} to the power {exponent:g} is not a real number", number)
    if base == 0 and exponent < 0:
        raise ProgramError(f"0 to the power {exponent:g}", number)
    try:
        return base**exponent
    except OverflowError:
        raise ProgramError(f"{base:g} to the power {exponent:g} is too large", number) from None


def _row(table: Sequence[Sequence[str]], name: str, number: int) -> list[float]:
    """The numbers of the last row of this name."""
    rows = [row for row in table if row and as_argument(row[0]) == name]
    if not rows:
        raise ProgramError(f"the table has no row {_quote(name)}", number)
    cells = [_to_number(cell.replace("$", "").split("(")[0].strip()) for cell in rows[-1][1:]]
    if not cells:
        raise ProgramError(f"the row {_quote(name)} has no cells", number)
    numbers = [cell for cell in cells if cell is not None]
    if len(numbers) < len(cells):
        cell = rows[-1][1 + cells.index(None)]
        raise ProgramError(f"the cell {_quote(cell)} of the row {_quote(name)} is no number", number)
    return numbers


def _compute_on_row(operation: str, cells: list[float]) -> float:
    if operation == "table_max":
        return max(cells)
    if operation == "table_min":
        return min(cells)
    total = functools.reduce(operator.add, cells)  # sum() rounds differently from Python 3.12 on
    return total if operation == "table_sum" else total / len(cells)


def _within_limits(value: float, number: int) -> float:
    if not abs(value) <= MAX_MAGNITUDE:  # also true for NaN
        raise ProgramError(f"the value {value:g} is beyond {MAX_MAGNITUDE:g}", number)
    return value
