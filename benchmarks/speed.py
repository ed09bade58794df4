"""
Speed beside a peer, both in one run: the ratios are what counts, the absolute figures are this machine's.

python -m benchmarks.speed trainer      # our training step against Hugging Face Trainer + BertForMaskedLM, same size
python -m benchmarks.speed logits       # logits at masked positions only against logits everywhere, vocabulary 8k
python -m benchmarks.speed generation   # synthetic generation against the bare forward pass
python -m benchmarks.speed overhead     # hashing, fsync and keyed noise as a share of a training stage
python -m benchmarks.speed masking      # every type of masking on 64 x 1,024 tokens
python -m benchmarks.speed int8 --run outputs/shakespeare   # its generator in fp32, bf16 and int8: speed and loss
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from benchmarks.provenance import say_provenance
from lib import durable, randomness
from lib.config import Config, load_config
from lib.diffusion.masking import draw_mask, masked_counts
from lib.diffusion.nelbo import mask_batch
from lib.diffusion.top_k import lowest_k
from lib.models.build import make_model, model_config, save_model
from lib.runtime import Runtime
from lib.sections.masking import LineMasking, Masking, RandomMasking, SpanMasking, StickyMasking
from lib.sections.models import ArchitectureConfig, TrainingConfig
from lib.synthetic import MaskedLMEngine
from lib.tokenization import train_tokenizer
from lib.training.cross_entropy import cross_entropies
from lib.training.data import Windows
from lib.training.loop import train
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.optimizer import Optimizer

ROUNDS = 5


def settings(steps: int, **architecture) -> tuple[Config, ArchitectureConfig, TrainingConfig]:
    config = load_config()
    shape = {
        "num_hidden_layers": 6,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "context": 128,
    } | architecture
    training = config.training.model_dump() | {
        "steps": steps, "batch_size": 32, "evaluate_every": steps, "checkpoint_every": steps, "evaluation_examples": 32,
    }  # fmt: skip
    return config, config.architecture.model_copy(update=shape), TrainingConfig.model_validate(training)


def random_windows(vocabulary: int, width: int) -> Windows:
    ids = np.random.default_rng(0).integers(4, vocabulary, 200_000).astype(np.int32)
    lists = pa.chunked_array([pa.array(ids.reshape(-1, 500).tolist(), pa.list_(pa.int32()))])
    return Windows(pa.table({"token_ids": lists, "continues": [i > 0 for i in range(400)]}), width, 0)


def objective_of(config: Config, vocabulary: int, width: int, context: TrainingContext) -> MaskedDiffusion:
    data = random_windows(vocabulary, width)
    tiles = data.tiled()
    splits = WindowSplits(data, tiles, tiles, tiles.owner)
    return MaskedDiffusion(context, splits, config.diffusion, MaskingTokens(mask_id=1))


def tokenizer_of_size(vocabulary: int):
    """A character tokenizer of so many ids."""
    return train_tokenizer("character", ["".join(chr(0x4E00 + i) for i in range(vocabulary - 4))], 0)


def ours(steps: int, vocabulary: int) -> float:
    """Tokens per second of our loop, everything in it: data, noise, forward, backward, Muon, running mean."""
    config, architecture, training = settings(steps)
    context = TrainingContext("speed", 0, training, Runtime.detect(config))
    objective = objective_of(config, vocabulary, architecture.context, context)
    model = make_model("language_model", model_config(architecture, "bidirectional", vocabulary), 0, "speed")
    tokenizer = tokenizer_of_size(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, objective, context, Path(folder), lambda m, p: save_model(m, p, tokenizer))
    return result.tokens_per_second


def hugging_face(steps: int, vocabulary: int) -> float:
    """Tokens per second of Trainer with BertForMaskedLM of the same size, bf16 where the processor has it."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    _, architecture, training = settings(steps)
    runtime = Runtime.detect(load_config())
    tokenizer = tokenizer_of_size(vocabulary)
    ids = np.random.default_rng(0).integers(
        4, vocabulary, (training.batch_size * (steps + 8), architecture.context)
    )
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model = BertForMaskedLM(
        BertConfig(vocab_size=vocabulary, hidden_size=architecture.hidden_size, num_hidden_layers=architecture.num_hidden_layers,
                   num_attention_heads=architecture.num_attention_heads, intermediate_size=4 * architecture.hidden_size,
                   max_position_embeddings=architecture.context)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=training.batch_size, report_to=[],
            bf16=runtime.precision == "bf16", use_cpu=runtime.device.type == "cpu", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    return steps * training.batch_size * architecture.context / seconds


def compare_trainer(steps: int) -> None:
    warm_up = (ours(3, 70), hugging_face(3, 70))
    assert all(warm_up)
    pairs = [(ours(steps, 70), hugging_face(steps, 70)) for _ in range(3)]
    for a, b in pairs:
        print(f"ours {a:8,.0f} tokens/s   Trainer + BertForMaskedLM {b:8,.0f} tokens/s   ratio {a / b:.2f}")
    print(
        f"median ratio {statistics.median(a / b for a, b in pairs):.2f} (6 layers x 192, context 128, batch 32, vocabulary 70)"
    )


def compare_logits() -> None:
    """One optimiser step with logits where the loss needs them, and with logits everywhere."""
    vocabulary = 8192
    config, architecture, training = settings(1)
    runtime = Runtime.detect(config)
    context = TrainingContext("speed", 0, training, runtime)
    objective = objective_of(config, vocabulary, architecture.context, context)
    index, ids, valid = objective.windows(range(training.batch_size))
    batch = mask_batch(config.diffusion, valid, 0, "speed", index, training.batch_size)
    targets, at = torch.from_numpy(ids).flatten(), torch.from_numpy(np.flatnonzero(batch.masked))
    weights = torch.from_numpy(batch.weights).flatten()
    inputs = torch.from_numpy(np.where(batch.masked, 1, ids))

    def loss_of(model, way: str):
        with runtime.autocast():
            logits = model(input_ids=inputs, logits_at=at if way == "masked" else None).logits
        if way == "masked":
            return (cross_entropies(logits, targets[at]) * weights[at]).sum()
        logits = logits.flatten(0, 1)
        if way == "everywhere":
            return (cross_entropies(logits, targets) * weights).sum()
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()

    ways = ("masked", "everywhere", "plain")
    model = make_model("language_model", model_config(architecture, "bidirectional", vocabulary), 0, "speed")
    optimizer = Optimizer(model, training)
    with torch.no_grad():
        runtime, kept = Runtime(runtime.device, "fp32"), runtime
        losses = {way: loss_of(model, way).item() for way in ways}
        runtime = kept
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way in ways:
            begin = time.perf_counter()
            loss_of(model, way).backward()
            optimizer.step(0)
            if number:
                times[way].append(time.perf_counter() - begin)
    masked, everywhere, plain = (statistics.median(times[way]) for way in ways)
    print(f"logits at the {len(at)} masked of {targets.numel()} positions: {masked * 1e3:.0f} ms a step\n"
          f"everywhere, F.cross_entropy: {plain * 1e3:.0f} ms, ratio {plain / masked:.2f}\n"
          f"everywhere, our cross-entropy: {everywhere * 1e3:.0f} ms, ratio {everywhere / masked:.2f}\n"
          f"relative difference of the losses in fp32 {abs(losses['masked'] / losses['plain'] - 1):.1e}")  # fmt: skip


def compare_generation() -> None:
    """Tokens per second of candidate rewriting against the bare forward pass at the same batch."""
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
    masked = mask_batch(config.diffusion, valid, 0, "speed", rows, size).masked

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(ids), size):
            with runtime.autocast():
                model(input_ids=torch.from_numpy(ids[start : start + size]))

    speeds: dict[str, list[float]] = {"bare": [], "fill": []}
    for _ in range(ROUNDS + 1):
        for name, work in (
            ("bare", bare),
            ("fill", lambda: engine.fill(ids, valid, masked, config.candidates, 0, rows)),
        ):
            begin = time.perf_counter()
            work()
            speeds[name].append(ids.size / (time.perf_counter() - begin))
    fill, forward = (statistics.median(speeds[n][1:]) for n in ("fill", "bare"))
    print(f"filling {fill:,.0f} tokens/s, bare forward {forward:,.0f} tokens/s: {fill / forward:.0%}")


def measure_masking() -> None:
    """Milliseconds to draw the masks of a batch, for settings of every type, beside two that are hard."""
    eligible, rows = np.ones((64, 1024), bool), np.arange(64)
    counts = masked_counts(np.full(64, 0.4), eligible.sum(1))
    lines = np.tile(np.arange(1024) // 40, (64, 1))
    kinds: list[Masking] = [
        RandomMasking(type="random"), SpanMasking(type="span", num_spans=20), LineMasking(type="line", min_ratio=0, max_ratio=1),
        *(StickyMasking(type="sticky", p1=p1, p2=p2) for p1, p2 in ((0.05, 0.5), (0.02, 0.9), (0.5, 0.1), (0.01, 0))),
    ]  # fmt: skip
    for masking in kinds:
        seconds = _seconds(lambda m=masking: draw_mask(m, eligible, counts, 1, rows, lines))
        print(f"{masking!r}: {seconds * 1e3:.1f} ms for 64 x 1,024 tokens, 40 % masked")


def compare_precisions(run: Path, texts: int = 256) -> None:
    """A run's generator on its held-out text with half of it masked: tokens/s and nats per masked token."""
    table = pq.read_table(run / "01_prepare_dataset" / "examples.parquet", columns=["token_ids", "split"])
    held_out = table.filter(pc.equal(table["split"], "held_out"))["token_ids"].to_pylist()
    folder = run / "02_generate_candidates" / "generator" / "best_model"
    engines = {
        name: MaskedLMEngine.load(folder, Runtime(torch.device("cpu"), precision), int8=name.startswith("int8"))
        for name, precision in (("fp32", "fp32"), ("bf16", "bf16"), ("int8", "fp32"), ("int8, rest bf16", "bf16"))
    }  # fmt: skip
    width = engines["fp32"].width
    ids = np.array([row[:width] for row in held_out if len(row) >= width][:texts])
    masked = lowest_k(randomness.uniform(7, np.arange(len(ids)), width), np.ones(ids.shape, bool),
                    np.full(len(ids), width // 2))  # fmt: skip
    targets = torch.from_numpy(ids[masked])
    found: dict[str, tuple[list[float], float]] = {name: ([], 0.0) for name in engines}
    for number in range(ROUNDS + 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            with torch.no_grad():
                logits = torch.cat([_read(engine, ids[i : i + 64], masked[i : i + 64]) for i in range(0, len(ids), 64)])  # fmt: skip
            times = found[name][0]
            if number:
                times.append(time.perf_counter() - begin)
            found[name] = (times, float(F.cross_entropy(logits.float(), targets)))
    print(f"{folder}: {len(ids)} x {width} held-out tokens, half of them masked")
    for name, (times, nats) in found.items():
        print(
            f"{name:16}{ids.size / statistics.median(times):9,.0f} tokens/s   {nats:.4f} nats per masked token"
        )


def _read(engine: MaskedLMEngine, ids: np.ndarray, masked: np.ndarray) -> torch.Tensor:
    inputs = np.where(masked, engine.tokenizer.mask_token_id, ids)
    return engine._logits(inputs, np.ones(ids.shape, bool), np.flatnonzero(masked))


def measure_overhead() -> None:
    """What bookkeeping costs beside training: keyed noise per step, hashing and fsync per checkpoint."""
    config, architecture, training = settings(60)
    context = TrainingContext("speed", 0, training, Runtime.detect(config))
    objective = objective_of(config, 70, architecture.context, context)
    model = make_model("language_model", model_config(architecture, "bidirectional", 70), 0, "speed")
    tokenizer = tokenizer_of_size(70)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        train(model, objective, context, Path(folder), lambda m, p: save_model(m, p, tokenizer))
        step = _step_seconds(model, objective, training)
        noise = _seconds(lambda: _noise(config, objective, training))
        file = Path(folder) / "final_model" / "model.safetensors"
        payload = file.read_bytes() * 4  # weights, running mean and two moments
        hashing = _seconds(lambda: _hash(Path(folder), payload))
        plain, synced = (_seconds(lambda s=s: _write(Path(folder), payload, s)) for s in (False, True))
    every = config.training.checkpoint_every
    share = (noise + (hashing + synced - plain) / every) / step
    print(f"step {step * 1e3:.1f} ms; keyed noise {noise * 1e3:.2f} ms a step; hashing {hashing * 1e3:.0f} ms and "
          f"fsync {(synced - plain) * 1e3:.0f} ms a checkpoint of {len(payload) / 1e6:.0f} MB every {every} steps")  # fmt: skip
    print(f"overhead {share:.2%} of a training stage")


def _seconds(work) -> float:
    work()
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _step_seconds(model, objective, training) -> float:
    optimizer = Optimizer(model, training)

    def step() -> None:
        objective.loss(model, 0, range(training.batch_size))["loss"].backward()
        optimizer.gradient_norm()
        optimizer.step(0)

    return _seconds(step)


def _noise(config: Config, objective: MaskedDiffusion, training: TrainingConfig) -> None:
    index = np.arange(training.batch_size)
    objective._order.samples(index)
    randomness.uniform(1, index, 1)
    mask_batch(config.diffusion, np.ones((len(index), 128), bool), 0, "x", index, training.batch_size)


def _hash(folder: Path, payload: bytes) -> None:
    import hashlib

    hashlib.sha256(payload).hexdigest()


def _write(folder: Path, payload: bytes, synced: bool) -> None:
    path = folder / "payload"
    if synced:
        with durable.replacing(path) as temporary:
            temporary.write_bytes(payload)
    else:
        path.write_bytes(payload)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["trainer", "logits", "generation", "overhead", "masking", "int8"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--run", type=Path, help="for int8: a run with a generator", metavar="RUN_DIR")
    options = parser.parse_args()
    say_provenance()
    if options.what == "trainer":
        compare_trainer(options.steps)
    elif options.what == "logits":
        compare_logits()
    elif options.what == "generation":
        compare_generation()
    elif options.what == "masking":
        measure_masking()
    elif options.what == "int8":
        compare_precisions(options.run or parser.error("int8 needs --run RUN_DIR"))
    else:
        measure_overhead()


if __name__ == "__main__":
    main()
