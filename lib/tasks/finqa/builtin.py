"""Small synthetic financial reports with questions in FinQA's format, for quick tests.

Page n is a function of the seed and n. The interpreter computes the answers. Nothing is copied from FinQA.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lib import randomness
from lib.tasks.finqa.page_text import plain_cell
from lib.tasks.finqa.program import execute
from lib.tasks.finqa.record import Record, parse_record

SOURCE = "lib.tasks.finqa.builtin"  # source of these records in messages
BUILTIN = {"builtin": 400, "builtin_small": 60}  # data.path: number of pages

_COMPANIES = ("ARBR", "BLNK", "CDRS", "DELV", "EMBR", "FJRD", "GLDN", "HARO", "INLT", "JUNI", "KELP", "LUMN")
_UNITS = ("in millions", "in thousands", "dollars in millions")
_INCOME = (
    "net sales", "service revenue", "cost of goods sold", "research and development", "depreciation expense",
    "operating income", "interest expense", "income tax expense", "marketing expense", "gross profit",
    "stock-based compensation", "rental expense", "licensing revenue", "freight costs", "net earnings",
)  # fmt: skip
_SEGMENTS = (
    "consumer products", "industrial", "energy storage", "data services", "packaging", "rail transport",
    "medical devices", "retail stores", "water treatment", "aerospace parts", "home lending", "cold chain",
)  # fmt: skip
_REGIONS = ("north america", "europe", "asia pacific", "latin america", "middle east", "africa")
_OBLIGATIONS = ("operating leases", "long-term debt", "purchase obligations", "pension contributions")
_TITLES = (
    "liquidity and capital resources", "results of operations", "notes to consolidated financial statements",
    "commitments and contingencies", "segment information",
)  # fmt: skip
_FILLERS = (
    "the accompanying notes are an integral part of these statements .",
    "management believes that cash flows from operations will meet foreseeable needs .",
    "certain amounts of prior periods were reclassified to conform to the current presentation .",
    "actual results could differ from these estimates .",
    "the company operates in a competitive industry and depends on a limited number of suppliers .",
    "no assurance can be given that these trends will continue .",
    "the increase was primarily due to higher volumes and favorable pricing .",
    "we evaluate goodwill for impairment once a year , or more often when circumstances change .",
    "our revolving credit facility contains customary covenants , with which we were in compliance .",
)


@dataclass
class _Page:
    """A page under construction: its table, its sentences, and questions about their numbers."""

    draw: random.Random
    year: int
    header: list[str]
    rows: dict[str, list[str]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    # Question, program, whether the answer is a percentage
    questions: list[tuple[str, str, bool]] = field(default_factory=list)

    @property
    def table(self) -> list[list[str]]:
        return [self.header, *([name, *cells] for name, cells in self.rows.items())]

    def value(self, name: str, column: int) -> str:
        """The number of a cell as programs write it."""
        return plain_cell(self.rows[name][column]).replace("$", "")

    def ask(self, question: str, program: str, share: bool = False) -> None:
        self.questions.append((question, program, share))


def make_pages(seed: int, count: int) -> list[dict]:
    """The questions on `count` synthetic pages, as records in FinQA's format.

    A page has four to seven questions. Each is a record that repeats the page, as in FinQA. Pages do not depend on
    `count`. Programs have one to three steps and use all ten operations.
    """
    return [record for number in range(count) for record in make_page(seed, number)]


def make_page(seed: int, number: int) -> list[dict]:
    """The records of page `number`."""
    draw = random.Random(randomness.key(seed, "finqa page", number))
    kind = _PAGE_KINDS[number % len(_PAGE_KINDS)]
    page = kind(draw)
    _add_prose(page)
    draw.shuffle(page.sentences)
    title = f"{draw.choice(_COMPANIES).lower()} {draw.choice(_TITLES)} ."
    middle = draw.randint(1, len(page.sentences) - 1)
    before = [title, *page.sentences[:middle]]
    # The number makes the name unique. The part before the last slash is the report
    filename = (
        f"{_COMPANIES[number % len(_COMPANIES)]}{number // len(_COMPANIES)}/{page.year}/page_{number}.pdf"
    )
    content = {"pre_text": before, "post_text": page.sentences[middle:], "table": page.table}
    chosen = draw.sample(page.questions, min(len(page.questions), draw.randint(4, 7)))
    records = []
    for number_on_page, (question, program, share) in enumerate(chosen, 1):
        value = execute(program, page.table)
        qa = {"question": question, "program": program, "answer": _answer(value, share), "exe_ans": value}
        records.append({**content, "filename": filename, "id": f"{filename}-{number_on_page}", "qa": qa})
    return records


def _answer(value: float | str, share: bool) -> str:
    if isinstance(value, str):
        return value
    if share:
        return f"{value * 100:.1f}%"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def builtin_records(name: str, seed: int) -> Iterator[Record]:
    """The records of the pages that data.path names. Of ten pages, eight are train, one is dev, one is test."""
    for number in range(BUILTIN[name]):
        split = {8: "dev", 9: "test"}.get(number // len(_PAGE_KINDS) % 10, "train")
        for data in make_page(seed, number):
            record = parse_record(json.loads(json.dumps(data)), split, SOURCE, data["id"])
            assert isinstance(record, Record)
            yield record


def _amounts(draw: random.Random, count: int) -> list[str]:
    """Different amounts of similar size, for one row."""
    size = 10 ** draw.uniform(1.5, 4.5)
    decimals = 1 if size < 1000 else 0
    amounts: list[str] = []
    while len(amounts) < count:
        text = f"{size * draw.uniform(0.6, 1.6):.{decimals}f}"
        if text not in amounts:
            amounts.append(text)
    return amounts


def _pick(draw: random.Random, names: Sequence[str], low: int, high: int) -> list[str]:
    return draw.sample(names, draw.randint(low, high))


def _dollars(cells: list[str]) -> list[str]:
    return [f"$ {cell}" for cell in cells]


def _income_page(draw: random.Random) -> _Page:
    """An income statement: line items by year."""
    year = draw.randint(2004, 2019)
    years = [str(year - back) for back in range(draw.randint(2, 4))]
    page = _Page(draw, year, [f"( {draw.choice(_UNITS)} )", *years])
    for number, name in enumerate(_pick(draw, _INCOME, 4, 8)):
        amounts = _amounts(draw, len(years))
        page.rows[name] = _dollars(amounts) if number == 0 else amounts
    # Losses have FinQA's format
    losses = _amounts(draw, len(years))
    page.rows["other income ( loss ) net"] = [f"-{a} ( {a} )" if draw.random() < 0.6 else a for a in losses]
    _ask_by_year(page, [n for n in page.rows if "(" not in n], years)
    a, b = (page.value("other income ( loss ) net", column) for column in (0, 1))
    question = f"what was the change in other income ( loss ) net from {years[1]} to {years[0]}?"
    page.ask(question, f"subtract({a}, {b})")
    return page


def _ask_by_year(page: _Page, names: list[str], years: list[str]) -> None:
    draw, value = page.draw, page.value
    one, two, three = draw.sample(names, 3)
    new, old = years[0], years[1]
    a, b = value(one, 0), value(one, 1)
    page.ask(
        f"what was the percentage change in {one} from {old} to {new}?",
        f"subtract({a}, {b}), divide(#0, {b})",
        True,
    )
    page.ask(
        f"how much did {two} change between {old} and {new}?", f"subtract({value(two, 0)}, {value(two, 1)})"
    )
    page.ask(f"what was {two} as a percent of {one} in {new}?", f"divide({value(two, 0)}, {a})", True)
    page.ask(f"what was the sum of {one} and {three} in {old}?", f"add({b}, {value(three, 1)})")
    page.ask(
        f"what was the average of {three} for {new} and {old}?",
        f"add({value(three, 0)}, {value(three, 1)}), divide(#0, const_2)",
    )
    if len(years) > 2:
        page.ask(
            f"what was the average {two} over the three years from {years[2]} to {new}?",
            f"add({value(two, 0)}, {value(two, 1)}), add(#0, {value(two, 2)}), divide(#1, const_3)",
        )
    row, best = draw.choice(names), draw.choice(("max", "min", "sum", "average"))
    said = {"max": "the highest", "min": "the lowest", "sum": "the total", "average": "the average"}[best]
    page.ask(f"what was {said} annual {row} of all years shown?", f"table_{best}({row}, none)")
    page.ask(f"was {three} greater in {new} than in {old}?", f"greater({value(three, 0)}, {value(three, 1)})")
    page.ask(
        f"did {one} grow by more than {two} from {old} to {new}?",
        f"subtract({a}, {b}), subtract({value(two, 0)}, {value(two, 1)}), greater(#0, #1)",
    )
    spread = f"table_max({row}, none), table_min({row}, none), subtract(#0, #1)"
    page.ask(f"by how much does the highest annual {row} exceed the lowest?", spread)


def _schedule_page(draw: random.Random) -> _Page:
    """Future payments: a row for each year, a column for each kind of obligation."""
    year = draw.randint(2004, 2019)
    kinds = _pick(draw, _OBLIGATIONS, 2, 3)
    page = _Page(draw, year, ["year ending december 31", *kinds])
    years = [str(year + ahead) for ahead in range(1, draw.randint(4, 6))]
    columns = [_amounts(draw, len(years) + 1) for _ in kinds]
    for number, name in enumerate([*years, "thereafter"]):
        cells = [column[number] for column in columns]
        page.rows[name] = _dollars(cells) if number == 0 else cells
    value, (first, second) = page.value, draw.sample(range(len(kinds)), 2)
    one, two, three = draw.sample(years, 3)
    page.ask(
        f"what are the total {kinds[first]} due in {one} and {two}?",
        f"add({value(one, first)}, {value(two, first)})",
    )
    page.ask(
        f"what is the total of {kinds[second]} due in {one} , {two} and {three}?",
        f"add({value(one, second)}, {value(two, second)}), add(#0, {value(three, second)})",
    )
    page.ask(
        f"what is the ratio of {kinds[first]} to {kinds[second]} due in {three}?",
        f"divide({value(three, first)}, {value(three, second)})",
    )
    page.ask(
        f"what share of the {kinds[first]} of {one} and {two} together is due in {one}?",
        f"add({value(one, first)}, {value(two, first)}), divide({value(one, first)}, #0)",
        True,
    )
    page.ask(
        f"are the {kinds[second]} due in {two} above those due in {three}?",
        f"greater({value(two, second)}, {value(three, second)})",
    )
    page.ask(f"what are the payments due in {three} in total?", f"table_sum({three}, none)")
    page.ask(f"what is the smallest payment due in {one}?", f"table_min({one}, none)")
    page.ask(f"what is the average of the payments due after {years[-1]}?", "table_average(thereafter, none)")
    return page


def _segment_page(draw: random.Random) -> _Page:
    """Segments by region, with a column of totals."""
    year = draw.randint(2004, 2019)
    regions = _pick(draw, _REGIONS, 2, 3)
    page = _Page(draw, year, ["", *regions, "total"])
    sums = [0] * (len(regions) + 1)
    for name in _pick(draw, _SEGMENTS, 3, 6):
        amounts = [draw.randint(40, 9000) for _ in regions]
        cells = [*amounts, sum(amounts)]
        sums = [s + c for s, c in zip(sums, cells, strict=True)]
        page.rows[name] = [f"{cell:,}" if draw.random() < 0.5 else str(cell) for cell in cells]
    page.rows["total"] = [str(s) for s in sums]
    value, last = (lambda name, column: page.value(name, column).replace(",", "")), len(regions)
    one, two, three = draw.sample([n for n in page.rows if n != "total"], 3)
    at = draw.randrange(last)
    page.ask(
        f"what percentage of total sales came from {one}?",
        f"divide({value(one, last)}, {value('total', last)})",
        True,
    )
    page.ask(
        f"how much more did {two} sell in total than {three}?",
        f"subtract({value(two, last)}, {value(three, last)})",
    )
    page.ask(
        f"what portion of the sales of {two} was in {regions[at]}?",
        f"divide({value(two, at)}, {value(two, last)})",
        True,
    )
    page.ask(
        f"what were the combined sales of {one} and {three} in {regions[at]}?",
        f"add({value(one, at)}, {value(three, at)})",
    )
    page.ask(
        f"how many percent of the sales in {regions[at]} did not come from {three}?",
        f"divide({value(three, at)}, {value('total', at)}), subtract(const_1, #0)",
        True,
    )
    page.ask(
        f"did {one} sell more than {two} in {regions[at]}?", f"greater({value(one, at)}, {value(two, at)})"
    )
    page.ask(
        f"what would be the sales of {three} in {regions[at]} at the mean of all {last} regions?",
        f"divide({value(three, last)}, const_{last})",
    )
    return page


def _add_prose(page: _Page) -> None:
    """Add sentences with numbers, questions about these, and sentences without numbers."""
    draw = page.draw
    shares, price = f"{draw.uniform(0.5, 40):.1f}", f"{draw.uniform(8, 160):.2f}"
    rate, years = f"{draw.uniform(1.2, 8.8):.2f}%", draw.randint(2, 9)
    notes, staff = str(draw.randint(12, 180) * 25), draw.randint(12, 480) * 100
    before = staff - draw.randint(1, 40) * 25
    page.sentences += [
        f"during {page.year} , we repurchased {shares} million shares at an average price of $ {price} per share .",
        f"in {page.year} the company issued $ {notes} million of {rate} ( {rate[:-1]} % ) senior notes , "
        f"due in {years} years .",
        f"as of december 31 , {page.year} , we had approximately {staff:,} employees , "
        f"compared with {before:,} a year before .",
        *_pick(draw, _FILLERS, 3, 6),
    ]
    page.ask(
        f"what was the total cost of the shares repurchased in {page.year} , in millions?",
        f"multiply({shares}, {price})",
    )
    page.ask("what is the annual interest on the senior notes , in millions?", f"multiply({notes}, {rate})")
    page.ask(
        "what is owed on the senior notes when they fall due if all interest is compounded yearly , in millions?",
        f"add(const_1, {rate}), exp(#0, {years}), multiply({notes}, #1)",
    )
    page.ask(
        f"by what factor does a debt at the rate of the senior notes grow in {years} years?",
        f"add(const_1, {rate}), exp(#0, {years})",
    )
    page.ask(
        f"by what percentage did the number of employees grow in {page.year}?",
        f"subtract({staff}, {before}), divide(#0, {before})",
        True,
    )


_PAGE_KINDS: tuple[Callable[[random.Random], _Page], ...] = (_income_page, _schedule_page, _segment_page)
