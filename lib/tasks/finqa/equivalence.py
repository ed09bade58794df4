"""FinQA's program accuracy: whether two programs are the same formula.

Two programs are the same when they are the same formula over their numbers as *written*: `1000`, `1,000`, `1000.0` and
`const_1000` are four symbols. Two different table steps are two symbols. A program with a number that the gold program
lacks is different, even if the number cancels out.

Differences from the published evaluator, on purpose (in brackets: on how many of its 5,890 published answers):

- A table step is the same symbol at every position, and with spaces around its row name (5). The evaluator makes another
  symbol of it as the first step: there `table_max(x, none), table_min(x, none), add(#0, #1)` differs from its mirror image.
- A program that cannot run is equivalent to no program. Examples are a division by `a - a`, and arithmetic with the
  result of `greater`. This holds for unused steps too; in the evaluator only the used steps count.
- Formulas are compared exactly. The result does not depend on how a simplifier writes them. `exp` of equal base and
  exponent are equal, but no law of exponents is applied. `a > b` equals `a + c > b + c`; no other rule is applied.
"""

import hashlib
from dataclasses import dataclass

from lib.tasks.finqa.program import Argument, ProgramError, parse

# Formulas are compared by their value at one random point, modulo a prime (Schwartz-Zippel). Two different formulas of
# degree d agree there with a probability below d / 2^127. The prime follows 39 digits of pi, so no short program
# contains a multiple of it.
_PRIME = 314159265358979323846264338327950288459


@dataclass(frozen=True)
class Formula:
    """The canonical form of a program. Equal formulas have equal `kind` and `residue`.

    Attributes:
        kind: "number" or "truth".
        residue: the value of the formula at a fixed random point, modulo a prime. For `a > b` that of `a - b`.
        symbols: the numbers and table steps of the program.
    """

    kind: str
    residue: int
    symbols: frozenset[str]


def equivalent(gold: str, other: str) -> bool:
    """Program accuracy: whether `other` is the same formula as `gold`, without further numbers and table steps.

    False when `other` is malformed or cannot run.

    Raises:
        ProgramError: the gold program is malformed or cannot run.
    """
    expected = formula(gold)
    try:
        found = formula(other)
    except ProgramError:
        return False
    same = (found.kind, found.residue) == (expected.kind, expected.residue)
    return same and found.symbols <= expected.symbols


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
    if operation in ("subtract", "greater"):  # a > b means a - b > 0
        return (first - second) % _PRIME
    if operation == "multiply":
        return first * second % _PRIME
    if operation == "exp":
        return _random_residue("exp", f"{first} {second}")
    if second == 0:
        raise ProgramError("the divisor is always 0", number)
    return first * pow(second, -1, _PRIME) % _PRIME


def _random_residue(kind: str, text: str) -> int:
    """A pseudo-random number below the prime, a function of kind and text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), person=kind.encode()).digest()
    return int.from_bytes(digest) % _PRIME
