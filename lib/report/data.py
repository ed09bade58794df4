"""What the report shows, gathered by stage 06. Plain data: the report knows no model and no task."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa


@dataclass
class ReportData:
    """
    Attributes:
        run: name of the run; `settings` is a line about its data and size.
        manifests: stage name -> manifest.json of the finished stages.
        curves: model name -> lines of its metrics.jsonl: {"step", "train": {term: value}, "selection": {metric: value}}.
        results: rows of the results table (lib.training.objectives.base.ResultRow as dictionaries).
        policies: one entry per policy and NFE: {"policy", "nfe", "passes", "samples", "seconds",
            "reference_nll": {"value", "low", "high"} or None (nats per character), "character_entropy",
            "fourgram_entropy", "valid_words": {"value", "low", "high"}, "judge_score" or None,
            "critic_error" or None, "infill_accuracy": an estimate where texts with a known answer were filled}; the row of policy "real text" is held-out text, "autoregressive" the causal model.
        best_of: one entry per scorer, see `lib.evaluation.best_of`; empty if only one sample was written each time.
        samples: schema.SAMPLES; trace: schema.TRACE (a few samples per policy).
        token_text: token id -> its characters, special ones by name.
        mask_id: the mask's id.
        explain: the task's few words about a row of samples, if it has any.
    """

    run: str
    settings: str
    manifests: dict[str, dict]
    curves: dict[str, list[dict]]
    results: list[dict]
    policies: list[dict]
    best_of: list[dict]
    samples: pa.Table
    trace: pa.Table
    token_text: Callable[[int], str]
    mask_id: int
    explain: Callable[[dict], str] | None = None
