"""Collect what the reports of stage 06 draw, as plain data, from this stage and the manifests of earlier ones."""

import json
from pathlib import Path

import numpy as np

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.evaluation.ranking_evaluator import RankingEvaluator
from lib.evaluation.run_models import RunModels
from lib.evaluation.sampling import SamplingResults
from lib.report.data import RankedPool, RankingReportData, ReportData
from lib.runs import STAGES, load_manifest
from lib.tasks import get_task
from lib.training.model_plans import STAGE as TRAIN
from lib.training.model_plans import trained_models
from lib.training.policy import METHODS
from lib.units_summary import describe_units, stats_of

DETAILED = METHODS[0]  # the policy whose pools the ranking report shows


def collect_samples(
    stage: Stage, config: Config, models: RunModels, results: SamplingResults | None, detection: dict | None
) -> ReportData:
    """The data of the report on samples, or of a run without a generator (`results` None) on detectors."""
    curves = {name: _lines(stage.run_dir / "04_train" / name / "metrics.jsonl") for name in config.models}
    curves["critic"] = _lines(stage.run_dir / "05_train_critic" / "metrics.jsonl")
    generator_alone = _lines(stage.run_dir / "02_generate_candidates" / "generator" / "metrics.jsonl")
    if generator_alone:
        curves = {"generator (stage 02)": generator_alone} | curves
    described = next(iter(config.models), None) if results is None else config.critic.generator
    settings = f"data: {config.data.path}, {_backbone(config, described)}; seed {config.seed}"
    return ReportData(
        run=stage.run_dir.name,
        settings=settings,
        manifests=_manifests(stage, config),
        curves=curves,
        results=models.results,
        policies=[] if results is None else results.policies,
        best_of=[] if results is None else results.best_of,
        samples=schema.SAMPLES.arrow.empty_table() if results is None else results.samples(),
        trace=schema.TRACE.arrow.empty_table() if results is None else results.trace(),
        token_text=models.token_text,
        mask_id=models.tokenizer.mask_token_id,
        explain=getattr(get_task(config.task), "explain", None),
        detection=detection,
    )


def _backbone(config: Config, model: str | None) -> str:
    """The tokens of a run and the backbone of one of its models, in words."""
    tokens = (
        f"{config.tokenizer.kind} tokens"
        if config.pretrained.model is None
        else "tokens of the pretrained model"
    )
    if model is None:
        return tokens
    architecture = config.models[model].architecture
    if architecture.family == "pretrained":
        return f"{tokens}; backbone: {config.pretrained.model}, context {architecture.context}"
    return (
        f"{tokens}; backbone: {architecture.num_hidden_layers} layers, hidden size {architecture.hidden_size}, "
        f"context {architecture.context}"
    )


def collect_ranking(stage: Stage, config: Config, evaluator: RankingEvaluator) -> RankingReportData:
    """The data of the report on rankers: the figures of all, and the pools of one policy in detail."""
    split = next(iter(evaluator.tables))
    table = evaluator.tables[split]
    detailed = DETAILED if DETAILED in evaluator.trained else evaluator.trained[0]
    measured = {row["name"]: row for row in evaluator.measured(split)}[detailed]
    breakdowns = {
        "Kinds of questions": [{"name": k} | v for k, v in measured.get("tags", {}).items()],
        "Wrong choices": [
            {
                "name": kind,
                "chosen": round(found["chosen"]),
                "of all wrong ones": found["share_of_errors"],
                "of its kind": found["rate"],
            }
            for kind, found in measured["wrong_choices"].items()
        ],
    }
    settings = (
        f"data: {config.data.path}, split {split}; encoder: {config.ranker.encoder or 'trained from scratch'}; "
        f"pools of {_sizes(table.present)}; details: {detailed}; seed {config.seed}"
    )
    curves = {
        ranker.name: _lines(stage.folder_of(ranker.stage, ranker.output).parent / "metrics.jsonl")
        for ranker in evaluator.rankers()
    }
    return RankingReportData(
        run=stage.run_dir.name,
        settings=settings,
        results=stats_of(trained_models(stage, config))["table"]
        + stage.upstream_stats("05_train_critic").get("table", []),
        models=evaluator.summary(split),
        breakdowns=breakdowns,
        curves=curves,
        pools=[_pool(evaluator, detailed, split, n) for n in range(len(table))],
        manifests=_manifests(stage, config),
    )


def _sizes(present: np.ndarray) -> str:
    """The number of candidates of the pools: one number, or the smallest and the largest."""
    sizes = present.sum(1)
    return f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"


def _pool(evaluator: RankingEvaluator, name: str, split: str, n: int) -> RankedPool:
    table, scores = evaluator.tables[split], evaluator.scores[name, split]
    k = np.flatnonzero(table.present[n])
    return RankedPool(
        example_id=table.example_ids[n],
        group=str(table.groups[n]),
        prompt=table.prompts[n],
        candidates=list(table.texts[n, k]),
        kinds=list(table.kinds[n, k]),
        scores=[float(s) for s in scores[n, k]],
        rewards=[float(r) for r in table.rewards[n, k]],
        note=evaluator.answer(name, split, n)["note"],
    )


def _manifests(stage: Stage, config: Config) -> dict[str, dict]:
    """Those of the stages before: the manifest of this stage is of the outputs that --overwrite replaces.

    While some models are not trained, that of stage 04 describes the others.
    """
    found = {name: load_manifest(stage.run_dir / name) for name in STAGES if name != stage.name}
    if found[TRAIN] is None and (models := trained_models(stage, config)):
        found[TRAIN] = describe_units(TRAIN, models, {})
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
