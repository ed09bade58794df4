"""The rankers of a run on its pools, for stage 06: every score, every answer, and how good they are.

Knows pools, rankers and what the task says about a row; not how the report looks.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.models.ranker_files import load_ranker
from lib.report.ranking import RankedPool, interesting, ranking_page
from lib.runtime import Runtime
from lib.tasks import get_task
from lib.training.objectives.pool_choice import PoolReader, measure, say_shortened, simple_scores
from lib.training.policy import METHODS
from lib.training.pool_table import PoolTable
from lib.training.stage_inputs import read_stage_inputs

SPLITS = ("held_out", "test")
FINAL = METHODS[0]  # whose pools are shown in detail
SHOWN_OF_A_KIND = 3


class RankingEvaluator:
    """All that scores the pools of a run.

    Attributes:
        tables: split -> its pools, for the splits that have any.
        scores: (model, split) -> (N, K).
        trained: names of the models that learned; the others are baselines.
        shortened: "model, split" -> how many prompts and candidates it reads in part only.
    """

    def __init__(self, stage: Stage, config: Config, runtime: Runtime):
        self.stage, self.config, self.runtime = stage, config, runtime
        stage_inputs = read_stage_inputs(stage, config, runtime)
        there = set(
            stage.read("01_prepare_dataset", "examples", schema.EXAMPLES, ["split"])["split"].to_pylist()
        )
        self.tables = {split: stage_inputs.pools(split) for split in SPLITS if split in there}
        self.scores: dict[tuple[str, str], np.ndarray] = {}
        self.trained: list[str] = []
        self.shortened: dict[str, dict[str, int]] = {}
        self._explain: Callable[[dict], str] = getattr(get_task(config.task), "explain", lambda row: "")

    def models(self) -> Iterator[tuple[str, str, bool]]:
        """(name, the folder's output name, whether it is blind) of every trained ranker."""
        for name, spec in self.config.models.items():
            if spec.mode == "ranker":
                yield name, "04_train", spec.blind
        for method in METHODS:
            yield method, "05_train_critic", False

    def score(self, name: str, where: str, blind: bool) -> None:
        """Score every pool by one trained ranker."""
        ranker, tokenizer = load_ranker(self.stage.folder_of(where, f"{name}/best_model"))
        ranker.to(self.runtime.device).eval()
        reader = PoolReader(tokenizer, self.config.ranker, self.runtime, self.config.seed, blind)
        for split, table in self.tables.items():
            self.shortened[f"{name}, {split}"] = say_shortened(name, split, reader, [table])
            self.scores[name, split] = reader.all_scores(ranker, table)
        self.trained.append(name)

    def score_simply(self) -> None:
        """The baselines' scores."""
        for split, table in self.tables.items():
            for name, scores in simple_scores(table).items():
                self.scores[name, split] = scores

    def measured(self, split: str) -> list[dict[str, Any]]:
        """A row per model: its metrics with intervals on the split's pools."""
        table = self.tables[split]
        return [
            {"name": name, "trained": name in self.trained, **measure(table, scores, self.config.seed)}
            for (name, of), scores in self.scores.items()
            if of == split
        ]

    def table(self, split: str) -> list[dict[str, Any]]:
        """`measured`, as the tables of the report take it: plain numbers, the accuracy with `low` and `high`."""
        rows = []
        for row in self.measured(split):
            flat = {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in row.items()}
            rows.append(flat | {k: row["accuracy"][k] for k in ("low", "high")})
        return rows

    def page(self) -> str:
        """The report: the final policy's pools in detail, everyone's figures."""
        split = next(iter(self.tables))
        shown, table = FINAL, self.tables[split]
        measured = {row["name"]: row for row in self.measured(split)}[shown]
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
        pools = [self._pool(shown, split, table, n) for n in range(len(table))]
        results = [
            row
            for name in ("04_train", "05_train_critic")
            for row in self.stage.upstream_stats(name)["table"]
        ]
        settings = (
            f"data: {self.config.data.path}, split {split}; encoder: {self.config.ranker.encoder or 'ours'}; "
            f"pools of {table.present.shape[1]}; in detail: {shown}; seed {self.config.seed}"
        )
        return ranking_page(
            self.stage.run_dir.name, settings, results, self.table(split), breakdowns, self._curves(),
            [pool for _, pool in interesting(pools, SHOWN_OF_A_KIND)],
        )  # fmt: skip

    def _pool(self, name: str, split: str, table: PoolTable, n: int) -> RankedPool:
        k = np.flatnonzero(table.present[n])
        answer = self._answer(name, split, table, self.scores[name, split], n)
        return RankedPool(
            table.example_ids[n], str(table.groups[n]), table.prompts[n], list(table.texts[n, k]),
            list(table.kinds[n, k]), [float(s) for s in self.scores[name, split][n, k]],
            [float(r) for r in table.rewards[n, k]], answer["note"],
        )  # fmt: skip

    def _curves(self) -> dict[str, list[dict]]:
        curves = {}
        for name, where, _ in self.models():
            file = self.stage.run_dir / where / name / "metrics.jsonl"
            curves[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return curves

    def ranked(self) -> pa.Table:
        """Every score of the trained rankers (schema.RANKED)."""
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
        """What every trained ranker answers (schema.ANSWERS)."""
        rows = []
        for (name, split), scores in self.scores.items():
            if name in self.trained:
                table = self.tables[split]
                rows += [self._answer(name, split, table, scores, n) for n in range(len(table))]
        return pa.Table.from_pylist(rows, schema.ANSWERS.arrow)

    def _answer(self, name: str, split: str, table: PoolTable, scores: np.ndarray, n: int) -> dict[str, Any]:
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
        seen = {"chosen_value": row["value"], "best_value": row["best_value"], "reward": row["reward"],
                "chosen_kind": table.kinds[n, chosen]}  # fmt: skip
        return row | {"note": self._explain(seen)}
