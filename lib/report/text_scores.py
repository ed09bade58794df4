"""The scores of a user's text: a table for the screen, and a page with the text as heat maps."""

from collections.abc import Callable, Sequence
from html import escape

from lib.report.html_table import table
from lib.report.page import Section, page, report_body
from lib.report.table import aligned
from lib.report.tint import SCALE, tinted

MAX_LINES = 20  # documents on the screen
MAX_WINDOWS, MAX_DOCUMENTS = 60, 200  # on the page
HEAD = (
    "document",
    "tokens",
    "critic: error",
    "inspector: changed",
    "reference NLL",
    "judge",
    "P(synthetic)",
    "verdict",
)


def scores_table(documents: list[dict]) -> str:
    """Aligned text: a line per document. `documents`: rows of `lib.evaluation.text_scores.documents_of`."""
    return aligned([HEAD, *(_cells(document) for document in documents)])


def scores_page(
    rows: list[dict],
    documents: list[dict],
    known: list[dict],
    token_text: Callable[[int], str],
    source: str,
    facts: Sequence[str] = (),
) -> str:
    """The whole page. All text of the user is escaped.

    Args:
        rows: rows of schema.SCORES, one per window.
        documents, known: one row per document of the user, and per known text to compare with.
        token_text: token id -> its characters.
        source: the name of the user's file.
        facts: further lines about the scores.
    """
    lines = [[escape(c) for c in _cells(d)] for d in (*documents[:MAX_DOCUMENTS], *known)]
    more = len(documents) - MAX_DOCUMENTS
    rest = f'<p class="caption">And {more:,} more documents; scores.parquet has all.</p>' if more > 0 else ""
    sections = [
        Section(
            "Whole texts",
            "Means over the tokens of each text."
            + (f" The last {len(known)} lines are texts of this run, to compare with." if known else ""),
            table(list(HEAD), lines) + rest,
        )
    ]
    maps = (
        ("critic_error", "Critic", "The redder a token, the likelier it is an error."),
        ("inspector_changed", "Inspector", "The redder a token, the likelier it was changed."),
    )
    for key, title, caption in maps:
        if rows and rows[0][key] is not None:
            texts = "".join(_heat_map(row, key, token_text) for row in rows[:MAX_WINDOWS])
            if len(rows) > MAX_WINDOWS:
                texts += f'<p class="caption">The first {MAX_WINDOWS} of {len(rows):,} windows; scores.parquet has all.</p>'
            legend = f'<p class="legend">probability {SCALE}</p>'
            sections.append(Section(title, caption, legend + texts))
    facts = ["Every token of the text as the models of this run score it.", *facts]
    return page(f"Remask: {source}", report_body(source, facts, sections))


def _cells(document: dict) -> tuple[str, ...]:
    """A document's line of the table as text."""
    keys = (
        "critic_error_mean",
        "inspector_changed_mean",
        "reference_nll_mean",
        "judge_score",
        "synthetic_probability",
    )
    values = [document[key] for key in keys]
    return (
        document["document_id"],
        f"{document['tokens']:,}",
        *("-" if v is None else f"{v:.3f}" for v in values),
        verdict(document),
    )


def verdict(document: dict) -> str:
    """What the thresholds of the judge say of a document."""
    if document["synthetic_probability"] is None:
        return "-"
    if document["alarm_at"] is None:
        return "not flagged"
    if document["known_rate"] is None:
        return "synthetic (FPR not known)"
    return f"synthetic (at {document['known_rate']:.0%} FPR)"


def _heat_map(row: dict, key: str, token_text: Callable[[int], str]) -> str:
    text = tinted(row["token_ids"], row[key], token_text)
    return f"<h3>{escape(row['document_id'])}, window {row['window'] + 1}</h3><pre>{text}</pre>"
