"""Sections that all reports share: the data of the run, and its settings and provenance."""

from html import escape
from typing import Any

from lib.report import plots
from lib.report.html_table import table
from lib.report.page import Section, figure, part

HASH_DIGITS = 12  # of a SHA-256 or a commit


def facts(settings: str, manifests: dict[str, dict]) -> list[str]:
    """Lines for the header: settings, time, memory, device."""
    if not manifests:
        return [settings]
    seconds = sum(m["seconds"] for m in manifests.values())
    memory = max(m["environment"]["peak_memory_mb"] for m in manifests.values())
    last = next(reversed(manifests.values()))["environment"]
    cost = f"The stages before this one took {_duration(seconds)} and at most {memory:,.0f} MB of memory."
    machine = (
        f"torch {last.get('torch', '?')}, device {last.get('device', '?')}, precision {last.get('precision', '?')}, "
        f"threads {last.get('threads', '?')}"
    )
    return [settings, f"{cost} {machine}."]


def data_section(manifests: dict[str, dict]) -> Section:
    """What the models learned from: splits, candidates, rewards, synthetic text."""
    parts = [
        part("Splits", "Models learn from train. Selection chooses the best step. Reported figures are of held-out examples; the reference model learns from reference.", _splits(manifests)),
        part("Candidates and rewards", "", _candidates(manifests)),
        part("Synthetic text", "Share of the tokens of a rewritten candidate that the masked language model generated.", _synthetic(manifests)),
    ]  # fmt: skip
    return Section("Data and synthetic text", "What the models learned from.", "".join(parts))


def provenance_section(manifests: dict[str, dict]) -> Section:
    """Stages, commands, code, library versions and settings."""
    parts = [
        part("Stages", "", _stages(manifests)),
        part("Code and libraries", "", _code(manifests)),
        f"<details><summary>All settings of the run</summary><pre>{escape(_settings(manifests))}</pre></details>",
    ]
    caption = "What ran, for how long, and with which settings. manifest.json of each stage has the hashes of all files."
    return Section("Settings and provenance", caption, "".join(parts))


def _stats(manifests: dict[str, dict], stage: str) -> dict[str, Any]:
    return manifests.get(stage, {}).get("stats", {})


def _splits(manifests: dict[str, dict]) -> str:
    stats = _stats(manifests, "01_prepare_dataset")
    if not stats.get("examples"):
        return "<p>Nothing is recorded.</p>"
    tokens = stats.get("tokens", {})
    lines = [[escape(s), f"{n:,}", f"{tokens.get(s, 0):,}"] for s, n in stats["examples"].items()]
    dropped = "; ".join(f"{n:,} x {reason}" for reason, n in stats.get("dropped", {}).items())
    vocabulary = f"Vocabulary of {stats['vocabulary']:,}, {stats['characters_per_token']:.2f} characters per token. " if "vocabulary" in stats else ""  # fmt: skip
    text = f"{vocabulary}Not used: {dropped or 'nothing'}."
    return table(["split", "examples", "tokens"], lines) + f'<p class="caption">{escape(text)}</p>'


def _candidates(manifests: dict[str, dict]) -> str:
    made, rewards = _stats(manifests, "02_generate_candidates"), _stats(manifests, "03_build_rewards")
    if "kinds" not in made:
        return "<p>Nothing is recorded.</p>"
    kinds = table(["kind of candidate", "number"], [[escape(k), f"{n:,}"] for k, n in made["kinds"].items()])
    dropped = "; ".join(f"{n:,} x {reason}" for reason, n in made.get("dropped", {}).items())
    text = f"Examples without candidates: {dropped or 'none'}."
    if "mean" in rewards:
        text += f" Mean reward {rewards['mean']:.3f}, standard deviation {rewards['standard_deviation']:.3f}."
    return kinds + f'<p class="caption">{escape(text)}</p>'


def _synthetic(manifests: dict[str, dict]) -> str:
    stats = _stats(manifests, "02_generate_candidates")
    counts = stats.get("synthetic_fraction_histogram")
    if not counts or not sum(counts):
        return "<p>No candidate was rewritten.</p>"
    accuracy = ", ".join(f"{s} {v:.1%}" for s, v in stats["generator_accuracy"].items())
    text = (
        f"{stats['rewritten']:,} rewritten candidates; {stats['unchanged']:,} of them equal the original. Generated tokens "
        f"that equal the original's: {accuracy or 'not compared'}."
    )
    picture = figure(plots.histogram(counts, "synthetic fraction"), "histogram of the synthetic fraction")
    return f"<p>{escape(text)}</p>{picture}"


def _stages(manifests: dict[str, dict]) -> str:
    lines = []
    for name, m in manifests.items():
        rows = ", ".join(f"{k} {o['rows']:,}" for k, o in m["outputs"].items() if "rows" in o)
        memory = m["environment"]["peak_memory_mb"]
        lines.append([escape(name), f"{m['seconds']:.1f}", f"{memory:,.0f}", escape(rows)])
    return table(["stage", "seconds", "peak memory, MB", "rows written"], lines)


def _code(manifests: dict[str, dict]) -> str:
    """Commits and versions; several in a cell if the stages differ."""
    if not manifests:
        return "<p>Nothing is recorded.</p>"
    code = [m.get("code", {}) for m in manifests.values()]
    commits = [
        (c["commit"][:HASH_DIGITS] + (" with changes" if c.get("dirty") else "")) if c.get("commit") else "unknown"
        for c in code
    ]  # fmt: skip
    lines = [["commit", escape(", ".join(dict.fromkeys(commits)))]]
    names = ("python", "torch", "transformers", "tokenizers", "peft", "pyarrow", "numpy")
    for name in names:
        found = [m["environment"][name] for m in manifests.values() if name in m["environment"]]
        if found:
            lines.append([name, escape(", ".join(dict.fromkeys(found)))])
    commands = "\n".join(" ".join(m.get("command", [])) for m in manifests.values())
    details = f"<details><summary>Commands</summary><pre>{escape(commands)}</pre></details>"
    return table(["what", "version"], lines) + details


def _settings(manifests: dict[str, dict]) -> str:
    import yaml

    merged: dict = {}
    for m in manifests.values():
        merged |= m["config"]
    return yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"
