"""
Can the gold program of a FinQA pool be guessed without the question? Naive pools beside ours, on the dev split.

Naive pools are seven single edits of the gold program; ours come from finqa.pools of the config. Scorers learn on pools of
the train split. Chance is 12.5 % for pools of eight; the intervals (95 %) resample pages.

python -m benchmarks.finqa_leak /path/to/FinQA/dataset
python -m benchmarks.finqa_leak /path/to/FinQA/dataset --set finqa.pools.corruption_rate=0.5
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.provenance import say_provenance
from lib.config import Config, load_config
from lib.report.table import aligned
from lib.tasks.finqa.leak import Pool, PoolFeatures, accuracy, label_overlap, measure_leak, question_trees
from lib.tasks.finqa.naive import naive_pools
from lib.tasks.finqa.pools import PoolMaker, Unfilled
from lib.tasks.finqa.record import Record, read_records


def by_page(records: Sequence[Record]) -> dict[str, list[Record]]:
    pages: dict[str, list[Record]] = {}
    for record in records:
        pages.setdefault(record.filename, []).append(record)
    return pages


def our_pools(train: list[Record], dev: list[Record], config: Config) -> tuple[list[Pool], list[Pool]]:
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


def rows_of(
    name: str, train: Sequence[Pool], dev: Sequence[Pool], seed: int, limit: float
) -> list[tuple[str, ...]]:
    leak = measure_leak(train, dev, seed + 1, limit)
    rows: list[tuple[str, ...]] = [(name, row["scorer"], row["sees"], _shown(row)) for row in leak["rows"]]
    pools = PoolFeatures.of(dev)
    for method, scores in (
        ("trees", question_trees(train, dev, seed + 1)),
        ("overlap of names, untrained", label_overlap(dev)),
    ):
        estimate = accuracy(scores, pools.gold, pools.pages)
        rows.append((name, method, "candidate and question", _shown(estimate._asdict())))
    return rows


def _shown(figures: dict) -> str:
    value = figures.get("accuracy", figures.get("value", 0.0))
    return f"{value:.1%} ({figures['low']:.1%} to {figures['high']:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder with FinQA's train.json and dev.json")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    say_provenance()
    config = load_config(overrides=["candidates.per_example=8", *args.overrides])
    records = [r for r in read_records(args.data) if isinstance(r, Record) and r.program]
    train, dev = ([r for r in records if r.split == split] for split in ("train", "dev"))
    size, limit = config.candidates.per_example, config.finqa.pools.leak_limit
    naive = (naive_pools(train, size, config.seed), naive_pools(dev, size, config.seed))
    rows = rows_of("naive", *naive, config.seed, limit)
    rows += rows_of("ours", *our_pools(train, dev, config), config.seed, limit)
    print(aligned([("pools", "scorer", "sees", "gold found (95 %)"), *rows]))


if __name__ == "__main__":
    main()
