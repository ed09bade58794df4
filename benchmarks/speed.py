"""
Speed against a baseline, both measured in one run. The ratios count; absolute figures depend on the machine.

python -m benchmarks.speed trainer      # training step against Trainer + BertForMaskedLM of transformers, same size
python -m benchmarks.speed logits       # logits at masked positions only, against logits everywhere, vocabulary 8k
python -m benchmarks.speed generation   # synthetic generation against the bare forward pass
python -m benchmarks.speed sampling     # 64 samples by 32 forward passes, plain and compiled
python -m benchmarks.speed neighbours   # a training step of every mode beside a busy program
python -m benchmarks.speed overhead     # hashing, fsync and keyed noise as a share of a training stage
python -m benchmarks.speed masking      # every type of masking on 64 x 1,024 tokens
python -m benchmarks.speed int8 --run outputs/shakespeare   # its generator in fp32, bf16 and int8: speed and loss
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from benchmarks.speed_neighbours import compare_neighbours
from benchmarks.speed_precisions import compare_precisions
from benchmarks.speed_sampling import compare_sampling
from benchmarks.speed_setup import ROUNDS, median_seconds, objective_of, settings, tokenizer_of_size
from benchmarks.step_clock import StepClock
from lib import durable, randomness
from lib.config import Config, load_config
from lib.devices import synchronize
from lib.diffusion.masking import BatchDraw, draw_mask, masked_counts
from lib.diffusion.nelbo import mask_batch
from lib.models.build import make_model, model_config, save_model
from lib.runtime import Runtime
from lib.sections.masking import LineMasking, Masking, RandomMasking, SpanMasking, StickyMasking
from lib.sections.models import TrainingConfig
from lib.synthetic import MaskedLMEngine, MaskedRows
from lib.training.cross_entropy import cross_entropies
from lib.training.loop import train
from lib.training.objectives.base import TrainingContext, batch_losses
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.optimizer import Optimizer

Figures = dict[str, Any]


def ours(steps: int, vocabulary: int, compiled: bool) -> float:
    """Tokens per second of the training loop, with data, noise, forward, backward, NorMuon and EMA."""
    config, architecture, training = settings(steps)
    training = training.model_copy(update={"compile": "on" if compiled else "off"})
    context = TrainingContext("speed", 0, training, Runtime.detect(config))
    objective: Any = objective_of(config, vocabulary, architecture.context, context)
    model = make_model("language_model", model_config(architecture, "bidirectional", vocabulary), 0, "speed")
    tokenizer = tokenizer_of_size(vocabulary)
    clock = StepClock.of(objective)
    with tempfile.TemporaryDirectory() as folder:
        train(model, objective, context, Path(folder), lambda m, p: save_model(m, p, tokenizer))
    return training.batch_size * architecture.context / clock.seconds_per_step()


def hugging_face(steps: int, vocabulary: int, compiled: bool) -> float:
    """Tokens per second of Trainer with a BertForMaskedLM of the same size; bf16 where the processor has it."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    _, architecture, training = settings(steps)
    runtime = Runtime.detect(load_config())
    tokenizer = tokenizer_of_size(vocabulary)
    ids = np.random.default_rng(0).integers(
        4, vocabulary, (training.batch_size * (steps + 8), architecture.context)
    )
    data: Any = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model = BertForMaskedLM(
        BertConfig(vocab_size=vocabulary, hidden_size=architecture.hidden_size, num_hidden_layers=architecture.num_hidden_layers,
                   num_attention_heads=architecture.num_attention_heads, intermediate_size=4 * architecture.hidden_size,
                   max_position_embeddings=architecture.context, hidden_dropout_prob=architecture.dropout,
                   attention_probs_dropout_prob=architecture.dropout)
    )  # fmt: skip
    clock = StepClock()

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_begins()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=training.batch_size, report_to=[],
            bf16=runtime.precision == "bf16", use_cpu=runtime.device.type == "cpu", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0, torch_compile=compiled,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
        Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[Steps()]
        ).train()
    return training.batch_size * architecture.context / clock.seconds_per_step()


def compare_trainer(steps: int) -> Figures:
    """Three rounds of both, each plain and compiled, after one short round that does not count."""
    kinds = [(name, run, compiled) for compiled in (False, True) for name, run in (("ours", ours), ("trainer", hugging_face))]  # fmt: skip
    for _, run, compiled in kinds:
        run(StepClock.FIRST + 2, 70, compiled)
    found: dict[str, list[float]] = {}
    for number in range(3):
        for name, run, compiled in kinds if number % 2 == 0 else kinds[::-1]:
            key = f"{name}, {'compiled' if compiled else 'plain'}"
            found.setdefault(key, []).append(run(steps, 70, compiled))
    for key, speeds in found.items():
        print(
            f"{key:20} {statistics.median(speeds):8,.0f} tokens/s   {', '.join(f'{v:,.0f}' for v in speeds)}"
        )
    best = [max(found["ours, plain"][n], found["ours, compiled"][n]) for n in range(3)]
    other = [max(found["trainer, plain"][n], found["trainer, compiled"][n]) for n in range(3)]
    plain = statistics.median(
        a / b for a, b in zip(found["ours, plain"], found["trainer, plain"], strict=True)
    )
    ratio = statistics.median(a / b for a, b in zip(best, other, strict=True))
    print(
        f"median ratio {ratio:.2f} of the faster ones, {plain:.2f} of the plain ones (6 layers x 192, context 128, batch size 32)"
    )
    return {"tokens_per_second": found, "rounds": 3, "median_ratio": ratio, "median_ratio_plain": plain}


def compare_logits() -> Figures:
    """One optimizer step with logits where the loss needs them, and with logits everywhere."""
    vocabulary = 8192
    config, architecture, training = settings(1)
    runtime = Runtime.detect(config)
    context = TrainingContext("speed", 0, training, runtime)
    objective = objective_of(config, vocabulary, architecture.context, context)
    index, ids, valid = objective.windows(range(training.batch_size))
    batch = mask_batch(config.diffusion, valid, BatchDraw(0, "speed", index, training.batch_size))
    arrays = (
        ids.reshape(-1),
        np.flatnonzero(batch.masked),
        batch.weights.reshape(-1),
        np.where(batch.masked, 1, ids),
    )
    targets, at, weights, inputs = (torch.from_numpy(a).to(runtime.device) for a in arrays)

    def loss_of(model, method: str):
        with runtime.autocast():
            logits = model(input_ids=inputs, logits_at=at if method == "masked" else None).logits
        if method == "masked":
            return (cross_entropies(logits, targets[at]) * weights[at]).sum()
        logits = logits.flatten(0, 1)
        if method == "everywhere":
            return (cross_entropies(logits, targets) * weights).sum()
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()

    methods = ("masked", "everywhere", "plain")
    model = make_model("language_model", model_config(architecture, "bidirectional", vocabulary), 0, "speed")
    model.to(runtime.device)
    optimizer = Optimizer(model, training, runtime.matrix_dtype)
    with torch.no_grad():
        runtime, kept = Runtime(runtime.device, "fp32"), runtime
        losses = {method: loss_of(model, method).item() for method in methods}
        runtime = kept
    times: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(ROUNDS + 1):
        for method in methods:
            begin = time.perf_counter()
            loss_of(model, method).backward()
            optimizer.step(0)
            synchronize(runtime.device)
            if number:
                times[method].append(time.perf_counter() - begin)
    masked, everywhere, plain = (statistics.median(times[method]) for method in methods)
    difference = abs(losses["masked"] / losses["plain"] - 1)
    print(f"logits at the {len(at)} masked of {targets.numel()} positions: {masked * 1e3:.0f} ms a step\n"
          f"everywhere, F.cross_entropy: {plain * 1e3:.0f} ms, ratio {plain / masked:.2f}\n"
          f"everywhere, sliced cross-entropy: {everywhere * 1e3:.0f} ms, ratio {everywhere / masked:.2f}\n"
          f"relative difference of the losses in fp32 {difference:.1e}")  # fmt: skip
    return {
        "masked": masked,
        "everywhere_plain": plain,
        "everywhere_sliced": everywhere,
        "relative_difference": difference,
    }


def compare_generation() -> Figures:
    """Tokens per second of candidate generation, against the bare forward pass at the same batch size."""
    config, architecture, _ = settings(1)
    runtime = Runtime.detect(config)
    tokenizer = tokenizer_of_size(70)
    model = make_model(
        "language_model", model_config(architecture, "bidirectional", len(tokenizer)), 0, "speed"
    ).eval()
    engine = MaskedLMEngine(model, tokenizer, runtime, architecture.context)
    size = config.candidates.batch_size
    ids = np.random.default_rng(0).integers(4, len(tokenizer), (8 * size, architecture.context))
    valid, rows = np.ones(ids.shape, bool), np.arange(len(ids))
    masked = mask_batch(config.diffusion, valid, BatchDraw(0, "speed", rows, size)).masked

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(ids), size):
            with runtime.autocast():
                model(input_ids=torch.from_numpy(ids[start : start + size]).to(runtime.device))
        synchronize(runtime.device)

    speeds: dict[str, list[float]] = {"bare": [], "fill": []}
    for _ in range(ROUNDS + 1):
        for name, work in (
            ("bare", bare),
            ("fill", lambda: engine.fill(MaskedRows(ids, valid, masked, rows), config.candidates, 0)),
        ):
            begin = time.perf_counter()
            work()
            speeds[name].append(ids.size / (time.perf_counter() - begin))
    fill, forward = (statistics.median(speeds[n][1:]) for n in ("fill", "bare"))
    print(f"filling {fill:,.0f} tokens/s, bare forward pass {forward:,.0f} tokens/s: {fill / forward:.0%}")
    return {"fill": fill, "forward": forward, "share": fill / forward}


def measure_masking() -> Figures:
    """Milliseconds to draw the masks of a batch, for every type and two difficult settings."""
    eligible, rows = np.ones((64, 1024), bool), np.arange(64)
    counts = masked_counts(np.full(64, 0.4), eligible.sum(1))
    lines = np.tile(np.arange(1024) // 40, (64, 1))
    kinds: list[Masking] = [
        RandomMasking(type="random"), SpanMasking(type="span", num_spans=20), LineMasking(type="line", min_ratio=0, max_ratio=1),
        *(StickyMasking(type="sticky", p1=p1, p2=p2) for p1, p2 in ((0.05, 0.5), (0.02, 0.9), (0.5, 0.1), (0.01, 0))),
    ]  # fmt: skip
    milliseconds = {}
    for masking in kinds:
        seconds = median_seconds(lambda m=masking: draw_mask(m, eligible, counts, 1, rows, lines))
        print(f"{masking!r}: {seconds * 1e3:.1f} ms for 64 x 1,024 tokens, 40 % masked")
        milliseconds[repr(masking)] = seconds * 1e3
    return {"milliseconds": milliseconds}


def measure_overhead() -> Figures:
    """Cost of bookkeeping during training: keyed noise per step, hashing and fsync per checkpoint."""
    config, architecture, training = settings(60)
    context = TrainingContext("speed", 0, training, Runtime.detect(config))
    objective = objective_of(config, 70, architecture.context, context)
    model = make_model("language_model", model_config(architecture, "bidirectional", 70), 0, "speed")
    tokenizer = tokenizer_of_size(70)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        train(model, objective, context, Path(folder), lambda m, p: save_model(m, p, tokenizer))
        step = _step_seconds(model, objective, training)
        noise = median_seconds(lambda: _noise(config, objective, training))
        file = Path(folder) / "final_model" / "model.safetensors"
        payload = file.read_bytes() * 4  # weights, EMA and two moments
        hashing = median_seconds(lambda: hashlib.sha256(payload).hexdigest())
        plain, synced = (median_seconds(lambda s=s: _write(Path(folder), payload, s)) for s in (False, True))
    every = config.training.checkpoint_every
    share = (noise + (hashing + synced - plain) / every) / step
    print(f"step {step * 1e3:.1f} ms; keyed noise {noise * 1e3:.2f} ms a step; hashing {hashing * 1e3:.0f} ms and "
          f"fsync {(synced - plain) * 1e3:.0f} ms a checkpoint of {len(payload) / 1e6:.0f} MB every {every} steps")  # fmt: skip
    print(f"overhead {share:.2%} of a training stage")
    return {"step": step, "noise": noise, "hashing": hashing, "fsync": synced - plain, "share": share}


def _step_seconds(model, objective: MaskedDiffusion, training: TrainingConfig) -> float:
    """Seconds of an optimizer step."""
    optimizer = Optimizer(model, training, objective.runtime.matrix_dtype)

    def step() -> None:
        batch_losses(objective, model, 0, range(training.batch_size))["loss"].backward()
        float(optimizer.clip_gradients())
        optimizer.step(0)

    return median_seconds(step)


def _noise(config: Config, objective: MaskedDiffusion, training: TrainingConfig) -> None:
    """The keyed draws of one step."""
    index = np.arange(training.batch_size)
    objective._order.samples(index)
    randomness.uniform(1, index, 1)
    mask_batch(
        config.diffusion, np.ones((len(index), 128), bool), BatchDraw(0, "x", index, training.batch_size)
    )


def _write(folder: Path, payload: bytes, synced: bool) -> None:
    """Write a file, durably or plainly."""
    path = folder / "payload"
    if synced:
        with durable.replacing(path) as temporary:
            temporary.write_bytes(payload)
    else:
        path.write_bytes(payload)


KINDS: dict[str, Callable[[], Figures]] = {
    "logits": compare_logits,
    "generation": compare_generation,
    "sampling": compare_sampling,
    "overhead": measure_overhead,
    "masking": measure_masking,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["trainer", "neighbours", *KINDS, "int8"])
    parser.add_argument("--steps", type=int, default=40, help="for trainer and neighbours: steps per round")
    parser.add_argument("--run", type=Path, help="for int8: a run with a generator", metavar="RUN_DIR")
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    if options.what == "int8":
        figures = compare_precisions(options.run or parser.error("int8 needs --run RUN_DIR"))
    elif options.what == "trainer":
        if options.steps < StepClock.FIRST + 2:
            parser.error(f"--steps {options.steps} is too few to time: at least {StepClock.FIRST + 2}")
        figures = compare_trainer(options.steps)
    elif options.what == "neighbours":
        figures = compare_neighbours(options.steps)
    else:
        figures = KINDS[options.what]()
    write(options.out, f"speed_{options.what}", figures)


if __name__ == "__main__":
    main()
