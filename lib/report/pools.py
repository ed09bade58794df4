"""Pools of candidates as the ranking report shows them: which pools are informative, and how a pool is drawn."""

import math
from collections.abc import Iterable
from html import escape

from lib.report.data import RankedPool
from lib.report.html_table import table

POOLS_PER_HEADING = 3
HEADINGS = ("Correct by a wide margin", "Correct by a narrow margin", "Wrong by a narrow margin", "Wrong by a wide margin")  # fmt: skip


def softmax(scores: list[float]) -> list[float]:
    """Probabilities that sum to 1."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def choose_pools(pools: Iterable[RankedPool], count: int) -> list[tuple[str, RankedPool]]:
    """At most `count` (heading, pool) for each of HEADINGS, the most extreme first; no pool twice.

    Pools without a wrong candidate are skipped. A second pool of a group is only taken when there are too few groups.
    """
    decided = [pool for pool in pools if not all(pool.correct)]
    ordered = sorted(decided, key=lambda pool: (-pool.margin, pool.example_id))
    correct = [pool for pool in ordered if pool.margin > 0]
    wrong = [pool for pool in ordered if pool.margin <= 0]
    chosen: list[tuple[str, RankedPool]] = []
    for (wide, narrow), side in ((HEADINGS[:2], correct), (HEADINGS[:1:-1], wrong[::-1])):
        first = _spread(side, min(count, (len(side) + 1) // 2))
        rest = [pool for pool in reversed(side) if pool not in first]
        chosen += [(wide, pool) for pool in first] + [(narrow, pool) for pool in _spread(rest, count)]
    return sorted(chosen, key=lambda item: HEADINGS.index(item[0]))


def _spread(pools: list[RankedPool], count: int) -> list[RankedPool]:
    """The first `count` pools; the first pool of every group comes before the others."""
    firsts: dict[str, RankedPool] = {}
    for pool in pools:
        firsts.setdefault(pool.group, pool)
    return [*firsts.values(), *(pool for pool in pools if firsts[pool.group] is not pool)][:count]


def pools_html(pools: list[RankedPool]) -> str:
    """The informative pools, each as a table of its candidates by score."""
    chosen = choose_pools(pools, POOLS_PER_HEADING)
    if not chosen:
        return "<p>No pool with correct and wrong candidates was ranked.</p>"
    return f'<div class="pools">{"".join(_pool(heading, pool) for heading, pool in chosen)}</div>'


def _pool(heading: str, pool: RankedPool) -> str:
    probabilities = softmax(pool.scores)
    order = sorted(range(len(probabilities)), key=lambda i: (-pool.scores[i], pool.correct[i], i))
    lines, classes = [], []
    for rank, i in enumerate(order):
        marks = f"{'▶' if rank == 0 else ''}{'★' if pool.correct[i] else ''}"
        bar = f'<span class="track"><i style="width:{probabilities[i]:.2%}"></i></span>'
        lines.append(
            [marks, bar, f"{probabilities[i]:.1%}", f"{pool.rewards[i]:.3f}", escape(pool.kinds[i]), escape(pool.candidates[i])]
        )  # fmt: skip
        names = ("chosen" if rank == 0 else "", "best" if pool.correct[i] else "")
        classes.append(" ".join(name for name in names if name) or "rest")
    question, _, more = pool.prompt.partition("\n")
    details = f"<details><summary>whole prompt</summary><pre>{escape(more)}</pre></details>" if more else ""
    note = f'<p class="verdict">{escape(pool.note)}</p>' if pool.note else ""
    head = ["", "", "probability", "reward", "kind", "candidate"]
    return (
        f'<article class="pool"><h3>{escape(heading)} · {escape(pool.example_id)}</h3>'
        f'<p class="asked">{escape(question)}</p>{details}{table(head, lines, classes)}{note}</article>'
    )
