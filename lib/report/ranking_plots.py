"""Figures of the ranking report: the accuracy of every ranker, and training curves."""

from collections.abc import Sequence

from lib.report.plots import PALETTE, new_figure, svg_of

SELECTION = ("accuracy", "average_reward")  # the first of these in a line of metrics.jsonl is drawn


def accuracies(models: list[dict], chance: float | None, baselines: Sequence[str] = ()) -> str:
    """A mark with its 95 % interval for each row, the first row on top, and a line at chance.

    Args:
        models: rows with "name", "accuracy" and, if known, "low" and "high".
        baselines: names of rows that are not trained models: hollow marks.
    """
    figure = new_figure(7.2, 0.75 + 0.27 * len(models))
    axes = figure.subplots()
    for height, row in enumerate(reversed(models)):
        value, hollow = row["accuracy"], row["name"] in baselines
        low, high = row.get("low"), row.get("high")
        error = None if low is None or high is None else [[max(value - low, 0)], [max(high - value, 0)]]
        color = "#666666" if hollow else PALETTE[0]
        axes.errorbar(value, height, xerr=error, color=color, marker="s" if hollow else "o", markersize=5.5,
                      markerfacecolor="white" if hollow else color, capsize=2.5, linewidth=1.2)  # fmt: skip
        axes.annotate(
            f"{value:.1%}", (1.02, height), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    if chance is not None:
        axes.axvline(chance, color="#777777", linestyle=":", linewidth=1.2, zorder=0)
        axes.annotate(f"chance {chance:.1%}", (chance, 1), xycoords=("data", "axes fraction"), xytext=(3, 2),
                      textcoords="offset points", fontsize=8, color="#555555")  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(-0.7, len(models) - 0.3), xlabel="accuracy, with 95 % interval")
    axes.set_yticks(range(len(models)), [_short(row["name"]) for row in reversed(models)])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return svg_of(figure)


def _short(name: str, max_length: int = 44) -> str:
    """The name as plain text of a tick. Dollar signs are escaped, since they would start a formula."""
    return (name if len(name) <= max_length else f"{name[: max_length - 1]}…").replace("$", r"\$")


def learning(curves: dict[str, list[dict]], chance: float | None) -> str:
    """Two panels per model: the training loss, and below it the accuracy on the pools of the selection split."""
    drawn = {name: lines for name, lines in curves.items() if lines}
    columns = len(drawn)
    figure = new_figure(max(3.2, 2.9 * columns), 3.6)
    panels = figure.subplots(2, columns, squeeze=False, sharex="col")
    for (above, below), (name, lines) in zip(panels.T, drawn.items(), strict=True):
        steps = [line["step"] for line in lines]
        for axes, part, color in ((above, "train", PALETTE[0]), (below, "selection", PALETTE[1])):
            key = _key(lines, part)
            if key is None:
                axes.set_visible(False)
                continue
            values = [line[part].get(key, float("nan")) for line in lines]
            axes.plot(steps, values, color=color, linestyle="-" if part == "train" else "--",
                      marker=None if part == "train" and len(steps) > 1 else "o", markersize=3)  # fmt: skip
            axes.set_ylabel(
                f"{'training' if part == 'train' else 'selection'} {_short(key.replace('_', ' '), 20)}",
                fontsize=8,
            )
            if key == "accuracy" and chance is not None:
                axes.axhline(chance, color="#777777", linestyle=":", linewidth=1)
                axes.annotate("chance", (0, chance), xycoords=("axes fraction", "data"), xytext=(3, 2),
                              textcoords="offset points", fontsize=7, color="#555555")  # fmt: skip
        above.set_title(_short(name, 30), fontsize=9, loc="left")
        below.set_xlabel("step", fontsize=8)
    return svg_of(figure)


def _key(lines: list[dict], part: str) -> str | None:
    """The metric to draw: the loss in training, on the selection split the first known one of SELECTION."""
    known = lines[0].get(part, {})
    wanted = ("loss",) if part == "train" else SELECTION
    return next((name for name in (*wanted, *known) if name in known), None)
