"""
Causal characters of tinyshakespeare to 1.88 nats: our recipe against the plain one, one after the other in one run.

Training time is the loop's own clock over all steps, without evaluation. Both validate on every held-out window.

python -m benchmarks.causal_speedrun
python -m benchmarks.causal_speedrun --skip-plain --set models.generator.training.steps=300
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.prepared import prepare, shakespeare
from benchmarks.provenance import say_provenance
from lib.config import Config
from lib.models.build import start_model
from lib.training.loop import train
from lib.training.objectives.build import make_objective
from lib.training.tables import Materials

GOAL = 1.88


def plain_model(config: Config, vocabulary: int) -> torch.nn.Module:
    """GPT-2 of transformers at the size of the config's architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    a = config.models["generator"].architecture
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_layer=a.layers, n_embd=a.width, n_head=a.heads, n_positions=a.context,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def run(config: Config, materials: Materials, plain: bool) -> tuple[float, float, float]:
    """(validation nats per character, training seconds, tokens per second)."""
    spec = config.models["generator"]
    vocabulary = len(materials.tokenizer)
    objective = make_objective("generator", spec, materials, spec.architecture.context)
    if plain:
        model = plain_model(config, vocabulary)
    else:
        model, _ = start_model(
            "language_model", spec.architecture, "causal", vocabulary, config.seed, "generator"
        )
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, objective, spec.training, materials.runtime, Path(folder), seed=config.seed,
                       label="plain" if plain else "ours", save=lambda m, path: (path / "none").touch())  # fmt: skip
    # The loop leaves the last weights in the model; with a running mean, those are what was evaluated at the end
    return result.metrics["nll"], result.seconds, result.tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--skip-plain", action="store_true")
    options = parser.parse_args()
    say_provenance()
    overrides = [f"data.path={shakespeare()}", "training.evaluation_examples=100000"]
    found = {}
    for plain in (False,) if options.skip_plain else (False, True):
        configs = ["configs/speedrun.yaml"] + (["configs/speedrun_plain.yaml"] if plain else [])
        config, materials, _ = prepare("speedrun", configs, overrides + ([] if plain else options.overrides))
        found[plain] = run(config, materials, plain)
    print(f"{'recipe':<8}{'validation, nats/char':>24}{'training, seconds':>20}{'tokens/s':>12}")
    for plain, (nll, seconds, speed) in found.items():
        print(f"{'plain' if plain else 'ours':<8}{nll:>24.4f}{seconds:>20.1f}{speed:>12,.0f}")
    if len(found) == 2:
        print(f"our training time is {found[False][1] / found[True][1]:.3f} of the plain recipe's; goal {GOAL} nats: "
              f"{'reached' if found[False][0] <= GOAL else 'NOT reached'}")  # fmt: skip


if __name__ == "__main__":
    main()
