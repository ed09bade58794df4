"""The one training loop. It knows steps, optimisers, evaluation and checkpoints, and no kind of data.

An objective (`lib/training/objectives/`) brings the batches, the loss and the metrics. Kill the process at any step and
call `train` again: the weights, the metrics and the best model come out the same to the bit.
"""

import contextlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib import durable, randomness
from lib.errors import BadConfig, Interrupted, NonFiniteLoss
from lib.log import Progress, say
from lib.runtime import Runtime
from lib.sections.models import TrainingConfig
from lib.training import checkpoint
from lib.training.freezing import Freezing
from lib.training.optimizer import Optimizer
from lib.training.preemption import StopRequest

BEST = "best_model"


class Objective(Protocol):
    """What is learned. `evaluate` gives named numbers on the selection split; the one called `selection` is minimised."""

    selection: str
    tokens_per_row: int

    def loss(self, model: nn.Module, step: int, rows: "range") -> dict[str, Tensor]:
        """Named terms of the loss of the global batch `rows`; the term `loss` is what is minimised."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]: ...

    # An objective that remembers more than the step also has state() -> dict[str, Tensor] and load_state(dict)


@dataclass
class Result:
    steps: int
    best_step: int
    metrics: dict[str, float]  # of the best model, on the selection split
    seconds: float  # of this process only
    tokens_per_second: float
    optimizer: dict[str, Any]  # its groups and what was frozen until when, with the names of the weights


@dataclass
class _State:
    """All that a checkpoint must remember beside tensors."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)  # of loss terms since the last evaluation
    summed_steps: int = 0
    metrics_bytes: int = 0  # length of metrics.jsonl at this step


def train(
    model: nn.Module,
    objective: Objective,
    settings: TrainingConfig,
    runtime: Runtime,
    folder: Path,
    *,
    seed: int,
    label: str,
    save: Any,
) -> Result:
    """Train `model` to `settings.steps`, continuing from `folder/checkpoint` if there is one.

    Writes metrics.jsonl (same bytes however often the run was cut off), speed.jsonl (timings), and through
    `save(model, path)` the folders best_model (best `objective.selection`) and final_model.

    Raises NonFiniteLoss before an update with NaN or infinity, Interrupted after SIGINT or SIGTERM, with the
    step finished and a checkpoint committed.
    """
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise BadConfig(
            "training.tensorboard is true, but tensorboard is not installed; `pip install tensorboard`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    durable.recover_folder(folder / BEST)
    run = _Run(model, objective, settings, runtime, folder, seed, label, save)
    run.restore()
    with StopRequest() as stop, Progress(label, settings.steps, run.state.step) as progress:
        while run.state.step < settings.steps:
            run.step(progress)
            if run.due(settings.evaluate_every):
                run.evaluate()
            if stop.signal or (run.due(settings.checkpoint_every) and run.state.step < settings.steps):
                run.save_checkpoint()
            if stop.signal:
                message = f"{label}: stopped at step {run.state.step}; run the same command again to continue"
                raise Interrupted(message, 128 + stop.signal)
    return run.finish()


class _Run:
    def __init__(self, model, objective, settings, runtime, folder, seed, label, save):
        self.model, self.objective, self.settings, self.runtime = (
            model.to(runtime.device),
            objective,
            settings,
            runtime,
        )
        self.folder, self.seed, self.label, self.save = folder, seed, label, save
        self.optimizer = Optimizer(model, settings)
        if settings.optimizer == "muon" and not any(
            isinstance(part, torch.optim.Muon) for part in self.optimizer.parts
        ):
            say(f"{label}: no hidden matrix learns here, so Muon has none; AdamW updates what learns")
        self.mean = (
            {n: p.detach().clone() for n, p in self.optimizer.parameters.items()}
            if settings.ema_decay
            else {}
        )
        self.freezing = Freezing(model, settings, getattr(objective, "cls_id", None))
        self.state = _State()
        self.metrics_file = folder / "metrics.jsonl"
        self.trained_seconds, self.trained_steps = 0.0, 0

    # ------------------------------------------------------------------ one step

    def step(self, progress: Progress) -> None:
        begin = time.perf_counter()
        step, size = self.state.step, self.settings.batch_size
        self.freezing.at(step)
        self.model.train()
        # Dropout takes no generator: this is the one place that seeds torch's own, by the step.
        torch.manual_seed(randomness.key(self.seed, f"{self.label} dropout", step) % 2**63)
        terms = self.objective.loss(self.model, step, range(step * size, (step + 1) * size))
        value = terms["loss"].detach().item()
        if not math.isfinite(value):
            raise NonFiniteLoss(self._non_finite("loss", value))
        terms["loss"].backward()
        norm = self.optimizer.gradient_norm()
        if not math.isfinite(norm):
            raise NonFiniteLoss(self._non_finite("gradient norm", norm))
        self.optimizer.step(step)
        self._update_mean()
        for name, term in terms.items():
            self.state.sums[name] = self.state.sums.get(name, 0.0) + float(term.detach())
        self.state.sums["gradient_norm"] = self.state.sums.get("gradient_norm", 0.0) + norm
        self.state.summed_steps += 1
        self.state.step += 1
        self.trained_seconds += time.perf_counter() - begin
        self.trained_steps += 1
        progress.update(self.state.step, loss=f"{value:.3f}", speed=f"{self.tokens_per_second:,.0f} tokens/s")

    def _update_mean(self) -> None:
        if not self.mean:
            return
        # Young runs forget faster, so that the mean is not stuck at the initial weights.
        decay = min(self.settings.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        for name, mean in self.mean.items():
            mean.lerp_(self.optimizer.parameters[name].detach(), 1 - decay)

    def _non_finite(self, what: str, value: float) -> str:
        size, step = self.settings.batch_size, self.state.step
        bundle = {"step": step, "rows": [step * size, (step + 1) * size], "seed": self.seed, what: str(value)}
        durable.write_json(self.folder / "non_finite.json", bundle)
        return (
            f"{self.label}: the {what} at step {step} is {value}; stopped before the update. Try lower learning "
            f"rates or precision=fp32. The batch is described in {self.folder / 'non_finite.json'}"
        )

    @property
    def tokens_per_second(self) -> float:
        tokens = self.trained_steps * self.settings.batch_size * self.objective.tokens_per_row
        return tokens / self.trained_seconds if self.trained_seconds else 0.0

    def due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.settings.steps

    # ------------------------------------------------------------------ evaluation

    def evaluate(self) -> None:
        state = self.state
        terms = {name: total / max(state.summed_steps, 1) for name, total in state.sums.items()}
        state.sums, state.summed_steps = {}, 0
        with self.mean_weights():
            self.model.eval()
            with torch.no_grad():
                metrics = self.objective.evaluate(self.model)
            value = metrics[self.objective.selection]
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"{self.label}: {self.objective.selection} on the selection split at step {state.step} is {value}, so "
                    "that no best model can be chosen by it. Try lower learning rates or precision=fp32"
                )
            if state.best_value is None or value < state.best_value:
                state.best_value, state.best_step, state.best_metrics = value, state.step, metrics
                with durable.replacing_folder(self.folder / BEST) as temporary:
                    self.save(self.model, temporary)
        self._log({"step": state.step, "train": terms, "selection": metrics})
        shown = f"{self.objective.selection} {value:.4f}"
        say(
            f"  {self.label} {state.step}/{self.settings.steps}: loss {terms.get('loss', math.nan):.4f}, {shown}"
        )

    @contextlib.contextmanager
    def mean_weights(self) -> Iterator[None]:
        """The running mean in place of the weights, while evaluating and saving."""
        if not self.mean:
            yield
            return
        with torch.no_grad():
            kept = {n: self.optimizer.parameters[n].detach().clone() for n in self.mean}
            for n, value in self.mean.items():
                self.optimizer.parameters[n].copy_(value)
            try:
                yield
            finally:
                for n, value in kept.items():
                    self.optimizer.parameters[n].copy_(value)

    def _log(self, line: dict[str, Any]) -> None:
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        with open(self.folder / "speed.jsonl", "a", encoding="utf-8") as file:
            speed = {
                "step": line["step"],
                "seconds": self.trained_seconds,
                "tokens_per_second": self.tokens_per_second,
            }
            file.write(json.dumps(speed) + "\n")
        if self.settings.tensorboard:
            self._log_tensorboard(line)

    def _log_tensorboard(self, line: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / "tensorboard")) as writer:
            for split in ("train", "selection"):
                for name, value in line[split].items():
                    writer.add_scalar(f"{split}/{name}", value, line["step"])

    # ------------------------------------------------------------------ checkpoints

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.runtime.fingerprint() | {"code": dict(self.runtime.code)}

    @cached_property
    def frozen(self) -> str:
        """Hash of the weights that no checkpoint has: they come from the start."""
        return checkpoint.frozen_digest(self.model, self.optimizer.parameters)

    def save_checkpoint(self) -> None:
        self.state.metrics_bytes = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        if self.metrics_file.exists():
            with open(self.metrics_file, "rb+") as file:
                os.fsync(file.fileno())
        tensors = {
            "weights": {n: p for n, p in self.optimizer.parameters.items()},
            "mean": self.mean,
            "optimizer": self.optimizer.state(),
            "objective": self.objective.state() if hasattr(self.objective, "state") else {},
        }
        state = {**vars(self.state), "fingerprint": self.fingerprint, "frozen_sha256": self.frozen}
        best = self.folder / BEST if self.state.best_value is not None else None
        checkpoint.save(self.folder, {k: v for k, v in tensors.items() if v}, state, best)

    def restore(self) -> None:
        """Take up the last checkpoint. What was written after it, metrics and a better best model, goes away: its steps
        come again, and with `allow_inexact_resume` they may not be the same."""
        loaded = checkpoint.load(self.folder)
        if loaded is None:
            self.metrics_file.unlink(missing_ok=True)
            return
        tensors, state = loaded
        checkpoint.check_fingerprint(
            state.pop("fingerprint", {}),
            self.fingerprint,
            self.settings.allow_inexact_resume,
            self.label,
            self.folder,
        )
        checkpoint.check_frozen(state.pop("frozen_sha256", None), self.frozen, self.label)
        self.state = _State(**{k: v for k, v in state.items() if k in _State.__dataclass_fields__})
        with torch.no_grad():
            for name, value in tensors["weights"].items():
                self.optimizer.parameters[name].copy_(value)
            for name, value in tensors.get("mean", {}).items():
                self.mean[name].copy_(value)
        self.optimizer.load_state(tensors.get("optimizer", {}))
        if hasattr(self.objective, "load_state"):
            self.objective.load_state(tensors.get("objective", {}))
        checkpoint.restore_folder(self.folder, BEST)
        if self.metrics_file.exists():
            os.truncate(self.metrics_file, self.state.metrics_bytes)
        say(f"{self.label}: continuing from step {self.state.step}")

    def finish(self) -> Result:
        with self.mean_weights(), durable.replacing_folder(self.folder / "final_model") as temporary:
            self.save(self.model, temporary)
        state = self.state
        return Result(
            state.step,
            state.best_step,
            state.best_metrics,
            self.trained_seconds,
            self.tokens_per_second,
            {"groups": self.optimizer.groups(), "frozen": self.freezing.record()},
        )
