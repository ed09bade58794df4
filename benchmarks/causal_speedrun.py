"""
Causal characters of tinyshakespeare to 1.88 nats: our recipe against the plain one, one after the other in one run.

Training time is the loop's own clock over all steps, without evaluation. Both are reported on all held-out text, with the
95 % interval over its blocks; the one evaluation, at the last step, is on the selection split.

python -m benchmarks.causal_speedrun
python -m benchmarks.causal_speedrun --skip-plain --set models.generator.training.steps=300
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.prepared import prepare, shakespeare
from benchmarks.provenance import say_provenance
from lib.config import Config
from lib.models.build import start_model
from lib.training.loop import train
from lib.training.stage_inputs import StageInputs
from lib.training.train_model import context_of, make_objective

GOAL = 1.88


def plain_model(config: Config, vocabulary: int) -> torch.nn.Module:
    """GPT-2 of transformers at the size of the config's architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    a = config.models["generator"].architecture
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_layer=a.num_hidden_layers, n_embd=a.hidden_size, n_head=a.num_attention_heads, n_positions=a.context,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def run(config: Config, stage_inputs: StageInputs, plain: bool) -> tuple[dict[str, float], float, float]:
    """(figures of held-out text, training seconds, tokens per second)."""
    spec = config.models["generator"]
    vocabulary = len(stage_inputs.tokenizer)
    context = context_of("generator", spec, stage_inputs)
    objective = make_objective(context, spec, stage_inputs, spec.architecture.context)
    if plain:
        model = plain_model(config, vocabulary)
    else:
        model, _ = start_model(
            "language_model", spec.architecture, "causal", vocabulary, config.seed, "generator"
        )
    kept: dict[str, torch.Tensor] = {}

    def keep(trained: torch.nn.Module, folder: Path) -> None:
        """The weights that are evaluated: of a run with a running mean, that."""
        kept.update({name: value.clone() for name, value in trained.state_dict().items()})
        (folder / "none").touch()

    with tempfile.TemporaryDirectory() as folder:
        label = "plain" if plain else "ours"
        result = train(model, objective, replace(context, label=label), Path(folder), save=keep)
    model.load_state_dict(kept)
    with torch.no_grad():
        found, _ = objective.report(model.eval())
    return found, result.seconds, result.tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--skip-plain", action="store_true")
    parser.add_argument("--steps", type=int, help="of both recipes, for trying out")
    options = parser.parse_args()
    say_provenance()
    overrides = [f"data.path={shakespeare()}", "training.evaluation_examples=100000"]
    if options.steps:
        overrides += [
            f"models.generator.training.{key}={options.steps}" for key in ("steps", "evaluate_every")
        ]
    found = {}
    for plain in (False,) if options.skip_plain else (False, True):
        configs = ["configs/speedrun.yaml"] + (["configs/speedrun_plain.yaml"] if plain else [])
        config, stage_inputs, _ = prepare(
            "speedrun", configs, overrides[:2] + ([] if plain else options.overrides) + overrides[2:]
        )
        found[plain] = run(config, stage_inputs, plain)
    print(f"{'recipe':<8}{'held-out, nats/char':>24}{'training, seconds':>20}{'tokens/s':>12}")
    for plain, (figures, seconds, speed) in found.items():
        nll = f"{figures['nll']:.4f} +- {figures['nll_half_width']:.4f}"
        print(f"{'plain' if plain else 'ours':<8}{nll:>24}{seconds:>20.1f}{speed:>12,.0f}")
    if len(found) == 2:
        print(f"our training time is {found[False][1] / found[True][1]:.3f} of the plain recipe's; goal {GOAL} nats: "
              f"{'reached' if found[False][0]['nll'] <= GOAL else 'NOT reached'}")  # fmt: skip


if __name__ == "__main__":
    main()
