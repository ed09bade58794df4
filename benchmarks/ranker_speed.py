"""
Training step of a ranker: all candidates packed behind their prompt, against one padded row per candidate.

Same weights, same pools of K = 8, forward, backward and AdamW, in turns. The ratios count. One row per candidate is measured
twice: with the published encoder, whose attention dropout disables torch's fused attention, and without that dropout, as in
the packed rows. The second part is CrossEncoderTrainer of sentence-transformers with ListNet, on the same model and texts.

python -m benchmarks.ranker_speed                                      # a model of MiniLM's shape with random weights
python -m benchmarks.ranker_speed --encoder /path/to/all-MiniLM-L6-v2  # also the comparison with CrossEncoderTrainer
"""

import argparse
import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib.config import load_config
from lib.models.collation import collate
from lib.models.packing import Pools
from lib.models.ranker import CandidateRanker
from lib.models.ranker_files import open_encoder
from lib.ranking.losses import LOSSES
from lib.report.table import aligned
from lib.runtime import Runtime

NUM_CANDIDATES = 8
LENGTHS = ((448, 24), (160, 24), (48, 48))  # tokens of a prompt and of a candidate
PEER_LENGTHS = (302, 24)
LEARNING_RATE = 1e-5


def backbones_of(encoder: str | None) -> tuple[Any, Any]:
    """(as the ranker opens it, as it was published). Without a folder: the shape of MiniLM with random weights."""
    from transformers import AutoModel, BertConfig, BertModel

    if encoder:
        stock = AutoModel.from_pretrained(encoder, local_files_only=True, use_safetensors=True)
        return open_encoder(encoder)[0], stock

    def fresh(**choices: Any) -> Any:
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        }
        return BertModel(BertConfig(**(shape | choices)))

    return fresh(attention_probs_dropout_prob=0.0), fresh()


def random_pools(count: int, prompt: int, candidate: int) -> Pools:
    """Pools with full prompts, and candidates that have between half and all of their tokens."""
    draw = np.random.default_rng(0)
    shape = (count, NUM_CANDIDATES, candidate)
    lengths = draw.integers(candidate // 2, candidate + 1, shape[:2])
    lengths[:, 0] = candidate
    return Pools(
        draw.integers(1000, 20000, (count, prompt)), np.ones((count, prompt), bool),
        draw.integers(1000, 20000, shape), np.arange(candidate) < lengths[..., None],
    )  # fmt: skip


class Steps:
    """Training steps of one copy of a model.

    Args:
        scores: (model, pools) -> (N, K).
    """

    def __init__(
        self, model: CandidateRanker, scores: Callable[[CandidateRanker, Pools], Tensor], runtime: Runtime
    ):
        self.model = copy.deepcopy(model).to(runtime.device).train()
        self.scores, self.runtime = scores, runtime
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, fused=True)

    def seconds(self, pools: Pools) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        with self.runtime.autocast():
            scores = self.scores(self.model, pools).float()
        rewards = torch.zeros_like(scores)
        rewards[:, 0] = 1.0
        LOSSES["cross_entropy"](scores, rewards, torch.ones_like(scores, dtype=torch.bool)).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def compare_methods(
    encoder: str | None, runtime: Runtime, pools_per_step: int, rounds: int
) -> list[dict[str, Any]]:
    """A row per length and precision: seconds per step, packed and one by one."""
    ours, stock = (CandidateRanker(backbone, seed=0) for backbone in backbones_of(encoder))
    precisions = ["fp32", "bf16"] if Runtime.detect(load_config()).precision == "bf16" else ["fp32"]
    rows = []
    for prompt, candidate in LENGTHS:
        pools = random_pools(pools_per_step, prompt, candidate)
        for precision in precisions:
            there = Runtime(runtime.device, precision)
            methods = (
                Steps(ours, CandidateRanker.score_packed, there),
                Steps(ours, CandidateRanker.score_one_by_one, there),
                Steps(stock, CandidateRanker.score_one_by_one, there),
            )
            times = np.array([[method.seconds(pools) for method in methods] for _ in range(rounds + 1)])[1:]
            packed, alone, published = np.median(times, axis=0)
            ratio, to_published = np.median(times[:, 1:] / times[:, :1], axis=0)
            rows.append({
                "prompt": prompt, "candidate": candidate, "precision": precision, "packed": packed, "published": published,
                "published_ratio": to_published, "no_dropout": alone, "no_dropout_ratio": ratio,
            })  # fmt: skip
    say(rows)
    return rows


def say(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    head = ("prompt", "candidate", "precision", "packed s", "one by one s", "ratio", "no dropout s", "ratio")
    lines = [
        (f"{r['prompt']}", f"{r['candidate']}", r["precision"], f"{r['packed']:.2f}", f"{r['published']:.2f}",
         f"{r['published_ratio']:.1f}", f"{r['no_dropout']:.2f}", f"{r['no_dropout_ratio']:.1f}")
        for r in rows
    ]  # fmt: skip
    print("tokens, and seconds per training step; one by one as published, and without attention dropout")
    print(aligned([head, *lines]))


# --- sentence-transformers -------------------------------------------------------------------------------------------


def compare_peer(encoder: str, runtime: Runtime, pools_per_step: int, rounds: int) -> dict[str, Any] | None:
    """Seconds per step beside CrossEncoderTrainer; None when its packages are not installed."""
    lacking = [
        name for name in ("sentence_transformers", "datasets") if importlib.util.find_spec(name) is None
    ]
    if lacking:
        print(f"no comparison with CrossEncoderTrainer: {' and '.join(lacking)} not installed")
        return None
    backbone, tokenizer = open_encoder(encoder)
    prompts, candidates = texts(tokenizer, pools_per_step)
    pools = collate(tokenizer, prompts, candidates, sum(PEER_LENGTHS), PEER_LENGTHS[1])
    steps = Steps(CandidateRanker(backbone, seed=0), CandidateRanker.score_packed, runtime)
    pairs = []
    for number in range(rounds + 1):
        ours = statistics.median(steps.seconds(pools) for _ in range(3))
        theirs = peer_seconds(encoder, runtime, prompts, candidates)
        if number:
            pairs.append((ours, theirs))
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    prompt = int(pools.prompt_mask.sum(1).max())
    print(f"\nprompt {prompt} tokens, {runtime.precision}: ours {ours:.2f} s per step, "
          f"CrossEncoderTrainer with ListNet {theirs:.2f} s, ratio {ratio:.1f}")  # fmt: skip
    return {"prompt": prompt, "precision": runtime.precision, "ours": ours, "theirs": theirs, "ratio": ratio}


def texts(tokenizer: Any, count: int) -> tuple[list[str], list[list[str]]]:
    """Prompts and candidates of common words, one token each. The lengths include special tokens."""
    words = [w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) > 3]
    words, draw = sorted(words), np.random.default_rng(0)
    prompt, candidate = (length - special for length, special in zip(PEER_LENGTHS, (2, 1), strict=True))
    write = lambda length: " ".join(draw.choice(words, length))  # noqa: E731
    return [write(prompt) for _ in range(count)], [
        [write(candidate) for _ in range(NUM_CANDIDATES)] for _ in range(count)
    ]


def peer_seconds(encoder: str, runtime: Runtime, prompts: list[str], candidates: list[list[str]]) -> float:
    """Seconds per step of CrossEncoderTrainer: median of five steps after the first, the same pools each time."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from sentence_transformers.cross_encoder import (  # pyright: ignore[reportMissingImports]
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import ListNetLoss  # pyright: ignore[reportMissingImports]
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        ends: list[float]

        def __init__(self) -> None:
            self.ends = []

        def on_step_end(self, *arguments, **others) -> None:
            self.ends.append(time.perf_counter())

    steps, clock = 6, Clock()
    labels = [[1.0] + [0.0] * (NUM_CANDIDATES - 1)] * len(prompts)
    data = Dataset.from_dict({"query": prompts * steps, "docs": candidates * steps, "labels": labels * steps})
    model = CrossEncoder(encoder, num_labels=1, device=str(runtime.device), local_files_only=True)
    loss = ListNetLoss(
        model, mini_batch_size=-1
    )  # all candidates of the step in one forward pass, which is fastest
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=len(prompts), learning_rate=LEARNING_RATE,
            bf16=runtime.precision == "bf16", use_cpu=runtime.device.type == "cpu", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, report_to=[], dataloader_num_workers=0,
        )  # fmt: skip
        CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[clock]
        ).train()
    return statistics.median(np.diff(clock.ends))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", help="folder of a BERT-like encoder with its tokenizer")
    parser.add_argument("--pools", type=int, default=4, help="pools per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", choices=["methods", "peer"], help="leave out one of the two comparisons")
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    runtime = Runtime.detect(load_config())
    figures: dict[str, Any] = {"pools": options.pools, "rows": [], "peer": None}
    if options.skip != "methods":
        figures["rows"] = compare_methods(options.encoder, runtime, options.pools, options.rounds)
    if options.skip != "peer" and options.encoder:
        figures["peer"] = compare_peer(options.encoder, runtime, options.pools, options.rounds)
    write(options.out, "ranker_speed", figures)


if __name__ == "__main__":
    main()
