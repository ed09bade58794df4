"""The samples of a run: quality by policy, the texts side by side, fills of known texts, the best of N."""

from html import escape

from lib.report import plots
from lib.report.data import ReportData
from lib.report.html_table import interval, table
from lib.report.page import figure, part
from lib.report.table import BEST_OF_HEAD, best_of_cells, fewer_real_texts, interval_text, nfe_text

SAMPLES_PER_POLICY = 3
NO_SAMPLES = "<p>Nothing was sampled.</p>"


def estimate_cells(value: dict | None, percent: bool = False) -> list[str]:
    """The value of an estimate, and its interval."""
    if value is None or value["value"] is None:
        return ["–", ""]
    text = f"{value['value']:.1%}" if percent else f"{value['value']:.3f}"
    return [text, interval(interval_text(value, percent, " – "))]


def samples_parts(data: ReportData) -> str:
    """All parts of the section on samples."""
    return (
        part("Samples side by side", "The same sample numbers under each policy. Text that was given is underlined.", _texts(data))
        + part("Quality by policy", "All policies made the same numbered samples with about the same NFE. A low NLL is good only at an entropy near that of real text: low-diversity text has a low NLL too.", quality_table(data.policies))
        + _infilling(data.policies)
        + _best_of(data.best_of)
    )  # fmt: skip


def quality_table(rows: list[dict]) -> str:
    """The table of policies, and the picture of likelihood against diversity."""
    if not rows:
        return NO_SAMPLES
    lines = []
    for r in rows:
        judge = "–" if r["judge_score"] is None else f"{r['judge_score']:.3f}"
        lines.append(
            [escape(r["policy"]), nfe_text(r["passes"]) or "–", f"{r['samples']:,}", *estimate_cells(r["reference_nll"]),
             f"{r['character_entropy']:.3f}", f"{r['fourgram_entropy']:.3f}",
             *estimate_cells(r["valid_words"], percent=True), judge]
        )  # fmt: skip
    head = ["policy", "NFE", "texts", "NLL, nats/character", "95 % interval", "character entropy", "4-gram entropy", "real words", "95 % interval", "judge score"]  # fmt: skip
    classes = ["" if r["passes"] else "reference" for r in rows]
    if any(r["reference_nll"] for r in rows):
        end = figure(plots.policies(rows), "NLL against 4-gram entropy, a mark per policy and budget")
    else:
        end = "<p>No causal model was trained on the reference split, so there is no likelihood.</p>"
    fewer = fewer_real_texts(rows)
    return table(head, lines, classes) + (f"<p>{escape(fewer)}</p>" if fewer else "") + end


def _texts(data: ReportData) -> str:
    rows = data.samples.to_pylist()
    if not rows:
        return NO_SAMPLES
    highest = max(r["nfe"] for r in rows)
    cards = ""
    for policy in dict.fromkeys(r["policy"] for r in rows):
        these = [r for r in rows if r["policy"] == policy and r["nfe"] == highest][:SAMPLES_PER_POLICY]
        texts = "".join(f"<pre>{_text(r, data)}</pre>{_explanation(r, data)}" for r in these)
        cards += f'<div class="card"><h4>{escape(policy)}</h4>{texts}</div>'
    return f'<div class="cards">{cards}</div>'


def _explanation(row: dict, data: ReportData) -> str:
    return f'<p class="legend">{escape(data.explain(row))}</p>' if data.explain else ""


def _text(row: dict, data: ReportData) -> str:
    """The text of a sample; the given part is underlined."""
    if not any(row["given"]):
        return escape(row["text"])
    tokens = [(escape(data.token_text(t)), g) for t, g in zip(row["token_ids"], row["given"], strict=True)]
    return "".join(f"<u>{text}</u>" if given else text for text, given in tokens)


def _infilling(rows: list[dict]) -> str:
    """Accuracy of the fills, where texts with a target were filled."""
    filled = [r for r in rows if r.get("infill_accuracy")]
    if not filled:
        return ""
    lines = [
        [escape(r["policy"]), nfe_text(r["passes"]) or "–", *estimate_cells(r["infill_accuracy"], percent=True)]
        for r in filled
    ]  # fmt: skip
    caption = "Share of the generated tokens that equal the target's. The oracle re-masks exactly the wrong tokens: it is the upper bound."
    return part("Infilling", caption, table(["policy", "NFE", "correct tokens", "95 % interval"], lines))


def _best_of(rows: list[dict]) -> str:
    """The gain of choosing among N samples, where several were drawn."""
    if not rows:
        return ""
    first = rows[0]
    caption = (
        f"Policy {first['policy']} made {first['n']} texts for each sample with NFE {first['nfe']} each, and each scorer "
        "chose one. A random choice is the lower bound, the reference model's own choice the upper bound."
    )
    lines = [[escape(r["scorer"]), *best_of_cells(r)] for r in rows]
    return part("Best of N", caption, table([f"best of {first['n']} by", *BEST_OF_HEAD], lines))
