"""The re-masking tables of the results page, from docs/remasking/results.jsonl. docs/remasking/summary.md has all of them.

`±` is the half-width of the 95 % interval of a mean over seeds (Student's t).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.remasking_numbers import (
    AUTOREGRESSIVE,
    REAL,
    Record,
    apart,
    by_setting,
    likelihoods_at_entropy,
    of_experiment,
    over_seeds,
    shared_seeds,
    wrong_by_line,
)
from benchmarks.remasking_summary import BASELINES
from benchmarks.result_files import markdown
from lib.sections.sampler import POLICIES

JUDGE = "reference_nll"
LEADER = "critic_origin"  # the policy that the others are compared with
DETECTORS = ("confidence", "fresh_confidence", "critic", "critic_blend", "confidence_given")


def in_order(line: str) -> int:
    """Place of a line in the order of the policies; `critic, plain` is a line of `critic`."""
    policy = line.split(",")[0]
    return POLICIES.index(policy) if policy in POLICIES else len(POLICIES)


def format_half_width(
    mean: dict[str, Any] | None, digits: int = 3, percent: bool = False, signed: bool = False
) -> str:
    """`2.547 ± 0.058`; the value alone without an interval, a dash where a seed has no number."""
    if mean is None:
        return "–"
    scale = 100 if percent else 1
    text = f"{scale * mean['value']:{'+' if signed else ''}.{digits}f}"
    if mean["low"] is not None and mean["high"] is not None:
        text += f" ± {scale * (mean['high'] - mean['low']) / 2:.{digits}f}"
    return text.replace("-", "−")


def likelihood_table(records: Sequence[Record]) -> str:
    """A row per policy, a column per number of forward passes: NLL at the 4-gram entropy of real text."""
    samples = apart(of_experiment(records, "E3"))
    seeds = shared_seeds(samples)
    means = {
        (policy, nfe): over_seeds([value for seed, value in found.items() if seed in seeds])
        for (policy, nfe, step), found in likelihoods_at_entropy(samples, JUDGE).items()
        if not step
    }
    policies = sorted(dict.fromkeys(policy for policy, _ in means), key=in_order)
    budgets = sorted({nfe for _, nfe in means})
    best = {
        nfe: min(m["value"] for (name, n), m in means.items() if m and n == nfe and name != AUTOREGRESSIVE)
        for nfe in budgets
    }
    rows = []
    for policy in policies:
        cells = [(nfe, means.get((policy, nfe), ...)) for nfe in budgets]
        texts = [
            ""
            if mean is ...
            else f"**{format_half_width(mean)}**"
            if mean and mean["value"] == best[nfe]
            else format_half_width(mean)
            for nfe, mean in cells
        ]
        rows.append([f"`{policy}`" if policy != AUTOREGRESSIVE else policy, *texts])
    return markdown(["policy", *(f"NFE {nfe}" for nfe in budgets)], rows)


def seeds_in_words(records: Sequence[Record]) -> str:
    """The seeds that every policy of whole samples has run."""
    seeds = shared_seeds(apart(of_experiment(records, "E3")))
    return ", ".join(map(str, sorted(seeds)))


def difference_table(records: Sequence[Record]) -> str:
    """The leader's NLL minus that of others, with the same models and noise; over all seeds that both have run."""
    found = likelihoods_at_entropy(apart(of_experiment(records, "E3")), JUDGE)
    budgets = sorted({nfe for policy, nfe, _ in found if policy == LEADER})
    rows = []
    for other in (*BASELINES, "remdm_conf"):
        cells, seeds = [], set()
        for nfe in budgets:
            own, base = found[LEADER, nfe, 0.0], found.get((other, nfe, 0.0), {})
            both = [seed for seed in own if seed in base]
            seeds |= set(both)
            cells.append(format_half_width(over_seeds([own[s] - base[s] for s in both]), signed=True))
        rows.append([f"minus `{other}`", str(len(seeds)), *cells])
    return markdown([f"`{LEADER}`", "seeds", *(f"NFE {nfe}" for nfe in budgets)], rows)


def real_text_table(records: Sequence[Record]) -> str:
    """4-gram entropy and NLL of real text, of as many held-out texts as a policy has samples."""
    real = [r["result"] for r in of_experiment(records, "E3") if r["setting"]["policy"] == REAL]
    entropy, nll = (over_seeds([r[key] for r in real]) for key in ("fourgram_entropy", JUDGE))
    return markdown(
        ["", "4-gram entropy", "NLL, nats/character"],
        [["real text", format_half_width(entropy), format_half_width(nll)]],
    )


# -------------------------------------------------------------------------------------------------- sums


def best_line(wrong: dict[str, dict[int, list[float]]], nfe: int, has_critic: bool) -> str:
    """The line with the fewest wrong sentences at one NFE, of those with or without a critic."""
    lines = [name for name in wrong if nfe in wrong[name] and name.startswith("critic") == has_critic]
    return min(lines, key=lambda name: float(np.mean(wrong[name][nfe])))


def sums_table(records: Sequence[Record]) -> str:
    """Share of correct sentences; then the errors of the best line with a critic, relative to the best one without."""
    wrong = wrong_by_line(of_experiment(records, "E4"))
    budgets = sorted({nfe for line in wrong.values() for nfe in line})
    leaders = {nfe: [best_line(wrong, nfe, critic) for critic in (True, False)] for nfe in budgets}
    line_names = [n for n in wrong if "," not in n or any(n in pair for pair in leaders.values())]
    rows = []
    for name in sorted(line_names, key=in_order):
        means = [over_seeds([1 - share for share in wrong[name][nfe]]) for nfe in budgets]
        texts = [
            f"**{format_half_width(mean, 1, percent=True)}**"
            if name in leaders[nfe]
            else format_half_width(mean, 1, percent=True)
            for nfe, mean in zip(budgets, means, strict=True)
        ]
        rows.append([f"`{name}`", *texts])
    ratios = []
    for nfe in budgets:
        critic, other = leaders[nfe]
        pairs = zip(wrong[critic][nfe], wrong[other][nfe], strict=True)
        ratio = over_seeds([a / b if b else None for a, b in pairs])
        ratios.append(format_half_width(ratio, 2))
    rows.append(["errors of the best with a critic / of the best without", *ratios])
    return markdown(["policy", *(f"NFE {nfe}" for nfe in budgets)], rows)


# ------------------------------------------------------------------------------- infilling and detection


def infilling_table(records: Sequence[Record]) -> str:
    """Share of correct tokens in sticky spans of held-out text."""
    found = {
        setting["nfe"]: results for setting, results in by_setting(of_experiment(records, "E2")).values()
    }
    budgets = sorted(found)
    rows = []
    for name in sorted(found[budgets[0]][0]["policies"], key=in_order):
        means = [over_seeds([r["policies"][name]["accuracy"] for r in found[nfe]]) for nfe in budgets]
        rows.append([f"`{name}`", *(format_half_width(mean, 1, percent=True) for mean in means)])
    return markdown(["policy, correct tokens, %", *(f"NFE {nfe}" for nfe in budgets)], rows)


def detection_table(records: Sequence[Record]) -> str:
    """AUROC of wrong tokens in held-out fills, by who judges them."""
    stored, fresh, critic, both, ceiling = DETECTORS
    rows = []
    for setting, results in by_setting(of_experiment(records, "E1")).values():
        views = [result["views"] for result in results]
        auroc = {name: over_seeds([view[name]["auroc"]["value"] for view in views]) for name in DETECTORS}
        lead = {
            name: over_seeds([view[name]["auroc_over_confidence"]["value"] for view in views])
            for name in (critic, both)
        }
        values = {name: f"{mean['value']:.3f}" if mean else "–" for name, mean in auroc.items()}
        rows.append([
            f"{setting['masks']}, {setting['ratio']:.0%}, {setting['passes']}", values[stored], values[fresh],
            values[critic], format_half_width(lead[critic], signed=True), values[both], format_half_width(lead[both], signed=True), values[ceiling],
        ])  # fmt: skip
    head = ["masks, ratio, passes", "stored confidence", "fresh confidence", "critic", "minus stored",
            "critic and stored", "minus stored", "upper bound"]  # fmt: skip
    return markdown(head, rows)
