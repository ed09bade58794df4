"""
Does staged unmasking pay? Three ways to draw masks, the same tokens, compared by one NELBO on held-out text.

continuous  the bound itself: k of n tokens, k uniform, every row weighed by 1 / k
random      one stage of all ratios from the start: the same masks, every masked token weighed alike within its row
staged      the stages of configs/staged.yaml, light masks first; each joins when the one before is stale

tinyshakespeare characters, 90/10 contiguous, the model of configs/nelbo.yaml; only the generator's masks differ. Resumable:
what is trained is not trained again.

python -m benchmarks.staging                                   # 500 steps, three seeds: about an hour on one core
python -m benchmarks.staging --steps 40 --seeds 1              # for trying out
"""

import argparse
import json

import numpy as np
from scipy import stats

from benchmarks.prepared import prepare, shakespeare
from benchmarks.provenance import say_provenance
from lib.report.table import aligned
from lib.training.train_model import RECORD, train_model

CHECKS = 40  # evaluations of a run: so often a stage may end
WAYS = {  # config files beside configs/nelbo.yaml, and settings
    "continuous": ([], []),
    "random": ([], ["diffusion.stages=[{type: random, max_masked_ratio: 1.0, val_loss_stale_count: 1}]"]),
    "staged": (["configs/staged.yaml"], []),
}


def run(way: str, seed: int, steps: int) -> dict:
    """Held-out figures of one model, and the step at which each stage joined."""
    files, settings = WAYS[way]
    overrides = [
        *settings, f"data.path={shakespeare()}", f"seed={seed}", f"models.generator.training.steps={steps}", f"models.generator.training.evaluate_every={max(1, steps // CHECKS)}",
    ]  # fmt: skip
    config, stage_inputs, folder = prepare(f"staging_{seed}", ["configs/nelbo.yaml", *files], overrides)
    own = folder / f"{way}_{steps}"
    if not (own / RECORD).exists():
        train_model("generator", config.models["generator"], stage_inputs, own, start=None)
    record = json.loads((own / RECORD).read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    stages = [(line["step"], int(line["selection"].get("stage", 0))) for line in lines]
    joined = {stage: step for step, stage in reversed(stages)}
    return record["held_out"] | {"joined": [joined[s] for s in sorted(joined)][1:]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    say_provenance()
    found = {way: [run(way, seed, options.steps) for seed in range(options.seeds)] for way in WAYS}
    first = np.array([row["nelbo"] for row in found["continuous"]])
    lines = [
        (
            "masks",
            "NELBO of each seed",
            "mean",
            "less than continuous (95 %)",
            "masked accuracy",
            "stages joined at",
        )
    ]
    for way, rows in found.items():
        nelbo = np.array([row["nelbo"] for row in rows])
        joined = "; ".join(" ".join(map(str, row["joined"])) or "-" for row in rows)
        accuracy = np.mean([row["masked_accuracy"] for row in rows])
        each = " ".join(f"{value:.3f}" for value in nelbo)
        lines.append((way, each, f"{nelbo.mean():.3f}", paired(first - nelbo), f"{accuracy:.3f}", joined))
    print(aligned(lines))


def paired(gains: np.ndarray) -> str:
    """Mean and 95 % interval over seeds."""
    if len(gains) < 2:
        return f"{gains.mean():+.3f}"
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return f"{gains.mean():+.3f} +- {half:.3f}"


if __name__ == "__main__":
    main()
