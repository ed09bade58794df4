"""The report of a run: one HTML file that needs no network, reads on paper and in the dark."""

from html import escape
from pathlib import Path

from lib.report import plots
from lib.report.classifiers import CLASSES_HINT, SCORES_HINT, classes_table, scores_table
from lib.report.data import ReportData
from lib.report.html_table import table
from lib.report.table import (
    BANDS_HEAD,
    BEST_OF_HEAD,
    INTERVALS,
    bands_cells,
    best_of_cells,
    interval_text,
    passes_text,
)
from lib.report.trace import heat_map, trace_section

STYLE = Path(__file__).with_name("report.css")
SCRIPT = Path(__file__).with_name("report.js")
SAMPLES_SHOWN = 3


def build_report(data: ReportData) -> str:
    """The whole page. All text of the run is escaped: it may hold anything."""
    sections = [
        _header(data),
        _section("Models", "Each trained model beside what doing nothing clever gives. The 95 % interval must lie on the good side. " + INTERVALS, results_html(data.results)),
        *_classifiers(data),
        _section("What the ranker chooses", "Mean of each reward term over held-out examples: of the candidate it puts first, of a random one, of the best one.", _winners(data)),
        _section("Sampling", "Every policy wrote the same numbered samples with about as many forward passes. A low NLL counts only beside an entropy like real text's: dull text is likely too.", _policies(data.policies)),
        *_infilling(data.policies),
        *_best_of(data.best_of),
        _section("Samples", "The same sample numbers under each policy; given text is underlined.", _samples(data)),
        _section("How a sample came about", "A row is a round, a column a token. Step through the rounds to see what was written and taken back.", trace_section(data)),
        _section("What the critic suspects", "The redder a token, the likelier the critic holds it for an error; hover for the number.", heat_map(data, SAMPLES_SHOWN)),
        _section("The critic against the generator's own confidence", "AUROC: chance that a wrong token is more suspected than a right one. ECE and Brier: how far stated chances are from what happened. Below, the same by how much of the text was masked before the critic read it (filled), or still is (partial).", _critic(data)),
        _section("Learning", "Training loss and the number on the selection split that chose the best model; what is reported is held-out text, which chose nothing.", _curves(data)),
        _section("Synthetic text", "How much of each rewritten candidate a masked LM wrote.", _synthetic(data)),
        _section("Stages", "What ran, how long, and with which settings.", _stages(data)),
    ]  # fmt: skip
    return page(f"Remask: {data.run}", "\n".join(sections))


def page(title: str, body: str, more_style: str = "") -> str:
    """A whole HTML file around a body that is HTML already."""
    style, script = STYLE.read_text(encoding="utf-8") + more_style, SCRIPT.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>\n"
        f"{body}\n</main><script>{script}</script></body></html>\n"
    )


def _section(title: str, hint: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="hint">{escape(hint)}</p>{body}</section>'


def _header(data: ReportData) -> str:
    seconds = sum(m["seconds"] for m in data.manifests.values())
    memory = max((m["environment"]["peak_memory_mb"] for m in data.manifests.values()), default=0)
    machine = next(iter(reversed(data.manifests.values())), {}).get("environment", {})
    facts = f"{seconds / 60:.1f} minutes before this stage, at most {memory:,.0f} MB; torch {machine.get('torch', '?')}, {machine.get('device', '?')}, {machine.get('precision', '?')}, {machine.get('threads', '?')} threads"
    return f'<header><h1>{escape(data.run)}</h1><p>{escape(data.settings)}</p><p class="hint">{escape(facts)}</p></header>'


def _interval(value: dict | None, percent: bool = False) -> list[str]:
    if value is None:
        return ["–", ""]
    f = (lambda v: f"{v:.1%}") if percent else (lambda v: f"{v:.3f}")
    ends = interval_text(value, percent, " – ")
    return [f(value["value"]), f'<span class="interval">{ends}</span>']


def results_html(rows: list[dict]) -> str:
    if not rows:
        return "<p>No model was judged.</p>"
    lines = [
        [escape(r["model"]), escape(r["metric"]), *_interval(r), escape(r["baseline"]), f"{r['baseline_value']:.3f}",
         "better" if r["beats_baseline"] else "<b>not better</b>"]
        for r in rows
    ]  # fmt: skip
    return table(["model", "metric", "value", "95 % interval", "baseline", "its value", "verdict"], lines)


def _classifiers(data: ReportData) -> list[str]:
    """A section for each model that sorts tokens into classes or gives whole texts a score."""
    stats = data.manifests.get("04_train", {}).get("stats", {})
    sections = []
    for name, record in stats.items():
        held_out = record.get("held_out", {}) if isinstance(record, dict) else {}
        if "confusion" in held_out:
            sections.append(_section(f"Classes of {name}", CLASSES_HINT, classes_table(held_out)))
        if "reliability" in held_out:
            sections.append(_section(f"Scores of {name}", SCORES_HINT, scores_table(held_out)))
    return sections


def _winners(data: ReportData) -> str:
    stats = data.manifests.get("04_train", {}).get("stats", {})
    tables = ""
    for name, record in stats.items():
        terms = record.get("held_out", {}).get("terms", {}) if isinstance(record, dict) else {}
        lines = [
            [escape(t), *(f"{v[k]:.3f}" for k in ("winner", "random", "best"))] for t, v in terms.items()
        ]
        if lines:
            tables += table([name, "winner", "random choice", "best choice"], lines)
    return tables or "<p>No ranker was trained.</p>"


def _policies(rows: list[dict]) -> str:
    if not rows:
        return "<p>Nothing was sampled.</p>"
    lines, classes = [], []
    for r in rows:
        judged = "–" if r["judge_score"] is None else f"{r['judge_score']:.3f}"
        lines.append(
            [escape(r["policy"]), passes_text(r["passes"]) or "–", f"{r['seconds']:.1f}" if r["seconds"] else "–",
             *_interval(r["reference_nll"]), f"{r['character_entropy']:.3f}", f"{r['fourgram_entropy']:.3f}",
             *_interval(r["valid_words"], percent=True), judged]
        )  # fmt: skip
        classes.append("" if r["passes"] else "reference")
    head = ["policy", "passes (NFE)", "seconds", "NLL, nats/char", "95 % interval", "character entropy", "4-gram entropy", "valid words", "95 % interval", "judge"]  # fmt: skip
    picture = plots.policies(rows) + _over_passes(rows) if any(r["reference_nll"] for r in rows) else ""
    missing = (
        ""
        if picture
        else "<p>No causal model was trained on the reference split, so no likelihood is shown.</p>"
    )
    return table(head, lines, classes) + picture + missing


def _over_passes(rows: list[dict]) -> str:
    """Likelihood and variety over the passes spent, where policies were given several budgets."""
    spent = [r for r in rows if r["passes"] and r["reference_nll"]]
    nll: dict[str, dict[int, dict]] = {}
    entropy: dict[str, dict[int, dict]] = {}
    for r in spent:
        nll.setdefault(r["policy"], {})[r["nfe"]] = r["reference_nll"]
        value = r["fourgram_entropy"]
        entropy.setdefault(r["policy"], {})[r["nfe"]] = {"value": value, "low": value, "high": value}
    if max(map(len, nll.values()), default=0) < 2:
        return ""
    panels = {"NLL under the reference model, per character": nll, "4-gram entropy": entropy}
    return plots.over_passes(panels, "nats")


def _infilling(rows: list[dict]) -> list[str]:
    """A section of its own, where texts with a known answer were filled."""
    filled = [r for r in rows if r.get("infill_accuracy")]
    lines = [
        [escape(r["policy"]), passes_text(r["passes"]) or "–", *_interval(r["infill_accuracy"], percent=True)]
        for r in filled
    ]
    hint = "Share of the filled tokens that are exactly the target's. The oracle takes back what is wrong, and only that."
    body = table(["policy", "passes (NFE)", "right tokens", "95 % interval"], lines)
    return [_section("Infilling", hint, body)] if filled else []


def _best_of(rows: list[dict]) -> list[str]:
    """A section of its own, where every sample was written several times."""
    if not rows:
        return []
    first = rows[0]
    hint = f"Every sample was written {first['n']} times by {first['policy']} in {first['nfe']} passes each, and one was kept. Chance and the reference model's own choice are the floor and the ceiling; the chosen texts are among the samples below."
    body = table(
        [f"best of {first['n']} by", *BEST_OF_HEAD], [[escape(r["scorer"]), *best_of_cells(r)] for r in rows]
    )
    return [_section("Best of N", hint, body)]


def _samples(data: ReportData) -> str:
    rows = data.samples.to_pylist()
    if not rows:
        return "<p>Nothing was sampled.</p>"
    highest = max(r["nfe"] for r in rows)
    columns = ""
    for policy in dict.fromkeys(r["policy"] for r in rows):
        these = [r for r in rows if r["policy"] == policy and r["nfe"] == highest][:SAMPLES_SHOWN]
        texts = "".join(f"<pre>{_given(r, data)}</pre>{_explained(r, data)}" for r in these)
        columns += f'<div class="card"><h3>{escape(policy)}</h3>{texts}</div>'
    return f'<div class="cards">{columns}</div>'


def _explained(row: dict, data: ReportData) -> str:
    return f'<p class="legend">{escape(data.explain(row))}</p>' if data.explain else ""


def _given(row: dict, data: ReportData) -> str:
    """The text, what was given underlined."""
    if not any(row["given"]):
        return escape(row["text"])
    parts = [(escape(data.token_text(t)), g) for t, g in zip(row["token_ids"], row["given"], strict=True)]
    return "".join(f"<u>{text}</u>" if given else text for text, given in parts)


def _critic(data: ReportData) -> str:
    stats = data.manifests.get("05_train_critic", {}).get("stats", {})
    if "detection" not in stats:
        return "<p>No critic was trained.</p>"
    lines = [
        [
            escape(name),
            *_interval(d["auroc"]),
            f"{d['average_precision']:.3f}",
            f"{d['ece']:.3f}",
            f"{d['brier']:.3f}",
        ]
        for name, d in stats["detection"].items()
    ]
    head = ["score", "AUROC", "95 % interval", "average precision", "ECE", "Brier"]
    ece = stats["detection"]["critic_calibrated"]["ece"]
    bands = [[escape(cell) for cell in bands_cells(row)] for row in stats["bands"]]
    picture = plots.reliability(
        stats["reliability"],
        f"calibration error {ece:.3f}",
        "calibrated chance of error",
        "share that were errors",
    )
    return table(head, lines) + picture + table(list(BANDS_HEAD), bands)


def _curves(data: ReportData) -> str:
    baselines = {
        r["model"]: r["baseline_value"] for r in reversed(data.results) if "AUROC" not in r["metric"]
    }
    return (
        plots.loss_curves(data.curves, baselines)
        if any(data.curves.values())
        else "<p>No model was trained.</p>"
    )


def _synthetic(data: ReportData) -> str:
    stats = data.manifests.get("02_generate_candidates", {}).get("stats", {})
    counts = stats.get("synthetic_fraction_histogram")
    if not counts or not sum(counts):
        return "<p>No candidate was rewritten.</p>"
    accuracy = ", ".join(f"{s} {v:.1%}" for s, v in stats["generator_accuracy"].items())
    text = f"<p>{stats['rewritten']:,} rewritten candidates, {stats['unchanged']} came out as the original. Predicted tokens equal to the original's: {escape(accuracy) or 'not compared'}.</p>"
    return text + plots.histogram(counts, "synthetic fraction")


def _stages(data: ReportData) -> str:
    lines = []
    for name, m in data.manifests.items():
        rows = ", ".join(f"{k} {o['rows']:,}" for k, o in m["outputs"].items() if "rows" in o)
        memory = m["environment"]["peak_memory_mb"]
        lines.append([escape(name), f"{m['seconds']:.1f}", f"{memory:,.0f}", escape(rows)])
    return table(["stage", "seconds", "peak MB", "rows"], lines) + _settings(data)


def _settings(data: ReportData) -> str:
    import yaml

    merged: dict = {}
    for m in data.manifests.values():
        merged |= m["config"]
    text = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    return f"<details><summary>Settings</summary><pre>{escape(text)}</pre></details>"
