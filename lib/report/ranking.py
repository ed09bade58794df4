"""The report of a run that ranks candidates: who finds the right one, where, and pools that are worth a look.

Plain data comes in, one HTML file goes out. Knows no model, no task and no file.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lib.report import ranking_plots
from lib.report.html import page, results_html
from lib.report.html_table import table
from lib.report.table import INTERVALS, aligned

STYLE = Path(__file__).with_name("ranking.css")
RANDOM = "random choice"  # the row of `models` that says what chance is, if there is one
POOLS_PER_HEADING = 3
HEADINGS = ("Right, and sure of it", "Right, but only just", "Wrong, but only just", "Wrong, and sure of it")

# Columns of the models' table: key of a row, title, whether it is a percentage
_COLUMNS = (
    ("accuracy", "accuracy", True), ("mrr", "MRR", False), ("ndcg", "NDCG", False), ("pairwise_accuracy", "pairs", True),
    ("average_reward", "reward", False), ("reward_ratio", "of the best", True),
    ("normalised_reward_ratio", "above random", True),
)  # fmt: skip


@dataclass(frozen=True)
class RankedPool:
    """The K candidates of one example with the scores of one model.

    Attributes:
        group: examples of one group are alike, such as questions on one page.
        rewards: of each candidate; the highest are right.
        note: the task's words on the choice, "" if none.
    """

    example_id: str
    group: str
    prompt: str
    candidates: list[str]
    kinds: list[str]
    scores: list[float]
    rewards: list[float]
    note: str = ""

    @property
    def right(self) -> list[bool]:
        return [reward == max(self.rewards) for reward in self.rewards]

    @property
    def lead(self) -> float:
        """Score of the best right candidate minus that of the best wrong one; 0 or less is no right choice."""
        scored = list(zip(self.scores, self.right, strict=True))
        best_wrong = max((score for score, right in scored if not right), default=-math.inf)
        return max(score for score, right in scored if right) - best_wrong


def softmax(scores: list[float]) -> list[float]:
    """Shares that sum to 1."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def interesting(pools: Iterable[RankedPool], count: int) -> list[tuple[str, RankedPool]]:
    """At most `count` pools for each of HEADINGS, each pool once, the most telling first.

    Pools whose candidates are all right, or are one, tell nothing. Of a group a second pool is only taken when
    there are not enough groups.
    """
    telling = [pool for pool in pools if not all(pool.right)]
    ordered = sorted(telling, key=lambda pool: (-pool.lead, pool.example_id))
    right = [pool for pool in ordered if pool.lead > 0]
    wrong = [pool for pool in ordered if pool.lead <= 0]
    chosen: list[tuple[str, RankedPool]] = []
    for (sure, narrow), side in ((HEADINGS[:2], right), (HEADINGS[:1:-1], wrong[::-1])):
        first = _spread(side, min(count, (len(side) + 1) // 2))
        rest = [pool for pool in reversed(side) if pool not in first]
        chosen += [(sure, pool) for pool in first] + [(narrow, pool) for pool in _spread(rest, count)]
    return sorted(chosen, key=lambda item: HEADINGS.index(item[0]))


def _spread(pools: list[RankedPool], count: int) -> list[RankedPool]:
    """The first `count`, groups that were not there yet before others."""
    firsts: dict[str, RankedPool] = {}
    for pool in pools:
        firsts.setdefault(pool.group, pool)
    fresh = list(firsts.values())
    return [*fresh, *(pool for pool in pools if firsts[pool.group] is not pool)][:count]


# ---------------------------------------------------------------------------------------------------- screen


def ranking_table(models: list[dict]) -> str:
    """Aligned text: a row per ranker, policy or baseline; figures that no row has are left out."""
    columns = [column for column in _COLUMNS if any(_known(row, column[0]) for row in models)]
    lines: list[tuple[str, ...]] = [("chosen by", *_titles(columns))]
    for row in models:
        cells: list[str] = []
        for key, _, percent in columns:
            cells.append(_figure_text(row, key, percent) or "-")
            if key == "accuracy":
                cells.append(_interval_text(row, " .. ") or "-")
        lines.append((row["name"], *cells))
    return aligned(lines)


def _titles(columns: list[tuple[str, str, bool]]) -> list[str]:
    titles = []
    for key, title, _ in columns:
        titles += [title, "95 % interval"] if key == "accuracy" else [title]
    return titles


def _known(row: dict, key: str) -> bool:
    value = row.get(key)
    return value is not None and math.isfinite(value)


def _figure_text(row: dict, key: str, percent: bool) -> str:
    """The figure, or nothing where the row has none."""
    if not _known(row, key):
        return ""
    return f"{row[key]:.1%}" if percent else f"{row[key]:.3f}"


def _interval_text(row: dict, between: str) -> str:
    known = _known(row, "low") and _known(row, "high")
    return f"{row['low']:.1%}{between}{row['high']:.1%}" if known else ""


# ---------------------------------------------------------------------------------------------------- page


def ranking_page(
    title: str, settings: str, results: list[dict], models: list[dict], breakdowns: dict[str, list[dict]],
    curves: dict[str, list[dict]], pools: list[RankedPool],
) -> str:  # fmt: skip
    """The whole page. All text of the run is escaped: it may hold anything.

    Args:
        settings: a line about the run's data and size.
        results: rows of the results table (lib.training.objectives.base.ResultRow as dictionaries).
        models: a row per ranker, policy and baseline: "name", "accuracy" with "low" and "high", and whatever else
            of `average_reward`, `reward_ratio`, `normalised_reward_ratio`, `mrr`, `ndcg` and `pairwise_accuracy` is
            known. Those not named in `results` are shown as baselines.
        breakdowns: title -> rows {"name", "accuracy", "low", "high", "count"}, or rows {"name", ...} of counts (int)
            and shares (float) without an accuracy.
        curves: model -> lines of its metrics.jsonl.
        pools: of one ranker, all or some; the telling ones are shown.
    """
    chance = _chance(models, pools)
    sections = [
        f'<header><h1>{escape(title)}</h1><p class="hint">{escape(settings)}</p></header>',
        _section("Models", "Each trained model beside the best of what needs no model. The 95 % interval must lie on the good side. " + INTERVALS, results_html(results)),
        _section("Who finds the right candidate", "Accuracy: the candidate with the highest score has the best reward. Of the best: reward of the choices over the best possible. Above random: the same, counted from a random choice (0 %) to the best (100 %).", _models(models, results, chance)),
        _section("Where it is right", "Small counts have wide intervals. The dashed line is chance.", _breakdowns(breakdowns, chance)),
        _section("Pools worth a look", "Candidates by score. The bar and the share are the softmax of the scores; ▶ is the model's choice, ★ has the best reward.", _pools(interesting(pools, POOLS_PER_HEADING)), "long"),
        _section("Learning", "Training loss, and how often the model chose right on pools that it did not learn from.", _learning(curves, chance)),
    ]  # fmt: skip
    return page(title, "\n".join(sections), STYLE.read_text(encoding="utf-8"))


def _section(title: str, hint: str, body: str, kind: str = "") -> str:
    return (
        f'<section class="{kind}"><h2>{escape(title)}</h2><p class="hint">{escape(hint)}</p>{body}</section>'
    )


def _chance(models: list[dict], pools: list[RankedPool]) -> float | None:
    """Accuracy of a random choice: as the models' table has it, or from the pools."""
    for row in models:
        if row["name"] == RANDOM:
            return row["accuracy"]
    shares = [sum(pool.right) / len(pool.right) for pool in pools]
    return sum(shares) / len(shares) if shares else None


def _models(models: list[dict], results: list[dict], chance: float | None) -> str:
    if not models:
        return "<p>Nothing was ranked.</p>"
    trained = {row["model"] for row in results}
    rivals = [row["name"] for row in models if row["name"] not in trained]
    columns = [column for column in _COLUMNS if any(_known(row, column[0]) for row in models)]
    lines = []
    for row in models:
        cells = [escape(row["name"])]
        for key, _, percent in columns:
            cells.append(_figure_text(row, key, percent) or "–")
            if key == "accuracy":
                cells.append(f'<span class="interval">{_interval_text(row, " – ")}</span>')
        lines.append(cells)
    classes = ["reference" if row["name"] in rivals else "" for row in models]
    drawn = [row for row in models if _known(row, "accuracy")]
    picture = ranking_plots.accuracies(drawn, chance, rivals) if drawn else ""
    return table(["chosen by", *_titles(columns)], lines, classes) + picture


def _breakdowns(breakdowns: dict[str, list[dict]], chance: float | None) -> str:
    tables = "".join(
        f"<div>{_accuracies(title, rows, chance) if 'accuracy' in rows[0] else _shares(title, rows)}</div>"
        for title, rows in breakdowns.items()
        if rows
    )
    return f'<div class="breakdowns">{tables}</div>' if tables else "<p>Nothing was broken down.</p>"


def _accuracies(title: str, rows: list[dict], chance: float | None) -> str:
    lines = [
        [escape(row["name"]), _figure_text(row, "accuracy", True) or "–", _range(row, chance),
         f'<span class="interval">{_interval_text(row, " – ")}</span>', f"{row['count']:,}"]
        for row in rows
    ]  # fmt: skip
    return table([title, "accuracy", "", "95 % interval", "pools"], lines)


def _shares(title: str, rows: list[dict]) -> str:
    """Rows of other figures, each under its own name: whole numbers are counts, others shares of 1."""
    keys = [key for key in rows[0] if key != "name"]
    lines = [
        [escape(row["name"]), *(f"{row[k]:,}" if isinstance(row[k], int) else f"{row[k]:.1%}" for k in keys)]
        for row in rows
    ]
    return table([title, *(key.replace("_", " ") for key in keys)], lines)


def _range(row: dict, chance: float | None) -> str:
    """A dot with its interval on a line from 0 to 1."""
    if not _known(row, "accuracy"):
        return ""
    parts = "" if chance is None else f'<u style="left:{chance:.2%}"></u>'
    if _known(row, "low") and _known(row, "high"):
        parts += f'<i style="left:{row["low"]:.2%};width:{row["high"] - row["low"]:.2%}"></i>'
    return f'<span class="range">{parts}<b style="left:{row["accuracy"]:.2%}"></b></span>'


def _learning(curves: dict[str, list[dict]], chance: float | None) -> str:
    shown = any(curves.values())
    return ranking_plots.learning(curves, chance) if shown else "<p>No model was trained.</p>"


def _pools(chosen: list[tuple[str, RankedPool]]) -> str:
    if not chosen:
        return "<p>No pool with right and wrong candidates was ranked.</p>"
    return f'<div class="pools">{"".join(_pool(heading, pool) for heading, pool in chosen)}</div>'


def _pool(heading: str, pool: RankedPool) -> str:
    shares = softmax(pool.scores)
    order = sorted(range(len(shares)), key=lambda i: (-pool.scores[i], pool.right[i], i))
    lines, classes = [], []
    for place, i in enumerate(order):
        mark = f"{'▶' if place == 0 else ''}{'★' if pool.right[i] else ''}"
        bar = f'<span class="track"><i style="width:{shares[i]:.2%}"></i></span>'
        lines.append(
            [mark, bar, f"{shares[i]:.1%}", f"{pool.rewards[i]:.3f}", escape(pool.kinds[i]), escape(pool.candidates[i])]
        )  # fmt: skip
        names = ("chosen" if place == 0 else "", "best" if pool.right[i] else "")
        classes.append(" ".join(name for name in names if name) or "rest")
    asked, _, more = pool.prompt.partition("\n")
    details = (
        f"<details><summary>all of the prompt</summary><pre>{escape(more)}</pre></details>" if more else ""
    )
    note = f'<p class="verdict">{escape(pool.note)}</p>' if pool.note else ""
    head = ["", "score", "share", "reward", "kind", "candidate"]
    return (
        f'<article class="pool"><h3>{escape(heading)} · {escape(pool.example_id)}</h3><p class="asked">{escape(asked)}</p>'
        f"{details}{table(head, lines, classes)}{note}</article>"
    )
