"""
Does the critic pay? Samples of one finished run under every policy at equal NFE, with a sweep over temperatures.

NLL under reference_lm (a causal model that learned from a split of its own) is compared at matched 4-gram entropy: for
each policy the line through its temperatures is read off at the entropy of as much real text, and at less varied points.
Outside of what a policy reached at any temperature there is no number.

python -m benchmarks.critic outputs/run_001
python -m benchmarks.critic outputs/run_001 --nfe 32 128 --samples 256
"""

import argparse
from pathlib import Path

import numpy as np

from lib.artifacts import RunArgs, Stage
from lib.config import Config, load_config
from lib.diffusion.policies import POLICIES
from lib.metrics import ngram_entropy
from lib.report.bench import Bench
from lib.report.quality import characters, describe
from lib.report.table import aligned
from lib.runtime import Runtime
from lib.tokenization import decode_batch

TEMPERATURES = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0)
STEPS_BELOW_REAL = (0.0, 0.5, 1.0)  # nats of 4-gram entropy
BLIND = ("none", "random")  # policies without a view of errors to blend with noise
SEEING = ("confidence", "remdm_conf", "critic", "critic_partial", "critic_blend")


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
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3])
    options = parser.parse_args()
    config = stored_config(options.run_dir)
    reads = ("00_check_data", "01_prepare_dataset", "04_train", "05_train_critic")
    args = RunArgs(run_dir=options.run_dir)
    with Stage("07_benchmark.py", config, args, uses=("seed",), reads=reads, restarts=True) as stage:
        bench = Bench(stage, config, Runtime.detect(config))
        for nfe in options.nfe:
            compare(bench, nfe, options.samples, options.strengths)
        stage.leave_incomplete("")


def compare(bench, nfe: int, count: int, strengths: list[float]) -> None:
    rows = []
    for policy in (*BLIND, *SEEING):
        for strength in strengths if policy in SEEING else [0.0]:
            rows += [measured(bench, policy, nfe, t, strength, count) for t in TEMPERATURES]
    lines: list[tuple[str, ...]] = [
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
    real = real_entropy(bench, count)
    targets = [real - step for step in STEPS_BELOW_REAL]
    table: list[tuple[str, ...]] = [("policy", "randomness", *(f"at 4-gram H {t:.2f}" for t in targets))]
    for policy, strength in dict.fromkeys((r["policy"], r["strength"]) for r in rows):
        these = [r for r in rows if (r["policy"], r["strength"]) == (policy, strength)]
        found = (at_entropy(these, t) for t in targets)
        table.append((policy, f"{strength:.1f}", *("-" if np.isnan(v) else f"{v:.3f}" for v in found)))
    print(f"\nNLL at matched entropy; real text of this size has {real:.2f}")
    print(aligned(table), flush=True)


def real_entropy(bench, count: int) -> float:
    """4-gram entropy of as many held-out texts: it grows with their number."""
    texts = decode_batch(bench.tokenizer, bench.real_text(count))
    return ngram_entropy(characters(texts), 4)


if __name__ == "__main__":
    main()
