"""Sampling with plain and with compiled layers: the same samples, in one run."""

import statistics
import time
from typing import Any

import numpy as np

from benchmarks.speed_setup import ROUNDS, tokenizer_of_size
from lib.config import load_config
from lib.diffusion.policies import POLICIES
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import MaskedTexts
from lib.models.build import make_model, model_config
from lib.models.compiling import CompiledLayers
from lib.runtime import Runtime

SAMPLES, PASSES = 64, 32
COMPARED = ("ancestral", "confidence_remask", "critic_origin")


def sampler_of(compiled: bool) -> tuple[Sampler, CompiledLayers]:
    """A sampler with a new model of the default architecture, with a critic, and the layers of the model."""
    config = load_config()
    runtime, tokenizer = Runtime.detect(config), tokenizer_of_size(70)
    settings = model_config(config.architecture, "bidirectional", len(tokenizer), critic_layers=0)
    model = make_model("language_model", settings, 0, "speed").to(runtime.device).eval()
    layers = CompiledLayers(model, "on" if compiled else "off", 0, learns=False, label="sampler")
    sampler = Sampler(
        model, tokenizer.mask_token_id, sorted(set(tokenizer.all_special_ids)), runtime, config.sampler, config.seed,
        context=config.architecture.context,
    )  # fmt: skip
    return sampler, layers


def compare_sampling() -> dict[str, Any]:
    """Seconds for 64 samples of 128 tokens by 32 forward passes, plain and compiled, for several policies."""
    plain_sampler, _ = sampler_of(compiled=False)
    compiled_sampler, layers = sampler_of(compiled=True)
    samplers = {"plain": plain_sampler, "compiled": compiled_sampler}
    length = load_config().architecture.context
    shape = (SAMPLES, length)
    texts = MaskedTexts(np.full(shape, plain_sampler.mask_id), np.ones(shape, bool), np.arange(SAMPLES))
    seconds: dict[str, dict[str, list[float]]] = {p: {name: [] for name in samplers} for p in COMPARED}
    for _ in range(ROUNDS + 1):  # the first round does not count
        for policy in COMPARED:
            for name, sampler in samplers.items():
                begin = time.perf_counter()
                sampler.sample(texts, POLICIES[policy], PASSES)
                seconds[policy][name].append(time.perf_counter() - begin)
        if not layers.compiled:
            raise SystemExit("the layers are not compiled here, so there is nothing to compare")
    found: dict[str, Any] = {"rounds": ROUNDS, "policies": {}}
    for policy, times in seconds.items():
        plain, compiled = (statistics.median(times[name][1:]) for name in ("plain", "compiled"))
        ratio = statistics.median(
            a / b for a, b in zip(times["plain"][1:], times["compiled"][1:], strict=True)
        )
        found["policies"][policy] = {"plain": plain, "compiled": compiled, "ratio": ratio}
        print(f"{policy:20} plain {plain:6.2f} s   compiled {compiled:6.2f} s   ratio {ratio:.2f}")
    found["ratio"] = min(figures["ratio"] for figures in found["policies"].values())
    return found
