"""Figures of the reports as inline SVG. Colours suit colour-blind readers; line styles and markers survive grey print."""

import io
import itertools
import math
from typing import Any

from lib.report.table import has_interval, nfe_text

# Okabe and Ito's palette. Each colour has a line style and a marker, so that no meaning depends on colour alone
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "*", "X")
CORNERS = ((6, 4), (6, -10), (-6, 4), (-6, -10))  # offsets of a label from its mark, in points
SELECTION = ("nelbo_and_auroc", "nelbo", "nll", "cross_entropy", "mse", "critic_loss", "loss", "regret")


def new_figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "remask", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: Any) -> str:
    """The figure's <svg> element; the same figure always gives the same bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_curves(curves: dict[str, list[dict]], baselines: dict[str, float]) -> str:
    """A panel per model: training loss, and the metric on the selection split that chooses the best step."""
    drawn = {name: lines for name, lines in curves.items() if lines}
    columns = min(4, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = new_figure(2.7 * columns, 2.1 * rows)
    for axes, (name, lines) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, drawn.items(), strict=False
    ):
        steps = [line["step"] for line in lines]
        metric = next(m for m in SELECTION if m in lines[0]["selection"])
        losses = [line["train"]["loss"] for line in lines]
        marker = None if len(steps) > 1 else "o"  # a single point has no line
        axes.plot(steps, losses, color=PALETTE[0], marker=marker, markersize=3, label="train loss")
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
        for before, line in itertools.pairwise(lines):  # a new stage of staged unmasking begins
            if line["selection"].get("stage", 0) > before["selection"].get("stage", 0):
                axes.axvline(before["step"], color="#999999", linestyle="-", linewidth=0.8)
                axes.text(before["step"], 1, f" stage {line['selection']['stage']:.0f}", fontsize=6, va="top",
                          color="#555555", transform=axes.get_xaxis_transform())  # fmt: skip
        if name in baselines:
            axes.axhline(baselines[name], color="#777777", linestyle=":", linewidth=1, label="baseline")
        axes.set_title(name, fontsize=9, loc="left")
        axes.legend(fontsize=6.5, frameon=False)
        axes.set_xlabel("step", fontsize=8)
    for axes in figure.axes[len(drawn) :]:
        axes.set_visible(False)
    return svg_of(figure)


def reliability(points: list[list[float]], title: str, x_label: str, y_label: str) -> str:
    """Predicted against observed. `points`: [predicted, observed, ...] each; a calibrated model lies on the diagonal."""
    figure = new_figure(3.4, 3.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=1)
    predicted, observed = zip(*(point[:2] for point in points), strict=True)
    axes.plot(predicted, observed, color=PALETTE[0], marker="o", markersize=4)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, fontsize=9, loc="left")
    return svg_of(figure)


def policies(rows: list[dict]) -> str:
    """NLL under the reference model against diversity; down and right is better.

    A line joins the budgets of a policy in their order. Its name is at the largest budget.
    """
    figure = new_figure(6.2, 3.8)
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
        for row, point in zip(lines[name], zip(x, y, strict=True), strict=True):
            last = row is lines[name][-1]
            text = ", ".join(filter(None, (name if last else "", nfe_text(row["passes"]))))
            labels.append(axes.annotate(text, point, xytext=CORNERS[0], textcoords="offset points",
                                        fontsize=8 if last else 7, color=style["color"]))  # fmt: skip
        marks += [
            [(entropy, low), (entropy, value), (entropy, high)]
            for entropy, value, (low, high) in zip(x, y, ends, strict=True)
        ]
    axes.set(
        xlabel="4-gram entropy, nats (higher is more diverse)",
        ylabel="NLL under the reference model, nats per character",
    )
    axes.margins(0.15)
    figure.draw_without_rendering()
    _apart(labels, [axes.transData.transform(mark) for mark in marks])
    return svg_of(figure)


def _ends(estimate: dict) -> tuple[float, float]:
    """(low, high) of an estimate; its value twice if there is no interval, which draws a mark without a bar."""
    value = estimate["value"]
    return (estimate["low"], estimate["high"]) if has_interval(estimate) else (value, value)


def _apart(labels: list[Any], marks: list[Any]) -> None:
    """Move each label to the corner of its mark where it covers the fewest marks and earlier labels.

    `marks`: for each label, (N, 2) points on the canvas that its mark and interval cover.
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
    """Panels of lines. `panels`: panel title -> line name -> (x, y) points, joined in the order of x.

    `near`: the part of the x axis to draw.
    """
    columns = max(1, len(panels))
    figure = new_figure(3.6 * columns + 1.6, 4.0)
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
    return svg_of(figure)


def over_passes(
    panels: dict[str, dict[str, dict[float, dict[str, float]]]],
    y_label: str,
    cut: bool = False,
    strong: str | None = None,
) -> str:
    """Panels of lines over the number of forward passes, on a logarithmic axis.

    The marks of one budget stand side by side, so that their intervals are readable.

    Args:
        panels: panel title -> line name -> forward passes -> {"value", "low", "high"}. A line without points keeps
            its colour.
        cut: cut off the few values far above the others, so that the others are distinguishable.
        strong: the line to draw thick, above the others.
    """
    columns = max(1, len(panels))
    figure = new_figure(4.4 * columns + 1.8, 4.0)
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
            smallest, median = min(everything), sorted(everything)[len(everything) // 2]
            if median > smallest:
                axes.set_ylim(top=min(axes.get_ylim()[1], smallest + 4 * (median - smallest)))
        ticks = _ticks({n for found in lines.values() for n in found})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [nfe_text(n) for n in ticks])
        axes.minorticks_off()
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("forward passes")
    figure.axes[0].set_ylabel(y_label)
    _legend(figure)
    return svg_of(figure)


def _ticks(passes: set[float]) -> list[float]:
    """The numbers of forward passes to label: labels of numbers that are less than 20 % apart would overlap."""
    ticks: list[float] = []
    for number in sorted(passes):
        if not ticks or number >= 1.2 * ticks[-1]:
            ticks.append(number)
    return ticks


def _style(index: int) -> dict[str, Any]:
    """Colour, line style and marker of line number `index`; no two lines share more than one of the three."""
    turn, i = divmod(index, len(PALETTE))
    return {
        "color": PALETTE[i],
        "linestyle": DASHES[(i + turn) % len(DASHES)],
        "marker": MARKERS[(i + 2 * turn) % len(MARKERS)],
    }


def _legend(figure: Any) -> None:
    """One legend for all panels, to their right."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)


def histogram(counts: list[int], label: str) -> str:
    """Counts over [0, 1] in equal bins."""
    figure = new_figure(3.4, 2.4)
    axes = figure.subplots()
    width = 1 / len(counts)
    axes.bar([(i + 0.5) * width for i in range(len(counts))], counts, width=0.9 * width, color=PALETTE[0])
    axes.set(xlabel=label, ylabel="candidates", xlim=(0, 1))
    return svg_of(figure)
