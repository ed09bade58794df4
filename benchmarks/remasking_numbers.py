"""Numbers from the benchmark's lines: means over seeds, and likelihoods at equal diversity."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

REAL, AUTOREGRESSIVE = "real text", "autoregressive"
STEPS_BELOW_REAL = (0.0, 0.25)  # nats of 4-gram entropy at which likelihoods are compared
JUDGES = (("reference_nll", "the reference model"), ("ngram_nll", "n-grams"))

Record = dict[str, Any]
Likelihoods = dict[tuple[str, int, float], dict[int, float]]


def over_seeds(estimates: Sequence[dict[str, Any] | float | None]) -> dict[str, Any] | None:
    """{"value", "low", "high"} of the mean; None where a seed has no number.

    One seed shows nothing about others: a plain number has no interval then, and an estimate keeps its own.
    """
    if not estimates or any(e is None for e in estimates):
        return None
    values = np.array([e["value"] if isinstance(e, dict) else e for e in estimates], float)
    if not np.isfinite(values).all():
        return None
    mean = float(values.mean())
    if len(values) == 1:
        only = estimates[0]
        return only if isinstance(only, dict) else {"value": mean, "low": None, "high": None}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"value": mean, "low": mean - half, "high": mean + half}


def at_entropy(rows: list[tuple[float, float]], entropy: float) -> float:
    """NLL at a 4-gram entropy, from (entropy, NLL) points of several temperatures; NaN outside their range.

    Interpolates with the monotone cubic curve through the points (Fritsch and Carlson, 1980).
    """
    from scipy.interpolate import PchipInterpolator

    x, y = np.array(sorted(dict(rows).items())).reshape(-1, 2).T
    if len(x) < 2 or not x[0] <= entropy <= x[-1]:
        return float(y[0]) if len(x) and x[0] == entropy else float("nan")
    return float(PchipInterpolator(x, y)(entropy))


def by_setting(records: Sequence[Record]) -> dict[str, tuple[dict, list[dict]]]:
    """Setting as text -> (setting, the results of its seeds in their order)."""
    found: dict[str, tuple[dict, list[dict]]] = {}
    for record in sorted(records, key=lambda r: r["seed"]):
        name = json.dumps(record["setting"], sort_keys=True)
        found.setdefault(name, (record["setting"], []))[1].append(record["result"])
    return found


def mean_of(results: list[dict], *path: str) -> dict[str, float] | None:
    """Mean over seeds of the numbers at a path of keys."""

    def at(result: Any) -> Any:
        for key in path:
            result = result[key]
        return result

    return over_seeds([at(result) for result in results])


def apart(records: list[Record]) -> list[Record]:
    """Lines of whole samples, split into one line per run, with NFE and temperature in its setting."""
    return [
        record | {"setting": record["setting"] | {k: run[k] for k in ("nfe", "temperature")}, "result": run}
        for record in records
        for run in record["result"].get("runs", [])
    ] + [record for record in records if "runs" not in record["result"]]


def shared_seeds(records: list[Record]) -> set[int]:
    """The seeds that every policy of whole samples has run. Means of policies are compared over them."""
    ran: dict[str, set[int]] = {}
    for record in records:
        ran.setdefault(record["setting"]["policy"], set()).add(record["seed"])
    return set.intersection(*ran.values()) if ran else set()


def likelihoods_at_entropy(records: list[Record], judge: str) -> Likelihoods:
    """(policy, NFE, step below the 4-gram entropy of real text) -> seed -> NLL there.

    NaN outside the range of the temperatures, and where a seed's samples were not diverse enough to be tried.
    """
    real = {r["seed"]: r["result"]["fourgram_entropy"] for r in records if r["setting"]["policy"] == REAL}
    curves: dict[tuple[str, int], dict[int, list[tuple[float, float]]]] = {}
    for record in records:
        setting, result = record["setting"], record["result"]
        if setting["policy"] != REAL and record["seed"] in real:
            seeds = curves.setdefault((setting["policy"], setting["nfe"]), {})
            seeds.setdefault(record["seed"], []).append((result["fourgram_entropy"], result[judge]["value"]))
    ran: dict[str, set[int]] = {}
    for (policy, _), seeds in curves.items():
        ran.setdefault(policy, set()).update(seeds)
    return {
        (policy, nfe, step): {
            seed: at_entropy(seeds.get(seed, []), real[seed] - step) for seed in sorted(ran[policy])
        }
        for (policy, nfe), seeds in curves.items()
        for step in STEPS_BELOW_REAL
    }


def of_experiment(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record["experiment"] == name]


def wrong_by_line(sums: Sequence[Record]) -> dict[str, dict[int, list[float]]]:
    """Line -> NFE -> share of wrong sentences of each seed, at the temperature with fewer of them. `sums`: lines of E4."""
    seeds = {record["seed"] for record in sums}
    wrong: dict[str, dict[int, list[float]]] = {}
    for setting, results in by_setting(sums).values():
        if "threshold" in setting or len(results) < len(seeds):
            continue
        line, nfe = wrong.setdefault(setting["policy"], {}), setting["nfe"]
        found = [1 - result["valid"]["value"] for result in results]
        if nfe not in line or np.mean(found) < np.mean(line[nfe]):
            line[nfe] = found
    return wrong
