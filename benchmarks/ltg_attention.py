"""
LTG-BERT forward and backward: this project's attention against the plain method, in turns, each in processes of its own.

The plain method follows the formula: one table of projected positions per pair of tokens, (T, T, 2 D), and three score
terms. Both compute the same function; the benchmark checks that first.

python -m benchmarks.ltg_attention                        # small, T = 512, batch 8
python -m benchmarks.ltg_attention --length 128 --batch 32 --precision bf16
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib.models.hugging_face import LtgBertConfig, LtgBertForMaskedLM
from lib.models.hugging_face.modeling_ltg_bert import LtgBertAttention

LABELLED = 0.15


def plain_forward(self: LtgBertAttention, hidden, relative, index, mask):
    """`LtgBertAttention.forward`, written exactly as the formula."""
    batch, length, width = hidden.shape
    hidden = self.pre_layer_norm(hidden)
    shape = (batch, length, self.num_heads, self.head_dim)
    query, key = (part.view(shape) for part in self.in_proj_qk(hidden).chunk(2, dim=-1))
    value = self.in_proj_v(hidden).view(shape)
    pairs = F.embedding(index[0], self.in_proj_qk(self.dropout(relative)))  # (T, T, 2 D)
    query_pos, key_pos = pairs.view(length, length, self.num_heads, -1).chunk(2, dim=-1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key * self.scale)
    scores = scores + torch.einsum("bqhd,qkhd->bhqk", query, key_pos * self.scale)
    scores = scores + torch.einsum("bkhd,qkhd->bhqk", key * self.scale, query_pos)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    drop = self.config.attention_probs_dropout_prob if self.training else 0.0
    weights = F.dropout(torch.softmax(scores, dim=-1), drop)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
    return self.dropout(self.post_layer_norm(self.out_proj(mixed))), None


@contextlib.contextmanager
def attention(method: str):
    """Use the attention of one method inside the block."""
    ours = LtgBertAttention.forward
    try:
        LtgBertAttention.forward = plain_forward if method == "plain" else ours  # pyright: ignore
        yield
    finally:
        LtgBertAttention.forward = ours


def make(options) -> tuple[LtgBertForMaskedLM, torch.Tensor, torch.Tensor]:
    """A model with random weights, input ids and labels, both (B, T)."""
    torch.manual_seed(0)
    model = LtgBertForMaskedLM(LtgBertConfig.published(options.size))
    ids = torch.randint(5, model.config.vocab_size, (options.batch, options.length))
    return model, ids, torch.where(torch.rand(ids.shape) < LABELLED, ids, -100)


def step(model, ids, labels, precision: str) -> torch.Tensor:
    """Forward and backward; returns the loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(ids, labels=labels, logits_at="labels").loss
    loss.backward()
    return loss


def check(options) -> float:
    """Largest difference of any gradient between the two methods, in float64, without dropout, on a short input."""
    torch.manual_seed(0)
    config = LtgBertConfig.published(options.size, num_hidden_layers=2, vocab_size=64)
    model = LtgBertForMaskedLM(config).double().eval()
    ids, found = torch.randint(5, 64, (2, 48)), []
    for method in ("ours", "plain"):
        model.zero_grad()
        with attention(method):
            step(model, ids, ids, "fp32")
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))  # pyright: ignore
    return float((found[0] - found[1]).abs().max())


def measure(options) -> dict:
    """Seconds of each step and this process's peak memory in megabytes."""
    model, ids, labels = make(options)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = []
    with attention(options.method):
        for _ in range(options.steps + 1):
            model.zero_grad()
            begin = time.perf_counter()
            step(model, ids, labels, options.precision)
            seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[1:], "peak": peak, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small", choices=["xs", "small", "base"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--method", choices=["ours", "plain"], help="measure this method only and print JSON")
    add_out(parser)
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options)))
        return
    say_provenance()
    difference = check(options)
    print(f"largest difference of a gradient between the two methods, float64: {difference:.1e}")
    found = in_turns(options)
    seconds = {
        method: statistics.median(s for r in rounds for s in r["seconds"]) for method, rounds in found.items()
    }
    peak = {method: max(r["peak"] for r in rounds) for method, rounds in found.items()}
    figures = {
        "size": options.size,
        "length": options.length,
        "batch": options.batch,
        "precision": options.precision,
        "seconds": seconds,
        "peak_megabytes": peak,
        "speed_ratio": seconds["plain"] / seconds["ours"],
        "memory_ratio": peak["ours"] / peak["plain"],
        "gradient_difference": difference,
    }
    say(figures)
    write(options.out, "ltg_attention", figures)


def in_turns(options) -> dict[str, list[dict]]:
    """Measure each method in processes of its own, in turns."""
    found: dict[str, list[dict]] = {"ours": [], "plain": []}
    for _ in range(options.rounds):
        for method, rounds in found.items():
            command = [sys.executable, "-m", "benchmarks.ltg_attention", "--method", method]
            for name in ("size", "length", "batch", "steps", "precision"):
                command += [f"--{name}", str(getattr(options, name))]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds.append(json.loads(out))
    return found


def say(figures: dict) -> None:
    """Print a line per method, and the ratios."""
    batch, length = figures["batch"], figures["length"]
    print(f"{figures['size']}, T = {length}, batch size {batch}, {figures['precision']}")
    for method, seconds in figures["seconds"].items():
        tokens, peak = batch * length / seconds, figures["peak_megabytes"][method]
        print(f"{method:<6} {seconds:7.2f} s per step, {tokens:7,.0f} tokens/s, peak memory {peak:7,.0f} MB")
    print(
        f"ours is {figures['speed_ratio']:.2f} times as fast with {figures['memory_ratio']:.2f} of the memory"
    )


if __name__ == "__main__":
    main()
