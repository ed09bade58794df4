"""The data that the reports draw: plain values, which stage 06 collects."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass
class ReportData:
    """The data of the report on samples.

    An estimate is {"value", "low", "high"}, the ends of a 95 % interval; the ends are None where there is no interval.

    Attributes:
        run: name of the run.
        settings: one line about its data and models.
        manifests: stage name -> manifest.json of the finished stages.
        curves: model -> lines of its metrics.jsonl: {"step", "train": {term: value}, "selection": {metric: value}}.
        results: rows of the results table: lib.training.objectives.base.ResultRow as dictionaries.
        policies: one row per policy and budget, see `lib.evaluation.quality.describe`. Policy "real text" is
            held-out text, "autoregressive" the causal model. "infill_accuracy" is an estimate, or None without targets.
        best_of: one row per scorer, see `lib.evaluation.best_of`; empty if each sample was drawn once.
        samples: a table of schema.SAMPLES.
        trace: a table of schema.TRACE, a few samples per policy.
        token_text: token id -> its characters; the name of a special token.
        mask_id: the id of [MASK].
        explain: row of `samples` -> a sentence from the task; None if the task has none.
        detection: figures of `lib.evaluation.detection_results`; None without labels beside the text.
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
    detection: dict | None = None


@dataclass(frozen=True)
class RankedPool:
    """The K candidates of one example with the scores of one model.

    Attributes:
        group: examples of one group are alike, such as questions on one page.
        rewards: of each candidate; the candidates with the highest reward are correct.
        note: a sentence from the task about the choice; "" if there is none.
    """

    example_id: str
    group: str
    prompt: str
    candidates: list[str]
    kinds: list[str]
    scores: list[float]
    rewards: list[float]
    note: str = ""

    @property
    def correct(self) -> list[bool]:
        return [reward == max(self.rewards) for reward in self.rewards]

    @property
    def margin(self) -> float:
        """Score of the best correct candidate minus that of the best wrong one; the choice is correct above 0."""
        scored = list(zip(self.scores, self.correct, strict=True))
        best_wrong = max((score for score, correct in scored if not correct), default=-math.inf)
        return max(score for score, correct in scored if correct) - best_wrong


@dataclass
class RankingReportData:
    """The data of the report on rankers.

    Attributes:
        run: name of the run.
        settings: one line about its data and models.
        results: as in `ReportData`.
        models: a row per ranker, policy and baseline: "name", "accuracy" with its "low" and "high", and what is known of
            "average_reward", "reward_ratio", "normalised_reward_ratio", "mrr", "ndcg" and "pairwise_accuracy". A name
            that is not in `results` is a baseline.
        breakdowns: title -> rows {"name", "accuracy", "low", "high", "count"}, or rows {"name", ...} of counts (int) and
            shares (float).
        curves: as in `ReportData`.
        pools: of one ranker; the report shows the most informative ones.
        manifests: as in `ReportData`.
    """

    run: str
    settings: str
    results: list[dict]
    models: list[dict]
    breakdowns: dict[str, list[dict]]
    curves: dict[str, list[dict]]
    pools: list[RankedPool]
    manifests: dict[str, dict] = field(default_factory=dict)
