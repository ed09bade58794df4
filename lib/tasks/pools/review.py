"""Stage 02 for pools: measure shortcuts after the last candidate, and write the scores of simple scorers as baselines."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from lib.config import Config
from lib.errors import BadData
from lib.log import say
from lib.randomness import hash_fraction
from lib.tasks import CandidateContext
from lib.tasks.pools.candidates import mapped
from lib.tasks.pools.shortcuts import (
    BM25,
    FIRST,
    MOST_CANDIDATES,
    Shortcuts,
    SimpleScorers,
    SomePools,
    pools_of,
)

TESTED = ("selection", "held_out", "test")
BLOCK = 1024  # pools that are scored at a time
BI_ENCODER = "bi_encoder"


def review_candidates(context: CandidateContext) -> tuple[dict[str, Any], pa.Table | None]:
    """(figures of shortcuts, table of schema.BASELINES).

    Raises:
        BadData: a simple scorer chooses more right candidates than `pools.leak_limit`.
    """
    config = context.config
    scorers = SimpleScorers(_train_pools(context), context.seed)
    encode = _bi_encoder(config)
    columns: dict[str, list[np.ndarray]] = {}
    names: list[str] = []
    numbers: list[np.ndarray] = []
    shortcuts, held_out = Shortcuts(), 0
    for split, pools in _tested(context):
        scores = scorers.scores(pools)
        if split == "held_out":
            held_out += len(pools)
            shortcuts.add(pools, scores)
        del scores[FIRST]  # the report has this row for every task
        if encode is not None:
            scores[BI_ENCODER] = encode(pools)
        rows = np.nonzero(pools.present)
        names += [pools.ids[n] for n in rows[0]]
        numbers.append(pools.places[rows])
        for name, values in scores.items():
            columns.setdefault(name, []).append(values[rows])
    figures: dict[str, Any] = {}
    if held_out:
        figures["shortcuts"] = rows = list(shortcuts.rows())
        _report(rows, config.pools.leak_limit)
    if not names:
        return figures, None
    table = {"example_id": pa.array(names), "candidate_id": pa.array(np.concatenate(numbers), pa.int32())}
    return figures, pa.table(table | {f"score_{n}": np.concatenate(v) for n, v in columns.items()})


def _report(rows: list[dict[str, Any]], limit: float | None) -> None:
    """Print the table of shortcuts; raise BadData if one is above the limit, warn of those above chance."""
    if not rows:
        say("no held-out pool has candidates of different reward: shortcuts are not measured")
        return
    say(f"right candidates that simple scorers choose in held-out pools (chance {rows[0]['chance']:.1%}):")
    for row in rows:
        reads = "prompt and candidate" if row["reads_prompt"] else "no prompt"
        say(f"  {row['scorer']}, {reads}: {row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})")
    ordered = [row for row in rows if row["scorer"] == FIRST and row["accuracy"] == 1]
    if ordered:
        say("the files list the best candidate first in every pool; no model of this project reads the order")
    # BM25 is a ranker of its own, no shortcut
    counted = [row for row in rows if row not in ordered and row["scorer"] != BM25]
    blind = [row["scorer"] for row in counted if not row["reads_prompt"] and row["low"] > row["chance"]]
    if blind:
        more = "" if limit is not None else ". pools.leak_limit makes this an error"
        say(
            f"WARNING: {', '.join(blind)} find more right candidates than chance without reading the prompt. A ranker may "
            f"learn this shortcut instead of the task: compare it with these rows{more}"
        )
    if limit is None:
        return
    worst = max(counted, key=lambda row: _bound(row), default=None)
    if worst is not None and _bound(worst) > limit:
        raise BadData(
            f"the scorer '{worst['scorer']}' chooses up to {_bound(worst):.1%} of the right candidates, more than pools.leak_limit "
            f"({limit:.1%}). A ranker could learn this shortcut instead of the task. Add wrong candidates that look like right ones, "
            "or raise the limit"
        )


def _bound(row: dict[str, Any]) -> float:
    """The upper end of the interval; 1 where a single group has none."""
    return 1.0 if np.isnan(row["high"]) else row["high"]


def _records(context: CandidateContext) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, record) of every example."""
    tables: Iterable[pa.Table] = context.examples or ()
    for table in tables:
        columns = (table[name].to_pylist() for name in ("split", "record"))
        for split, record in zip(*columns, strict=True):
            yield split, json.loads(record)


def _train_pools(context: CandidateContext) -> SomePools:
    """The train pools that scorers learn from: all, or a sample of those of a large file."""
    total = sum(len(record["candidates"]) for split, record in _records(context) if split == "train")
    share = MOST_CANDIDATES / max(total, 1)
    kept = [
        record
        for split, record in _records(context)
        if split == "train"
        and (share >= 1 or hash_fraction(context.seed, "simple scorers", record["id"]) < share)
    ]
    return pools_of(kept, _rewards(kept, context.config))


def _tested(context: CandidateContext) -> Iterator[tuple[str, SomePools]]:
    """The pools of the splits that are measured, in blocks."""
    for wanted in TESTED:
        block: list[dict[str, Any]] = []
        for split, record in _records(context):
            if split != wanted:
                continue
            block.append(record)
            if len(block) == BLOCK:
                yield wanted, pools_of(block, _rewards(block, context.config))
                block = []
        if block:
            yield wanted, pools_of(block, _rewards(block, context.config))


def _rewards(records: list[dict[str, Any]], config: Config) -> list[np.ndarray]:
    return [
        mapped(np.asarray(r["rewards"], float), np.zeros(len(r["rewards"])), config.pools) for r in records
    ]


def _bi_encoder(config: Config) -> Callable[[SomePools], np.ndarray] | None:
    """The scorer of the untrained encoder; None if the ranker has none."""
    if config.ranker.encoder is None:
        return None
    from lib.runtime import Runtime
    from lib.tasks.pools.bi_encoder import BiEncoder

    longest = max(config.ranker.prompt_tokens, config.ranker.candidate_tokens)
    encoder = BiEncoder(config.ranker.encoder, longest, Runtime.detect(config))
    return lambda pools: encoder.scores(pools.prompts, pools.texts, pools.present)
