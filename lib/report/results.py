"""The table of results: every trained model beside its baseline."""

from html import escape

from lib.report.html_table import interval, table
from lib.report.table import difference_of, has_interval, interval_text, value_text

WORSE, NOT_SIGNIFICANT, BETTER = "worse", "not significant", "better"
VERDICT_CAPTION = (
    "The verdict is better if the whole 95 % interval of the difference to the baseline lies on the better side of 0. Model "
    "and baseline are measured on the same groups, so their difference is resampled as one. Where the baseline is a number, "
    "such as chance, the interval of the value decides."
)


def verdict(row: dict) -> str:
    """What a result says about its baseline, see `VERDICT_CAPTION`. `row`: a row of the results table."""
    if row["beats_baseline"]:
        return BETTER
    found, limit = difference_of(row), 0.0
    if not has_interval(found):
        found, limit = row, row["baseline_value"]
    if not has_interval(found):
        return NOT_SIGNIFICANT
    is_worse = found["low"] > limit if row["lower_is_better"] else found["high"] < limit
    return WORSE if is_worse else NOT_SIGNIFICANT


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
            interval(interval_text(difference_of(row), between=" – ")),
            f"<b>{found}</b>" if found == WORSE else found,
        ]
        for row, found in zip(rows, verdicts, strict=True)
    ]
    head = ["model", "metric", "value", "95 % interval", "baseline", "its value", "difference", "verdict"]
    return f'<p class="verdicts">{escape(sentence)}</p>' + table(head, lines)
