"""Which year a number of a sentence belongs to, by rules for English lists of numbers."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?|[^\W\d_]+|[^\s\w]")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}(?! *(?:%|percent|[mb]illion|thousand|shares))")
# FinQA has the codes of dashes and quotes as text: 2014nasdaq, company 2019s
CHARACTER_CODE = re.compile(r"\b(?:2019s\b|20(?:1[3489cd]|2[26])(?=[a-z]))")
_MONTHS = frozenset((
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november", "december",
))  # fmt: skip
_BETWEEN = _MONTHS | frozenset((  # may be between the numbers of a list, or between a number and its year
    ",", "$", "%", "(", ")", ";", "-", "and", "or", "a", "an", "of", "in", "for", "at", "as", "on",
    "during", "the", "fiscal", "year", "years", "ended", "approximately", "per", "share", "cents",
    "million", "millions", "billion", "thousand", "percent", "respectively",
))  # fmt: skip


@dataclass
class _Run:
    """Consecutive numbers of one kind (years or others), with only words of _BETWEEN between them.

    `joined`: only such words are between this run and the next.
    """

    years: bool
    numbers: list[str]
    joined: bool = False


def year_of(sentence: str, start: int) -> str | None:
    """The year that the number at character `start` belongs to, or None where no rule applies. In order:

    - The year follows the number: `$ 15.6 million in 2001`.
    - A list has as many years as there are numbers. In `$ 3 million and $ 5 million in 2012 and 2011 , respectively`
      the second number is of the second year. Years after the numbers have priority over years before them.
    - The sentence has only one year.
    """
    runs, positions = _runs(sentence)
    current, index = next((positions[at] for at in sorted(positions) if at >= start), (0, 0))
    years = [i for i, run in enumerate(runs) if run.years]
    if not years or current in years:
        return None
    size = len(runs[current].numbers)
    if size == 1 and runs[current].joined and len(runs[current + 1].numbers) == 1:
        return runs[current + 1].numbers[0]
    after, before = [i for i in years if i > current], [i for i in reversed(years) if i < current]
    if size > 1:
        for i in (*after, *before):
            if len(runs[i].numbers) == size:
                return runs[i].numbers[index]
    distinct = {number for i in years for number in runs[i].numbers}
    return distinct.pop() if len(distinct) == 1 else None


def _runs(sentence: str) -> tuple[list[_Run], dict[int, tuple[int, int]]]:
    """(runs, character where a number starts -> its run and its index in the run)."""
    runs: list[_Run] = []
    positions: dict[int, tuple[int, int]] = {}
    near, last, text = False, "", CHARACTER_CODE.sub(lambda match: " " * len(match[0]), sentence).lower()
    for match in _TOKEN.finditer(text):
        token = match[0]
        if not token[0].isdigit():
            near &= token in _BETWEEN
        elif last not in _MONTHS or len(token) > 2:  # not the day of a date
            is_year = last != "$" and _YEAR.match(text, match.start()) is not None and len(token) == 4
            if not near or runs[-1].years != is_year:
                if runs:
                    runs[-1].joined = near
                runs.append(_Run(is_year, [token]))
            elif last != "(" or runs[-1].numbers[-1] != token:  # `8.5% ( 8.5 % )` is one number
                runs[-1].numbers.append(token)
            positions[match.start()] = (len(runs) - 1, len(runs[-1].numbers) - 1)
            near = True
        last = token
    return runs, positions
