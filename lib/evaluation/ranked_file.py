"""Rank the candidates of a user's file with a model of a run: by a ranker that reads prompts, or by the models of task text.

A run of task text scores each candidate by itself: by its judge, or without one by its critic.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadData, MissingInput, RemaskError
from lib.evaluation.rank import Ranker, say_shortened, softmax
from lib.evaluation.run_models import RunModels, roles_of, units_of_roles
from lib.evaluation.sample_evaluator import open_models
from lib.evaluation.text_scores import documents_of, say_left_out, score, windows_for
from lib.ranking.bm25 import bm25_scores
from lib.ranking.metrics import ranking_metrics, summarise
from lib.runtime import Runtime
from lib.tasks import Problem, problem_lines
from lib.tasks.pools.candidates import mapped
from lib.tasks.pools.check import merged, pool_faults
from lib.tasks.pools.layouts import Entry, reward_fault
from lib.tasks.pools.reading import problem, read_into, sources
from lib.tasks.pools.store import FoundPool, PoolStore
from lib.tasks.pools.values import identity
from lib.training.model_plans import unit_of

BLOCK = 512  # pools that are read and scored at a time
SHOWN = 24  # pools on the page
BM25 = "bm25"


class Scorer(Protocol):
    """Scores the candidates of pools. `name` says by which model."""

    name: str

    def scores(self, prompts: list[str], candidates: list[list[str]]) -> list[np.ndarray]:
        """(K,) scores of each pool; higher is better."""
        ...

    def say_what_was_not_read(self) -> None:
        """Log which parts of the texts so far did not reach the model."""
        ...


@dataclass(frozen=True)
class ShownPool:
    """A ranked pool for the page. `rewards` are None where the file has none."""

    pool_id: str
    prompt: str
    candidates: list[str]
    scores: np.ndarray
    rewards: list[float | None]


@dataclass
class UserPools:
    """The pools of a file, and what was measured on them so far.

    Attributes:
        num_pools: pools that can be ranked, counted when the file is read.
        done: pools that were ranked.
        displayed: the first ranked pools.
        incomplete, undecided: ranked pools that are not measured, because some rewards are missing or outside
            pools.reward_range, or because all are equal.
    """

    config: Config
    files: list[Path]
    store: PoolStore
    problems: list[Problem]
    num_pools: int = 0
    done: int = 0
    displayed: list[ShownPool] = field(default_factory=list)
    incomplete: int = 0
    undecided: int = 0
    _per_pool: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)

    def __enter__(self) -> "UserPools":
        return self

    def __exit__(self, *error: Any) -> None:
        self.store.__exit__(*error)

    def problem_lines(self) -> Iterator[str]:
        """What is wrong with the file, in lines."""
        return problem_lines(self.problems)

    def blocks(self) -> Iterator[list[tuple[FoundPool, list[Entry]]]]:
        """The valid pools, `BLOCK` at a time."""
        block = []
        for pool in self.store.pools():
            entries = valid_entries(pool, self.config)
            if entries:
                block.append((pool, entries))
            if len(block) == BLOCK:
                yield block
                block = []
        if block:
            yield block

    def measure(
        self, block: list[tuple[FoundPool, list[Entry]]], scores: list[np.ndarray], scorer: str
    ) -> None:
        """Keep the metrics of the pools of a block that have different rewards, and some pools for the page."""
        self.done += len(block)
        for (pool, entries), row in list(zip(block, scores, strict=True))[
            : max(0, SHOWN - len(self.displayed))
        ]:
            texts, rewards = [e.text for e in entries], [e.reward for e in entries]
            self.displayed.append(ShownPool(pool.pool_id, pool.prompt, texts, row, rewards))
        known = [n for n, of_pool in enumerate(block) if self._decided(*of_pool)]
        if not known:
            return
        sizes = [len(block[n][1]) for n in known]
        present = np.arange(max(sizes)) < np.array(sizes)[:, None]
        given, own = np.zeros(present.shape), np.zeros(present.shape)
        given[present] = [e.reward for n in known for e in block[n][1]]
        own[present] = np.concatenate([scores[n] for n in known])
        texts = np.full(present.shape, "", object)
        texts[present] = [e.text for n in known for e in block[n][1]]
        settings = self.config.pools
        rewards = np.zeros(present.shape)
        rewards[present] = mapped(given[present], np.repeat(np.arange(len(known)), sizes), settings)
        # Frequencies over this block alone: an index of the whole file would have to be held in memory
        lexical = bm25_scores([block[n][0].prompt for n in known], texts, present)
        for name, values in ((scorer, own), ("random choice", np.zeros_like(own)), (BM25, lexical)):
            found = ranking_metrics(values, rewards, present, relevant=settings.relevant)
            kept = self._per_pool.setdefault(name, {})
            for metric, value in found.items():
                kept.setdefault(metric, []).append(value)

    def _decided(self, pool: FoundPool, entries: list[Entry]) -> bool:
        """Whether a pool can be measured: all rewards are known, in range and without contradiction, and not all are equal."""
        rewards = [entry.reward for entry in entries if entry.reward is not None]
        faults = [reward_fault(entry, *self.config.pools.reward_range) for entry in entries]
        faults += [fault for _, fault in merged(pool, self.config.pools)[1] if fault.severity == "error"]
        if len(rewards) < len(entries) or any(faults):
            self.incomplete += bool(rewards)
            return False
        self.undecided += min(rewards) == max(rewards)
        return min(rewards) < max(rewards)

    def not_measured(self) -> str:
        """Why some of the ranked pools with rewards are not measured; empty if all are."""
        low, high = self.config.pools.reward_range
        reasons = {
            "have equal rewards": self.undecided,
            f"lack a reward, or have contradicting ones or one outside pools.reward_range ({low:g} to {high:g})": self.incomplete,
        }
        return "; ".join(f"{count:,} pools {reason}" for reason, count in reasons.items() if count)

    def metrics(self, seed: int) -> dict[str, Any]:
        """Name of a row -> its metrics with intervals over pools; empty if no pool has rewards."""
        found = {}
        for name, metrics in self._per_pool.items():
            per_pool = {metric: np.concatenate(values) for metric, values in metrics.items()}
            groups = np.arange(len(per_pool["accuracy"]))
            found[name] = summarise(per_pool, groups, seed) | {"pools": len(groups)}
        return found


def valid_entries(pool: FoundPool, config: Config) -> list[Entry]:
    """The candidates of a pool that can be ranked, each text once; none if the pool has an error. Rewards do not matter."""
    if any(fault.severity == "error" for _, fault in pool_faults(pool, config.pools, with_rewards=False)):
        return []
    return merged(pool, config.pools)[0]


def read_user_pools(config: Config, path: Path) -> UserPools:
    """Read a file of any layout of task pools, whatever the run's task is. Rows that cannot be read are problems.

    Raises:
        MissingInput: there is no such file or folder.
    """
    if not path.exists():
        raise MissingInput(f"--rank {path}: there is no such file or folder")
    name = os.path.join(".", path) if str(path).startswith("builtin") else str(path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": name})})
    store = PoolStore()
    try:
        files = sources(config)
        problems = list(read_into(store, config, all_keys=False))
        user = UserPools(config, files, store, problems)
        for pool in store.pools():
            faults = [*pool_faults(pool, config.pools, with_rewards=False), *merged(pool, config.pools)[1]]
            errors = [(where, fault) for where, fault in faults if fault.severity == "error"]
            problems += [problem(fault, pool.source, f"{where} ({pool.pool_id})") for where, fault in errors]
            user.num_pools += bool(valid_entries(pool, config))
    except RemaskError as error:  # the message names the setting, but the user gave the flag
        store.__exit__()
        raise type(error)(str(error).replace("data.path", "--rank")) from None
    return user


def reads_of(config: Config) -> tuple[str, ...]:
    """The stages and units that a run's scorer reads."""
    if ranks_texts(config):
        return ("01_prepare_dataset", *units_of_roles(config))
    return ("01_prepare_dataset", unit_of(ranker_name(config)))


def ranks_texts(config: Config) -> bool:
    """Whether candidates are scored as texts by themselves, by the judge or the critic."""
    by_judge = config.only_detects and roles_of(config)["judge"] is not None
    return by_judge or config.critic.method == "token_critic"


def ranker_name(config: Config) -> str:
    """The ranker of the run: the one called `ranker`, or the first one that reads prompts, or the first one.

    Raises BadData if there is none.
    """
    rankers = {name: spec for name, spec in config.models.items() if spec.mode == "ranker"}
    names = sorted(rankers, key=lambda name: rankers[name].blind)
    if not names:
        raise BadData("--rank needs a judge or a model of mode ranker, and the config has none")
    return "ranker" if "ranker" in names else names[0]


def open_scorer(stage: Stage, config: Config, runtime: Runtime) -> Scorer:
    """The scorer of a run."""
    if ranks_texts(config):
        return TextScorer(open_models(stage, config, runtime))
    name = ranker_name(config)
    ranker = Ranker.load(stage.folder_of(unit_of(name), "best_model"), runtime=runtime)
    return PromptScorer(name, ranker)


@dataclass
class PromptScorer:
    """Scores by a ranker that reads prompts."""

    name: str
    ranker: Ranker
    cut: tuple[int, int] = (0, 0)

    def scores(self, prompts: list[str], candidates: list[list[str]]) -> list[np.ndarray]:
        found = self.ranker.shortened(prompts, candidates)
        self.cut = (self.cut[0] + found[0], self.cut[1] + found[1])
        return [ranking.scores for ranking in self.ranker.rank_all(prompts, candidates)]

    def say_what_was_not_read(self) -> None:
        say_shortened(self.cut, self.ranker)


class TextScorer:
    """Scores each candidate by itself, as `--score` does. Prompts are not read."""

    def __init__(self, evaluator: RunModels):
        self.evaluator = evaluator
        self.key, self.sign = (
            ("judge_score", 1.0) if evaluator.judge is not None else ("critic_error_mean", -1.0)
        )
        self.name = "judge" if evaluator.judge is not None else "critic"
        self.left_out = 0

    def scores(self, prompts: list[str], candidates: list[list[str]]) -> list[np.ndarray]:
        evaluator = self.evaluator
        named = [(f"{n}/{k}", text) for n, texts in enumerate(candidates) for k, text in enumerate(texts)]
        parts, left_out = windows_for(named, evaluator)
        self.left_out += left_out
        rows = documents_of(score(parts, evaluator), evaluator.judge_figures)
        found = {row["document_id"]: self.sign * row[self.key] for row in rows}
        return [
            np.array([found[f"{n}/{k}"] for k in range(len(texts))]) for n, texts in enumerate(candidates)
        ]

    def say_what_was_not_read(self) -> None:
        say_left_out(self.left_out)


def score_pools(user: UserPools, scorer: Scorer) -> Iterator[pa.Table]:
    """Tables of schema.RANKING, block by block, each pool with its best candidate first."""
    for block in user.blocks():
        texts = [[entry.text for entry in entries] for _, entries in block]
        scores = scorer.scores([pool.prompt for pool, _ in block], texts)
        rows = []
        for (pool, entries), row in zip(block, scores, strict=True):
            number = {id(entry): k for k, entry in enumerate(pool.entries)}
            where = {identity(entry.text): k for k, entry in reversed(list(enumerate(pool.entries)))}
            probability = softmax(row)
            for k in np.argsort(-row, kind="stable"):
                entry = entries[k]
                rows.append(
                    {
                        "pool_id": pool.pool_id,
                        "candidate_id": number.get(id(entry), where[identity(entry.text)]),
                        "prompt": pool.prompt,
                        "text": entry.text,
                        "score": float(row[k]),
                        "probability": float(probability[k]),
                        "rank": 1 + int((row > row[k]).sum()),
                        "reward": entry.reward,
                    }
                )
        user.measure(block, scores, scorer.name)
        yield pa.Table.from_pylist(rows, schema.RANKING.arrow)
    scorer.say_what_was_not_read()
