"""
Does staged unmasking pay? Three methods of drawing masks, compared by the NELBO on held-out text.

continuous  the bound itself: k of n tokens, k uniform, every row has the weight 1 / k
random      one stage of all mask ratios from the start: the same masks, but equal weights of the masked tokens in a row
staged      the stages of configs/staged.yaml, low mask ratios first; each joins when the stage before stops improving

tinyshakespeare characters, contiguous 90/10 split, the model of configs/nelbo.yaml. All methods see the same number of
tokens; only the generator's masks differ. An interrupted benchmark continues: finished models are not trained again.

python -m benchmarks.staging                                   # 500 steps, three seeds: about an hour on one core
python -m benchmarks.staging --steps 40 --seeds 1              # for trying out
"""

import argparse
import json
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.prepared import prepare, shakespeare, train_one
from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib.report.table import aligned

CHECKS = 40  # evaluations per run; a stage can end at each of them
METHODS = {  # config files beside configs/nelbo.yaml, and settings
    "continuous": ([], []),
    "random": ([], ["diffusion.stages=[{type: random, max_masked_ratio: 1.0, val_loss_stale_count: 1}]"]),
    "staged": (["configs/staged.yaml"], []),
}


def run(method: str, seed: int, steps: int) -> dict:
    """Held-out figures of one model, and the step at which each stage joined."""
    files, settings = METHODS[method]
    overrides = [
        *settings, f"data.path={shakespeare()}", f"seed={seed}", f"models.generator.training.steps={steps}", f"models.generator.training.evaluate_every={max(1, steps // CHECKS)}",
    ]  # fmt: skip
    configs, name = ["configs/nelbo.yaml", *files], f"staging_{seed}_{method}_{steps}"
    config, folder = prepare(name, configs, overrides)
    record = train_one("generator", config, folder)
    text = (folder / "04_train" / "generator" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    stages = [(line["step"], int(line["selection"].get("stage", 0))) for line in lines]
    joined = {stage: step for step, stage in reversed(stages)}
    return record["held_out"] | {"joined": [joined[s] for s in sorted(joined)][1:]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    runs = {m: [run(m, seed, options.steps) for seed in range(options.seeds)] for m in METHODS}
    masks = {method: summary(rows, runs["continuous"]) for method, rows in runs.items()}
    say(masks)
    write(options.out, "staging", {"steps": options.steps, "masks": masks})


def summary(rows: list[dict], bound: list[dict]) -> dict[str, Any]:
    """One method over its seeds; `gain`: how much lower its NELBO is than that of the bound itself."""
    nelbo = np.array([row["nelbo"] for row in rows])
    found = {
        "nelbo": nelbo.tolist(),
        "mean": float(nelbo.mean()),
        "masked_accuracy": float(np.mean([row["masked_accuracy"] for row in rows])),
        "joined": [row["joined"] for row in rows],
    }
    return found if rows is bound else found | {"gain": paired([row["nelbo"] for row in bound] - nelbo)}


def say(masks: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    lines = [("masks", "NELBO of each seed", "mean", "less than continuous (95 %)", "masked accuracy", "stages joined at")]  # fmt: skip
    for method, row in masks.items():
        gain = row.get("gain")
        difference = "-" if gain is None else f"{gain['value']:+.3f}"
        if gain is not None and gain["half_width"] is not None:
            difference += f" +- {gain['half_width']:.3f}"
        each = " ".join(f"{value:.3f}" for value in row["nelbo"])
        joined = "; ".join(" ".join(map(str, steps)) or "-" for steps in row["joined"])
        accuracy = f"{row['masked_accuracy']:.3f}"
        lines.append((method, each, f"{row['mean']:.3f}", difference, accuracy, joined))
    print(aligned(lines))


def paired(gains: np.ndarray) -> dict[str, float | None]:
    """Mean over seeds and half-width of its 95 % interval (Student's t); None for one seed."""
    if len(gains) < 2:
        return {"value": float(gains.mean()), "half_width": None}
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return {"value": float(gains.mean()), "half_width": float(half)}


if __name__ == "__main__":
    main()
