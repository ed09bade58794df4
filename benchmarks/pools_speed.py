"""
Speed of rankers on pools: a step with pools of different size, and ranking beside sentence-transformers.

steps   forward, backward and AdamW with pools of 2 to 64 candidates, and with equal pools of the same number of tokens
rank    `Ranker.rank_all` on pools of ten short candidates, and CrossEncoder.predict on the same pairs, in turns

python -m benchmarks.pools_speed --encoder /path/to/all-MiniLM-L6-v2
python -m benchmarks.pools_speed --encoder /path/to/all-MiniLM-L6-v2 --skip rank   # without sentence-transformers
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.provenance import say_provenance
from benchmarks.ranker_speed import Steps
from benchmarks.result_files import add_out, write
from lib.config import load_config
from lib.evaluation.rank import Ranker
from lib.models.packing import Pools
from lib.models.ranker import CandidateRanker
from lib.models.ranker_files import open_encoder
from lib.report.table import aligned
from lib.runtime import Runtime

PROMPTS = (16, 200)  # tokens
CANDIDATE = 30  # tokens at most; half of it at least
SIZES = (2, 64)


def mixed_and_equal(count: int, prompt: int, seed: int = 0) -> tuple[Pools, Pools]:
    """Two batches of `count` prompts with the same candidates: once in pools of different size, once in equal ones."""
    draw = np.random.default_rng(seed)
    low, high = np.log(SIZES)
    sizes = np.exp(draw.uniform(low, high, count)).round().astype(int)
    sizes[:2] = SIZES
    equal = -(-int(sizes.sum()) // count)
    sizes[-1] += equal * count - int(sizes.sum())
    lengths = draw.integers(CANDIDATE // 2, CANDIDATE + 1, equal * count)
    ids = draw.integers(1000, 20000, (equal * count, CANDIDATE))

    def pools(counts: np.ndarray) -> Pools:
        present = np.arange(counts.max()) < counts[:, None]
        shape = (*present.shape, CANDIDATE)
        candidates, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        candidates[present], mask[present] = ids, np.arange(CANDIDATE) < lengths[:, None]
        prompts = np.random.default_rng(1).integers(1000, 20000, (count, prompt))
        return Pools(prompts, np.ones((count, prompt), bool), candidates, mask)

    return pools(sizes), pools(np.full(count, equal))


def compare_steps(encoder: str, runtime: Runtime, count: int, rounds: int) -> list[dict[str, Any]]:
    """A row per length of prompts: seconds of a step with mixed and with equal pools."""
    rows = []
    for prompt in PROMPTS:
        mixed, equal = mixed_and_equal(count, prompt)
        steps = Steps(
            CandidateRanker(open_encoder(encoder)[0], seed=0, pooling="mean"),
            CandidateRanker.forward,
            runtime,
        )
        times = np.array([[steps.seconds(mixed), steps.seconds(equal)] for _ in range(rounds + 1)])[1:]
        a, b = np.median(times, axis=0)
        ratio = float(np.median(times[:, 0] / times[:, 1]))
        rows.append({"prompt": prompt, "mixed": float(a), "equal": float(b), "ratio": ratio})
    return rows


def short_pools(tokenizer: Any, count: int) -> tuple[list[str], list[list[str]]]:
    """Prompts of 6 to 12 and ten candidates of 6 to 16 common words each."""
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) > 3)
    draw = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words, draw.integers(low, high + 1)))

    return [text(6, 12) for _ in range(count)], [[text(6, 16) for _ in range(10)] for _ in range(count)]


def compare_ranking(encoder: str, runtime: Runtime, count: int, rounds: int) -> list[dict[str, Any]]:
    """A row per way to score the same pairs: seconds, and how many times as fast as CrossEncoder.predict."""
    from sentence_transformers.cross_encoder import CrossEncoder  # pyright: ignore[reportMissingImports]

    tokenizer = open_encoder(encoder)[1]
    prompts, candidates = short_pools(tokenizer, count)
    pairs = [(p, c) for p, texts in zip(prompts, candidates, strict=True) for c in texts]
    methods = {}
    for attention, pooling in (("prefix", "mean"), ("full", "cls")):
        model = CandidateRanker(open_encoder(encoder)[0], seed=0, attention=attention, pooling=pooling).eval()
        for precision in dict.fromkeys((runtime.precision, "fp32")):
            ranker = Ranker(model, tokenizer, Runtime(runtime.device, precision), 128, 128)
            methods[f"{attention}, {precision}"] = lambda r=ranker: r.rank_all(prompts, candidates)
    peer = CrossEncoder(encoder, num_labels=1, local_files_only=True, device=str(runtime.device))
    methods["CrossEncoder.predict"] = lambda: peer.predict(pairs, batch_size=32, show_progress_bar=False)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds + 1):
        for name, way in methods.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(found[1:]) for name, found in times.items()}
    return [
        {"name": name, "seconds": value, "times_as_fast": seconds["CrossEncoder.predict"] / value}
        for name, value in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="folder of a BERT-like encoder with its tokenizer")
    parser.add_argument("--pools", type=int, default=16, help="pools per step")
    parser.add_argument("--ranked", type=int, default=1000, help="pools that are ranked")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", choices=["steps", "rank"], help="leave out one of the two comparisons")
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    runtime = Runtime.detect(load_config())
    figures: dict[str, Any] = {"pools": options.pools, "ranked": options.ranked, "steps": [], "rank": []}
    if options.skip != "steps":
        figures["steps"] = compare_steps(options.encoder, runtime, options.pools, options.rounds)
        head = ("prompt tokens", "mixed pools s", "equal pools s", "ratio")
        lines = [
            (f"{r['prompt']}", f"{r['mixed']:.3f}", f"{r['equal']:.3f}", f"{r['ratio']:.3f}")
            for r in figures["steps"]
        ]
        print(aligned([head, *lines]))
    if options.skip != "rank":
        figures["rank"] = compare_ranking(options.encoder, runtime, options.ranked, options.rounds)
        lines = [(r["name"], f"{r['seconds']:.2f}", f"{r['times_as_fast']:.2f}") for r in figures["rank"]]
        print(aligned([("scored by", "seconds", "times as fast"), *lines]))
    write(options.out, "pools_speed", figures)


if __name__ == "__main__":
    main()
