"""`ranker` of tasks with prompts: a score for each of the K candidates of a prompt; the best one is to win.

What is reported is measured on held-out pools beside what needs no ranker: chance, the first candidate, simple methods
(`PoolTable.baselines`), and beside the ranker itself where it cannot know: without the question, with the question of
another page, with the candidates as they would read on another page. Only above all of these has it read anything.

Knows pools of texts and a ranker. Legend: N pools, K candidates, B pools of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.log import say
from lib.metrics import Estimate
from lib.models.collation import collate, hide_words, too_long
from lib.models.packing import Pools
from lib.ranking.losses import LOSSES
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
from lib.training.objectives.base import ResultRow, chunks, result_row, tensor
from lib.training.pool_table import PoolTable

EVALUATION_BATCH = 32
REMOVED, SWAPPED, ELSEWHERE = "question removed", "question of another page", "candidates on another page"
RANDOM, FIRST = "random choice", "first candidate"


@dataclass(frozen=True)
class PoolReader:
    """Turns prompts and candidates into what a ranker takes.

    Attributes:
        blind: give every ranker an empty prompt instead.
    """

    tokenizer: Any
    settings: RankerConfig
    runtime: Runtime
    seed: int
    blind: bool = False

    def read(
        self, prompts: list[str], texts: np.ndarray, present: np.ndarray, hidden_by: np.ndarray | None = None
    ) -> Pools:
        """The batch of B prompts and (B, K) candidates, on the device.

        Args:
            hidden_by: (B,) numbers of training rows, which decide the words that `ranker.word_dropout` hides.
        """
        if self.blind:
            prompts = [""] * len(prompts)
        candidates = [[t for t, p in zip(*row, strict=True) if p] for row in zip(texts, present, strict=True)]
        pools = collate(
            self.tokenizer, prompts, candidates, self.settings.prompt_tokens, self.settings.candidate_tokens
        )
        if hidden_by is not None and self.settings.word_dropout > 0:
            pools = hide_words(pools, self.tokenizer, self.settings.word_dropout, self.seed, hidden_by)
        pools = pools.tensors()
        moved = (
            getattr(pools, name).to(self.runtime.device)
            for name in ("prompt_ids", "prompt_mask", "candidate_ids", "candidate_mask")
        )
        return Pools(*moved)

    def shortened(self, table: PoolTable) -> dict[str, int]:
        """How many prompts and candidates of the pools are read in part only, as `ranker.*_tokens` has it."""
        prompts = [] if self.blind else table.prompts
        texts = table.texts[table.present].tolist()
        budgets = self.settings.prompt_tokens, self.settings.candidate_tokens
        cut = too_long(self.tokenizer, prompts, texts, *budgets)
        return {
            "prompts": cut[0],
            "of_prompts": len(prompts),
            "candidates": cut[1],
            "of_candidates": len(texts),
        }

    def tokens_per_pool(self, table: PoolTable) -> int:
        """Mean over the first pools, for the speed that is logged."""
        some = np.arange(min(len(table), 64))
        pools = self.read([table.prompts[i] for i in some], table.texts[some], table.present[some])
        return int((pools.prompt_mask.sum() + pools.candidate_mask.sum()) / len(some))

    def scores(
        self,
        model: nn.Module,
        table: PoolTable,
        which: np.ndarray,
        prompts: list[str] | None = None,
        texts: np.ndarray | None = None,
        hidden_by: np.ndarray | None = None,
    ) -> Tensor:
        """(B, K) scores of some pools, -inf where there is no candidate; with other prompts or texts if given.

        `hidden_by`: see `read`; for training only.
        """
        given = prompts if prompts is not None else [table.prompts[i] for i in which]
        shown = (table.texts if texts is None else texts)[which]
        pools = self.read(given, shown, table.present[which], hidden_by)
        with self.runtime.autocast():
            scores = model(pools).float()
        missing = table.present.shape[1] - scores.shape[1]
        return nn.functional.pad(scores, (0, missing), value=-torch.inf)

    @torch.no_grad()
    def all_scores(self, model: nn.Module, table: PoolTable, **other: Any) -> np.ndarray:
        """(N, K) scores of every pool; `prompts` (N) and `texts` (N, K) in place of the table's own."""
        prompts, texts = other.get("prompts"), other.get("texts")
        found = []
        for part in chunks(len(table), EVALUATION_BATCH):
            given = None if prompts is None else [prompts[i] for i in part]
            found.append(self.scores(model, table, part, given, texts).cpu().numpy())
        return np.concatenate(found)


def say_shortened(name: str, split: str, reader: PoolReader, tables: list[PoolTable]) -> dict[str, int]:
    """How many prompts of a split, and candidates of all its draws, are read in part only; says so if any are."""
    found = [reader.shortened(table) for table in tables]
    total = found[0] | {key: sum(one[key] for one in found) for key in ("candidates", "of_candidates")}
    for what, budget in (("prompts", "prompt_tokens"), ("candidates", "candidate_tokens")):
        if total[what]:
            say(
                f"{name}: {total[what]:,} of {total[f'of_{what}']:,} {what} in {split} are longer than ranker.{budget} "
                f"({getattr(reader.settings, budget)}); their ends are not read"
            )
    return total


class PoolChoice:
    """The configured loss over training pools, and how well the ranker chooses on others.

    The best step is the one with the least regret: how much less the choices earn than the best ones, on average.

    Args:
        train: pools to learn from; each pass over them takes the next of the list.
        selection, held_out: pools to choose the best step by, and to report on.
        evaluated: how many pools of `selection` an evaluation takes, the same ones each time.
    """

    selection = "regret"  # the loss rises with confidence while the choices still get better

    def __init__(
        self, label: str, train: list[PoolTable], selection: PoolTable, held_out: PoolTable, reader: PoolReader,
        seed: int, evaluated: int,
    ):  # fmt: skip
        self.label, self.reader, self.seed = label, reader, seed
        self.train, self.held_out, self._selection = train, held_out, selection
        self._order = Rows(seed, f"{label} order", len(train[0]))
        spread = randomness.permutation(seed, "selection pools", 0, len(selection))
        self._evaluated = np.sort(spread[: max(1, evaluated)])
        self.tokens_per_row = reader.tokens_per_pool(train[0])

    def _losses(self, scores: Tensor, table: PoolTable, which: np.ndarray) -> Tensor:
        """(B,) the configured loss of each pool."""
        runtime, settings = self.reader.runtime, self.reader.settings
        extra: dict[str, float] = {}
        if settings.loss == "listwise":
            extra["temperature"] = settings.temperature
        if settings.loss == "pairwise":
            extra["margin"] = settings.margin
        rewards = tensor(table.rewards[which].astype(np.float32), runtime)
        return LOSSES[settings.loss](scores, rewards, tensor(table.present[which], runtime), **extra)

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        index = np.arange(rows.start, rows.stop)
        which, draw = self._order.samples(index), index // len(self.train[0]) % len(self.train)
        losses = []
        for number in np.unique(draw):  # one, or two where a pass ends within the batch
            table, here = self.train[number], draw == number
            scores = self.reader.scores(model, table, which[here], hidden_by=index[here])
            losses.append(self._losses(scores, table, which[here]))
        return {"loss": torch.cat(losses).mean()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        table, scores, losses = self._selection, [], []
        for part in chunks(len(self._evaluated), EVALUATION_BATCH):
            which = self._evaluated[part]
            found = self.reader.scores(model, table, which)
            losses.append(self._losses(found, table, which).cpu().numpy())
            scores.append(found.cpu().numpy())
        per_pool = ranking_metrics(
            np.concatenate(scores), table.rewards[self._evaluated], table.present[self._evaluated]
        )
        values = {n: float(per_pool[n].mean()) for n in ("accuracy", "average_reward", "mrr")}
        regret = float((per_pool["best_reward"] - per_pool["average_reward"]).mean())
        return {"loss": float(np.concatenate(losses).mean()), "regret": regret} | values

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out pools: metrics with intervals, controls, baselines, and what the errors are."""
        table = self.held_out
        scores = self.reader.all_scores(model, table)
        values = measure(table, scores, self.seed)
        accuracy = ranking_metrics(scores, table.rewards, table.present)["accuracy"]
        others = {}
        for name, found in self._others(model).items():
            others[name] = measure(table, found, self.seed, short=True)
            control = ranking_metrics(found, table.rewards, table.present)["accuracy"]
            others[name]["lead"] = paired_difference(accuracy, control, table.groups, self.seed)
        values["others"] = others
        rival = max((n for n in others if n not in CONTROLS), key=lambda n: others[n]["accuracy"]["value"])
        row = result_row(
            self.label, "accuracy", Estimate(**values["accuracy"]), rival, others[rival]["accuracy"]["value"],
            lower_is_better=False,
        )  # fmt: skip
        return values, [row]

    def _others(self, model: nn.Module) -> dict[str, np.ndarray]:
        """name -> (N, K) scores of baselines, and of the ranker where it cannot know."""
        table = self.held_out
        found = simple_scores(table)
        strangers = [table.prompts[i] for i in table.strangers(self.seed)]
        blind: Callable = self.reader.all_scores
        found[REMOVED] = blind(model, table, prompts=[""] * len(table))
        found[SWAPPED] = blind(model, table, prompts=strangers)
        if table.controls is not None:
            found[ELSEWHERE] = blind(model, table, texts=table.controls)
        return found


CONTROLS = (REMOVED, SWAPPED, ELSEWHERE)


def simple_scores(table: PoolTable) -> dict[str, np.ndarray]:
    """name -> (N, K) scores of what needs no ranker."""
    return {
        RANDOM: np.zeros(table.present.shape),
        FIRST: np.broadcast_to(-np.arange(table.present.shape[1], dtype=float), table.present.shape),
    } | table.baselines


def measure(table: PoolTable, scores: np.ndarray, seed: int, short: bool = False) -> dict[str, Any]:
    """Metrics of (N, K) scores with intervals over groups; unless `short`, broken down and with the winners' terms."""
    per_pool = ranking_metrics(scores, table.rewards, table.present)
    values: dict[str, Any] = summarise(per_pool, table.groups, seed)
    values["pools"] = len(table)
    if short:
        return values
    accuracy = per_pool["accuracy"]
    pairs = [(tag, n) for n, tags in enumerate(table.tags) for tag in tags]
    if pairs:
        labels, which = zip(*pairs, strict=True)
        values["tags"] = breakdown(accuracy[list(which)], np.asarray(labels))
    best = table.present & (table.rewards == table.rewards.max(1, keepdims=True))
    values["wrong_choices"] = chosen_kinds(scores, table.kinds, best, table.present)
    values["terms"] = winners(scores, table.rewards, table.present, table.terms)
    return values
