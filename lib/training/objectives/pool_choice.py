"""`ranker` of tasks with prompts: a score for each of the K candidates of a prompt.

The report compares the ranker on held-out pools with two kinds of others:

    baselines  random choice, first candidate, and the simple methods of `PoolTable.baselines`
    controls   the ranker itself with inputs that hide the answer: no question, the question of another page, or the
               candidates as they would read for another page (off-page)

A ranker that does not beat its controls has not used the question.

Legend: N pools, K candidates, B pools of a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.engine.parts import Part
from lib.log import say
from lib.metrics import Estimate
from lib.models.collation import collate, hide_words, too_long
from lib.models.packing import Pools
from lib.ranking.losses import LOSSES, TEACHER
from lib.ranking.metrics import (
    breakdown,
    chosen_kinds,
    paired_difference,
    ranking_metrics,
    summarise,
    winners,
)
from lib.runtime import Runtime
from lib.sections.finqa import RankerConfig
from lib.training.data import Rows
from lib.training.objectives.base import (
    ResultRow,
    TrainingContext,
    chunks,
    evaluation_rows,
    result_row,
    tensor,
)
from lib.training.pool_sampling import CandidateSampler
from lib.training.pool_table import PoolRows, PoolTable

EVALUATION_BATCH = 32
NO_QUESTION, MISMATCHED, OFF_PAGE = "question removed", "mismatched prompt", "off-page candidates"
CONTROLS = (NO_QUESTION, MISMATCHED, OFF_PAGE)
RANDOM, FIRST = "random choice", "first candidate"


@dataclass(frozen=True)
class PoolReader:
    """Turns prompts and candidates into the inputs of a ranker.

    Attributes:
        blind: replace every prompt by an empty one.
    """

    tokenizer: Any
    settings: RankerConfig
    runtime: Runtime
    seed: int
    blind: bool = False

    def read(
        self, prompts: list[str], texts: np.ndarray, present: np.ndarray, hidden_by: np.ndarray | None = None
    ) -> Pools:
        """The batch of B prompts and (B, K) candidates, on the CPU, where the model packs it.

        Args:
            hidden_by: (B,) global training rows, the key of the words that `ranker.word_dropout` hides.
        """
        if self.blind:
            prompts = [""] * len(prompts)
        candidates = [[t for t, p in zip(*row, strict=True) if p] for row in zip(texts, present, strict=True)]
        settings = self.settings
        lengths = settings.prompt_tokens, settings.candidate_tokens
        pools = collate(self.tokenizer, prompts, candidates, *lengths, settings.suffix)
        if hidden_by is not None and settings.word_dropout > 0:
            share, suffix = settings.word_dropout, settings.suffix
            pools = hide_words(pools, self.tokenizer, share, self.seed, hidden_by, suffix)
        return pools.tensors()

    def shortened(self, table: PoolTable) -> dict[str, int]:
        """Number of prompts and candidates that exceed `ranker.*_tokens`, so that their ends are not read."""
        prompts = [] if self.blind else table.prompts
        texts = table.texts[table.present].tolist()
        budgets = self.settings.prompt_tokens, self.settings.candidate_tokens
        cut = too_long(self.tokenizer, prompts, texts, *budgets, self.settings.suffix)
        return {
            "prompts": cut[0],
            "of_prompts": len(prompts),
            "candidates": cut[1],
            "of_candidates": len(texts),
        }

    def tokens_per_pool(self, table: PoolTable, packs: bool = True, most: int | None = None) -> int:
        """Mean over some pools, for the logged speed. Without packing each candidate has its own copy of the prompt.

        Args:
            most: of the candidates that are read of a pool.
        """
        some = np.unique(np.linspace(0, len(table) - 1, min(len(table), 64)).astype(int))
        texts, present = table.texts[some][:, :most], table.present[some][:, :most]
        pools = self.read([table.prompts[i] for i in some], texts, present)
        copies = 1 if packs else pools.candidate_mask.any(-1).sum(1)
        return int(((pools.prompt_mask.sum(1) * copies).sum() + pools.candidate_mask.sum()) / len(some))

    def evaluation_pools(self, model: nn.Module, table: PoolTable) -> int:
        """Pools of a forward pass of an evaluation: fewer where they have many tokens."""
        return evaluation_rows(EVALUATION_BATCH, self.tokens_per_pool(table, getattr(model, "packs", True)))

    def scores(self, model: nn.Module, rows: PoolRows, hidden_by: np.ndarray | None = None) -> Tensor:
        """(B, K) scores of B pools, -inf where there is no candidate. One forward pass.

        Args:
            hidden_by: see `read`; for training only.
        """
        pools = self.read(rows.prompts, rows.texts, rows.present, hidden_by)
        with self.runtime.autocast():
            scores = model(pools).float()
        missing = rows.present.shape[1] - scores.shape[1]
        return nn.functional.pad(scores, (0, missing), value=-torch.inf)

    @torch.no_grad()
    def all_scores(self, model: nn.Module, table: PoolTable, **other: Any) -> np.ndarray:
        """(N, K) scores of every pool, with N other `prompts` or (N, K) other `texts` if given."""
        prompts, texts = other.get("prompts"), other.get("texts")

        def score(part: np.ndarray) -> tuple[np.ndarray]:
            rows = PoolRows.of(table, part)
            if prompts is not None:
                rows = replace(rows, prompts=[prompts[i] for i in part])
            if texts is not None:
                rows = replace(rows, texts=texts[part])
            return (self.scores(model, rows).cpu().numpy(),)

        found = self.runtime.processes.share(
            score, list(chunks(len(table), self.evaluation_pools(model, table)))
        )
        return np.concatenate([scores for (scores,) in found])


def say_shortened(name: str, split: str, reader: PoolReader, tables: list[PoolTable]) -> dict[str, int]:
    """Count, and log, the prompts of a split and the candidates of all its draws whose ends are not read."""
    found = [reader.shortened(table) for table in tables]
    total = found[0] | {key: sum(one[key] for one in found) for key in ("candidates", "of_candidates")}
    for what, budget in (("prompts", "prompt_tokens"), ("candidates", "candidate_tokens")):
        if total[what]:
            say(
                f"{name}: {total[what]:,} of {total[f'of_{what}']:,} {what} in {split} are longer than ranker.{budget} "
                f"({getattr(reader.settings, budget)}); their ends are not read"
            )
    return total


@dataclass(frozen=True)
class PoolSplits:
    """Pools to learn from, to choose the best step by, and to report on.

    Attributes:
        train: draws of the training pools; each epoch takes the next one.
    """

    train: list[PoolTable]
    selection: PoolTable
    held_out: PoolTable


class PoolChoice:
    """The configured ranking loss over training pools.

    The best step has the lowest regret on the selection pools: the mean reward of the best candidates less that of the
    chosen ones. With `ranker.best_by: map`, it has the highest mean average precision. The loss would be a worse criterion: it
    rises with overconfidence while the choices still improve.
    """

    draws_ahead = True

    def __init__(self, context: TrainingContext, splits: PoolSplits, reader: PoolReader):
        self.label, self.seed, self.splits, self.reader = context.label, context.seed, splits, reader
        self.selection = {"reward": "regret", "map": "map_regret"}[reader.settings.best_by]
        self._order = Rows(context.seed, f"{context.label} order", len(splits.train[0]))
        shuffled = randomness.permutation(context.seed, "selection pools", 0, len(splits.selection))
        self.evaluated = np.sort(shuffled[: max(1, context.settings.evaluation_examples)])
        self._decided = decided(splits.selection)[self.evaluated]
        if self.selection == "map_regret" and self._decided.mean() < 1:
            self._say_undecided(len(self.evaluated), int(self._decided.sum()))
        self._sampler = CandidateSampler.of(reader.settings, splits.train, context.seed)
        packs = reader.settings.attention == "prefix"
        self.tokens_per_row = reader.tokens_per_pool(
            splits.train[0], packs, reader.settings.sampled_candidates
        )

    def _say_undecided(self, pools: int, count: int) -> None:
        """Say how many selection pools have a mean average precision. Without one, the best step has the lowest regret."""
        relevant = self.splits.selection.relevant
        said = (
            f"{self.label}: {count:,} of {pools:,} selection pools have rewards on both sides of pools.relevant ({relevant:g}), "
            "which ranker.best_by=map needs"
        )
        if count:
            say(f"{said}; the others do not count")
            return
        self.selection = "regret"
        say(f"WARNING: {said}. The best step is chosen by reward in its place; or set pools.relevant")

    def _losses(self, scores: Tensor, rows: PoolRows) -> Tensor:
        """(B,) the configured loss of each pool."""
        runtime, settings = self.reader.runtime, self.reader.settings
        extra: dict[str, float] = {}
        if settings.loss == "listwise":
            extra["temperature"] = settings.temperature
        if settings.loss in ("pairwise", "bradley_terry"):
            extra["margin"] = settings.margin
        learned = rows.targets if settings.loss in TEACHER else rows.rewards
        rewards = tensor(learned.astype(np.float32), runtime)
        return LOSSES[settings.loss](scores, rewards, tensor(rows.present, runtime), **extra)

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The mean loss of the batch's pools."""
        tables = self.splits.train
        row = np.arange(rows.start, rows.stop)
        draw = row // len(tables[0]) % len(tables)  # one, or two if an epoch ends within these rows
        index = self._order.samples(row)
        pools = PoolRows.of_draws(tables, draw, index).narrowed()
        if self._sampler is not None:
            pools = self._sampler.sample(pools, self._order.epochs(row), draw, index)

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            scores = self.reader.scores(model, pools, hidden_by=row)
            return {"loss": self._losses(scores, pools).sum() / totals["pools"]}

        return Part({"pools": len(row)}, losses)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        table = self.splits.selection

        def score(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = PoolRows.of(table, self.evaluated[part])
            scores = self.reader.scores(model, rows)
            return scores.cpu().numpy(), self._losses(scores, rows).cpu().numpy()

        size = self.reader.evaluation_pools(model, table)
        found = self.reader.runtime.processes.share(score, list(chunks(len(self.evaluated), size)))
        scores, losses = zip(*found, strict=True)
        per_pool = ranking_metrics(
            np.concatenate(scores),
            table.rewards[self.evaluated],
            table.present[self.evaluated],
            relevant=table.relevant,
        )
        values = {n: float(per_pool[n].mean()) for n in ("accuracy", "average_reward", "mrr")}
        regret = float((per_pool["best_reward"] - per_pool["average_reward"]).mean())
        if self.selection == "map_regret":  # the lowest value is chosen
            values["map_regret"] = 1 - float(per_pool["map"][self._decided].mean())
        return {"loss": float(np.concatenate(losses).mean()), "regret": regret} | values

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out pools: metrics with intervals, baselines, controls, and an analysis of the errors."""
        table = self.splits.held_out
        scores = self.reader.all_scores(model, table)
        values = measure(table, scores, self.seed)
        accuracy = ranking_metrics(scores, table.rewards, table.present)["accuracy"]
        others = {}
        for name, other_scores in (simple_scores(table) | self._control_scores(model)).items():
            others[name] = measure(table, other_scores, self.seed, short=True)
            other = ranking_metrics(other_scores, table.rewards, table.present)["accuracy"]
            others[name]["lead"] = paired_difference(accuracy, other, table.groups, self.seed)
        values["others"] = others
        rival = max((n for n in others if n not in CONTROLS), key=lambda n: others[n]["accuracy"]["value"])
        row = result_row(
            self.label, "accuracy", Estimate(**values["accuracy"]), rival, others[rival]["accuracy"]["value"],
            lower_is_better=False,
        )  # fmt: skip
        return values, [row.with_difference(Estimate(**others[rival]["lead"]))]

    def _control_scores(self, model: nn.Module) -> dict[str, np.ndarray]:
        """name -> (N, K) scores of the ranker with inputs that hide the answer."""
        table = self.splits.held_out
        mismatched = [table.prompts[i] for i in table.mismatched(self.seed)]
        score: Callable = self.reader.all_scores
        found = {
            NO_QUESTION: score(model, table, prompts=[""] * len(table)),
            MISMATCHED: score(model, table, prompts=mismatched),
        }
        if table.controls is not None:
            found[OFF_PAGE] = score(model, table, texts=table.controls)
        return found


def decided(table: PoolTable) -> np.ndarray:
    """(N,) whether a pool has relevant candidates and others, so that its average precision depends on the order."""
    relevant = table.rewards >= table.relevant
    right, wrong = (np.any(which & table.present, 1) for which in (relevant, ~relevant))
    return np.logical_and(right, wrong)


def simple_scores(table: PoolTable) -> dict[str, np.ndarray]:
    """name -> (N, K) scores of methods without a ranker.

    The first candidate is no row where it is the best of every pool: the files then list the best one first. No model
    reads the order.
    """
    first = -table.candidate_ids.astype(float)
    always = ranking_metrics(first, table.rewards, table.present)["accuracy"].min() == 1
    found = {RANDOM: np.zeros(table.present.shape)} | ({} if always else {FIRST: first})
    return found | table.baselines


def measure(table: PoolTable, scores: np.ndarray, seed: int, short: bool = False) -> dict[str, Any]:
    """Metrics of (N, K) scores with intervals over groups.

    Unless `short`, also the accuracy by tag, the kinds of wrong choices, and the reward terms of the winners.
    """
    per_pool = ranking_metrics(scores, table.rewards, table.present, relevant=table.relevant)
    values: dict[str, Any] = summarise(per_pool, table.groups, seed)
    values["pools"] = len(table)
    if short:
        return values
    accuracy = per_pool["accuracy"]
    pairs = [(tag, n) for n, tags in enumerate(table.tags) for tag in tags]
    if pairs:
        labels, index = zip(*pairs, strict=True)
        values["tags"] = breakdown(accuracy[list(index)], np.asarray(labels))
    best = table.present & (table.rewards == table.rewards.max(1, keepdims=True))
    values["wrong_choices"] = chosen_kinds(scores, table.kinds, best, table.present)
    values["terms"] = winners(scores, table.rewards, table.present, table.terms)
    return values
