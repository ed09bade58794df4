"""The results table on the screen: every model beside what doing nothing clever gives."""

from collections.abc import Mapping
from typing import Any

INTERVALS = (
    "Intervals are 95 % intervals; ± is half the width of one. Whole groups are resampled: documents or blocks of held-out "
    "text for models, samples for policies, pages for questions. Where a table is over seeds, so is the interval."
)


def interval_text(estimate: Mapping[str, Any], percent: bool = False, between: str = " .. ") -> str:
    """The ends of an estimate's interval; `-` where one group alone gives none."""
    ends = (estimate["low"], estimate["high"])
    if any(end is None or end != end for end in ends):  # manifests hold None for NaN
        return "-"
    return between.join(f"{end:.1%}" if percent else f"{end:.3f}" for end in ends)


def results_table(rows: list[dict]) -> str:
    """Aligned text of result rows (lib.training.objectives.base.ResultRow as dictionaries)."""
    head = ("model", "metric", "value", "95 % interval", "baseline", "", "beats it")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        lines.append(
            (
                row["model"],
                row["metric"],
                f"{row['value']:.3f}",
                interval_text(row),
                row["baseline"],
                f"{row['baseline_value']:.3f}",
                "yes" if row["beats_baseline"] else "NO",
            )
        )
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Columns of equal width, numbers to the right, a rule below the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = [all(_is_number(line[i]) for line in lines[1:]) for i in range(len(widths))]
    text = [
        "  ".join(
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(len(t) for t in text), *text[1:]])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("", "-")
    return True


def detection_table(detection: dict[str, dict]) -> str:
    """How well each score tells wrong tokens from right ones."""
    lines = [("error detection", "AUROC", "95 % interval", "average precision", "ECE", "Brier")]
    for name, found in detection.items():
        auroc = found["auroc"]
        lines.append(
            (
                name,
                f"{auroc['value']:.3f}",
                interval_text(auroc),
                f"{found['average_precision']:.3f}",
                f"{found['ece']:.3f}",
                f"{found['brier']:.3f}",
            )
        )
    return aligned(lines)


BANDS_HEAD = ("calibration", "masked share", "tokens", "wrong", "ECE raw", "one curve", "by band", "Brier raw", "one curve", "by band")  # fmt: skip


def bands_cells(row: dict) -> tuple[str, ...]:
    """A band of the masked share as text: how honest the critic is, raw, with one curve for all, with curves by band."""
    kinds = ("raw", "one_curve", "by_band")
    numbers = [f"{row[f'{measure}_{kind}']:.3f}" for measure in ("ece", "brier") for kind in kinds]
    share = f"{row['low']:.2f} to {row['high']:.2f}" + ("" if row["own"] else " (no curve of its own)")
    return (row["reading"], share, f"{row['tokens']:,}", f"{row['error_rate']:.1%}", *numbers)


def bands_table(rows: list[dict]) -> str:
    return aligned([BANDS_HEAD, *(bands_cells(row) for row in rows)])


def winners_table(ranker: str, terms: dict[str, dict[str, float]]) -> str:
    """What the ranker's choice is worth: mean of each reward term of the winner, beside a random and the best choice."""
    lines: list[tuple[str, ...]] = [(f"chosen by {ranker}", "winner", "random choice", "best choice")]
    for name, values in terms.items():
        lines.append((name, *(f"{values[key]:.3f}" for key in ("winner", "random", "best"))))
    return aligned(lines)


BEST_OF_HEAD = ("NLL, nats/token", "gain over one sample", "95 % interval", "4-gram entropy")


def best_of_cells(row: dict) -> tuple[str, ...]:
    """What a scorer's choice among N samples gains over the first of them, under the reference model, and its variety."""
    gain, entropy = row["gain"], f"{row['fourgram_entropy']:.3f}"
    if gain is None:
        return "-", "-", "-", entropy
    return f"{row['nll']['value']:.3f}", f"{gain['value']:.3f}", interval_text(gain), entropy


def best_of_table(rows: list[dict]) -> str:
    first = rows[0]
    lines = [
        (f"best of {first['n']} by", *BEST_OF_HEAD),
        *((row["scorer"], *best_of_cells(row)) for row in rows),
    ]
    return f"policy {first['policy']}, {first['nfe']} passes a sample\n{aligned(lines)}"


def sampling_table(policies: list[dict]) -> str:
    """Quality of samples per policy and budget, real text last."""
    lines = [("policy", "NFE", "seconds", "NLL, nats/char", "95 % interval", "char entropy", "4-gram entropy", "valid words")]  # fmt: skip
    for row in policies:
        nll, words = row["reference_nll"], row["valid_words"]
        lines.append(
            (
                row["policy"],
                passes_text(row["passes"]) or "-",
                f"{row['seconds']:.1f}" if row["seconds"] else "-",
                f"{nll['value']:.3f}" if nll else "-",
                interval_text(nll) if nll else "-",
                f"{row['character_entropy']:.3f}",
                f"{row['fourgram_entropy']:.3f}",
                f"{words['value']:.1%}" if words else "-",
            )
        )
    return aligned(lines)


def infilling_table(policies: list[dict]) -> str:
    """Share of the filled tokens that are the target's, per policy and budget."""
    lines: list[tuple[str, ...]] = [("infilling", "NFE", "right tokens", "95 % interval")]
    for row in policies:
        found = row["infill_accuracy"]
        if found is not None:
            interval = interval_text(found, percent=True)
            lines.append(
                (row["policy"], passes_text(row["passes"]) or "-", f"{found['value']:.1%}", interval)
            )
    return aligned(lines)


def passes_text(passes: float) -> str:
    """`32`, or `12.4` where samples finished early; nothing for none."""
    return f"{passes:.1f}".removesuffix(".0") if passes else ""
