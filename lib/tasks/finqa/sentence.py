"""Which year a number of a sentence belongs to. Knows English lists of numbers; no pages, no programs."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?|[^\W\d_]+|[^\s\w]")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}(?! *(?:%|percent|[mb]illion|thousand|shares))")
# FinQA has the codes of dashes and quotes as text: 2014nasdaq, company 2019s
MARK = re.compile(r"\b(?:2019s\b|20(?:1[3489cd]|2[26])(?=[a-z]))")
_MONTHS = frozenset((
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november", "december",
))  # fmt: skip
_BETWEEN = _MONTHS | frozenset((  # stand between the numbers of a list, or between a number and its year
    ",", "$", "%", "(", ")", ";", "-", "and", "or", "a", "an", "of", "in", "for", "at", "as", "on",
    "during", "the", "fiscal", "year", "years", "ended", "approximately", "per", "share", "cents",
    "million", "millions", "billion", "thousand", "percent", "respectively",
))  # fmt: skip


@dataclass
class _Run:
    """Numbers in a row, of one kind, with nothing that matters between them or, if `joined`, before the next run."""

    years: bool
    numbers: list[str]
    joined: bool = False


def year_of(sentence: str, start: int) -> str | None:
    """The year that the number at character `start` belongs to, or None where the sentence does not say.

    - It follows the number: `$ 15.6 million in 2001`.
    - There are as many years in a row as numbers: in `$ 3 million and $ 5 million in 2012 and 2011 , respectively`
      the second number is of the second year. Years behind the numbers go before those in front of them.
    - It is the only year of the sentence.
    """
    runs, places = _runs(sentence)
    owner, place = next((places[at] for at in sorted(places) if at >= start), (0, 0))
    years = [i for i, run in enumerate(runs) if run.years]
    if not years or owner in years:
        return None
    size = len(runs[owner].numbers)
    if size == 1 and runs[owner].joined and len(runs[owner + 1].numbers) == 1:
        return runs[owner + 1].numbers[0]
    after, before = [i for i in years if i > owner], [i for i in reversed(years) if i < owner]
    if size > 1:
        for i in (*after, *before):
            if len(runs[i].numbers) == size:
                return runs[i].numbers[place]
    distinct = {number for i in years for number in runs[i].numbers}
    return distinct.pop() if len(distinct) == 1 else None


def _runs(sentence: str) -> tuple[list[_Run], dict[int, tuple[int, int]]]:
    """(runs, character where a number starts -> its run and its place in that)."""
    runs: list[_Run] = []
    places: dict[int, tuple[int, int]] = {}
    near, last, text = False, "", MARK.sub(lambda match: " " * len(match[0]), sentence).lower()
    for match in _TOKEN.finditer(text):
        token = match[0]
        if not token[0].isdigit():
            near &= token in _BETWEEN
        elif last not in _MONTHS or len(token) > 2:  # days of a month are no numbers of their own
            is_year = last != "$" and _YEAR.match(text, match.start()) is not None and len(token) == 4
            if not near or runs[-1].years != is_year:
                if runs:
                    runs[-1].joined = near
                runs.append(_Run(is_year, [token]))
            elif last != "(" or runs[-1].numbers[-1] != token:  # once for `8.5% ( 8.5 % )`
                runs[-1].numbers.append(token)
            places[match.start()] = (len(runs) - 1, len(runs[-1].numbers) - 1)
            near = True
        last = token
    return runs, places
