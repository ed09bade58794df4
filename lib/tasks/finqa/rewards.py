"""Stage 03 for FinQA: the reward of a candidate program, a weighted mean of four terms in [0, 1].

| term      | 1 when                                                 | else                                     |
|-----------|--------------------------------------------------------|------------------------------------------|
| execution | the value equals the gold value to five decimals       | 0                                        |
| program   | the program is the gold formula over the same numbers  | 0                                        |
| closeness | as execution                                           | decreases with the relative error        |
| format    | the program can be parsed and executed                 | 0                                        |

Candidates of one pool with equal values have equal terms, those of the best of them, because they give the same answer.
All candidates with the gold value therefore have reward 1 and tie.
"""

import math

import numpy as np
import pyarrow as pa

from lib.config import Config
from lib.errors import BadData
from lib.sections.data import RewardWeights
from lib.tasks.finqa.equivalence import equivalent
from lib.tasks.finqa.program import DECIMALS, ProgramError, parse

TERMS = ("execution", "program", "closeness", "format")
STEEPNESS = 10.0  # of closeness: 1 / e at a relative error of 0.1

# Closeness of a value that is the gold value times a factor
PERCENT_CREDIT = 0.5
SIGN_CREDIT = 0.5
SCALE_CREDIT = 0.25
FORMS = (
    (1.0, 1.0), (-1.0, SIGN_CREDIT), (100.0, PERCENT_CREDIT), (0.01, PERCENT_CREDIT),
    (1e3, SCALE_CREDIT), (1e-3, SCALE_CREDIT), (1e6, SCALE_CREDIT), (1e-6, SCALE_CREDIT),
)  # fmt: skip
_ROUNDING = 0.5 * 10.0**-DECIMALS

Value = float | str | None


def rewards(config: Config, candidates: pa.Table) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(rows,) rewards and terms of whole pools.

    The rows of one example are adjacent. Its gold program has the kind "gold", and is in each of its pools.

    Raises:
        BadData: an example has no gold candidate, or different ones, or one that does not run.
    """
    ids = candidates["example_id"].to_pylist()
    programs, values, kinds = (candidates[name].to_pylist() for name in ("program", "value", "kind"))
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
    reward = np.empty(len(ids))
    terms = {name: np.empty(len(ids)) for name in TERMS}
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        gold = [i for i in range(end - start) if kinds[start + i] == "gold"]
        if len({programs[start + i] for i in gold}) != 1:
            raise BadData(
                f"candidates of {ids[start]}: {len(gold)} of {end - start} are of kind gold, expected one program; "
                "run stage 02 again"
            )
        try:
            reward[start:end], named = pool_rewards(
                [program or "" for program in programs[start:end]],
                values[start:end],
                gold[0],
                config.rewards.weights,
            )
        except (ValueError, ProgramError) as error:
            raise BadData(f"candidates of {ids[start]}: {error}; run stage 02 again") from None
        for name, value in named.items():
            terms[name][start:end] = value
    return reward, terms


def pool_rewards(
    programs: list[str], values: list[str | None], gold: int, weights: RewardWeights
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(K,) rewards of a pool and its (K,) terms.

    Args:
        programs: K programs as text.
        values: K values as text, None where the program does not run.
        gold: index of the gold program.

    Raises:
        ValueError: a value is neither a number nor yes or no, or the gold program does not run.
    """
    answers = [
        read_value(value) if _parses(program) else None
        for program, value in zip(programs, values, strict=True)
    ]
    right = answers[gold]
    if right is None:
        raise ValueError(f"the gold program {programs[gold]!r} does not run")
    of_answer = {answer: _terms(answer, right) for answer in answers}
    for program, answer in zip(programs, answers, strict=True):
        if answer is not None and not of_answer[answer]["program"] and equivalent(programs[gold], program):
            of_answer[answer]["program"] = 1.0
    terms = {name: np.array([of_answer[answer][name] for answer in answers]) for name in TERMS}
    reward, total = np.zeros(len(programs)), 0.0
    for name in TERMS:
        reward += getattr(weights, name) * terms[name]
        total += getattr(weights, name)
    reward /= total
    return reward, terms


def _terms(answer: Value, right: Value) -> dict[str, float]:
    """All terms except `program`, which does not depend on the answer alone."""
    return {
        "execution": float(answer is not None and answer == right),
        "program": 0.0,
        "closeness": closeness(answer, right),
        "format": float(answer is not None),
    }


def _parses(program: str) -> bool:
    try:
        parse(program)
    except ProgramError:
        return False
    return True


def read_value(text: str | None) -> Value:
    """A number rounded to five decimals, "yes", "no" or None. Raises ValueError for any other text."""
    if text is None or text in ("yes", "no"):
        return text
    try:
        number = round(float(text), DECIMALS) + 0.0  # -0.0 becomes 0.0
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the value {text[:60]!r} is not a number, and neither yes nor no")
    return number


def closeness(value: Value, gold: Value) -> float:
    """How close a value is to the gold value: 1 if equal, otherwise decreasing with the relative error.

    The relative error e is |value - gold| / max(|value|, |gold|), and the closeness is exp(-10 e). FORMS gives partial
    credit for the gold value with the other sign, as a percentage, or in thousands or millions. The credit is multiplied
    by the closeness to that form. "yes" and "no" are right or wrong.
    """
    if value == gold:
        return float(value is not None)
    if not isinstance(value, float) or not isinstance(gold, float):
        return 0.0
    return max(
        credit * math.exp(-STEEPNESS * _relative_error(factor, value, gold)) for factor, credit in FORMS
    )


def _relative_error(factor: float, value: float, gold: float) -> float:
    """The relative error of factor * value, in [0, 2]. For factors other than 1, rounding errors count as 0."""
    product = factor * value
    error = abs(product - gold)
    if factor != 1 and value and gold:
        error = max(0.0, error - _ROUNDING * (1 + abs(factor)))
    return error / max(abs(product), abs(gold))
