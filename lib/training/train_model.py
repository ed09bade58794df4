"""Train one named model of the config: its data, its objective, its start, its record.

Stage 04 calls this for every model of `models:`, stage 02 for the generator it needs. Knows tables and modes, and
no task.
"""

import json
from pathlib import Path
from typing import Any

import torch

from lib import durable
from lib.log import say
from lib.runs import plain
from lib.sections.models import ModelSpec
from lib.training.loop import train
from lib.training.stage_inputs import StageInputs
from lib.training.trainer_setup import set_up_model, set_up_ranker

RECORD = "training_manifest.json"


def train_model(
    name: str, spec: ModelSpec, stage_inputs: StageInputs, folder: Path, start: Path | None
) -> dict[str, Any]:
    """Train a model, or return the record of one already trained.

    Returns the record, also in `folder/training_manifest.json`: settings, which tensors came from the start,
    which weights are in which group of the optimiser, best step, held-out metrics, rows for the results table.
    """
    record_file = folder / RECORD
    if record_file.exists():
        say(f"{name}: already trained")
        return json.loads(record_file.read_text(encoding="utf-8"))
    with_prompts = spec.mode == "ranker" and stage_inputs.have_prompts
    recipe = (set_up_ranker if with_prompts else set_up_model)(name, spec, stage_inputs, folder, start)
    result = train(
        recipe.model,
        recipe.objective,
        spec.training,
        stage_inputs.runtime,
        folder,
        seed=stage_inputs.config.seed,
        label=name,
        save=recipe.save,
    )
    best: Any = recipe.load(folder / "best_model").to(stage_inputs.runtime.device).eval()
    with torch.no_grad():
        values, rows = recipe.objective.report(best)
    record = {
        "name": name,
        "mode": spec.mode,
        "parameters": sum(p.numel() for p in best.parameters()),
        "learning_parameters": sum(p.numel() for p in recipe.model.parameters() if p.requires_grad),
        "transfer": recipe.transfer,
        **recipe.facts,
        "optimizer": result.optimizer,
        "steps": result.steps,
        "best_step": result.best_step,
        "selection": recipe.objective.selection,
        "held_out": values,
        "table": [row.as_dict() for row in rows],
    }
    durable.write_json(record_file, plain(record))
    return record
