"""
A row of docs/leaderboard.md: tinyshakespeare, five minutes of training on two CPU cores.

A short training measures the time of a step. Then a training of as many steps as fit into the budget is measured. Its time
is all that `train` takes: steps, and the evaluation and the writing of the model at the end. No layers are compiled, since the
short training would fill the cache of compiled code. The figure is the likelihood of all held-out text.

python -m benchmarks.leaderboard gpt2_causal       # nanoGPT's recipe for a CPU
python -m benchmarks.leaderboard bert_diffusion    # masked diffusion with BERT and AdamW
python -m benchmarks.leaderboard remask_causal
python -m benchmarks.leaderboard remask_diffusion
python -m benchmarks.leaderboard my_row --config configs/nelbo.yaml --set models.generator.training.muon_learning_rate=0.03
python -m benchmarks.leaderboard my_row --config configs/nelbo.yaml --model benchmarks.plain_models:bert
"""

import argparse
import importlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.prepared import prepare, shakespeare, stage_inputs_of, train_in_memory
from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, full, write
from benchmarks.results_tables import BUDGET, THREADS, TOLERANCE
from benchmarks.step_clock import StepClock
from lib.config import ROOT, Config
from lib.models.build import start_model
from lib.runs import plain
from lib.training.stage_inputs import StageInputs
from lib.training.train_model import context_of, make_objective

DATA = {  # of the section `data`: all of the text, and the usual split
    "split": "contiguous", "fractions": {"train": 0.9, "held_out": 0.1}, "whitespace": "keep", "deduplicate": "none",
}  # fmt: skip
TRIAL = 40  # steps of the training that measures the time of a step
MARGIN = 0.96  # of the budget that is planned for


@dataclass(frozen=True)
class Row:
    """An entry: its configs and settings, and the function `package.module:name` that builds its model, or none."""

    configs: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    model: str | None = None


PLAIN = (
    "training.optimizer=adamw", "training.weight_decay=0.1", "training.ema_decay=0.0", "models.generator.training.learning_rate=0.001",
    "models.generator.training.warmup_fraction=0.05", "models.generator.training.decay_fraction=0.95",
)  # fmt: skip
ROWS = {
    "gpt2_causal": Row(
        ("configs/speedrun.yaml", "configs/speedrun_plain.yaml"), (), "benchmarks.plain_models:gpt2"
    ),
    "bert_diffusion": Row(
        ("configs/nelbo.yaml",), (*PLAIN, "diffusion.ratios={type: uniform}"), "benchmarks.plain_models:bert"
    ),
    "remask_causal": Row(("configs/nelbo.yaml",), ("models.generator.attention=causal",)),
    "remask_diffusion": Row(("configs/nelbo.yaml",)),
}


def run(row: Row, budget: float, name: str) -> dict[str, Any]:
    """Train the row within the budget of seconds. Returns its figures."""
    overrides = ["training.compile=off", "device=cpu", f"data.path={shakespeare()}", *row.overrides]
    config, folder = prepare(f"leaderboard_{name}", list(row.configs), overrides)
    if budget >= BUDGET and (broken := broken_rules(config)):
        raise SystemExit(
            f"this is no row of the leaderboard: {'; '.join(broken)}; see docs/leaderboard.md, Rules"
        )
    with stage_inputs_of(config, folder) as stage_inputs:
        steps = _steps_within(budget, lambda n: _trained(row, config, stage_inputs, n))
        found = _trained(row, config, stage_inputs, steps, report=True)
    a = config.models["generator"].architecture
    return {
        **found,
        "steps": steps,
        "budget": budget,
        "context": a.context,
        "size": f"{a.num_hidden_layers} x {a.hidden_size}",
        "threads": torch.get_num_threads(),
    }


def broken_rules(config: Config) -> list[str]:
    """What in a config breaks the rules of docs/leaderboard.md, in words."""
    found = []
    spec = config.models["generator"]
    if config.device != "cpu":
        found.append(f"device is {config.device}; expected cpu")
    if spec.split != "train":
        found.append(f"split of the generator is {spec.split}; expected train")
    compiles = spec.training.compile  # a model may have a setting of its own
    if compiles != "off":
        found.append(f"training.compile of the generator is {compiles}; expected off")
    if config.tokenizer.kind != "character":
        found.append(f"tokenizer.kind is {config.tokenizer.kind}; expected character")
    if config.data.path != str(shakespeare()):
        found.append(f"data.path is {config.data.path}; expected tinyshakespeare")
    for key, expected in DATA.items():
        value = getattr(config.data, key)
        if plain(value) != expected:
            found.append(f"data.{key} is {plain(value)}; expected {expected}")
    return found


def _steps_within(budget: float, trained: Callable[[int], dict[str, Any]]) -> int:
    """Steps that fit into the budget, by the time of a short training and of its steps.

    Raises SystemExit if it has no room for any.
    """
    trained(StepClock.FIRST + 2)  # the first one fills caches
    trial = trained(TRIAL)
    step = trial["seconds_per_step"]
    start = trial["seconds"] - TRIAL * step
    steps = int((MARGIN * budget - start) / step)
    print(
        f"{step:.3f} s a step, {start:.1f} s for start and end: {steps:,} steps in {budget:.0f} s", flush=True
    )
    if steps < 1:
        raise SystemExit(f"a budget of {budget:.0f} s has no room for a step; give more with --budget")
    return steps


def _trained(
    row: Row, config: Config, stage_inputs: StageInputs, steps: int, *, report: bool = False
) -> dict[str, Any]:
    """A training of that many steps: its seconds, and those of a step or, with `report`, its likelihood of all held-out text."""
    spec = config.models["generator"]
    changed = {"steps": steps, "evaluate_every": steps, "checkpoint_every": steps}
    spec = spec.model_copy(update={"training": spec.training.model_copy(update=changed)})
    context = context_of("generator", spec, stage_inputs)
    objective: Any = make_objective(context, spec, stage_inputs, spec.architecture.context)
    vocabulary = len(stage_inputs.tokenizer)
    model: Any = _built(row, config, vocabulary)
    if model is None:
        attention = spec.effective_attention
        model, _ = start_model(
            "language_model", spec.architecture, attention, vocabulary, config.seed, "generator"
        )
    clock = StepClock.of(objective)
    begin = time.perf_counter()
    train_in_memory(model, objective, replace(context, label="leaderboard"))
    seconds = time.perf_counter() - begin
    if not report:
        return {"seconds": seconds, "seconds_per_step": clock.seconds_per_step()}
    with torch.no_grad():
        values, rows = objective.report(model.eval())
    figure = rows[0].as_dict()
    return {
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kind": "NELBO" if "nelbo" in values else "NLL",
        "value": {key: figure[key] for key in ("value", "low", "high")},
        "train_nelbo": values.get("train_nelbo"),
    }


def _built(row: Row, config: Config, vocabulary: int) -> nn.Module | None:
    """The model of the row's own function; None if it has none."""
    if row.model is None:
        return None
    model = _function_of(row.model)(config, vocabulary)
    causal = config.models["generator"].effective_attention == "causal"
    needed = {"input_ids", "attention_mask", "use_cache" if causal else "logits_at"}
    accepted = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if (missing := sorted(needed - accepted.keys())) and not takes_all:
        raise SystemExit(
            f"--model {row.model}: forward of {type(model).__name__} takes no {', '.join(missing)}; see docs/leaderboard.md, Add a row"
        )
    return model


def _function_of(name: str) -> Callable[..., nn.Module]:
    """The function `package.module:name`. Raises SystemExit."""
    name_of_module, _, function = name.partition(":")
    try:
        module = importlib.import_module(name_of_module)
        found = getattr(module, function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(
            f"--model {name}: {error}; give PACKAGE.MODULE:FUNCTION, a function (config, vocabulary) -> model"
        ) from None
    file = Path(module.__file__ or "/").resolve()
    if not file.is_relative_to(ROOT) or ".venv" in file.parts:
        raise SystemExit(
            f"--model {name}: {file} is not in this repository; put the function into benchmarks/, so that the result has its hash"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help=f"{', '.join(ROWS)}, or a name of your own with --config")
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="config of a row of your own"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="builds the model: (config, vocabulary) -> model"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for trying out")
    add_out(parser)
    options = parser.parse_args()
    if not options.name.isidentifier():
        parser.error(f"{options.name!r} is no name for a file; use letters, digits and _")
    if (options.name in ROWS) == bool(options.config):
        parser.error(f"give --config for a row of your own, and only then; known rows: {', '.join(ROWS)}")
    row = ROWS.get(options.name) or Row(tuple(options.config), model=options.model)
    row = replace(row, overrides=(*row.overrides, *options.overrides), model=options.model or row.model)
    if options.budget >= BUDGET and torch.get_num_threads() > THREADS:
        parser.error(f"torch has {torch.get_num_threads()} threads; set OMP_NUM_THREADS={THREADS}")
    if row.model:
        _function_of(row.model)  # its code is part of the provenance
    say_provenance()
    found = run(row, options.budget, options.name)
    print(f"training             {found['steps']:,} steps, {found['seconds']:.0f} of {found['budget']:.0f} s")
    print(f"parameters           {found['parameters']:,}")
    print(f"held-out {found['kind']:<11} {full(found['value'], 4)} nats/character")
    if found["seconds"] > TOLERANCE * found["budget"] and found["budget"] >= BUDGET:
        raise SystemExit("the training took longer than the budget: another program was busy. Run it again")
    write(options.out, f"leaderboard_{options.name}", found)


if __name__ == "__main__":
    main()
