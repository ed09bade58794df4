"""
LTG-BERT forward and backward: our attention beside the plain way, in one run, each in processes of its own.

The plain way writes the formula down: one table of projected positions per pair of tokens, [T, T, 2 D], and three score
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
from lib.models.hugging_face import LtgBertConfig, LtgBertForMaskedLM
from lib.models.hugging_face.modeling_ltg_bert import LtgBertAttention

LABELLED = 0.15


def plain_forward(self: LtgBertAttention, hidden, relative, index, mask):
    """`LtgBertAttention.forward` as the formula stands."""
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
def attention(way: str):
    ours = LtgBertAttention.forward
    try:
        LtgBertAttention.forward = plain_forward if way == "plain" else ours  # pyright: ignore
        yield
    finally:
        LtgBertAttention.forward = ours


def make(options) -> tuple[LtgBertForMaskedLM, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = LtgBertForMaskedLM(LtgBertConfig.published(options.size))
    ids = torch.randint(5, model.config.vocab_size, (options.batch, options.length))
    return model, ids, torch.where(torch.rand(ids.shape) < LABELLED, ids, -100)


def step(model, ids, labels, precision: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(ids, labels=labels, logits_at="labels").loss
    loss.backward()
    return loss


def check(options) -> float:
    """Largest difference of any gradient between the two ways, in float64 and without dropout, on a short input."""
    torch.manual_seed(0)
    config = LtgBertConfig.published(options.size, num_hidden_layers=2, vocab_size=64)
    model = LtgBertForMaskedLM(config).double().eval()
    ids, found = torch.randint(5, 64, (2, 48)), []
    for way in ("ours", "plain"):
        model.zero_grad()
        with attention(way):
            step(model, ids, ids, "fp32")
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))  # pyright: ignore
    return float((found[0] - found[1]).abs().max())


def measure(options) -> dict:
    """Seconds of each step and this process's peak memory in megabytes."""
    model, ids, labels = make(options)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = []
    with attention(options.way):
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
    parser.add_argument("--way", choices=["ours", "plain"], help="measure this one and print JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    say_provenance()
    print(f"largest difference of a gradient between the two ways, float64: {check(options):.1e}")
    found: dict[str, list[dict]] = {"ours": [], "plain": []}
    for _ in range(options.rounds):
        for way, results in found.items():
            command = [sys.executable, "-m", "benchmarks.ltg_attention", "--way", way]
            for name in ("size", "length", "batch", "steps", "precision"):
                command += [f"--{name}", str(getattr(options, name))]
            results.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
    seconds = {
        way: statistics.median(s for r in results for s in r["seconds"]) for way, results in found.items()
    }
    peak = {way: max(r["peak"] for r in results) for way, results in found.items()}
    print(f"{options.size}, T = {options.length}, batch {options.batch}, {options.precision}")
    for way in found:
        tokens = options.batch * options.length / seconds[way]
        print(
            f"{way:<6} {seconds[way]:7.2f} s a step, {tokens:7,.0f} tokens/s, peak memory {peak[way]:7,.0f} MB"
        )
    print(
        f"ours is {seconds['plain'] / seconds['ours']:.2f} times as fast with {peak['ours'] / peak['plain']:.2f} of the memory"
    )


if __name__ == "__main__":
    main()
