"""
Training time of a causal model on tinyshakespeare characters: this project's recipe and the plain one, in one run.

The goal is 1.88 nats per character. Training time is the loop's own clock over all steps, without evaluation. Both models
are reported on all held-out text, with the 95 % interval over its blocks. The only evaluation during training, at the last
step, uses the selection split.

python -m benchmarks.causal_speedrun
python -m benchmarks.causal_speedrun --skip-plain --set models.generator.training.steps=300
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

from benchmarks.plain_models import gpt2
from benchmarks.prepared import prepare, shakespeare, stage_inputs_of, train_in_memory
from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, full, write
from lib.config import Config
from lib.models.build import start_model
from lib.training.stage_inputs import StageInputs
from lib.training.train_model import context_of, make_objective

GOAL = 1.88


def run(config: Config, stage_inputs: StageInputs, plain: bool) -> dict[str, Any]:
    """Train one recipe; its held-out NLL, training seconds and tokens per second."""
    spec = config.models["generator"]
    vocabulary = len(stage_inputs.tokenizer)
    context = context_of("generator", spec, stage_inputs)
    objective = make_objective(context, spec, stage_inputs, spec.architecture.context)
    if plain:
        model = gpt2(config, vocabulary)
    else:
        model, _ = start_model(
            "language_model", spec.architecture, "causal", vocabulary, config.seed, "generator"
        )
    result = train_in_memory(model, objective, replace(context, label="plain" if plain else "ours"))
    with torch.no_grad():
        found, _ = objective.report(model.eval())
    return {
        "nll": {"value": found["nll"], "half_width": found["nll_half_width"]},
        "seconds": result.speed["seconds"],
        "tokens_per_second": result.speed["tokens_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--skip-plain", action="store_true", help="train this project's recipe only")
    parser.add_argument("--steps", type=int, help="number of steps of both recipes, for trying out")
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    overrides = [f"data.path={shakespeare()}", "training.evaluation_examples=100000"]
    if options.steps:
        overrides += [
            f"models.generator.training.{key}={options.steps}" for key in ("steps", "evaluate_every")
        ]
    recipes = {}
    for name in ("ours",) if options.skip_plain else ("ours", "plain"):
        plain = name == "plain"
        configs = ["configs/speedrun.yaml"] + (["configs/speedrun_plain.yaml"] if plain else [])
        changed = overrides[:2] + ([] if plain else options.overrides) + overrides[2:]
        config, folder = prepare("speedrun", configs, changed)
        with stage_inputs_of(config, folder) as stage_inputs:
            recipes[name] = run(config, stage_inputs, plain)
    say(recipes)
    write(options.out, "causal_speedrun", {"goal": GOAL, "recipes": recipes})


def say(recipes: dict[str, dict[str, Any]]) -> None:
    """Print the table, and whether the goal was reached."""
    print(f"{'recipe':<8}{'held-out, nats/char':>24}{'training, seconds':>20}{'tokens/s':>12}")
    for name, found in recipes.items():
        print(
            f"{name:<8}{full(found['nll'], 4):>24}{found['seconds']:>20.1f}{found['tokens_per_second']:>12,.0f}"
        )
    if "plain" in recipes:
        ours = recipes["ours"]
        reached = "reached" if ours["nll"]["value"] <= GOAL else "NOT reached"
        ratio = ours["seconds"] / recipes["plain"]["seconds"]
        print(f"training time is {ratio:.3f} of the plain recipe's; the goal of {GOAL} nats is {reached}")


if __name__ == "__main__":
    main()
