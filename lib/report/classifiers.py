"""What the report shows of models that sort tokens into classes or score whole texts."""

from html import escape
from typing import Any

from lib.report import plots
from lib.report.html_table import table

ORIGINS = ("original", "random", "predicted")  # what classes 0, 1 and 2 are, where there are three
CLASSES_HINT = "Held-out tokens: a row is what a token is, a column what the model takes it for."
SCORES_HINT = (
    "Held-out texts. A constant has R2 0. Nobody can reach 1 where synthetic tokens came out as the original ones and "
    "left no trace. AUROC: chance that an untouched text scores higher than a rewritten one."
)


def classes_table(held_out: dict[str, Any]) -> str:
    """Confusion counts with precision, recall and F1 of each class."""
    confusion = held_out["confusion"]
    names = ORIGINS if len(confusion) == len(ORIGINS) else [str(c) for c in range(len(confusion))]
    lines = []
    for c, counts in enumerate(confusion):
        scores = [held_out.get(f"{score}_{c}") for score in ("precision", "recall", "f1")]
        lines.append(
            [
                escape(names[c]),
                *(f"{n:,}" for n in counts),
                *("–" if v is None else f"{v:.3f}" for v in scores),
            ]
        )
    return table(["class", *(f"taken for {name}" for name in names), "precision", "recall", "F1"], lines)


def scores_table(held_out: dict[str, Any]) -> str:
    """The scorer beside the generator's mean confidence and beside who knows which tokens differ; its reliability."""

    def cells(name: str, values: dict[str, Any]) -> list[str]:
        keys = ("mse", "r2", "spearman", "auroc_untouched")
        return [escape(name), *("–" if values.get(k) is None else f"{values[k]:.3f}" for k in keys)]

    lines = [cells("this model", held_out)]
    if "rewritten" in held_out:
        lines.append(cells("this model, of rewritten sequences alone", held_out["rewritten"]))
    if "confidence" in held_out:
        lines.append(cells("generator's mean confidence", held_out["confidence"]))
    lines.append(cells("constant", {"mse": held_out["constant_mse"], "r2": 0.0}))
    if "best_r2" in held_out:
        lines.append(
            cells(
                "who knows which tokens differ",
                {"mse": held_out["irreducible_mse"], "r2": held_out["best_r2"]},
            )
        )
    picture = plots.reliability(held_out["reliability"], "reliability", "score given", "mean target")
    return table(["", "MSE", "R2", "Spearman", "AUROC, untouched"], lines) + picture
