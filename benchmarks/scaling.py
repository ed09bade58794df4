"""Several processes against several threads, the cost of the engine in one process, and the bytes that are exchanged.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --encoder /path/to/all-MiniLM-L6-v2

A training with two parts runs in one process with two threads, and in two processes with one thread each, in turns. With
`--encoder`, also the ranker of configs/finqa.yaml on that encoder. The same rows are trained on in both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result_files import add_out, write
from lib.config import ROOT, load_config
from lib.sections.models import TrainingConfig

ROUNDS = 3
WARM_UP = 3  # steps before the clock starts
LOOPBACK = "lo:"


# --- one training, in every process -----------------------------------------------------------------------------------


def training_of(settings: TrainingConfig, steps: int, parts: int) -> TrainingConfig:
    """The settings with that many steps and parts, without evaluation and checkpoints before the end."""
    changes = {
        "steps": steps,
        "parts": parts,
        "evaluate_every": steps,
        "checkpoint_every": steps,
        "evaluation_examples": 2,
    }
    return TrainingConfig.model_validate(settings.model_dump() | changes)


def make(kind: str, encoder: str, settings: TrainingConfig, runtime) -> tuple[Any, Any]:
    """(model, objective) of the default generator, or of the ranker of configs/finqa.yaml."""
    from benchmarks.speed_setup import objective_of
    from lib.models.build import make_model, model_config
    from lib.training.objectives.base import TrainingContext

    context = TrainingContext(kind, 0, settings, runtime)
    if kind == "generator":
        config = load_config()
        shape = model_config(config.architecture, "bidirectional", 70)
        model = make_model("language_model", shape, 0, kind)
        return model, objective_of(config, 70, config.architecture.context, context)
    from benchmarks.ranker_speed import texts
    from lib.training.objectives.pool_choice import PoolChoice, PoolReader, PoolSplits
    from lib.training.pool_table import PoolTable
    from lib.training.ranker_start import start_ranker

    config = load_config([ROOT / "configs" / "finqa.yaml"], overrides=[f"ranker.encoder={encoder}"])
    model, tokenizer, _ = start_ranker(kind, config.models[kind], config, None, None, ROOT)
    prompts, candidates = texts(tokenizer, 32)
    shape = (len(prompts), len(candidates[0]))
    rewards = np.zeros(shape)
    rewards[:, 0] = 1.0
    empty = np.full(shape, "", object)
    table = PoolTable(
        [str(n) for n in range(len(prompts))], prompts, [[] for _ in prompts], np.arange(len(prompts)),
        np.broadcast_to(np.arange(shape[1]), shape), np.asarray(candidates, object), None, empty, empty, rewards, {},
        np.ones(shape, bool), {},
    )  # fmt: skip
    reader = PoolReader(tokenizer, config.ranker, runtime, 0)
    return model, PoolChoice(context, PoolSplits([table], table, table), reader)


def worker(job: dict[str, Any]) -> None:
    """Train, and write speed, bytes and the share of the engine's time."""
    import torch

    from lib.engine import processes
    from lib.log import silence
    from lib.runtime import Runtime
    from lib.training import loop
    from lib.training.objectives.base import TrainingContext

    torch.set_num_threads(job["threads"])
    group = processes.start()
    silence()
    config = load_config([ROOT / "configs" / "finqa.yaml"] if job["kind"] == "ranker" else [])
    spec = config.models[job["kind"]]
    settings = training_of(spec.training, job["steps"] + WARM_UP, job["parts"])
    runtime = Runtime.detect(config)
    model, objective = make(job["kind"], job["encoder"], settings, runtime)
    clock = {"begin": 0.0, "bytes": 0}
    real = loop._Run.step

    def step(self, data, progress, stop):
        if self.state.step == WARM_UP:
            group.barrier()
            clock.update(begin=time.perf_counter(), bytes=loopback_bytes())
        stopping = real(self, data, progress, stop)
        if self.state.step == settings.steps:
            group.barrier()
            clock["seconds"] = time.perf_counter() - clock["begin"]
            clock["bytes"] = loopback_bytes() - clock["bytes"]
        return stopping

    loop._Run.step = step  # type: ignore[method-assign]
    objective.evaluate = lambda model: {objective.selection: 1.0}
    with tempfile.TemporaryDirectory() as folder:
        context = TrainingContext(job["kind"], 0, settings, runtime)
        loop.train(model, objective, context, Path(folder), lambda model, path: None)
    if group.is_main:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        figures = {
            "rows_per_second": job["steps"] * settings.batch_size / clock["seconds"],
            "bytes_per_step": clock["bytes"] / job["steps"] / group.size,
            "parameters": trained,
        }
        Path(job["out"]).write_text(json.dumps(figures), encoding="utf-8")
    group.close()


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith(LOOPBACK))
    return int(line.split(":")[1].split()[8])


# --- comparisons -----------------------------------------------------------------------------------------------------


def measure(
    kind: str, size: int, threads: int, parts: int, steps: int, encoder: str = ""
) -> dict[str, float]:
    """The figures of one training in `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        job = {
            "kind": kind,
            "threads": threads,
            "parts": parts,
            "steps": steps,
            "encoder": encoder,
            "out": str(out),
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command = [sys.executable, *launcher, "-m", "benchmarks.scaling", "--worker", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(out.read_text(encoding="utf-8"))


def compare_processes(kind: str, steps: int, encoder: str) -> dict[str, Any]:
    """Rows per second: two processes of one thread, and one process of two threads, in turns."""
    pairs = []
    for _ in range(ROUNDS):
        two = measure(kind, 2, 1, 2, steps, encoder)["rows_per_second"]
        one = measure(kind, 1, 2, 2, steps, encoder)["rows_per_second"]
        pairs.append((two, one))
        print(
            f"{kind}: 2 processes {two:8.1f} rows/s   1 process of 2 threads {one:8.1f} rows/s   ratio {two / one:.2f}"
        )
    ratio = statistics.median(two / one for two, one in pairs)
    print(f"{kind}: median ratio {ratio:.2f}\n")
    return {"rows_per_second": pairs, "median_ratio": ratio}


def compare_bytes(steps: int) -> list[dict[str, float]]:
    """Bytes that a process sends per step, and the formula 2 (W - 1) / W x 4 P."""
    rows = []
    for size in (2, 4):
        found = measure("generator", size, 1, 4, steps)
        formula = 2 * (size - 1) / size * 4 * found["parameters"]
        share = found["bytes_per_step"] / formula
        rows.append({"processes": size, "bytes": found["bytes_per_step"], "formula": formula, "ratio": share})
        print(f"{size} processes: {found['bytes_per_step'] / 1e6:.3f} MB per step and process, formula {formula / 1e6:.3f} MB, "
              f"ratio {share:.3f}")  # fmt: skip
    return rows


def engine_share(steps: int) -> float:
    """Share of a step that the engine takes in one process with one part: what a plain loop would not do."""
    from lib.engine.gradients import GradientSum
    from lib.engine.parts import Parts
    from lib.engine.processes import Processes
    from lib.runtime import Runtime
    from lib.training.optimizer import Optimizer

    config = load_config()
    settings = training_of(config.models["generator"].training, steps + WARM_UP, 1)
    runtime = Runtime.detect(config)
    model, objective = make("generator", "", settings, runtime)
    optimizer = Optimizer(model, settings, runtime.matrix_dtype)
    parts = Parts(1, settings.batch_size, Processes(), "generator")
    total = GradientSum(optimizer.parameters.values(), 1, Processes())
    engine = whole = 0.0
    for step in range(steps + WARM_UP):
        begin = time.perf_counter()
        part = objective.part(model, step, parts.rows(step, 0))
        drawn = time.perf_counter()
        totals = parts.sum([part.weights])
        summed = time.perf_counter()
        terms = part.losses(totals)
        terms["loss"].backward()
        done = time.perf_counter()
        total.push()
        parts.sum([{name: float(value.detach()) for name, value in terms.items()} | {"stop": 0}])
        total.reduce()
        reduced = time.perf_counter()
        float(optimizer.clip_gradients())
        optimizer.step(step)
        if step >= WARM_UP:
            engine += summed - drawn + reduced - done
            whole += time.perf_counter() - begin
    print(f"engine: {engine / whole:.3%} of a step of the default generator, in one process with one part")
    return engine / whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", metavar="FOLDER", help="a pretrained encoder, for the ranker")
    parser.add_argument("--steps", type=int, default=60, help="steps of a training that is measured")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    add_out(parser)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    figures: dict[str, Any] = {
        "engine_share": engine_share(options.steps),
        "bytes": compare_bytes(min(options.steps, 20)),
    }
    figures["generator"] = compare_processes("generator", options.steps, "")
    if options.encoder:
        figures["ranker"] = compare_processes("ranker", max(options.steps // 4, 2), options.encoder)
    write(options.out, "scaling", figures)


if __name__ == "__main__":
    main()
