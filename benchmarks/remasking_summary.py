"""Tables of the re-masking benchmark, with intervals over seeds, from its lines of results.

With two seeds or more, a number has the 95 % interval of its mean over seeds (Student's t). With one seed it has its interval
over samples, where there is one: likelihoods at equal entropy have none. Differences compare policies on the same samples of
a seed; they are then averaged over seeds.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.remasking_numbers import (
    JUDGES,
    STEPS_BELOW_REAL,
    Record,
    apart,
    by_setting,
    likelihoods_at_entropy,
    mean_of,
    over_seeds,
    shared_seeds,
    wrong_by_line,
)
from benchmarks.remasking_pictures import budget_picture, pareto_picture
from lib import durable

CHURNED = "random_remask, as critic_origin"
BASELINES = (
    "ancestral",
    "random_remask",
    "random_remask, plain",
    CHURNED,
)  # of E3: the policies that all others are compared with

NOTE = "note.md"  # in OUT: what a reader must know before the tables

Table = list[list[str]]


def write_summary(out: Path, records: list[Record]) -> None:
    """Write OUT/summary.md, and the pictures OUT/pareto.svg and OUT/passes.svg where there are whole samples."""
    note = out / NOTE
    parts = [
        "# Re-masking policies\n",
        *([note.read_text(encoding="utf-8").strip()] if note.exists() else []),
        __doc__.split("\n\n", 1)[1].strip() if __doc__ else "",
        origins(records),
    ]
    for name, make in SECTIONS.items():
        chosen = [r for r in records if r["experiment"] == name]
        if chosen:
            parts.append(make(chosen))
    if any(r["experiment"] == "E3" for r in records):
        whole = apart([r for r in records if r["experiment"] == "E3"])
        for name, picture in (
            ("pareto", pareto_picture(whole)),
            ("passes", budget_picture(whole, BASELINES[0])),
        ):
            on_white = picture.replace(
                "<svg ", '<svg style="background: white" ', 1
            )  # readable on a dark page, too
            durable.write_text(out / f"{name}.svg", on_white)
    durable.write_text(out / "summary.md", "\n\n".join(parts) + "\n")


def origins(records: list[Record]) -> str:
    """The commit of the lines, and when they were measured or, where that is unknown, published."""
    found: dict[str, list[str]] = {}
    for record in records:
        source = record.get("provenance", {})
        found.setdefault(commit_of(record), []).append(
            source.get("date") or source.get("published_date") or "?"
        )
    lines = [
        f"* {commit}: {len(dates):,} lines, {min(dates)} to {max(dates)}" for commit, dates in found.items()
    ]
    return "Lines by the commit whose code measured them:\n\n" + "\n".join(lines)


def commit_of(record: Record) -> str:
    """The commit that measured a line, or the one that published it."""
    source = record.get("provenance", {})
    if commit := source.get("commit"):
        return commit[:8] + (" with changes" if source.get("dirty") else "")
    published = source.get("published_commit")
    return f"not recorded, published in {published[:8]}" if published else "not recorded"


# ------------------------------------------------------------------------------------------- helpers


def format_estimate(value: dict[str, Any] | None, percent: bool = False, signed: bool = False) -> str:
    """`0.71 [0.69, 0.73]`. A difference whose interval excludes zero is bold. The value alone where there is no interval."""
    if value is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, 3)
    sign = "+" if signed else ""
    if value["low"] is None or value["high"] is None:  # too few samples for an interval, see metrics.Estimate
        return f"{scale * value['value']:{sign}.{digits}f}"
    numbers = [f"{scale * value[k]:{sign}.{digits}f}" for k in ("value", "low", "high")]
    text = (
        numbers[0] if numbers[0] == numbers[1] == numbers[2] else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    )
    clear = signed and value["low"] < value["high"] and (value["low"] > 0 or value["high"] < 0)
    return f"**{text}**" if clear else text


def markdown(head: list[str], rows: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def passes_of(results: list[dict]) -> str:
    return f"{np.mean([r['passes'] for r in results]):.1f}".removesuffix(".0")


def seconds_of(results: list[dict]) -> str:
    """Seconds of all samples together, of the fastest seed: other work on the machine can only slow a run down."""
    times = [r["seconds"] for r in results if "seconds" in r]
    return f"{min(times):.1f}" if times else "–"


# ---------------------------------------------------------------------------------------- the tables


def detection(records: list[Record]) -> str:
    rows: Table = []
    for setting, results in by_setting(records).values():
        for view in results[0]["views"]:
            found = [r["views"][view] for r in results]
            rows.append([
                setting["masks"], f"{setting['ratio']:.0%}", str(setting["passes"]), view, str(len(found)), format_estimate(mean_of(found, "auroc")),
                format_estimate(mean_of(found, "auroc_over_confidence"), signed=True), format_estimate(mean_of(found, "average_precision")),
                format_estimate(mean_of(found, "precision"), percent=True), format_estimate(mean_of(found, "ece")),
            ])  # fmt: skip
    head = [
        "masks", "masked", "filled in", "view", "seeds", "AUROC", "over confidence",
        "average precision", "precision at budget, %", "ECE",
    ]  # fmt: skip
    return "## E1: detection of wrong tokens in held-out fills\n\n" + markdown(head, rows)


def infilling(records: list[Record]) -> str:
    rows: Table = []
    against = records[0]["result"]["against"]
    for setting, results in by_setting(records).values():
        for policy in results[0]["policies"]:
            found = [r["policies"][policy] for r in results]
            rows.append([
                f"{setting['ratio']:.0%}", str(setting["nfe"]), policy, str(len(found)), passes_of(found), seconds_of(found),
                format_estimate(mean_of(found, "accuracy"), percent=True), format_estimate(mean_of(found, f"over_{against}"), percent=True, signed=True),
                format_estimate(mean_of(found, "reference_over_truth"), signed=True), format_estimate(mean_of(found, "ngram_over_truth"), signed=True),
            ])  # fmt: skip
    head = [
        "masked", "NFE", "policy", "seeds", "passes", "seconds", "correct tokens, %", f"over {against}, %",
        "NLL over the truth's, reference", "NLL over the truth's, n-grams",
    ]  # fmt: skip
    return "## E2: infilling of sticky spans of held-out text\n\n" + markdown(head, rows)


def samples(records: list[Record]) -> str:
    records = apart(records)
    rows: Table = []
    for setting, results in by_setting(records).values():
        temperature = f"{setting['temperature']:.2f}" if "temperature" in setting else "–"
        rows.append([
            setting["policy"], str(setting.get("nfe", "–")), str(len(results)), passes_of(results), temperature,
            *(format_estimate(mean_of(results, name)) for name in (
                "reference_nll", "ngram_nll", "character_entropy", "fourgram_entropy")),
            format_estimate(mean_of(results, "valid_words"), percent=True), format_estimate(mean_of(results, "repetition"), percent=True),
            format_estimate(mean_of(results, "divergence")), f"{np.max([r['longest_copy'] for r in results]):.0f}",
            seconds_of(results),
        ])  # fmt: skip
    head = ["policy", "NFE", "seeds", "passes", "temperature", "NLL, reference", "NLL, n-grams", "character entropy",
            "4-gram entropy", "valid words, %", "repeated 8-grams, %", "n-gram divergence", "longest copy", "seconds"]  # fmt: skip
    matched = "".join(matched_table(records, judge, name) for judge, name in JUDGES)
    return (
        "## E3: whole samples\n\n![NLL over passes](passes.svg)\n\n![NLL over 4-gram entropy](pareto.svg)\n\n" + matched
        + "### Everything measured\n\n" + markdown(head, rows)
    )  # fmt: skip


def matched_table(records: list[Record], judge: str, name: str) -> str:
    """NLL at equal diversity: interpolated between a policy's temperatures, at the 4-gram entropy of real text and below.

    The columns of differences, at the entropy of real text, pair the policies of a seed: they share models and noise.
    """
    read = likelihoods_at_entropy(records, judge)
    rows: Table = []
    for policy, nfe in dict.fromkeys(key[:2] for key in read):
        own = read[policy, nfe, 0.0]
        cells = [
            format_estimate(over_seeds(list(read[policy, nfe, step].values()))) for step in STEPS_BELOW_REAL
        ]
        for other in BASELINES:
            base = read.get((other, nfe, 0.0), {})
            both = [seed for seed in own if seed in base and other != policy]
            cells.append(format_estimate(over_seeds([own[s] - base[s] for s in both]), signed=True))
        rows.append([policy, str(nfe), str(len(own)), *cells])
    head = [
        "policy", "NFE", "seeds",
        *(f"real text's entropy{f' - {s}' if s else ''}" for s in STEPS_BELOW_REAL),
    ]  # fmt: skip
    head += [f"over {other}" for other in BASELINES]
    shared = shared_seeds(records)
    means = {
        key[:2]: over_seeds([value for seed, value in values.items() if seed in shared])
        for key, values in read.items()
        if not key[2]
    }
    return (
        f"### NLL under {name} at equal 4-gram entropy\n\nMeans at the entropy of real text, over {_listed(shared)}; the lowest is bold; `–`: less diverse at every temperature, in one seed at least.\n\n"
        f"{_means_by_budget(means)}\n\nWith intervals, at lower entropies, and as differences:\n\n{markdown(head, rows)}\n\n"
    )


def _listed(shared: set[int]) -> str:
    if not shared:
        return "the seeds that all policies ran (none yet)"
    numbers = ", ".join(map(str, sorted(shared)))
    return f"{'seed' if len(shared) == 1 else 'seeds'} {numbers}, which all policies ran"


def _means_by_budget(means: dict[tuple[str, int], dict[str, float] | None]) -> str:
    """A row per policy, a column per NFE."""
    budgets, policies = sorted({n for _, n in means}), dict.fromkeys(p for p, _ in means)
    lowest = {
        n: min((m["value"] for (_, k), m in means.items() if m and k == n), default=None) for n in budgets
    }
    rows: Table = []
    for policy in policies:
        found = [(nfe, means.get((policy, nfe))) for nfe in budgets]
        texts = [
            "–" if m is None else f"**{m['value']:.3f}**" if m["value"] == lowest[n] else f"{m['value']:.3f}"
            for n, m in found
        ]
        rows.append([policy, *texts])
    return markdown(["policy", *(f"NFE {n}" for n in budgets)], rows)


def valid_strings(records: list[Record]) -> str:
    rows: Table = [
        [setting["policy"], str(setting["nfe"]), f"{setting['temperature']:g}", f"{setting['threshold']:g}" if "threshold" in setting else "–",
         str(len(results)), passes_of(results), format_estimate(mean_of(results, "valid"), percent=True), format_estimate(mean_of(results, "sentences")),
         format_estimate(mean_of(results, "different"), percent=True)]
        for setting, results in by_setting(records).values()
    ]  # fmt: skip
    head = ["policy", "NFE", "temperature", "threshold", "seeds", "passes", "correct sentences, %", "sentences per sample",
            "different sentences, %"]  # fmt: skip
    return (
        "## E4: sums in brackets, correct or wrong\n\n" + _wrong_by_budget(records)
        + "\n\n### Everything measured\n\n" + markdown(head, rows)
    )  # fmt: skip


def _wrong_by_budget(records: list[Record]) -> str:
    """A row per line, a column per number of forward passes: share of wrong sentences at the better temperature.

    The last row: errors of the best line with a critic, relative to the best one without.
    """
    wrong = wrong_by_line(records)
    budgets = sorted({nfe for line in wrong.values() for nfe in line})
    rows: Table = [
        [name, *(format_estimate(over_seeds(line.get(n, [])), percent=True) for n in budgets)]
        for name, line in wrong.items()
    ]

    def leader(nfe: int, has_critic: bool) -> str | None:
        found = [
            (np.mean(line[nfe]), name)
            for name, line in wrong.items()
            if nfe in line and name.startswith("critic") == has_critic
        ]
        return min(found)[1] if found else None

    last = ["**best with a critic / best without**"]
    for nfe in budgets:
        critic, other = leader(nfe, True), leader(nfe, False)
        if critic is None or other is None:
            last.append("–")
            continue
        pairs = zip(wrong[critic][nfe], wrong[other][nfe], strict=True)
        ratio = over_seeds([a / b if b else float("nan") for a, b in pairs])
        last.append(f"{format_estimate(ratio)}: {critic} / {other}")
    table = markdown(["policy", *(f"NFE {n}" for n in budgets)], [*rows, last])
    return f"Wrong sentences in %, at the temperature with fewer of them:\n\n{table}"


def ablations(records: list[Record]) -> str:
    trained = by_setting([r for r in records if "changes" not in r["setting"]])
    changed = by_setting([r for r in records if "changes" in r["setting"]])
    _, plain = trained.get(json.dumps({"variant": "no critic"}), ({}, []))
    _, joint = trained.get(json.dumps({"variant": "joint"}), ({}, []))
    policies = list(records[0]["result"]["policies"])

    def right(results: list[dict], policy: str) -> dict[str, float] | None:
        return mean_of([r["policies"][policy] for r in results], "accuracy")

    rows: Table = [
        [setting["variant"], str(len(results)), format_estimate(mean_of(results, "nelbo")),
         format_estimate(_difference(results, plain, "nelbo"), signed=True),
         *(format_estimate(mean_of(results, name)) for name in ("auroc", "auroc_partial", "ece", "ece_raw")),
         *(format_estimate(right(results, p), percent=True) for p in policies)]
        for setting, results in trained.values()
    ]  # fmt: skip
    head = ["variant", "seeds", "NELBO", "over no critic", "AUROC", "AUROC, partial", "ECE", "ECE, raw"]
    head += [f"correct tokens, {p}, %" for p in policies]
    text = (
        "## E5: ablations\n\n`no critic` is the generator, trained further for as many steps. The cost of a critic is the "
        "difference to it.\n\n" + markdown(head, rows)
    )
    rows = []
    for setting, results in changed.values():
        name = ", ".join(f"{k}: {v}" for k, v in setting["changes"].items())
        cells = [
            (right(results, p), _difference(results, joint, "policies", p, "accuracy", "value"))
            for p in policies
        ]
        rows.append([
            name, str(len(results)),
            *(text for own, more in cells for text in (format_estimate(own, True), format_estimate(more, True, signed=True))),
        ])  # fmt: skip
    head = [
        "sampler",
        "seeds",
        *(text for p in policies for text in (f"correct tokens, {p}, %", "over joint")),
    ]
    return text + "\n\nThe joint critic with other settings of the sampler:\n\n" + markdown(head, rows)


def _difference(results: list[dict], others: list[dict], *path: str) -> dict[str, float] | None:
    """Over seeds, of the numbers at a path; None unless both have the same seeds, or for `others` themselves."""
    if results is others or len(results) != len(others):
        return None

    def at(result: Any) -> float:
        for key in path:
            result = result[key]
        return result

    return over_seeds([at(a) - at(b) for a, b in zip(results, others, strict=True)])


def costs(records: list[Record]) -> str:
    rows: Table = [
        [setting["policy"], str(setting["nfe"]), str(len(results)), passes_of(results), format_estimate(mean_of(results, "seconds_per_sample")),
         format_estimate(mean_of(results, "bare_share"), percent=True),
         "yes" if all(r["same_alone"] for r in results) else "**NO**"]
        for setting, results in by_setting(records).values()
    ]  # fmt: skip
    head = [
        "policy", "NFE", "seeds", "passes", "seconds per sample", "bare forward passes in them, %",
        "same at batch 1 and 64",
    ]  # fmt: skip
    return "## E6: cost\n\n" + markdown(head, rows)


SECTIONS = {
    "E1": detection,
    "E2": infilling,
    "E3": samples,
    "E4": valid_strings,
    "E5": ablations,
    "E6": costs,
}
