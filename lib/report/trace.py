"""The masking trace and the critic's heat map as HTML: a grid of rounds by tokens, a stepper, tinted texts."""

import json
from html import escape

from lib.report.data import ReportData

EVENTS = ("as before", "written in this round", "taken back", "still masked")
CLASSES = ("kept", "written", "taken", "masked")


def trace_section(data: ReportData) -> str:
    """One sample of each policy at the largest budget: its grid and its text after every round."""
    rows = data.trace.to_pylist()
    if not rows:
        return "<p>No trace was kept.</p>"
    first = min(r["sample_id"] for r in rows)
    rows = [r for r in rows if r["sample_id"] == first]
    highest = max(r["nfe"] for r in rows)
    legend = "".join(f'<span class="cell {c}"></span> {e} ' for c, e in zip(CLASSES, EVENTS, strict=True))
    parts = [f'<p class="legend">{legend}</p>']
    for policy in dict.fromkeys(r["policy"] for r in rows):
        rounds = sorted(
            (r for r in rows if r["policy"] == policy and r["nfe"] == highest), key=lambda r: r["iteration"]
        )
        parts.append(f"<h3>{escape(policy)}</h3>{_grid(rounds)}{_stepper(rounds, data)}")
    return "".join(parts)


def _grid(rounds: list[dict]) -> str:
    """An SVG of one cell per round and token."""
    columns, height = len(rounds[0]["events"]), 5
    cells = []
    for y, row in enumerate(rounds):
        x = 0
        while x < columns:  # neighbouring cells of one kind are one rectangle
            end = x
            while end < columns and row["events"][end] == row["events"][x]:
                end += 1
            kind = CLASSES[row["events"][x]]
            cells.append(
                f'<rect class="{kind}" x="{x}" y="{y * height}" width="{end - x}" height="{height - 0.6}"/>'
            )
            x = end
    box = f"0 0 {columns} {len(rounds) * height}"
    label = f"{len(rounds)} rounds of {columns} tokens"
    return f'<svg class="grid" role="img" aria-label="{label}" viewBox="{box}" preserveAspectRatio="none" height="{min(320, 8 * len(rounds))}">{"".join(cells)}</svg>'


def _stepper(rounds: list[dict], data: ReportData) -> str:
    """The text after each round; without script the last one is shown."""
    frames = [_frame(row, data) for row in rounds]
    payload = escape(json.dumps(frames), quote=True)
    last = len(frames) - 1
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="round">'
    return (
        f'<div class="stepper" data-frames="{payload}"><label>round <output>{last + 1}</output> of {len(frames)} '
        f"{slider}</label><pre>{frames[-1]}</pre></div>"
    )


def _frame(row: dict, data: ReportData) -> str:
    """HTML of one round: runs of one kind of event together, masks as a light shade."""
    parts: list[str] = []
    before = None
    for token, event in zip(row["token_ids"], row["events"], strict=True):
        text = "░" if token == data.mask_id else escape(data.token_text(token))
        if event != before:
            parts.append(("</span>" if before is not None else "") + f'<span class="{CLASSES[event]}">')
            before = event
        parts.append(text)
    return "".join(parts) + "</span>"


def heat_map(data: ReportData, count: int) -> str:
    """Texts with every token tinted by the critic's chance of error."""
    rows = [r for r in data.samples.to_pylist() if r["token_error"] is not None]
    if not rows:
        return "<p>No critic looked at the samples.</p>"
    highest = max(r["nfe"] for r in rows)
    steps = "".join(f'<span class="heat" style="--p:{p / 10}">{p / 10:.1f}</span>' for p in range(0, 11, 2))
    parts = [f'<p class="legend">chance of error {steps}</p>']
    for policy in dict.fromkeys(r["policy"] for r in rows):
        these = [r for r in rows if r["policy"] == policy and r["nfe"] == highest][:count]
        texts = "".join(f"<pre>{_tinted(r, data)}</pre>" for r in these[:1])
        parts.append(f'<div class="card"><h3>{escape(policy)}</h3>{texts}</div>')
    return f'{parts[0]}<div class="cards">{"".join(parts[1:])}</div>'


def _tinted(row: dict, data: ReportData) -> str:
    cells = []
    for token, error in zip(row["token_ids"], row["token_error"], strict=True):
        text = escape(data.token_text(token))
        cells.append(f'<span class="heat" style="--p:{error:.2f}" title="{error:.2f}">{text}</span>')
    return "".join(cells)
