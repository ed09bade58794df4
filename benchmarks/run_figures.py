"""The figures of a finished run for the results page, read from its manifests and metrics.json.

Only numbers that a stage stored are taken, each with its interval and its baseline. No model is loaded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import code_version
from lib.errors import MissingInput
from lib.runs import load_manifest

Figures = dict[str, Any]

# Model, beginning of its metric in the stored table, words for the metric on the page
MODEL_ROWS = (
    ("generator", "NELBO", "NELBO, nats/{unit}"),
    ("ar_baseline", "NLL", "NLL, nats/{unit}"),
    ("inspector", "AUROC", "AUROC of changed tokens"),
    ("judge", "R2", "R² of the synthetic fraction"),
    ("ranker", "accuracy", "accuracy, best of {candidates}"),
)
QUALITY = ("reference_nll", "character_entropy", "fourgram_entropy", "valid_words")
CONTROLS = {  # key in the result file -> names in the ranker's manifest, today's first
    "question_removed": ("question removed",),
    "question_of_another_page": ("mismatched prompt", "question of another page"),
    "candidates_on_another_page": ("off-page candidates", "candidates on another page"),
    "overlap": ("overlap",),
    "trees": ("trees",),
}
LEARNERS = ("ppo", "exact", "cross_entropy")  # of stage 05


def figures_of(run: Path, kind: str) -> tuple[Figures, dict[str, Any]]:
    """(figures, provenance) of a run; `kind`: default_run or finqa. Raises MissingInput for a stage that is not done."""
    return KINDS[kind](run), provenance_of(run)


def manifest(run: Path, stage: str) -> dict[str, Any]:
    found = load_manifest(run / stage)
    if found is None:
        raise MissingInput(f"stage {stage} of {run} is not complete; run it to its end first")
    return found


def training_record(run: Path, model: str) -> dict[str, Any]:
    """What stage 04 stored of a model."""
    path = run / "04_train" / model / "training_manifest.json"
    if not path.exists():
        raise MissingInput(f"{path} is not there; the run has no model '{model}'")
    return json.loads(path.read_text(encoding="utf-8"))


def provenance_of(run: Path) -> dict[str, Any]:
    """Commit, date and command of each stage; versions and machine of the last one that names a device."""
    stages = [found for folder in sorted(run.glob("0*")) if (found := load_manifest(folder))]
    with_device = [m for m in stages if "device" in m["environment"]]
    environment = with_device[-1]["environment"]
    machine = {key: environment[key] for key in ("device", "threads", "precision")}
    trained = next(m for m in stages if m["stage"] == "04_train")
    return {
        "commit": trained["code"]["commit"],
        "dirty": any(m["code"]["dirty"] for m in stages),
        "date": trained["finished_at"],
        "command": ["python", *trained["command"]],
        "versions": {k: v for k, v in environment.items() if k not in machine and k != "peak_memory_mb"},
        "machine": machine,
        "stages": [
            {
                "stage": m["stage"],
                "commit": m["code"]["commit"],
                "dirty": m["code"]["dirty"],
                "code": code_version.digest(m["code"]["files"]),
                "date": m["finished_at"],
                "seconds": m["seconds"],
            }
            for m in stages
        ],
    }


# ---------------------------------------------------------------------------------------- the default run


def default_run(run: Path) -> Figures:
    """Models, critic and sampling policies of a run on text."""
    tokenizer = manifest(run, "01_prepare_dataset")["config"]["tokenizer"]
    candidates = manifest(run, "02_generate_candidates")["config"]["candidates"]
    words = {
        "unit": "character" if tokenizer["kind"] == "character" else "token",
        "candidates": candidates["per_example"],
    }
    models = []
    for name, metric, text in MODEL_ROWS:
        rows = training_record(run, name)["table"]
        row = next(row for row in rows if row["metric"].startswith(metric))
        models.append(
            {key: row[key] for key in ("model", "value", "low", "high", "baseline", "baseline_value")}
            | {"metric": text.format(**words)}
        )
    metrics = json.loads((run / "06_sample" / "metrics.json").read_text(encoding="utf-8"))
    manifest(run, "06_sample")
    return words | {
        "models": models,
        "judge_best_r2": training_record(run, "judge")["held_out"]["best_r2"],
        "critic": _critic(manifest(run, "05_train_critic")["stats"]["detection"]),
        "policies": [
            {key: row[key] for key in ("policy", "nfe", "samples", *QUALITY)} for row in metrics["policies"]
        ],
    }


def _critic(detection: dict[str, Any]) -> Figures:
    """AUROC of wrong tokens: in the generator's fills, and in text without stored confidence."""
    whole = [name for name in detection if name.startswith("whole_text_") and name != "whole_text_critic"]
    return {
        "fills": {
            "critic": detection["critic"]["auroc"],
            "confidence": detection["confidence"]["auroc"],
            "both": detection["critic_blend"]["auroc"],
        },
        "whole_text": {
            "critic": detection["whole_text_critic"]["auroc"],
            "fresh_confidence": detection[whole[0]]["auroc"],
        },
    }


# --------------------------------------------------------------------------------------------------- FinQA


def finqa(run: Path) -> Figures:
    """The ranker, its controls and baselines on the held-out pools; what stage 05 made of it, where it has run."""
    ranker = training_record(run, "ranker")
    held_out = ranker["held_out"]
    leak = manifest(run, "02_generate_candidates")["stats"]["leak"]["rows"]
    best = max(leak, key=lambda row: row["accuracy"])
    rows = {"ranker": _choice(held_out)}
    others = held_out["others"]
    for key, names in CONTROLS.items():
        rows[key] = _choice(next(others[name] for name in names if name in others))
    if (run / "04_train" / "ranker_blind" / "training_manifest.json").exists():
        rows["ranker_blind"] = _choice(training_record(run, "ranker_blind")["held_out"])
    config = manifest(run, "04_train")["config"]
    training = config["models"]["ranker"]["training"]
    return {
        "pools": held_out["pools"],
        "chance": held_out["chance"],
        "seed": config["seed"],
        "optimizer": training["optimizer"],
        "steps": training["steps"],
        "parameters": ranker["parameters"],
        "learning_parameters": ranker["learning_parameters"],
        "without_question": {"scorer": best["scorer"], "sees": best["sees"], "scorers": len(leak)}
        | {"value": best["accuracy"], "low": best["low"], "high": best["high"]},
        "rows": rows,
        "lead_over_trees": others["trees"]["lead"],
        "tags": {
            name: {"value": tag["accuracy"], "low": tag["low"], "high": tag["high"], "count": tag["count"]}
            for name, tag in held_out["tags"].items()
        },
        "wrong_choices": {k: v["share_of_errors"] for k, v in held_out["wrong_choices"].items()},
        "further_training": _further(run),
    }


def _choice(measured: dict[str, Any]) -> Figures:
    return {"accuracy": measured["accuracy"], "reward": measured["normalised_reward_ratio"]}


def _further(run: Path) -> Figures | None:
    """Stage 05: the same pools before and after, and the paired difference of the average reward."""
    found = load_manifest(run / "05_train_critic")
    if found is None or "gain_over_start" not in found["stats"]:
        return None
    stats = found["stats"]
    before = next(name for name in stats["held_out"] if name not in LEARNERS)
    return {
        "start": _choice(stats["held_out"][before]),
        **{
            name: _choice(stats["held_out"][name]) | {"gain": stats["gain_over_start"][name]}
            for name in LEARNERS
            if name in stats["held_out"]
        },
    }


KINDS: dict[str, Callable[[Path], Figures]] = {"default_run": default_run, "finqa": finqa}
