"""The training loop of every model: steps, evaluations, checkpoints, exact resume.

An objective (`lib/training/objectives/`) provides the batches, the loss and the metrics. A process may be killed at any
step. The next call of `train` continues from the last checkpoint, and ends with the same weights, metrics and best
model to the bit.

Several processes may train one model (`lib/engine/`). Each has all weights, and computes its parts of every batch. They
end with the same bits as one process that computes all parts. Process 0 alone writes files.
"""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib import durable, randomness
from lib.engine.gradients import GradientSum
from lib.engine.parts import Part, Parts
from lib.engine.processes import exchanging
from lib.engine.sharding import is_sharded
from lib.engine.speed import SpeedMeter, flops_per_token, matmul_peak
from lib.errors import Interrupted, NonFiniteLoss
from lib.log import Progress, say
from lib.models.checkpointing import checkpoint_activations
from lib.models.compiling import CompiledLayers
from lib.training import checkpoint
from lib.training.ema import Ema
from lib.training.freezing import Freezing
from lib.training.metrics_log import MetricsLog
from lib.training.objectives.base import Objective, ScaledObjective, StatefulObjective, TrainingContext
from lib.training.optimizer import Optimizer
from lib.training.preemption import StopRequest
from lib.training.prefetch import Prefetcher, may_draw_ahead
from lib.training.step_terms import SETTLE_EVERY, StepNumbers, UnreadSteps, may_read_later
from lib.training.trackers import open_tracker

BEST = "best_model"
_STOP = "stop signal"


@dataclass
class Result:
    steps: int
    best_step: int
    metrics: dict[str, float]  # of the best model, on the selection split
    speed: dict[str, float]  # of the steps in this process, see lib/engine/speed.py
    optimizer: dict[str, Any]  # parameter groups, and which parameters were frozen until which step
    compiled: bool = False  # whether the layers were


@dataclass
class _State:
    """What a checkpoint stores beside tensors."""

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
    context: TrainingContext,
    folder: Path,
    save: Callable[[Any, Path], object],
) -> Result:
    """Train `model` for `context.settings.steps`, from `folder/checkpoint` if there is one.

    Writes metrics.jsonl, speed.jsonl, and two model folders through `save(model, folder)`: best_model, with the lowest
    `objective.selection`, and final_model.

    Raises:
        NonFiniteLoss: a loss or gradient is NaN or infinite. Nothing is saved after that step. On the CPU, the weights are
            those before it; on a GPU it is noticed up to `SETTLE_EVERY` steps later.
        Interrupted: SIGINT or SIGTERM arrived. The current step was finished and a checkpoint committed. A step that waited for
            its data has not begun; the checkpoint has the steps before it, if this process made any.
    """
    settings = context.settings
    if context.runtime.processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        durable.recover_folder(folder / BEST)
        checkpoint.check_room(folder, model, settings.ema_decay > 0, context.label)
    run = _Run(model, objective, context, folder, save)
    run.restore()
    first = run.state.step
    with (
        contextlib.closing(run.log),
        StopRequest() as stop,
        Progress(context.label, settings.steps, first) as progress,
        run.data() as data,
    ):
        while run.state.step < settings.steps:
            try:
                stopping = run.step(data, progress, stop)
            except Interrupted:  # while the step waited for its data
                run.save_between_steps(first)
                raise
            if run.due(settings.evaluate_every):
                run.evaluate()
            if stopping or (run.due(settings.checkpoint_every) and run.state.step < settings.steps):
                run.save_checkpoint()
            if stopping:
                message = (
                    f"{run.label}: stopped at step {run.state.step}; run the same command again to continue"
                )
                raise Interrupted(message, 128 + (stop.signal or signal.SIGTERM))
    return run.finish()


class _Run:
    """One training in this process."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        context: TrainingContext,
        folder: Path,
        save: Callable[[Any, Path], object],
    ):
        settings = context.settings
        self.model, self.objective = model.to(context.runtime.device), objective
        self.settings, self.runtime = settings, context.runtime
        self.seed, self.label = context.seed, context.label
        self.folder, self.save = folder, save
        self.processes = context.runtime.processes
        self.parts = Parts(settings.parts, settings.batch_size, self.processes, f"{self.label}.training")
        if settings.activation_checkpointing:
            checkpoint_activations(model, context.label)
        self.layers = CompiledLayers(
            self.model,
            "off" if is_sharded(model) else settings.compile,
            settings.steps * len(self.parts.own),
            learns=True,
            label=self.label,
            processes=self.processes,
        )
        self.optimizer = Optimizer(model, settings, self.runtime.matrix_dtype)
        self.gradients = GradientSum(self.optimizer.parameters.values(), settings.parts, self.processes)
        if settings.optimizer != "adamw" and not self.optimizer.has_muon:
            say(f"{self.label}: no hidden matrix is trained, so Muon updates nothing; AdamW updates the rest")
        self.ema = Ema(self.optimizer.parameters, settings.ema_decay)
        self.freezing = Freezing(model, settings, getattr(objective, "cls_id", None))
        tracker = settings.tracker if self.processes.is_main else None
        self.log = MetricsLog(folder, open_tracker(tracker, folder, self.label, settings.model_dump()))
        self.state = _State()
        self.display_loss = math.nan  # in the progress line
        device = context.runtime.device
        self.unread = UnreadSteps(device) if may_read_later(device, objective) else None
        self.speed = self._speed_meter()

    def _speed_meter(self) -> SpeedMeter:
        row, device = self.objective.tokens_per_row, self.runtime.device
        peak = matmul_peak(device, self.runtime.precision) * self.processes.size
        return SpeedMeter(device, self.settings.batch_size * row, flops_per_token(self.model, row), peak)

    # ------------------------------------------------------------------ one step

    @contextlib.contextmanager
    def data(self) -> Iterator[Callable[[int], list[Part]]]:
        """A function of the step that gives the data of this process's parts; on a GPU it is drawn in advance."""
        if may_draw_ahead(self.runtime.device, self.objective):
            with Prefetcher(self._draw, self.state.step, self.settings.steps) as ahead:
                yield ahead.take
        else:
            yield self._draw

    def _draw(self, step: int) -> list[Part]:
        return [self.objective.part(self.model, step, self.parts.rows(step, n)) for n in self.parts.own]

    def step(self, data: Callable[[int], list[Part]], progress: Progress, stop: StopRequest) -> bool:
        """One update of the weights. Returns whether some process has received a signal to stop."""
        self.speed.begin()
        step = self.state.step
        # 1. Freeze or unfreeze the backbone
        self.freezing.at(step)
        self.model.train()
        # 2. Data of this process's parts, and their weights summed over the global batch
        parts = data(step)
        totals = self.parts.sum([part.weights for part in parts])
        self.speed.data_is_there()
        # 3. Losses and gradients, part by part
        found = [self._backward(step, n, part, totals) for n, part in zip(self.parts.own, parts, strict=True)]
        # 4. Gradients of the global batch, clipped to `gradient_clip`
        if self.unread is None:
            stopping = self._reduce_and_read(step, found, stop)
        else:
            stopping = bool(self.parts.sum([{_STOP: stop.signal} for _ in found])[_STOP])
            self.gradients.reduce()
            self.unread.add(step, found, self.optimizer.clip_gradients())
        # 5. Update the weights and their EMA
        self.optimizer.step(step)
        self.ema.update(step)
        self.state.step += 1
        due = self.due(self.settings.evaluate_every) or self.due(self.settings.checkpoint_every) or stopping
        if self.unread is not None and (due or len(self.unread.steps) == SETTLE_EVERY):
            self._settle(self.unread)
        self.speed.end()
        loss, speed = f"{self.display_loss:.3f}", f"{self.speed.tokens_per_second:,.0f} tokens/s"
        progress.update(self.state.step, loss=loss, speed=speed)
        return stopping

    def _reduce_and_read(self, step: int, found: list[dict[str, Tensor]], stop: StopRequest) -> bool:
        """Add and clip the gradients, and check and log the numbers of the step. Returns whether to stop."""
        values = [{name: float(term) for name, term in terms.items()} for terms in found]
        terms = self.parts.sum([part | {_STOP: stop.signal} for part in values])
        stopping = bool(terms.pop(_STOP))
        factor = 1.0
        if isinstance(self.objective, ScaledObjective):
            terms, factor = self.objective.finish(terms)
        if not math.isfinite(terms["loss"]):
            raise NonFiniteLoss(self._non_finite("loss", terms["loss"], step))
        self.gradients.reduce(factor)
        self._log_step(StepNumbers(step, terms, float(self.optimizer.clip_gradients())))
        return stopping

    def _settle(self, unread: UnreadSteps) -> None:
        """Read, check and log the numbers of the steps that were not read. All processes call it together."""
        for numbers in unread.read(self.parts):
            if not math.isfinite(numbers.terms["loss"]):
                raise NonFiniteLoss(self._non_finite("loss", numbers.terms["loss"], numbers.step))
            self._log_step(numbers)

    def _log_step(self, numbers: StepNumbers) -> None:
        """Add the numbers of a step to the sums for the next line of metrics.jsonl, if the gradient is finite."""
        if not math.isfinite(numbers.norm):
            raise NonFiniteLoss(self._non_finite("gradient norm", numbers.norm, numbers.step))
        sums = self.state.sums
        for name, term in (numbers.terms | {"gradient_norm": numbers.norm}).items():
            sums[name] = sums.get(name, 0.0) + term
        self.state.summed_steps += 1
        self.display_loss = numbers.terms["loss"]

    def _backward(self, step: int, number: int, part: Part, totals: dict[str, float]) -> dict[str, Tensor]:
        """The named shares of one part. Its gradients go to `gradients`."""
        # Only dropout uses torch's generator, and nothing else seeds it
        draw = step * self.parts.count + number
        torch.manual_seed(randomness.key(self.seed, f"{self.label} dropout", draw) % 2**63)
        with exchanging():  # divided weights are gathered in both passes
            terms = part.losses(totals)
            terms["loss"].backward()
        self.gradients.push()
        return {name: term.detach() for name, term in terms.items()}

    def _non_finite(self, what: str, value: float, step: int) -> str:
        size = self.settings.batch_size
        when = "before the update" if step == self.state.step else "before anything was saved"
        bundle = {"step": step, "rows": [step * size, (step + 1) * size], "seed": self.seed, what: str(value)}
        if self.processes.is_main:
            durable.write_json(self.folder / "non_finite.json", bundle)
        return (
            f"{self.label}: the {what} at step {step} is {value}; training stopped {when}. Try lower learning "
            f"rates or precision=fp32. The batch is described in {self.folder / 'non_finite.json'}"
        )

    def due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.settings.steps

    # ------------------------------------------------------------------ evaluation

    def evaluate(self) -> None:
        """Measure the model on the selection split, keep it if it is the best so far, and write a line of metrics."""
        state, selection = self.state, self.objective.selection
        terms = {name: total / max(state.summed_steps, 1) for name, total in state.sums.items()}
        state.sums, state.summed_steps = {}, 0
        with self.ema.swapped():
            self.model.eval()
            with torch.no_grad():
                metrics = self.objective.evaluate(self.model)
            value = metrics[selection]
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"{self.label}: {selection} on the selection split at step {state.step} is {value}, so it cannot choose "
                    "the best model. Try lower learning rates or precision=fp32"
                )
            if state.best_value is None or value < state.best_value:
                state.best_value, state.best_step, state.best_metrics = value, state.step, metrics
                self._save_model(BEST)
        line = {"step": state.step, "train": terms, "selection": metrics}
        if self.processes.is_main:
            self.log.write(line, self.speed.figures())
        loss = terms.get("loss", math.nan)
        say(f"  {self.label} {state.step}/{self.settings.steps}: loss {loss:.4f}, {selection} {value:.4f}")

    def _save_model(self, name: str) -> None:
        if self.processes.is_main:
            with durable.replacing_folder(self.folder / name) as temporary:
                self.save(self.model, temporary)

    # ------------------------------------------------------------------ checkpoints

    @property
    def fingerprint(self) -> dict[str, Any]:
        compiled = bool(self.layers.compiled)
        own = {"parts": self.parts.count, "compiled": compiled, "code": dict(self.runtime.code)}
        return self.runtime.fingerprint() | own

    @cached_property
    def frozen_digest(self) -> str:
        """Hash of the weights that are never trained. A checkpoint leaves them out: they come from the start.

        If they are divided among the processes, all processes ask for it together the first time.
        """
        return checkpoint.frozen_digest(self.model, self.optimizer.parameters)

    def save_between_steps(self, first: int) -> None:
        """A checkpoint before a step that has not begun, if this process has made any since its `first`."""
        if self.unread is not None:
            self._settle(self.unread)
        if self.state.step > first:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        if not self.processes.is_main:
            return
        self.state.metrics_bytes = self.log.sync()
        stateful = isinstance(self.objective, StatefulObjective)
        tensors = {
            "weights": self.optimizer.parameters,
            "ema": self.ema.params,
            "optimizer": self.optimizer.state(),
            "objective": self.objective.state() if stateful else {},
        }
        state = {**vars(self.state), "fingerprint": self.fingerprint, "frozen_sha256": self.frozen_digest}
        best = self.folder / BEST if self.state.best_value is not None else None
        checkpoint.save(self.folder, {k: v for k, v in tensors.items() if v}, state, best)

    def restore(self) -> None:
        """Continue from the last checkpoint, if there is one.

        Metrics and a best model that were written after it are discarded: their steps run again. With
        `allow_inexact_resume` these steps may give other results.
        """
        if self.processes.is_main:  # first alone: it repairs what a crash has left
            checkpoint.load(self.folder)
        self.processes.barrier()
        if is_sharded(self.model):
            _ = self.frozen_digest  # later, only the main process asks for it
        loaded = checkpoint.load(self.folder)
        if loaded is None:
            if self.processes.is_main:
                self.log.clear()
            return
        tensors, state = loaded
        self.layers.follow(state.get("fingerprint", {}).get("compiled"))
        checkpoint.check_fingerprint(
            state.pop("fingerprint", {}),
            self.fingerprint,
            self.settings.allow_inexact_resume,
            self.label,
            self.folder,
        )
        checkpoint.check_frozen(state.pop("frozen_sha256", None), self.frozen_digest, self.label)
        own = {"weights": self.optimizer.parameters, "ema": self.ema.params}
        checkpoint.check_tensors(tensors, own, self.folder)
        checkpoint.check_step(state["step"], self.settings.steps, self.folder)
        self.state = _State(**{k: v for k, v in state.items() if k in _State.__dataclass_fields__})
        with torch.no_grad():
            for name, value in tensors["weights"].items():
                self.optimizer.parameters[name].copy_(value)
        self.ema.load(tensors.get("ema", {}))
        self.optimizer.load_state(tensors.get("optimizer", {}))
        if isinstance(self.objective, StatefulObjective):
            self.objective.load_state(tensors.get("objective", {}))
        if self.processes.is_main:
            checkpoint.restore_folder(self.folder, BEST)
            self.log.truncate(self.state.metrics_bytes)
        say(f"{self.label}: continuing from step {self.state.step}")

    def finish(self) -> Result:
        if self.processes.is_main:
            self.log.sync()  # the record of the training, which comes next, must not reach the disk before it
        with self.ema.swapped():
            self._save_model("final_model")
        self.processes.barrier()  # the others may read the models now
        if self.speed.steps:
            say(f"{self.label}: {self.speed.line()}")
        state = self.state
        return Result(
            state.step,
            state.best_step,
            state.best_metrics,
            self.speed.figures(),
            {"groups": self.optimizer.groups(), "frozen": self.freezing.record()},
            bool(self.layers.compiled),
        )
