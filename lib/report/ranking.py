"""The report of a run that ranks candidates: how often each ranker is correct, where, and pools that show it."""

import math
from html import escape
from pathlib import Path

from lib.report import ranking_plots
from lib.report.data import RankedPool, RankingReportData
from lib.report.html_table import interval, table
from lib.report.page import Section, figure, page, part, report_body
from lib.report.pools import pools_html
from lib.report.provenance import data_section, facts, provenance_section
from lib.report.results import VERDICT_CAPTION, results_html
from lib.report.table import INTERVALS, aligned

STYLE = Path(__file__).with_name("ranking.css")
RANDOM = "random choice"  # the row of `models` with the accuracy of chance, if there is one

# Columns of the table of models: key of a row, title, whether it is a percentage
_COLUMNS = (
    ("accuracy", "accuracy", True), ("map", "MAP", False), ("mrr", "MRR", False), ("mrr_at_10", "MRR@10", False),
    ("ndcg", "NDCG", False), ("ndcg_at_10", "NDCG@10", False), ("pairwise_accuracy", "pairs", True),
    ("average_reward", "reward", False), ("reward_ratio", "of the best", True),
    ("normalised_reward_ratio", "above random", True),
)  # fmt: skip
MODELS_CAPTION = (
    "Accuracy: share of pools in which the candidate with the highest score has the best reward. MAP, MRR@10 and NDCG@10 are those of "
    "retrieval; a candidate is relevant from a reward of 0.5 on, or pools.relevant. Tied scores count as in random order. Pairs: share of pairs in "
    "the order of their rewards. Of the best: reward of the choices over the best possible reward. Above random: the same, "
    "where a random choice is 0 % and the best choice 100 %."
)


def ranking_page(data: RankingReportData) -> str:
    """The whole page. All text of the run is escaped: it may hold anything."""
    chance = _chance(data.models, data.pools)
    results = results_html(data.results) + part(
        "All rankers and baselines", MODELS_CAPTION, _models(data.models, data.results, chance)
    )
    sections = [
        Section("Results", f"Each trained model against the best baseline. {VERDICT_CAPTION} {INTERVALS}", results),
        Section("Accuracy by kind", "Small counts have wide intervals. The dashed line is chance.", _breakdowns(data.breakdowns, chance)),
        Section("Choices", "Candidates by score, each with its probability, reward and kind. The probability is the softmax of the scores; the bar shows it. ▶ is the model's choice, ★ has the best reward.", pools_html(data.pools)),
        Section("Training", "Training loss, and accuracy on the selection split, which chose the best step.", _curves(data.curves, chance)),
        data_section(data.manifests),
        provenance_section(data.manifests),
    ]  # fmt: skip
    body = report_body(data.run, facts(data.settings, data.manifests), sections)
    return page(f"Remask: {data.run}", body, STYLE.read_text(encoding="utf-8"))


def ranking_table(models: list[dict]) -> str:
    """Aligned text: a row per ranker, policy or baseline. Columns that no row knows are omitted."""
    columns = _known_columns(models)
    lines: list[tuple[str, ...]] = [("chosen by", *_titles(columns))]
    for row in models:
        cells: list[str] = []
        for key, _, percent in columns:
            cells.append(_value_text(row, key, percent) or "-")
            if key == "accuracy":
                cells.append(_interval_text(row, " .. ") or "-")
        lines.append((row["name"], *cells))
    return aligned(lines)


def _known_columns(models: list[dict]) -> list[tuple[str, str, bool]]:
    return [column for column in _COLUMNS if any(_is_known(row, column[0]) for row in models)]


def _titles(columns: list[tuple[str, str, bool]]) -> list[str]:
    titles = []
    for key, title, _ in columns:
        titles += [title, "95 % interval"] if key == "accuracy" else [title]
    return titles


def _is_known(row: dict, key: str) -> bool:
    value = row.get(key)
    return value is not None and math.isfinite(value)


def _value_text(row: dict, key: str, percent: bool) -> str:
    """The value as text; "" if the row does not have it."""
    if not _is_known(row, key):
        return ""
    return f"{row[key]:.1%}" if percent else f"{row[key]:.3f}"


def _interval_text(row: dict, between: str) -> str:
    known = _is_known(row, "low") and _is_known(row, "high")
    return f"{row['low']:.1%}{between}{row['high']:.1%}" if known else ""


def _chance(models: list[dict], pools: list[RankedPool]) -> float | None:
    """Accuracy of a random choice, from the table of models or from the pools."""
    for row in models:
        if row["name"] == RANDOM:
            return row["accuracy"]
    shares = [sum(pool.correct) / len(pool.correct) for pool in pools]
    return sum(shares) / len(shares) if shares else None


def _models(models: list[dict], results: list[dict], chance: float | None) -> str:
    if not models:
        return "<p>Nothing was ranked.</p>"
    trained = {row["model"] for row in results}
    baselines = [row["name"] for row in models if row["name"] not in trained]
    columns = _known_columns(models)
    lines = []
    for row in models:
        cells = [escape(row["name"])]
        for key, _, percent in columns:
            cells.append(_value_text(row, key, percent) or "–")
            if key == "accuracy":
                cells.append(interval(_interval_text(row, " – ")))
        lines.append(cells)
    classes = ["baseline" if row["name"] in baselines else "" for row in models]
    drawn = [row for row in models if _is_known(row, "accuracy")]
    picture = ""
    if drawn:
        svg = ranking_plots.accuracies(drawn, chance, baselines)
        picture = figure(svg, "accuracy of every ranker and baseline with its interval")
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
        [escape(row["name"]), _value_text(row, "accuracy", True) or "–", _range(row, chance),
         interval(_interval_text(row, " – ")), f"{row['count']:,}"]
        for row in rows
    ]  # fmt: skip
    return table([title, "accuracy", "", "95 % interval", "pools"], lines)


def _shares(title: str, rows: list[dict]) -> str:
    """Rows without an accuracy: whole numbers are counts, other numbers are shares of 1."""
    keys = [key for key in rows[0] if key != "name"]
    lines = [
        [escape(row["name"]), *(f"{row[k]:,}" if isinstance(row[k], int) else f"{row[k]:.1%}" for k in keys)]
        for row in rows
    ]
    return table([title, *(key.replace("_", " ") for key in keys)], lines)


def _range(row: dict, chance: float | None) -> str:
    """A dot with its interval on a line from 0 to 1."""
    if not _is_known(row, "accuracy"):
        return ""
    parts = "" if chance is None else f'<u style="left:{chance:.2%}"></u>'
    if _is_known(row, "low") and _is_known(row, "high"):
        parts += f'<i style="left:{row["low"]:.2%};width:{row["high"] - row["low"]:.2%}"></i>'
    return f'<span class="range">{parts}<b style="left:{row["accuracy"]:.2%}"></b></span>'


def _curves(curves: dict[str, list[dict]], chance: float | None) -> str:
    if not any(curves.values()):
        return "<p>No model was trained.</p>"
    return figure(ranking_plots.learning(curves, chance), "training curves, two panels per model")
