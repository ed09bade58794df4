"""FinQA's program language: reading, running, and telling whether two programs say the same.

A program is a row of steps, `subtract(5829, 5735), divide(#0, 5735)`. Its value is that of the last step.

| operation                                   | arguments                                                |
|---------------------------------------------|----------------------------------------------------------|
| add subtract multiply divide exp            | two values                                               |
| greater                                     | two values; its own value is "yes" or "no"               |
| table_max table_min table_sum table_average | the name of a table row, and a second that means nothing |

A value is a number (`1,234.5`, `-7`, `12%` for 0.12), a constant (`const_100`, `const_m1` for -1) or `#k`,
the value of step k counted from 0. A row's cells are written as FinQA does: `$ 1,234`, or `-32 ( 32 )`, of
which the part before the bracket counts. Of rows with the same name the last counts. Text is cut at `, ` and
at brackets, so `1,234` is one number and `5,3` without a space is not two; a row name with a bracket or `, `
in it cannot be written.

`execute` and `equivalent` are FinQA's execution accuracy and program accuracy, written anew from what its
evaluator answers. Program accuracy calls two programs the same when they are the same formula over the
numbers as they are *written*: `1000`, `1,000`, `1000.0` and `const_1000` are four symbols, and so are two
different table steps. A program with a number that the gold one lacks is another one, even if it cancels out.

Where this differs from the published evaluator, on purpose (in brackets: how many of 5,890 programs with its
answers, `official_execution.parquet`, meet it; all others agree):

- A last step that is not closed is refused; there it is left out, and a program without steps is valid and
  has the value n/a (30).
- Complex numbers, infinity and values beyond `MAX_MAGNITUDE` are refused where they arise, exponents beyond
  `MAX_EXPONENT` too; programs beyond `MAX_CHARACTERS` or `MAX_STEPS` are refused unread (1, of value 8e270).
- A truth value is no number and no later step can use it; there "yes" > "no" and "yes" + "no" have values.
- Numbers are plain decimals; there what Python's float() and int() take is one too (`1e5`, `nan`, `# 0`), and
  `1|2` is 1.
- Table operations take no `#k` (there it fails, or uses the row of an earlier step), and no empty row.
- A table step is the same symbol wherever it stands and with blanks around its row (5); there it is another
  one as the first step: `table_max(x, none), table_min(x, none), add(#0, #1)` differs from its mirror image.
- A program that cannot run, because it divides by `a - a` or reckons with a truth, is equivalent to nothing,
  also when the failing step is not used; there only the steps that are used count.
- Formulas are compared exactly, not by how a simplifier happens to write them. `exp` of equal base and
  exponent are equal, but no law of exponents is applied; `a > b` is `a + c > b + c`, no more than that.

Knows nothing of questions, files or rewards. No text is ever evaluated as code.
"""

import functools
import hashlib
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
MAX_MAGNITUDE = 1e30  # of every number on the way; fits a float32
MAX_EXPONENT = 1_000.0

_TOKEN = re.compile(r"[^()]*\(|[^()]+|\)")
_NUMBER = re.compile(r"[+-]?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)")
_REFERENCE = re.compile(r"#([0-9]{1,4})")

# Formulas are compared by their value at one point, modulo a prime: two different ones of degree d agree
# there with a chance below d / 2^127. The prime follows 39 digits of pi: no short program writes a multiple.
_PRIME = 314159265358979323846264338327950288459


class ProgramError(ValueError):
    """A program that is malformed or cannot run.

    `what` is wrong, `step` is where: its number counted from 0 as in `#k`, or None for the whole program.
    """

    def __init__(self, what: str, step: int | None = None):
        super().__init__(what if step is None else f"step #{step}: {what}")
        self.what = what
        self.step = step


@dataclass(frozen=True)
class Argument:
    """`text` as written, and either the `value` of a number or the `reference` to an earlier step."""

    text: str
    value: float | None = None
    reference: int | None = None


@dataclass(frozen=True)
class Step:
    """One operation. Those on tables have the row's name in `first.text`, and neither value nor reference."""

    operation: str
    first: Argument
    second: Argument

    @property
    def reads_table(self) -> bool:
        return self.operation in TABLE_OPERATIONS


def parse(program: str) -> list[Step]:
    """The steps, with every number read and every reference to an earlier step. Raises ProgramError."""
    if len(program) > MAX_CHARACTERS:
        raise ProgramError(f"the program has {len(program)} characters; at most {MAX_CHARACTERS} are read")
    tokens = [token for piece in program.split(", ") for token in _TOKEN.findall(piece)]
    if not tokens:
        raise ProgramError("the program is empty")
    steps = []
    for start in range(0, len(tokens), 4):
        number = start // 4
        if number == MAX_STEPS:
            raise ProgramError(f"the program has more than {MAX_STEPS} steps")
        steps.append(_parse_step(tokens[start : start + 4], number))
    return steps


def _parse_step(tokens: list[str], number: int) -> Step:
    """One step from its `operation(`, argument, argument, `)`."""
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
    """A number, constant or reference, as an argument of step `number`."""
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
    """The number that `1,234.5` or `12%` says, or None."""
    digits = text.removesuffix("%").rstrip()
    if not _NUMBER.fullmatch(digits):
        return None
    value = float(digits.replace(",", ""))
    return value / 100 if text.endswith("%") else value


def _quote(text: str) -> str:
    """The text in quotes, short enough for a message and printable anywhere."""
    quoted = ascii(text[:60])
    return quoted if len(text) <= 60 and len(quoted) <= 62 else f"{quoted[:57]}...'"


# Running a program


def execute(program: str, table: Sequence[Sequence[str]]) -> float | str:
    """The value of the program's last step: a number rounded to five decimals, or "yes" or "no".

    Args:
        table: rows of cells as FinQA has them, the first cell of a row its name.

    Raises:
        ProgramError: the program is malformed, or a step (also one that is not used) cannot be computed.
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
        assert argument.value is not None  # parse has read it
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
    """The cells of the last row of that name as numbers."""
    rows = [row for row in table if row and row[0] == name]
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


# Comparing programs


@dataclass(frozen=True)
class Formula:
    """What a program says, apart from how it says it: equal formulas have equal `kind` and `residue`.

    `kind` is "number" or "truth"; `residue` the formula's value at a fixed random point modulo a prime, or
    for a truth that of the difference it tests; `symbols` are the program's numbers and table steps.
    """

    kind: str
    residue: int
    symbols: frozenset[str]


def equivalent(gold: str, other: str) -> bool:
    """Whether `other` is the same formula as `gold` over no other numbers and table steps (program accuracy).

    Raises:
        ProgramError: the gold program is malformed or cannot run. For the other one the answer is then False.
    """
    wanted = formula(gold)
    try:
        found = formula(other)
    except ProgramError:
        return False
    same = (found.kind, found.residue) == (wanted.kind, wanted.residue)
    return same and found.symbols <= wanted.symbols


def formula(program: str) -> Formula:
    """The program as a formula over its numbers, constants and table steps. Raises ProgramError."""
    kinds: list[str] = []
    residues: list[int] = []
    symbols: set[str] = set()

    def residue_of(argument: Argument, number: int) -> int:
        if argument.reference is None:
            symbols.add(argument.text)
            return _random_residue("symbol", argument.text)
        if kinds[argument.reference] == "truth":
            raise ProgramError(f"{argument.text} is yes or no and not a number", number)
        return residues[argument.reference]

    for number, step in enumerate(parse(program)):
        kinds.append("truth" if step.operation == "greater" else "number")
        if step.reads_table:
            written = f"{step.operation}({step.first.text}, {step.second.text})"
            symbols.add(written)
            residues.append(_random_residue("symbol", written))
        else:
            first, second = residue_of(step.first, number), residue_of(step.second, number)
            residues.append(_compute_residue(step.operation, first, second, number))
    return Formula(kinds[-1], residues[-1], frozenset(symbols))


def _compute_residue(operation: str, first: int, second: int, number: int) -> int:
    if operation == "add":
        return (first + second) % _PRIME
    if operation in ("subtract", "greater"):  # a > b says a - b > 0
        return (first - second) % _PRIME
    if operation == "multiply":
        return first * second % _PRIME
    if operation == "exp":
        return _random_residue("exp", f"{first} {second}")
    if second == 0:
        raise ProgramError("the divisor is always 0", number)
    return first * pow(second, -1, _PRIME) % _PRIME


def _random_residue(kind: str, text: str) -> int:
    """A number below the prime that looks random and is always the same for the same kind and text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), person=kind.encode()).digest()
    return int.from_bytes(digest) % _PRIME
