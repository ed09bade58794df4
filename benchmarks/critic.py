"""
Does the critic pay? Samples of one finished run under every policy at equal NFE, with a sweep over temperatures.

NLL under reference_lm (a causal model that learned from a split of its own) is compared at matched 4-gram entropy:
for each policy the line through its temperatures is read off at the entropy that `none` has at temperature 1.

python -m benchmarks.critic outputs/run_001
python -m benchmarks.critic outputs/run_001 --nfe 32 128 --samples 256
"""

import argparse
import importlib
from pathlib import Path

import numpy as np

from lib.artifacts import RunArgs, Stage
from lib.config import Config, load_config
from lib.diffusion.policies import POLICIES
from lib.report.quality import describe
from lib.report.table import aligned
from lib.runtime import Runtime

TEMPERATURES = (0.7, 0.85, 1.0, 1.2)


def measured(bench, policy: str, nfe: int, temperature: float, strength: float, count: int) -> dict:
    """One row: `count` unconditional samples under a policy."""
    settings = bench.config.sampler
    changes = {"temperature": temperature, "randomness_strength": strength}
    bench.sampler.settings = settings.model_copy(update=changes)
    ids = np.full((count, bench.context), bench.tokenizer.mask_token_id, np.int64)
    free = np.ones(ids.shape, bool)
    samples = bench.sampler.sample(ids, free, np.arange(count), POLICIES[policy], nfe)
    bench.sampler.settings = settings
    seen = bench.measure(samples.ids, free)
    row = describe(policy, nfe, samples.nfe, 0.0, seen.texts, bench.words, seen.nll, seen.size)
    return row | {"temperature": temperature, "strength": strength}


def at_entropy(rows: list[dict], entropy: float) -> float:
    """NLL of a policy read off at a 4-gram entropy, between its two nearest temperatures; NaN outside its range."""
    points = sorted((r["fourgram_entropy"], r["reference_nll"]["value"]) for r in rows)
    x, y = (np.array(v) for v in zip(*points, strict=True))
    return float(np.interp(entropy, x, y)) if x[0] <= entropy <= x[-1] else float("nan")


def stored_config(run_dir: Path) -> Config:
    """The config that a run's stages were made with, section by section from their manifests."""
    from lib.artifacts import STAGES, load_manifest

    sections: dict = load_config().model_dump(mode="json")
    for name in STAGES:
        manifest = load_manifest(run_dir / name)
        sections |= manifest["config"] if manifest else {}
    return Config.model_validate(sections)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--nfe", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3])
    options = parser.parse_args()
    config = stored_config(options.run_dir)
    script = importlib.import_module("06_sample")
    reads = ("00_check_data", "01_prepare_dataset", "04_train", "05_train_critic")
    args = RunArgs(run_dir=options.run_dir)
    with Stage("07_benchmark.py", config, args, uses=("seed",), reads=reads, restarts=True) as stage:
        bench = script.Bench(stage, config, Runtime.detect(config))
        for nfe in options.nfe:
            compare(bench, nfe, options.samples, options.strengths)
        stage.leave_incomplete("")


def compare(bench, nfe: int, count: int, strengths: list[float]) -> None:
    rows = []
    for policy in ("none", "random", "confidence", "critic"):
        for strength in strengths if policy in ("confidence", "critic") else [0.0]:
            rows += [measured(bench, policy, nfe, t, strength, count) for t in TEMPERATURES]
    target = next(r for r in rows if r["policy"] == "none" and r["temperature"] == 1.0)["fourgram_entropy"]
    lines = [
        (
            "policy",
            "passes",
            "randomness",
            "temperature",
            "NLL",
            "95 % interval",
            "char H",
            "4-gram H",
            "words",
        )
    ]
    for r in rows:
        nll = r["reference_nll"]
        lines.append(
            (r["policy"], str(r["passes"]), f"{r['strength']:.1f}", f"{r['temperature']:.2f}", f"{nll['value']:.3f}",
             f"{nll['low']:.3f} .. {nll['high']:.3f}", f"{r['character_entropy']:.3f}", f"{r['fourgram_entropy']:.3f}",
             f"{r['valid_words']['value']:.1%}" if r["valid_words"] else "-")
        )  # fmt: skip
    print(f"\nNFE {nfe}, {count} samples")
    print(aligned(lines))
    print(f"NLL at 4-gram entropy {target:.3f}:")
    for policy, strength in dict.fromkeys((r["policy"], r["strength"]) for r in rows):
        these = [r for r in rows if (r["policy"], r["strength"]) == (policy, strength)]
        print(f"  {policy:<12} randomness {strength:.1f}  {at_entropy(these, target):.3f}")


if __name__ == "__main__":
    main()
