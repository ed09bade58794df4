"""
How often is the gold program of a FinQA pool found without the question? Naive pools and this project's, on the dev split.

Naive pools are seven single edits of the gold program; this project's pools follow the settings `finqa.pools`. Scorers are
trained on pools of the train split. Chance is 12.5 % for pools of eight. The 95 % intervals resample pages.

python -m benchmarks.finqa_leak /path/to/FinQA/dataset
python -m benchmarks.finqa_leak /path/to/FinQA/dataset --set finqa.pools.corruption_rate=0.5
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib.config import Config, load_config
from lib.report.table import aligned
from lib.tasks.finqa.leak import Pool, PoolFeatures, accuracy, label_overlap, measure_leak, question_trees
from lib.tasks.finqa.naive import naive_pools
from lib.tasks.finqa.pools import PoolMaker, Unfilled
from lib.tasks.finqa.record import Record, read_records

WITH_QUESTION = "candidate and question"


def by_page(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Page -> its records."""
    pages: dict[str, list[Record]] = {}
    for record in records:
        pages.setdefault(record.filename, []).append(record)
    return pages


def our_pools(train: list[Record], dev: list[Record], config: Config) -> tuple[list[Pool], list[Pool]]:
    """This project's pools of both splits."""
    started = time.perf_counter()
    maker = PoolMaker.fit(
        train, [r.filename for r in train], config.finqa.pools, config.candidates.per_example, config.seed
    )
    made: list[list[Pool]] = []
    for records in (train, dev):
        pools, reasons = [], Counter()
        for name, page in by_page(records).items():
            for record, pool in zip(page, maker.pools(page, name), strict=True):
                if isinstance(pool, Unfilled):
                    reasons[pool.reason] += 1
                else:
                    pools.append((record, pool[0], [c.kind for c in pool[0]].index("gold")))
        print(f"{len(pools)} pools; without one: {dict(reasons.most_common(3))}")
        made.append(pools)
    kinds = Counter(candidate.kind for _, pool, _ in made[1] for candidate in pool)
    print(f"dev candidates: {dict(kinds)}; {time.perf_counter() - started:.0f} s")
    return made[0], made[1]


def rows_of(train: Sequence[Pool], dev: Sequence[Pool], seed: int, limit: float) -> list[dict[str, Any]]:
    """A row per scorer: what it sees, and the share of pools in which it finds the gold program."""
    leak = measure_leak(train, dev, seed + 1, limit)
    rows = [
        {"scorer": row["scorer"], "sees": row["sees"], "value": row["accuracy"], "low": row["low"], "high": row["high"]}
        for row in leak["rows"]
    ]  # fmt: skip
    pools = PoolFeatures.of(dev)
    for method, scores in (
        ("trees", question_trees(train, dev, seed + 1)),
        ("overlap of names, untrained", label_overlap(dev)),
    ):
        estimate = accuracy(scores, pools.gold, pools.pages)
        rows.append({"scorer": method, "sees": WITH_QUESTION} | estimate._asdict())
    return rows


def best_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a scorer sees -> the best of those that do not see the question."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        sees = row["sees"]
        if sees != WITH_QUESTION and (sees not in best or row["value"] > best[sees]["value"]):
            best[sees] = row
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder with FinQA's train.json and dev.json")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    add_out(parser)
    args = parser.parse_args()
    say_provenance()
    config = load_config(overrides=["candidates.per_example=8", *args.overrides])
    records = [r for r in read_records(args.data) if isinstance(r, Record) and r.program]
    train, dev = ([r for r in records if r.split == split] for split in ("train", "dev"))
    size, limit = config.candidates.per_example, config.finqa.pools.leak_limit
    naive = (naive_pools(train, size, config.seed), naive_pools(dev, size, config.seed))
    rows = {
        "naive": rows_of(*naive, config.seed, limit),
        "ours": rows_of(*our_pools(train, dev, config), config.seed, limit),
    }
    lines = [
        (name, row["scorer"], row["sees"], f"{row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%})")
        for name, found in rows.items()
        for row in found
    ]
    print(aligned([("pools", "scorer", "sees", "gold found (95 %)"), *lines]))
    write(args.out, "finqa_leak", {name: best_of(found) for name, found in rows.items()} | {"rows": rows})


if __name__ == "__main__":
    main()
