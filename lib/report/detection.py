"""Detection of synthetic documents: tables for the screen and for the page, and thresholds in words."""

from collections.abc import Mapping
from html import escape
from typing import Any

from lib.report.html_table import table
from lib.report.page import part
from lib.report.table import aligned, interval_text

CAPTION = (
    "Held-out documents. AUROC: probability that a synthetic document is more suspicious than an original one. TPR: share of the "
    "synthetic documents that are found; FPR: share of the originals that are flagged by mistake, at thresholds that the selection "
    "split chose. ECE: distance between predicted probabilities and outcomes."
)
PARTS_CAPTION = (
    "F1 of words whose characters are mostly synthetic, at the threshold that is best on the selection split; and the mean distance "
    "in characters from the place where a text turns from human to machine."
)


def _figures(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of the table of detectors."""
    names = list(found["detectors"])
    targets = [rates["target"] for rates in found["detectors"][names[0]]["thresholds"]]
    head = ["detector", "AUROC", "95 % interval", "judge's lead"]
    for target in targets:
        head += [f"TPR at {target:.0%} FPR", "95 % interval", "real FPR"]
    head.append("ECE")
    rows = dict(found["detectors"])
    windows = found.get("windows")
    if windows is not None and windows["documents"] > rows["judge"]["documents"]:
        rows = {"judge": rows.pop("judge"), "judge, window by window": windows} | rows
    lines = []
    for name, row in rows.items():
        lead = found.get("differences", {}).get(name)
        line = [name, f"{row['auroc']['value']:.3f}", interval_text(row["auroc"])]
        line.append("" if lead is None else f"{lead['value']:+.3f} ({interval_text(lead)})")
        for rates in row["thresholds"]:
            line += [
                f"{rates['tpr']['value']:.1%}",
                interval_text(rates["tpr"], percent=True),
                f"{rates['fpr']['value']:.1%}",
            ]
        lines.append([*line, f"{row['ece']:.3f}"])
    return head, lines


def _parts(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of the table of parts of texts."""
    parts = found["parts"]
    turning = f"error of the turn, {parts['num_turns']:,} texts"
    head = ["parts of a text", "word F1", "95 % interval", turning, "95 % interval", "median"]
    lines = []
    for name in dict.fromkeys([*parts["words"], *parts["turns"]]):
        f1, turn = parts["words"].get(name), parts["turns"].get(name)
        line = [name, *(("", "") if f1 is None else (f"{f1['value']:.3f}", interval_text(f1)))]
        if turn is None:
            line += ["", "", ""]
        else:
            line += [f"{turn['value']:.1f}", interval_text(turn), f"{parts['median_turn_error'][name]:.1f}"]
        lines.append(line)
    return head, lines


def _needed(target: float) -> str:
    return f"{target:.0%} needs {round(1 / target) - 1:,}"


def too_few_originals(found: Mapping[str, Any]) -> str:
    """What the columns of a target are where the selection split has too few originals for it; empty if it has enough."""
    judge = found["detectors"]["judge"]
    few = [rates["target"] for rates in judge["thresholds"] if not rates["enough_originals"]]
    if not few:
        return ""
    needed = ", ".join(map(_needed, few))
    return (
        f"The selection split has only {judge['originals']:,} original documents, and {needed}. The threshold is then the most "
        f"suspicious of them, and a new original exceeds it with a probability of up to {1 / (judge['originals'] + 1):.1%}."
    )


def detection_tables(found: Mapping[str, Any]) -> str:
    """The tables as aligned text."""
    tables = [_figures(found)] + ([_parts(found)] if found.get("parts") else [])
    texts = [aligned([tuple(head), *(tuple(line) for line in lines)]) for head, lines in tables]
    few = too_few_originals(found)
    return "\n\n".join([texts[0] + (f"\n{few}" if few else ""), *texts[1:]])


def detection_html(found: Mapping[str, Any] | None) -> str:
    """The same tables as HTML."""
    if found is None:
        return "<p>Not measured: the run has no labels beside the text, or a split lacks documents of one kind.</p>"
    about = f"{CAPTION} {too_few_originals(found)}".strip()
    captions = (("Documents", about, _figures), ("Parts of texts", PARTS_CAPTION, _parts))
    return "".join(
        part(title, caption, table(head, [[escape(cell) for cell in line] for line in lines]))
        for title, caption, make in captions
        if make is _figures or found.get("parts")
        for head, lines in [make(found)]
    )


def thresholds_in_words(figures: Mapping[str, Any]) -> list[str]:
    """A sentence for each threshold of the judge. `figures`: of `lib.detection.measure`."""
    lines = []
    for rates in figures["thresholds"]:
        line = (
            f"threshold for {rates['target']:.0%} false alarms, chosen on the selection split: on held-out documents it finds "
            f"{rates['tpr']['value']:.1%} of the synthetic ones, and flags {rates['fpr']['value']:.1%} of the originals by mistake"
        )
        if not rates["enough_originals"]:
            line += (
                f"; the selection split has only {figures['originals']:,} originals, and {_needed(rates['target'])}, so "
                f"it is the most suspicious of them"
            )
        lines.append(line)
    return lines


def rates_in_words(rates: list[dict[str, Any]]) -> list[str]:
    """A sentence for each threshold on labelled documents. `rates`: of `lib.evaluation.text_scores.measured_rates`."""
    lines = []
    for row in rates:
        parts = []
        for name, verb, kind in (("fpr", "flags", "originals"), ("tpr", "finds", "synthetic")):
            if (rate := row[name]) is not None:
                interval = interval_text(rate, percent=True)
                parts.append(
                    f"{verb} {rate['value']:.1%} ({interval}) of its {row[kind]:,} {kind} documents".replace(
                        "originals", "original"
                    )
                )
        lines.append(
            f"by the labels of this file, the threshold for {row['target']:.0%} false alarms {', and '.join(parts)}"
        )
    return lines
