"""How a wrong program differs from the gold program of its question."""

import math
import re

from lib.tasks.finqa.page import is_number
from lib.tasks.finqa.program import ProgramError, Step, parse

SIGN, SCALE, ARGUMENT, OPERATORS, SAME_OPERATORS, OTHER = KINDS = (
    "sign", "factor of 100", "one argument", "operators, same arguments", "arguments, same operators", "other",
)  # fmt: skip
_CLOSE = 1e-4  # relative difference of values that count as equal up to sign or factor


def error_kind(gold: str, other: str, gold_value: float | str, value: float | str) -> str:
    """The first of KINDS that describes the error of `other`. Both programs run, and their values differ."""
    try:
        expected, found = parse(gold), parse(other)
    except ProgramError:
        return OTHER
    if isinstance(gold_value, float) and isinstance(value, float) and gold_value and value:
        for factors, kind in (((-1.0,), SIGN), ((100.0, 0.01), SCALE)):
            if any(math.isclose(value, factor * gold_value, rel_tol=_CLOSE) for factor in factors):
                return kind
    same_operators = [s.operation for s in expected] == [s.operation for s in found]
    if not same_operators:
        return OPERATORS if sorted(_numbers(expected)) == sorted(_numbers(found)) else OTHER
    differing = sum(a != b for a, b in zip(_arguments(expected), _arguments(found), strict=True))
    changed = {
        (a, b) for a, b in zip(_arguments(expected), _arguments(found), strict=True) if a != b
    }  # a number that is used twice is one argument
    return ARGUMENT if differing == 1 or len(changed) == 1 else SAME_OPERATORS


def _arguments(steps: list[Step]) -> list[str]:
    return [_plain(a.text) for step in steps for a in (step.first, step.second)]


def _numbers(steps: list[Step]) -> list[str]:
    """The numbers and row names of a program, without constants and references."""
    found = [a.text for s in steps if not s.reads_table for a in (s.first, s.second) if is_number(a)]
    return [_plain(text) for text in dict.fromkeys(found)] + [s.first.text for s in steps if s.reads_table]


def _plain(text: str) -> str:
    """A number without commas and trailing zeros: 1,234.50 is 1234.5."""
    plain = text.replace(",", "")
    return re.sub(r"\.?0+$", "", plain) if re.fullmatch(r"-?[0-9]+\.[0-9]+", plain) else plain
