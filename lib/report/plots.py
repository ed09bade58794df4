"""Figures of the report as inline SVG: colours that colour-blind eyes tell apart, shapes that survive grey print."""

import io
import itertools
import math
from typing import Any

from lib.report.table import passes_text

# Okabe and Ito's palette, with a line style and a marker each, so that no colour carries a meaning alone.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "*", "X")
CORNERS = ((6, 4), (6, -10), (-6, 4), (-6, -10))  # of a mark, where its label may start or end, in points
SELECTION = ("nelbo_and_auroc", "nelbo", "nll", "cross_entropy", "mse", "critic_loss", "loss", "regret")


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "remask", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    """The figure's <svg> element; the same figure always gives the same bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_curves(curves: dict[str, list[dict]], baselines: dict[str, float]) -> str:
    """A panel per model: training loss and the number on the selection split that chooses the best model."""
    shown = {name: lines for name, lines in curves.items() if lines}
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(2.7 * columns, 2.1 * rows)
    for axes, (name, lines) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, shown.items(), strict=False
    ):
        steps = [line["step"] for line in lines]
        metric = next(m for m in SELECTION if m in lines[0]["selection"])
        axes.plot(steps, [line["train"]["loss"] for line in lines], color=PALETTE[0], label="train loss")
        modifiers = dict.fromkeys(t for line in lines for t in line["train"] if t.startswith("modifier_"))
        for i, term in enumerate(modifiers):
            values = [line["train"].get(term, math.nan) for line in lines]
            axes.plot(
                steps, values, color=PALETTE[2 + i % 5], linewidth=0.8, label=term.removeprefix("modifier_")
            )
        chosen_by = [line["selection"][metric] for line in lines]
        axes.plot(
            steps,
            chosen_by,
            color=PALETTE[1],
            linestyle="--",
            marker="o",
            markersize=3,
            label=f"selection {metric}",
        )
        for before, line in itertools.pairwise(lines):  # where a stage of unmasking joined
            if line["selection"].get("stage", 0) > before["selection"].get("stage", 0):
                axes.axvline(before["step"], color="#999999", linestyle="-", linewidth=0.8)
                axes.text(before["step"], 1, f" stage {line['selection']['stage']:.0f}", fontsize=6, va="top",
                          color="#555555", transform=axes.get_xaxis_transform())  # fmt: skip
        if name in baselines:
            axes.axhline(baselines[name], color="#777777", linestyle=":", linewidth=1, label="baseline")
        axes.set_title(name, fontsize=9, loc="left")
        axes.legend(fontsize=6.5, frameon=False)
    for axes in figure.axes[len(shown) :]:
        axes.set_visible(False)
    return _svg(figure)


def reliability(points: list[list[float]], title: str, x_label: str, y_label: str) -> str:
    """Said against happened: who is honest lies on the diagonal."""
    figure = _figure(3.4, 3.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=1)
    said, was = zip(*(point[:2] for point in points), strict=True)
    axes.plot(said, was, color=PALETTE[0], marker="o", markersize=4)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, fontsize=9, loc="left")
    return _svg(figure)


def policies(rows: list[dict]) -> str:
    """Likelihood under the reference model against diversity: up and left is worse than down and right. A policy's budgets
    are joined in their order; its name stands at the largest."""
    figure = _figure(6.2, 3.8)
    axes = figure.subplots()
    lines: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["nfe"]):
        if row["reference_nll"] is not None:
            lines.setdefault(row["policy"], []).append(row)
    labels: list[Any] = []
    marks: list[list[tuple[float, float]]] = []
    for i, name in enumerate(n for n in dict.fromkeys(row["policy"] for row in rows) if n in lines):
        style, found = _style(i), [row["reference_nll"] for row in lines[name]]
        x, y = [row["fourgram_entropy"] for row in lines[name]], [nll["value"] for nll in found]
        ends = [_ends(nll) for nll in found]
        spread = [[v - low for v, (low, _) in zip(y, ends, strict=True)], [high - v for v, (_, high) in zip(y, ends, strict=True)]]  # fmt: skip
        axes.errorbar(x, y, yerr=spread, markersize=6, capsize=2, linewidth=1, **style)
        for row, place in zip(lines[name], zip(x, y, strict=True), strict=True):
            last = row is lines[name][-1]
            text = ", ".join(filter(None, (name if last else "", passes_text(row["passes"]))))
            labels.append(axes.annotate(text, place, xytext=CORNERS[0], textcoords="offset points",
                                        fontsize=8 if last else 7, color=style["color"]))  # fmt: skip
        marks += [
            [(place, low), (place, value), (place, high)]
            for place, value, (low, high) in zip(x, y, ends, strict=True)
        ]
    axes.set(
        xlabel="4-gram entropy, nats (more is more varied)",
        ylabel="NLL under the reference model, nats per character",
    )
    axes.margins(0.15)
    figure.draw_without_rendering()
    _apart(labels, [axes.transData.transform(mark) for mark in marks])
    return _svg(figure)


def _ends(estimate: dict) -> tuple[float, float]:
    """(low, high) of an estimate; where one group alone gives no interval, its value twice: a mark without a bar."""
    low, high, value = estimate["low"], estimate["high"], estimate["value"]
    return (low, high) if low == low and high == high else (value, value)


def _apart(labels: list[Any], marks: list[Any]) -> None:
    """Each label goes to that corner of its mark where it covers the fewest marks and labels placed before it.

    `marks`: of each label, (N, 2) places on the canvas that the mark with its interval covers.
    """
    from matplotlib.transforms import Bbox

    taken = [Bbox([[x - 4, y - 4], [x + 4, y + 4]]) for mark in marks for x, y in mark]
    for label in labels:

        def covered(corner: tuple[int, int], label: Any = label) -> int:
            label.set(position=corner, ha="left" if corner[0] > 0 else "right")
            return label.get_window_extent().count_overlaps(taken)

        covered(min(CORNERS, key=covered))
        taken.append(label.get_window_extent())


def pareto(
    panels: dict[str, dict[str, list[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    near: tuple[float, float] | None = None,
) -> str:
    """Panel title -> line name -> (x, y) points, joined in the order of x; a line of one point is a mark alone.

    `near`: the part of the x axis that is shown, where the lines are worth telling apart.
    """
    columns = max(1, len(panels))
    figure = _figure(3.6 * columns + 1.6, 4.0)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    inside: list[float] = []
    for axes, (title, lines) in zip(figure.subplots(1, columns, squeeze=False, sharey=True).flat, panels.items(), strict=False):  # fmt: skip
        for name, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, label=name, markersize=5, linewidth=1.2, **_style(names.index(name)))
            inside += [v for u, v in points if near is None or near[0] <= u <= near[1]]
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel(x_label)
        if near is not None:
            axes.set_xlim(near)
    if inside:
        margin = 0.05 * (max(inside) - min(inside)) or 0.1
        figure.axes[0].set_ylim(min(inside) - margin, max(inside) + margin)
    figure.axes[0].set_ylabel(y_label)
    _legend(figure)
    return _svg(figure)


def over_passes(
    panels: dict[str, dict[str, dict[int, dict[str, float]]]],
    y_label: str,
    cut: bool = False,
    strong: str | None = None,
) -> str:
    """Panel title -> line name -> forward passes -> {"value", "low", "high"}, passes doubling from tick to tick.

    The marks of a budget stand side by side, so that their intervals can be read. A line without points keeps its place
    among the colours. `cut`: the few values far above the others are cut off, so that the others can be told apart.
    `strong`: the line that is drawn thick, above the others.
    """
    columns = max(1, len(panels))
    figure = _figure(4.4 * columns + 1.8, 4.0)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (title, lines) in zip(figure.subplots(1, columns, squeeze=False).flat, panels.items(), strict=False):  # fmt: skip
        for name, found in lines.items():
            if not found:
                continue
            index, budgets = names.index(name), sorted(found)
            aside = 2 ** (0.5 * ((index + 0.5) / len(names) - 0.5))
            values = [found[n]["value"] for n in budgets]
            spread = [
                [found[n]["value"] - _ends(found[n])[0] for n in budgets],
                [_ends(found[n])[1] - found[n]["value"] for n in budgets],
            ]
            axes.errorbar([n * aside for n in budgets], values, yerr=spread, label=name, markersize=5, elinewidth=0.8,
                          linewidth=2.4 if name == strong else 1.0, zorder=3 if name == strong else 2, **_style(index))  # fmt: skip
        everything = [e["value"] for found in lines.values() for e in found.values()]
        if everything and cut:
            lowest, middle = min(everything), sorted(everything)[len(everything) // 2]
            if middle > lowest:
                axes.set_ylim(top=min(axes.get_ylim()[1], lowest + 4 * (middle - lowest)))
        ticks = sorted({n for found in lines.values() for n in found})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("forward passes")
    figure.axes[0].set_ylabel(y_label)
    _legend(figure)
    return _svg(figure)


def _style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of a figure's line: no two of them share more than one, in a second turn neither."""
    turn, i = divmod(index, len(PALETTE))
    return {
        "color": PALETTE[i],
        "linestyle": DASHES[(i + turn) % len(DASHES)],
        "marker": MARKERS[(i + 2 * turn) % len(MARKERS)],
    }


def _legend(figure: Any) -> None:
    """One for all panels, to their right."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)


def histogram(counts: list[int], label: str) -> str:
    """Counts over [0, 1] in equal bins."""
    figure = _figure(3.4, 2.4)
    axes = figure.subplots()
    width = 1 / len(counts)
    axes.bar([(i + 0.5) * width for i in range(len(counts))], counts, width=0.9 * width, color=PALETTE[0])
    axes.set(xlabel=label, ylabel="candidates", xlim=(0, 1))
    return _svg(figure)
