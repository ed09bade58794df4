"""The table of results: every trained model beside its baseline."""

from html import escape

from lib.report.html_table import interval, table
from lib.report.table import has_interval, interval_text, value_text

WORSE, NOT_SIGNIFICANT, BETTER = "worse", "not significant", "better"


def verdict(row: dict) -> str:
    """What the 95 % interval of a result says about its baseline. `row`: a row of the results table."""
    if row["beats_baseline"]:
        return BETTER
    if not has_interval(row):
        return NOT_SIGNIFICANT
    base = row["baseline_value"]
    return WORSE if (row["low"] > base if row["lower_is_better"] else row["high"] < base) else NOT_SIGNIFICANT


def results_html(rows: list[dict]) -> str:
    """A sentence that counts the verdicts, and the table."""
    if not rows:
        return "<p>No model was evaluated.</p>"
    verdicts = [verdict(row) for row in rows]
    counts = [f"{verdicts.count(v)} {v}" for v in (BETTER, NOT_SIGNIFICANT, WORSE) if v in verdicts]
    sentence = f"{len(rows)} comparisons with a baseline: {', '.join(counts)}."
    lines = [
        [
            escape(row["model"]),
            escape(row["metric"]),
            value_text(row["value"]),
            interval(interval_text(row, between=" – ")),
            escape(row["baseline"]),
            value_text(row["baseline_value"]),
            f"<b>{found}</b>" if found == WORSE else found,
        ]
        for row, found in zip(rows, verdicts, strict=True)
    ]
    head = ["model", "metric", "value", "95 % interval", "baseline", "its value", "verdict"]
    return f'<p class="verdicts">{escape(sentence)}</p>' + table(head, lines)
