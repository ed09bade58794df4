"""Score the pools of a run by every ranker, policy and baseline, and measure the choices.

Legend: N pools, K candidates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.models.ranker_files import load_ranker
from lib.runtime import Runtime, release_memory
from lib.tasks import get_task
from lib.training.model_plans import unit_of
from lib.training.objectives.pool_choice import PoolReader, measure, say_shortened, simple_scores
from lib.training.policy import METHODS
from lib.training.stage_inputs import read_stage_inputs

SPLITS = ("held_out", "test")


@dataclass(frozen=True)
class TrainedRanker:
    """A ranker of stage 04 or a policy of stage 05: `output` of `stage`. A blind one does not read the prompt."""

    name: str
    stage: str
    output: str
    blind: bool = False


class RankingEvaluator:
    """All scores of the pools of a run.

    Attributes:
        tables: split -> its pools, for the splits that have examples.
        scores: (model, split) -> (N, K).
        trained: names of the trained models; the other models are baselines.
        shortened: "model, split" -> how many prompts and candidates the model reads only in part.
    """

    def __init__(self, stage: Stage, config: Config, runtime: Runtime):
        self.stage, self.config, self.runtime = stage, config, runtime
        stage_inputs = read_stage_inputs(stage, config, runtime)
        examples = stage.read("01_prepare_dataset", "examples", schema.EXAMPLES, ["split"])
        existing = set(examples["split"].to_pylist())
        self.tables = {split: stage_inputs.pools(split) for split in SPLITS if split in existing}
        self.scores: dict[tuple[str, str], np.ndarray] = {}
        self.trained: list[str] = []
        self.shortened: dict[str, dict[str, int]] = {}
        self._explain: Callable[[dict], str] = getattr(get_task(config.task), "explain", lambda row: "")

    def rankers(self) -> Iterator[TrainedRanker]:
        """All rankers of stage 04, then all policies of stage 05."""
        for name, spec in self.config.models.items():
            if spec.mode == "ranker":
                yield TrainedRanker(name, unit_of(name), "best_model", spec.blind)
        for method in METHODS if self.config.critic.method == "ppo" else ():
            yield TrainedRanker(method, "05_train_critic", f"{method}/best_model")

    def score(self, trained: TrainedRanker) -> None:
        """Score every pool by one trained ranker. The one before has left the memory."""
        name = trained.name
        release_memory()
        ranker, tokenizer = load_ranker(self.stage.folder_of(trained.stage, trained.output))
        ranker.to(self.runtime.device).eval()
        reader = PoolReader(tokenizer, self.config.ranker, self.runtime, self.config.seed, trained.blind)
        for split, table in self.tables.items():
            self.shortened[f"{name}, {split}"] = say_shortened(name, split, reader, [table])
            self.scores[name, split] = reader.all_scores(ranker, table)
        self.trained.append(name)

    def score_baselines(self) -> None:
        """Score every pool by methods that need no training, and by those of stage 02."""
        for split, table in self.tables.items():
            for name, scores in simple_scores(table).items():
                self.scores[name, split] = scores

    def measured(self, split: str) -> list[dict[str, Any]]:
        """A row per model: its metrics on the pools of a split, with intervals."""
        table = self.tables[split]
        return [
            {"name": name, "trained": name in self.trained, **measure(table, scores, self.config.seed)}
            for (name, of), scores in self.scores.items()
            if of == split
        ]

    def summary(self, split: str) -> list[dict[str, Any]]:
        """`measured` as plain numbers; of the intervals only that of the accuracy, as `low` and `high`."""
        rows = []
        for row in self.measured(split):
            flat = {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in row.items()}
            rows.append(flat | {k: row["accuracy"][k] for k in ("low", "high")})
        return rows

    def ranked(self) -> pa.Table:
        """Every score of the trained rankers: a table of schema.RANKED."""
        rows = []
        for (name, split), scores in self.scores.items():
            if name not in self.trained:
                continue
            table = self.tables[split]
            for n, k in zip(*np.nonzero(table.present), strict=True):
                rows.append(
                    {
                        "model": name,
                        "split": split,
                        "example_id": table.example_ids[n],
                        "candidate_id": int(table.candidate_ids[n, k]),
                        "text": table.texts[n, k],
                        "kind": table.kinds[n, k],
                        "score": float(scores[n, k]),
                        "rank": 1 + int((scores[n] > scores[n, k]).sum()),
                        "reward": float(table.rewards[n, k]),
                    }
                )
        return pa.Table.from_pylist(rows, schema.RANKED.arrow)

    def answers(self) -> pa.Table:
        """The candidate that every trained ranker chooses from every pool: a table of schema.ANSWERS."""
        rows = []
        for name, split in self.scores:
            if name in self.trained:
                rows += [self.answer(name, split, n) for n in range(len(self.tables[split]))]
        return pa.Table.from_pylist(rows, schema.ANSWERS.arrow)

    def answer(self, name: str, split: str, n: int) -> dict[str, Any]:
        """The choice of one model from pool `n`: a row of schema.ANSWERS."""
        table, scores = self.tables[split], self.scores[name, split]
        order = np.argsort(-np.where(table.present[n], scores[n], -np.inf), kind="stable")
        chosen, second = int(order[0]), int(order[1])
        best = int(np.where(table.present[n], table.rewards[n], -np.inf).argmax())
        odds = np.exp(scores[n] - scores[n, chosen])
        row = {
            "model": name,
            "split": split,
            "example_id": table.example_ids[n],
            "prompt": table.prompts[n],
            "chosen": table.texts[n, chosen],
            "value": table.values[n, chosen],
            "best_value": table.values[n, best],
            "probability": float(1 / odds[table.present[n]].sum()),
            "lead": float(scores[n, chosen] - scores[n, second]),
            "reward": float(table.rewards[n, chosen]),
            "best_reward": float(table.rewards[n, best]),
        }
        facts = {"chosen_value": row["value"], "best_value": row["best_value"], "reward": row["reward"],
                 "chosen_kind": table.kinds[n, chosen]}  # fmt: skip
        return row | {"note": self._explain(facts)}


def units_of_rankers(config: Config) -> list[str]:
    """The rankers of stage 04, for what the stage reads."""
    return [unit_of(name) for name, spec in config.models.items() if spec.mode == "ranker"]
