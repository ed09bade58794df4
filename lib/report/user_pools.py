"""The page and the summary of a user's file that a ranker has ranked."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from lib.report.html_table import table
from lib.report.page import Section, page, report_body
from lib.report.pools import softmax
from lib.report.table import aligned, interval_text

STYLE = Path(__file__).with_name("ranking.css")
METRICS = ("accuracy", "map", "mrr_at_10", "ndcg_at_10", "pairwise_accuracy", "reward_ratio")
TITLES = ("accuracy", "MAP", "MRR@10", "NDCG@10", "pairs", "of the best")
LINES = 8  # pools of the summary on the screen
BM25_NOTE = "bm25 counts its word frequencies over blocks of pools, in the order of the file."
WIDTH = 60  # characters of a text on the screen


def ranking_file_page(displayed: Sequence[Any], metrics: dict[str, Any], source: str, model: str) -> str:
    """One HTML page: metrics if the file has rewards, and some pools with their candidates by score."""
    sections = []
    if metrics:
        lines = [[escape(name), *_cells(row), f"{row['pools']:,}"] for name, row in metrics.items()]
        caption = f"Pools whose candidates have different rewards. 95 % intervals resample pools. {BM25_NOTE}"
        sections.append(Section("Metrics", caption, table(["chosen by", *TITLES, "pools"], lines)))
    caption = f"The first {len(displayed)} pools of the file, the best candidate first. ranking.parquet has all of them."
    sections.append(
        Section("Rankings", caption, f'<div class="pools">{"".join(map(_pool, displayed))}</div>')
    )
    body = report_body(source, [f"Candidates in the order of the model '{model}'."], sections)
    return page(f"Remask: {source}", body, STYLE.read_text(encoding="utf-8"))


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for name in METRICS:
        value = row.get(name)
        cells.append(
            "–" if value is None else f"{value['value']:.3f} ({interval_text(value, between=' – ')})"
        )
    return cells


def _pool(pool: Any) -> str:
    probabilities = softmax([float(s) for s in pool.scores])
    order = sorted(range(len(probabilities)), key=lambda i: -pool.scores[i])
    known = any(reward is not None for reward in pool.rewards)
    lines = []
    for rank, i in enumerate(order):
        bar = f'<span class="track"><i style="width:{probabilities[i]:.2%}"></i></span>'
        reward = ["–" if pool.rewards[i] is None else f"{pool.rewards[i]:g}"] if known else []
        mark = "▶" if rank == 0 else ""
        text = escape(pool.candidates[i])
        lines.append([mark, bar, f"{probabilities[i]:.1%}", f"{pool.scores[i]:.3f}", *reward, text])
    head = ["", "", "probability", "score", *(["reward"] if known else []), "candidate"]
    classes = ["chosen", *["rest"] * (len(lines) - 1)]
    return (
        f'<article class="pool"><h3>{escape(pool.pool_id)}</h3><p class="asked">{escape(pool.prompt)}</p>'
        f"{table(head, lines, classes)}</article>"
    )


def ranking_summary(displayed: Sequence[Any], metrics: dict[str, Any]) -> str:
    """Aligned text: the choice of the first pools, and the metrics if there are some."""
    lines = [("pool", "chosen", "probability")]
    for pool in displayed[:LINES]:
        probabilities = softmax([float(s) for s in pool.scores])
        best = max(range(len(probabilities)), key=lambda i: probabilities[i])
        text = " ".join(pool.candidates[best].split())
        short = text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
        lines.append((pool.pool_id, short, f"{probabilities[best]:.1%}"))
    parts = [aligned(lines)]
    if metrics:
        rows: list[tuple[str, ...]] = [("chosen by", *TITLES)]
        for name, row in metrics.items():
            values = [row.get(metric) for metric in METRICS]
            rows.append((name, *("-" if v is None else f"{v['value']:.3f}" for v in values)))
        parts.append(aligned(rows))
    return "\n\n".join(parts)
