"""Tables of results as aligned text for the screen, and the cells that they share with the HTML reports."""

from collections.abc import Mapping
from typing import Any

INTERVALS = (
    "Intervals are 95 % intervals; ± is half the width of one. The bootstrap resamples whole groups: documents or blocks "
    "of held-out text for models, samples for policies, pages for questions. Tables over several seeds have intervals "
    "over seeds."
)

# Plain names of the scores that stage 05 compares
DETECTION_LABELS = {
    "critic": "critic",
    "critic_calibrated": "critic, calibrated",
    "critic_unknown": "critic, without conditioning mask",
    "critic_blend": "critic and confidence combined",
    "confidence": "confidence when generated",
    "fresh_confidence": "confidence recomputed",
    "confidence_first_pass": "confidence in the first pass",
    "critic_partial": "partly masked: critic",
    "critic_partial_calibrated": "partly masked: critic, calibrated",
    "confidence_visible": "partly masked: confidence when generated",
    "whole_text_critic": "external text: critic, calibrated",
    "whole_text_fresh_confidence": "external text: confidence recomputed",
}


def has_interval(estimate: Mapping[str, Any]) -> bool:
    """Whether an estimate has an interval. A single group gives none; manifests hold None for NaN."""
    return all(end is not None and end == end for end in (estimate["low"], estimate["high"]))


def value_text(value: float | None) -> str:
    """Three digits; `-` if there is no value, such as an AUROC where all tokens are wrong. Manifests hold None for NaN."""
    return "-" if value is None or value != value else f"{value:.3f}"


def interval_text(estimate: Mapping[str, Any], percent: bool = False, between: str = " .. ") -> str:
    """The ends of an estimate's interval; `-` if it has none."""
    if not has_interval(estimate):
        return "-"
    return between.join(
        f"{estimate[end]:.1%}" if percent else f"{estimate[end]:.3f}" for end in ("low", "high")
    )


def difference_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The ends of the paired interval of a result minus its baseline; None if it was not measured, as in old manifests."""
    return {"low": row.get("difference_low"), "high": row.get("difference_high")}


def detection_label(name: str) -> str:
    """The plain name of a score that stage 05 compares."""
    return DETECTION_LABELS.get(name, name)


def results_table(rows: list[dict]) -> str:
    """Every model and metric beside its baseline. `rows`: lib.training.objectives.base.ResultRow as dictionaries."""
    head = ("model", "metric", "value", "95 % interval", "baseline", "", "difference", "beats it")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        lines.append(
            (
                row["model"],
                row["metric"],
                value_text(row["value"]),
                interval_text(row),
                row["baseline"],
                value_text(row["baseline_value"]),
                interval_text(difference_of(row)),
                "yes" if row["beats_baseline"] else "NO",
            )
        )
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells as text: columns of equal width, numbers to the right, a rule below the first line."""
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
    """Whether a cell is a number, such as 1.5, 1,234 or 12.5%, or stands for a missing one."""
    try:
        float(text.replace(",", "").removesuffix("%"))
    except ValueError:
        return text in ("", "-")
    return True


def detection_table(detection: dict[str, dict]) -> str:
    """How well each score separates wrong tokens from correct ones."""
    lines = [("error detection by", "AUROC", "95 % interval", "average precision", "ECE", "Brier score")]
    for name, found in detection.items():
        auroc = found["auroc"]
        lines.append(
            (
                detection_label(name),
                f"{auroc['value']:.3f}",
                interval_text(auroc),
                f"{found['average_precision']:.3f}",
                f"{found['ece']:.3f}",
                f"{found['brier']:.3f}",
            )
        )
    return aligned(lines)


BANDS_HEAD = ("calibration", "masked share", "tokens", "wrong", "ECE raw", "ECE one curve", "ECE by band", "Brier raw", "Brier one curve", "Brier by band")  # fmt: skip


def bands_cells(row: dict) -> tuple[str, ...]:
    """The calibration error in one band of the masked share: raw, with one curve for all bands, with a curve per band."""
    kinds = ("raw", "one_curve", "by_band")
    numbers = [f"{row[f'{measure}_{kind}']:.3f}" for measure in ("ece", "brier") for kind in kinds]
    share = f"{row['low']:.2f} to {row['high']:.2f}" + ("" if row["own"] else " (no curve)")
    return (row["reading"], share, f"{row['tokens']:,}", f"{row['error_rate']:.1%}", *numbers)


def bands_table(rows: list[dict]) -> str:
    """The calibration error by masked share. `(no curve)`: the band has too few tokens for a curve of its own."""
    return aligned([BANDS_HEAD, *(bands_cells(row) for row in rows)])


def winners_table(ranker: str, terms: dict[str, dict[str, float]]) -> str:
    """Mean of each reward term over held-out examples: of the ranker's choice, a random choice and the best choice."""
    lines: list[tuple[str, ...]] = [(f"chosen by {ranker}", "its choice", "random choice", "best choice")]
    for name, values in terms.items():
        lines.append((name, *(f"{values[key]:.3f}" for key in ("winner", "random", "best"))))
    return aligned(lines)


BEST_OF_HEAD = ("NLL, nats/token", "gain over one sample", "95 % interval", "4-gram entropy")


def best_of_cells(row: dict) -> tuple[str, ...]:
    """The gain of a scorer's choice among N samples over the first one, and the diversity of its choices."""
    gain, entropy = row["gain"], f"{row['fourgram_entropy']:.3f}"
    if gain is None:
        return "-", "-", "-", entropy
    return f"{row['nll']['value']:.3f}", f"{gain['value']:.3f}", interval_text(gain), entropy


def best_of_table(rows: list[dict]) -> str:
    """The gain of choosing among N samples, a line per scorer."""
    first = rows[0]
    lines = [
        (f"best of {first['n']} by", *BEST_OF_HEAD),
        *((row["scorer"], *best_of_cells(row)) for row in rows),
    ]
    return f"policy {first['policy']}, NFE {first['nfe']} per text\n{aligned(lines)}"


def sampling_table(policies: list[dict]) -> str:
    """Quality of the samples by policy and budget; real text comes last."""
    lines = [("policy", "NFE", "texts", "seconds", "NLL, nats/char", "95 % interval", "char entropy", "4-gram entropy", "real words")]  # fmt: skip
    for row in policies:
        nll, words = row["reference_nll"], row["valid_words"]
        lines.append(
            (
                row["policy"],
                nfe_text(row["passes"]) or "-",
                f"{row['samples']:,}",
                f"{row['seconds']:.1f}" if row["seconds"] else "-",
                f"{nll['value']:.3f}" if nll else "-",
                interval_text(nll) if nll else "-",
                f"{row['character_entropy']:.3f}",
                f"{row['fourgram_entropy']:.3f}",
                f"{words['value']:.1%}" if words else "-",
            )
        )
    return "\n".join(filter(None, (aligned(lines), fewer_real_texts(policies))))


def fewer_real_texts(policies: list[dict]) -> str:
    """A sentence if there is less real text than samples, so that their entropies cannot be compared; "" otherwise."""
    made = max((row["samples"] for row in policies if row["passes"]), default=0)
    real = next((row["samples"] for row in policies if not row["passes"]), made)
    if real >= made:
        return ""
    return (
        f"Real text: held-out text has only {real:,} texts of this length, beside {made:,} samples. Entropy grows with the number "
        "of texts, so the entropy of real text is too low here."
    )


def infilling_table(policies: list[dict]) -> str:
    """Share of the generated tokens that equal the target's, by policy and budget."""
    lines: list[tuple[str, ...]] = [("infilling", "NFE", "correct tokens", "95 % interval")]
    for row in policies:
        found = row["infill_accuracy"]
        if found is not None:
            interval = interval_text(found, percent=True)
            lines.append((row["policy"], nfe_text(row["passes"]) or "-", f"{found['value']:.1%}", interval))
    return aligned(lines)


def samples_summary(metrics: dict) -> str:
    """All tables of stage 06 for the screen. `metrics`: the content of its metrics.json."""
    policies, best_of = metrics["policies"], metrics["best_of"]
    tables = [results_table(metrics["results"])]
    tables += [winners_table(name, terms) for name, terms in metrics["winners"].items()]
    tables.append(sampling_table(policies))
    if any(row["infill_accuracy"] for row in policies):
        tables.append(infilling_table(policies))
    if best_of:
        tables.append(best_of_table(best_of))
    return "".join(f"\n{text}\n" for text in tables)


def nfe_text(passes: float) -> str:
    """`32`; `12.4` if samples were complete early; "" for no forward pass."""
    return f"{passes:.1f}".removesuffix(".0") if passes else ""
