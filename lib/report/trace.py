"""How samples were made: cost, quality by budget, and the masking trace of one sample per policy."""

import json
from html import escape

from lib.report import plots
from lib.report.data import ReportData
from lib.report.html_table import table
from lib.report.page import figure, part
from lib.report.table import nfe_text

# What happened to a token in a step, by the numbers of schema.TRACE's events, and the CSS class of each
EVENTS = ("unchanged", "unmasked in this step", "re-masked", "still masked")
CLASSES = ("kept", "unmasked", "remasked", "masked")


def sampling_parts(data: ReportData) -> str:
    """All parts of the section on sampling."""
    return (
        part("Cost", "NFE: mean number of forward passes per sample, those of the critic included. It is below the budget where samples were complete earlier.", _cost(data.policies))
        + _by_budget(data.policies)
        + part("Step by step", "One sample of each policy. A row is a step, a column a token. Move the slider to see the text after each step.", trace_html(data))
    )  # fmt: skip


def _cost(rows: list[dict]) -> str:
    made = [r for r in rows if r["passes"]]
    if not made:
        return "<p>Nothing was sampled.</p>"
    lines = [
        [escape(r["policy"]), f"{r['nfe']:,}", nfe_text(r["passes"]), f"{r['samples']:,}", f"{r['seconds']:.1f}"]
        for r in made
    ]  # fmt: skip
    return table(["policy", "budget", "NFE", "samples", "seconds, all samples"], lines)


def _by_budget(rows: list[dict]) -> str:
    """Likelihood and diversity against the NFE, where policies had several budgets.

    The NFE is what a sample took. A budget is per block, and samples may be complete before it is spent.
    """
    nll: dict[str, dict[float, dict]] = {}
    entropy: dict[str, dict[float, dict]] = {}
    for r in rows:
        if r["passes"] and r["reference_nll"]:
            nll.setdefault(r["policy"], {})[r["passes"]] = r["reference_nll"]
            value = r["fourgram_entropy"]
            entropy.setdefault(r["policy"], {})[r["passes"]] = {"value": value, "low": value, "high": value}
    if max(map(len, nll.values()), default=0) < 2:
        return ""
    panels = {"NLL under the reference model, per character": nll, "4-gram entropy": entropy}
    picture = figure(plots.over_passes(panels, "nats"), "NLL and 4-gram entropy against the NFE")
    return part("Quality by NFE", "More forward passes should give a lower NLL at the same entropy.", picture)


def trace_html(data: ReportData) -> str:
    """For each policy at the largest budget: the grid of steps by tokens, and the text after each step."""
    rows = data.trace.to_pylist()
    if not rows:
        return "<p>No trace was kept.</p>"
    first = min(r["sample_id"] for r in rows)
    rows = [r for r in rows if r["sample_id"] == first]
    highest = max(r["nfe"] for r in rows)
    legend = "".join(
        f'<span class="key"><span class="cell {c}"></span> {e}</span> '
        for c, e in zip(CLASSES, EVENTS, strict=True)
    )
    cards = []
    for policy in dict.fromkeys(r["policy"] for r in rows):
        steps = sorted(
            (r for r in rows if r["policy"] == policy and r["nfe"] == highest), key=lambda r: r["iteration"]
        )
        cards.append(
            f'<div class="card"><h4>{escape(policy)}</h4>{_grid(steps)}{_stepper(steps, data)}</div>'
        )
    return f'<p class="legend">{legend}</p><div class="cards">{"".join(cards)}</div>'


def _grid(steps: list[dict]) -> str:
    """An SVG with one cell per step and token."""
    columns, height = len(steps[0]["events"]), 5
    cells = []
    for y, row in enumerate(steps):
        x = 0
        while x < columns:  # neighbouring cells of one kind become one rectangle
            end = x
            while end < columns and row["events"][end] == row["events"][x]:
                end += 1
            kind = CLASSES[row["events"][x]]
            cells.append(
                f'<rect class="{kind}" x="{x}" y="{y * height}" width="{end - x}" height="{height - 0.6}"/>'
            )
            x = end
    box = f"0 0 {columns} {len(steps) * height}"
    label = f"{len(steps)} steps of {columns} tokens"
    return (
        f'<svg class="grid" role="img" aria-label="{label}" viewBox="{box}" preserveAspectRatio="none" '
        f'style="height:{min(320, 12 * len(steps))}px">{"".join(cells)}</svg>'
    )


def _stepper(steps: list[dict], data: ReportData) -> str:
    """The text after each step; the last one without JavaScript."""
    frames = [_frame(row, data) for row in steps]
    payload = escape(json.dumps(frames), quote=True)
    last = len(frames) - 1
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step">'
    return (
        f'<div class="stepper" data-frames="{payload}"><label>step <output>{last + 1}</output> of {len(frames)} '
        f"{slider}</label><pre>{frames[-1]}</pre></div>"
    )


def _frame(row: dict, data: ReportData) -> str:
    """The text after one step as HTML: a span per run of tokens with the same event, a light shade per mask."""
    parts: list[str] = []
    before = None
    for token, event in zip(row["token_ids"], row["events"], strict=True):
        text = "░" if token == data.mask_id else escape(data.token_text(token))
        if event != before:
            parts.append(("</span>" if before is not None else "") + f'<span class="{CLASSES[event]}">')
            before = event
        parts.append(text)
    return "".join(parts) + "</span>"
