"""Training speed of the backbone: tokens per second of forward, backward and weight copies, without the optimizer.

    python -m benchmarks.backbone_speed                     # masked LM, 6 layers x 192, context 128, batch 32
    python -m benchmarks.backbone_speed --causal            # causal LM, 4 layers x 128, context 64, batch 32
    python -m benchmarks.backbone_speed --precision bf16 --profile

Precisions: `fp32`; `autocast` (bfloat16 products under torch.autocast, float32 weights); `bf16`
(a bfloat16 working copy of the model). With `bf16`, each step copies the float32 master weights into the model and its
gradients back as float32.
The best of several short runs counts, because other work on the machine can only make a run slower.
"""

import argparse
import contextlib
import ctypes
import time

import torch

from benchmarks.provenance import say_provenance
from lib.models.hugging_face import RemaskGptConfig, RemaskGptForCausalLM, RemaskGptForMaskedLM

PRECISIONS = ("fp32", "autocast", "bf16")


@torch.no_grad()
def copy_all(sources, targets) -> None:
    """Copy tensors one to one, casting to the targets' type."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def make_step(causal: bool, precision: str, batch: int, vocab: int):
    """(function that runs one forward and backward pass, number of tokens that it reads)."""
    torch.manual_seed(0)
    if causal:
        config = RemaskGptConfig(vocab, 128, 4, 4, max_position_embeddings=64, attention="causal")
        model = RemaskGptForCausalLM(config)
    else:
        model = RemaskGptForMaskedLM(RemaskGptConfig(vocab_size=vocab))
    length = model.config.max_position_embeddings
    for weight in model.parameters():  # zero-initialised projections would hide the cost of real numbers
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    masters = [weight.detach().clone() for weight in model.parameters()]
    gradients = [torch.zeros_like(weight) for weight in masters]
    if precision == "bf16":
        model.bfloat16()
    weights = list(model.parameters())
    ids = torch.randint(4, vocab, (batch, length))
    labels = ids if causal else torch.where(torch.rand(ids.shape) < 0.5, ids, -100)
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()

    def step() -> float:
        if precision == "bf16":
            copy_all(masters, weights)
        with mixed:
            loss = model(input_ids=ids, labels=labels, logits_at=None if causal else "labels").loss
        loss.backward()
        if precision == "bf16":
            copy_all([weight.grad for weight in weights], gradients)
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step, batch * length


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory. Otherwise each step requests tens of thousands of new pages from the kernel."""
    trim_threshold, mmap_threshold, largest_mmap_threshold = -1, -3, 32 << 20
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, largest_mmap_threshold)
    libc.mallopt(trim_threshold, 2**31 - 1)


def best_seconds(step, seconds: float, runs: int) -> float:
    """Shortest mean time per step, over `runs` runs of about `seconds` each."""
    for _ in range(3):
        step()
    best = float("inf")
    for _ in range(runs):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            step()
            count += 1
        best = min(best, (time.perf_counter() - start) / count)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, action="append")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=70)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep_memory", action="store_true", help="never return freed memory to the system")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    say_provenance()
    if args.keep_memory:
        keep_freed_memory()
    for precision in args.precision or PRECISIONS:
        step, tokens = make_step(args.causal, precision, args.batch, args.vocab)
        best = best_seconds(step, args.seconds, args.runs)
        print(f"{precision:9s} {best * 1e3:7.2f} ms/step  {tokens / best:9,.0f} tokens/s", flush=True)
        if args.profile:
            with torch.profiler.profile() as profiler:
                for _ in range(5):
                    step()
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


if __name__ == "__main__":
    main()
