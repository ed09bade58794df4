"""How good the scorers are: the critic, the token classifiers, the judges, and the choices of the rankers."""

from html import escape
from typing import Any

from lib.report import plots
from lib.report.data import ReportData
from lib.report.html_table import table
from lib.report.page import figure, part
from lib.report.samples import estimate_cells
from lib.report.table import BANDS_HEAD, bands_cells, detection_label
from lib.report.tint import SCALE, tinted

ORIGINS = ("original", "random", "predicted")  # names of the classes 0, 1 and 2, if there are three
DETECTION_CAPTION = (
    "AUROC: probability that a wrong token gets a higher score than a correct one; 0.5 is chance. ECE and Brier score: "
    "distance between predicted probabilities and outcomes; lower is better."
)
BANDS_CAPTION = (
    "The same error by the share of the text that was masked: before the critic read it (filled), or while it read it "
    "(partial). Raw probabilities, one calibration curve for all shares, and a curve per band."
)
CLASSES_CAPTION = "Held-out tokens. A row is the true class, a column the predicted one."
SCORES_CAPTION = "Held-out texts. A constant score has R2 0."
ORIGINALS_CAPTION = (
    " R2 1 is out of reach: synthetic tokens that equal the original ones leave no trace. AUROC: probability that an "
    "unchanged text scores higher than a rewritten one."
)
CHOICES_CAPTION = "Mean of each reward term on held-out examples, for the ranker's choice, a random choice and the best choice."


def scorer_parts(data: ReportData) -> str:
    """All parts of the section on scorers."""
    return (
        part("Token critic", DETECTION_CAPTION, _critic(data))
        + part("Suspected errors", "The critic's probability of error for every token of one sample per policy. Point at a token for its number.", heat_map(data))
        + "".join(_classifiers(data))
        + part("Choices of the ranker", CHOICES_CAPTION, _choices(data))
    )  # fmt: skip


def _critic(data: ReportData) -> str:
    stats = data.manifests.get("05_train_critic", {}).get("stats", {})
    if "detection" not in stats:
        return "<p>No critic was trained.</p>"
    lines = [
        [
            escape(detection_label(name)),
            *estimate_cells(d["auroc"]),
            f"{d['average_precision']:.3f}",
            f"{d['ece']:.3f}",
            f"{d['brier']:.3f}",
        ]
        for name, d in stats["detection"].items()
    ]
    head = ["score", "AUROC", "95 % interval", "average precision", "ECE", "Brier score"]
    ece = stats["detection"]["critic_calibrated"]["ece"]
    picture = plots.reliability(
        stats["reliability"], f"ECE {ece:.3f}", "calibrated probability of error", "share of errors"
    )
    bands = table(list(BANDS_HEAD), [[escape(cell) for cell in bands_cells(row)] for row in stats["bands"]])
    return (
        table(head, lines)
        + part("Calibration", "A calibrated critic lies on the diagonal.", figure(picture, "reliability diagram of the critic"))
        + part("Calibration by masked share", BANDS_CAPTION, bands)
    )  # fmt: skip


def heat_map(data: ReportData) -> str:
    """One text per policy, every token tinted by the critic's probability of error."""
    rows = [r for r in data.samples.to_pylist() if r["token_error"] is not None]
    if not rows:
        return "<p>No critic scored the samples.</p>"
    highest = max(r["nfe"] for r in rows)
    cards = []
    for policy in dict.fromkeys(r["policy"] for r in rows):
        row = next((r for r in rows if r["policy"] == policy and r["nfe"] == highest), None)
        if row is not None:
            text = tinted(row["token_ids"], row["token_error"], data.token_text)
            cards.append(f'<div class="card"><h4>{escape(policy)}</h4><pre>{text}</pre></div>')
    return f'<p class="legend">probability of error {SCALE}</p><div class="cards">{"".join(cards)}</div>'


def _classifiers(data: ReportData) -> list[str]:
    """A part for each model that classifies tokens or scores whole texts."""
    stats = data.manifests.get("04_train", {}).get("stats", {})
    parts = []
    for name, record in stats.items():
        held_out = record.get("held_out", {}) if isinstance(record, dict) else {}
        if "confusion" in held_out:
            parts.append(part(f"Classes of {name}", CLASSES_CAPTION, classes_table(held_out)))
        if "reliability" in held_out:
            caption = SCORES_CAPTION + (ORIGINALS_CAPTION if _knows_originals(held_out) else "")
            parts.append(part(f"Scores of {name}", caption, scores_table(held_out)))
    return parts


def classes_table(held_out: dict[str, Any]) -> str:
    """Confusion counts, with precision, recall and F1 of each class."""
    confusion = held_out["confusion"]
    names = ORIGINS if len(confusion) == len(ORIGINS) else [str(c) for c in range(len(confusion))]
    lines = []
    for c, counts in enumerate(confusion):
        scores = [held_out.get(f"{score}_{c}") for score in ("precision", "recall", "f1")]
        lines.append(
            [escape(names[c]), *(f"{n:,}" for n in counts), *("–" if v is None else f"{v:.3f}" for v in scores)]
        )  # fmt: skip
    return table(["class", *(f"predicted as {name}" for name in names), "precision", "recall", "F1"], lines)


def _knows_originals(held_out: dict[str, Any]) -> bool:
    """Whether figures of a judge say how well it separates untouched texts from rewritten ones."""
    return "auroc_untouched" in held_out


def scores_table(held_out: dict[str, Any]) -> str:
    """The judge beside the generator's mean confidence, a constant and the oracle, and its reliability diagram."""
    columns = {"mse": "MSE", "r2": "R2", "spearman": "Spearman"}
    columns |= {"auroc_untouched": "AUROC, unchanged"} if _knows_originals(held_out) else {}

    def cells(name: str, values: dict[str, Any]) -> list[str]:
        return [escape(name), *("–" if values.get(k) is None else f"{values[k]:.3f}" for k in columns)]

    lines = [cells("this model", held_out)]
    if "rewritten" in held_out:
        lines.append(cells("this model, rewritten texts only", held_out["rewritten"]))
    if "confidence" in held_out:
        lines.append(cells("generator's mean confidence", held_out["confidence"]))
    lines.append(cells("constant", {"mse": held_out["constant_mse"], "r2": 0.0}))
    if "best_r2" in held_out:
        oracle = {"mse": held_out["irreducible_mse"], "r2": held_out["best_r2"]}
        lines.append(cells("oracle that knows the changed tokens", oracle))
    picture = plots.reliability(held_out["reliability"], "reliability", "predicted score", "mean target")
    return table(["", *columns.values()], lines) + figure(picture, "reliability diagram")


def _choices(data: ReportData) -> str:
    stats = data.manifests.get("04_train", {}).get("stats", {})
    tables = ""
    for name, record in stats.items():
        terms = record.get("held_out", {}).get("terms", {}) if isinstance(record, dict) else {}
        lines = [
            [escape(t), *(f"{v[k]:.3f}" for k in ("winner", "random", "best"))] for t, v in terms.items()
        ]
        if lines:
            tables += table([name, "its choice", "random choice", "best choice"], lines)
    return tables or "<p>No ranker was trained.</p>"
