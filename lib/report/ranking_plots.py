"""Figures of the ranking report: who finds the right candidate how often, and how rankers learned."""

from collections.abc import Sequence

from lib.report.plots import PALETTE, _figure, _svg

SHOWN = ("accuracy", "average_reward")  # of a line of metrics.jsonl the first that is there


def accuracies(models: list[dict], chance: float | None, rivals: Sequence[str] = ()) -> str:
    """A dot with its 95 % interval for each row, the first on top, and a line at chance.

    Args:
        models: rows with "name", "accuracy" and, if known, "low" and "high".
        rivals: names of rows that are no model of this run: hollow dots.
    """
    figure = _figure(7.2, 0.75 + 0.27 * len(models))
    axes = figure.subplots()
    for height, row in enumerate(reversed(models)):
        value, hollow = row["accuracy"], row["name"] in rivals
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
    return _svg(figure)


def _short(name: str, most: int = 44) -> str:
    """The name as plain text of a tick: no dollar sign starts a formula."""
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def learning(curves: dict[str, list[dict]], chance: float | None) -> str:
    """Two panels per model: the training loss, and below it how often it chose right on pools kept apart."""
    shown = {name: lines for name, lines in curves.items() if lines}
    columns = len(shown)
    figure = _figure(max(3.2, 2.9 * columns), 3.6)
    panels = figure.subplots(2, columns, squeeze=False, sharex="col")
    for (above, below), (name, lines) in zip(panels.T, shown.items(), strict=True):
        steps = [line["step"] for line in lines]
        for axes, part, color in ((above, "train", PALETTE[0]), (below, "selection", PALETTE[1])):
            key = _key(lines, part)
            if key is None:
                axes.set_visible(False)
                continue
            values = [line[part].get(key, float("nan")) for line in lines]
            axes.plot(steps, values, color=color, linestyle="-" if part == "train" else "--",
                      marker=None if part == "train" else "o", markersize=3)  # fmt: skip
            axes.set_ylabel(
                f"{'training' if part == 'train' else 'kept apart:'} {_short(key.replace('_', ' '), 20)}",
                fontsize=8,
            )
            if key == "accuracy" and chance is not None:
                axes.axhline(chance, color="#777777", linestyle=":", linewidth=1)
                axes.annotate("chance", (0, chance), xycoords=("axes fraction", "data"), xytext=(3, 2),
                              textcoords="offset points", fontsize=7, color="#555555")  # fmt: skip
        above.set_title(_short(name, 30), fontsize=9, loc="left")
        below.set_xlabel("step", fontsize=8)
    return _svg(figure)


def _key(lines: list[dict], part: str) -> str | None:
    """Which number of the lines is drawn: the loss in training, what is best known elsewhere."""
    known = lines[0].get(part, {})
    wanted = ("loss",) if part == "train" else SHOWN
    return next((name for name in (*wanted, *known) if name in known), None)
