"""Pictures of the re-masking benchmark: likelihood against diversity, and against the number of forward passes."""

import numpy as np

from benchmarks.remasking_numbers import (
    AUTOREGRESSIVE,
    JUDGES,
    REAL,
    Record,
    by_setting,
    likelihoods_at_entropy,
    over_seeds,
    shared_seeds,
)
from lib.report import plots


def pareto_picture(records: list[Record]) -> str:
    """NLL under the reference model against 4-gram entropy: a panel for the lowest, a middle and the highest NFE.

    Means over the seeds that all policies ran.
    """
    shared = shared_seeds(records)
    records = [r for r in records if r["seed"] in shared]
    lines = [r for r in records if r["setting"]["policy"] not in (REAL, AUTOREGRESSIVE)]
    causal = by_setting([r for r in records if r["setting"]["policy"] == AUTOREGRESSIVE]).values()
    budgets = sorted({r["setting"]["nfe"] for r in lines})
    picked = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]}) if budgets else []
    real = [r["result"] for r in records if r["setting"]["policy"] == REAL]
    panels = {}
    for nfe in picked:
        panel: dict[str, list[tuple[float, float]]] = {}
        for setting, results in by_setting([r for r in lines if r["setting"]["nfe"] == nfe]).values():
            panel.setdefault(setting["policy"], []).append(_mean_point(results))
        if causal:  # has one NFE: a forward pass per token
            passes = next(iter(causal))[0]["nfe"]
            panel[f"{AUTOREGRESSIVE}, {passes} passes"] = [_mean_point(results) for _, results in causal]
        panels[f"{nfe} passes"] = panel | ({REAL: [_mean_point(real)]} if real else {})
    at = _mean_point(real)[0] if real else 0.0
    near = (at - 1.25, at + 0.5) if real else None
    return plots.pareto(panels, "4-gram entropy, nats", "NLL under the reference model, nats", near)


def budget_picture(records: list[Record], base: str) -> str:
    """NLL under the reference model against NFE, at the entropy of real text, and the difference to `base`.

    Likelihoods are means over the seeds that all policies ran; differences pair the policies of a seed, over all seeds of
    both.
    """
    records = [r for r in records if r["setting"]["policy"] != AUTOREGRESSIVE]  # far lower, and at one NFE
    shared = shared_seeds(records)
    read = likelihoods_at_entropy(records, JUDGES[0][0])
    panels: dict[str, dict[str, dict[float, dict[str, float]]]] = {}
    for (policy, nfe, step), values in read.items():
        if step:
            continue
        other = read.get((base, nfe, step), {})
        differences = [value - other[seed] for seed, value in values.items() if seed in other]
        for title, numbers in (
            ("at the 4-gram entropy of real text", [v for seed, v in values.items() if seed in shared]),
            (f"minus {base}, within a seed", differences),
        ):
            line = panels.setdefault(title, {}).setdefault(policy, {})
            if (found := over_seeds(numbers)) is not None:
                line[nfe] = found
    means = next(iter(panels.values()), {})
    budgets = max(map(len, means.values()), default=0)
    whole = {
        name: sum(e["value"] for e in line.values()) for name, line in means.items() if len(line) == budgets
    }
    best = min(whole, key=lambda name: whole[name], default=None)
    return plots.over_passes(panels, "NLL under the reference model, nats", cut=True, strong=best)


def _mean_point(results: list[dict]) -> tuple[float, float]:
    return (
        float(np.mean([r["fourgram_entropy"] for r in results])),
        float(np.mean([r["reference_nll"]["value"] for r in results])),
    )
