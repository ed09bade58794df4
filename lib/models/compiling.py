"""Transformer layers compiled by `torch.compile`, where that pays back within the run.

All layers of a model share one compiled function, and it takes any number of rows and tokens. So one compilation, of 10
to 25 seconds, serves a whole training. Batches with padding are compiled besides, and so is the last layer, which
may compute some positions alone. Each takes about a quarter of that time. The results are kept on disk, from which a
later process reads each in 2 seconds.

    on      compile, if torch can do it on this machine
    auto    compile if the rest of the run will gain more time than it costs, as measured with the first batch
    off     never

Compiled code rounds in other places, so its results differ in their last bits. With dropout, it draws other numbers. A training decides once, at its first
step; its checkpoints record the decision, and a resumed training follows it.
"""

import hashlib
import itertools
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib.devices import synchronize
from lib.engine.processes import Processes
from lib.log import say
from lib.models.checkpointing import forgetful, is_forgetful, transformer_layers

COLD_SECONDS, WARM_SECONDS = 15.0, 3.0  # of a compilation, and of reading one from torch's cache
EXPECTED_GAIN = 0.3  # share of a layer's time that compiled code saves, before it is measured
REPEATS = 5  # timed calls of a layer


class CompiledLayers:
    """The layers of a model, of which `forward` calls compiled code once it is decided that they do.

    Args:
        model: layers are found as `transformer_layers` does. Their `forward` is replaced. If layers are to keep only their
            inputs, `checkpoint_activations` was called before.
        mode: see above.
        calls: times that each layer will still be called.
        learns: compile the calls that compute gradients, and no others. False: those that compute none.
        label: of the model, for messages.

    Attributes:
        compiled: whether layers call compiled code; None until the first call has decided.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        calls: int,
        *,
        learns: bool,
        label: str,
        processes: Processes | None = None,
    ):
        self.mode, self.calls, self.learns, self.label = mode, calls, learns, label
        self.processes = processes or Processes()
        self.compiled: bool | None = False if mode == "off" else None
        self._layers: list[Any] = transformer_layers(model)
        self._functions: dict[type, Callable[..., Any]] = {}
        if not self._layers:
            self.compiled = False
        self._before = [vars(layer).get("forward") for layer in self._layers]
        if self.compiled is None:
            for layer in self._layers:
                self._replace_forward(layer)

    def follow(self, compiled: bool | None) -> None:
        """Use the decision of a checkpoint. If torch cannot compile here, layers stay plain whatever it says."""
        if self.compiled is None and compiled is not None:
            self._settle(compiled and can_compile(next(self._layers[0].parameters()).device))

    def of_parts(self) -> dict[str, str]:
        """For the manifest of a part of a table: whether compiled code made it. Empty where layers were to stay plain."""
        return {} if self.mode == "off" or self.compiled is None else {"compiled": str(self.compiled)}

    def _settle(self, compiled: bool) -> None:
        self.compiled = compiled
        if not compiled:
            for layer, forward in zip(self._layers, self._before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _replace_forward(self, layer: Any) -> None:
        plain = layer.forward

        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() != self.learns:
                return plain(*args, **kwargs)
            if self.compiled is None:
                main = self.processes.is_main  # the main process decides for all
                decision = self._decide(layer, plain, args, kwargs) if main else False
                self._settle(self.processes.from_main(decision))
            return self._function_of(layer)(*args, **kwargs) if self.compiled else plain(*args, **kwargs)

        layer.forward = forward

    def _function_of(self, layer: Any) -> Callable[..., Any]:
        """The compiled `forward` of a layer. Layers of a class share its code."""
        kind = type(layer)
        if kind not in self._functions:
            if not self._functions:
                torch._dynamo.reset()  # compiled code of earlier models counts towards a limit
            function = torch.compile(kind.forward, dynamic=True)
            self._functions[kind] = forgetful(function) if is_forgetful(layer) else function
        return partial(self._functions[kind], layer)

    # ------------------------------------------------------------------ the decision

    def _decide(self, layer: Any, plain: Callable[..., Any], args: tuple, kwargs: dict) -> bool:
        """Whether to compile, from the first call of a layer. It changes neither weights nor gradients."""
        # 1. What a call costs now, and what compiled code would save
        trial = _Trial(layer, args, kwargs, self.learns)
        calls = self.calls * len(self._layers)
        now = trial.seconds(plain)
        marker = _marker(layer, trial)
        cost = WARM_SECONDS if marker is not None and marker.exists() else COLD_SECONDS
        if self.mode == "auto" and EXPECTED_GAIN * now * calls < cost:
            return False
        # 2. Compile, with the arguments of this call
        if cost == COLD_SECONDS:
            say(f"{self.label}: compiling the layers (about {cost:.0f} seconds, once on this machine)")
        begin = time.perf_counter()
        try:
            compiled = self._function_of(layer)
            trial.run(compiled)
        except Exception as error:  # torch raises errors of many kinds if it finds no C++ compiler
            say(
                f"{self.label}: the layers are not compiled, because torch cannot do it here: {_first_line(error)}"
            )
            return False
        took = time.perf_counter() - begin
        if marker is not None:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        # 3. Keep what is faster
        then = trial.seconds(compiled)
        figures = f"{1000 * now:.1f} -> {1000 * then:.1f} ms per layer, after {took:.0f} seconds"
        if self.mode == "auto" and then >= now:
            say(f"{self.label}: compiled layers are not faster ({figures}), so they are not used")
            return False
        say(f"{self.label}: compiled layers: {figures}")
        return True


class _Trial:
    """Calls of a layer with copies of the arguments of a real call. No gradient reaches a parameter's `grad`."""

    def __init__(self, layer: nn.Module, args: tuple, kwargs: dict, learns: bool):
        self.learns = learns
        self.args, self.kwargs = _detached(args), _detached(kwargs)
        self.inputs = [
            x
            for x in (*layer.parameters(), *self.args)
            if learns and isinstance(x, Tensor) and x.requires_grad
        ]
        self.device = next(layer.parameters()).device

    def run(self, function: Callable[..., Any]) -> None:
        """One call, with its derivatives if the model learns."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.set_grad_enabled(self.learns):
            found = function(*self.args, **self.kwargs)
            out = found[0] if isinstance(found, tuple) else found
            if self.inputs:
                torch.autograd.grad(out.sum(), self.inputs, allow_unused=True)
        synchronize(self.device)

    def seconds(self, function: Callable[..., Any]) -> float:
        """Of the fastest of a few calls."""
        taken = []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            self.run(function)
            taken.append(time.perf_counter() - begin)
        return min(taken[1:])


def _detached(x: Any) -> Any:
    """Arguments without their history."""
    if isinstance(x, Tensor):
        return x.detach().requires_grad_(x.requires_grad)
    if isinstance(x, tuple | list):
        return type(x)(_detached(part) for part in x)
    return {name: _detached(value) for name, value in x.items()} if isinstance(x, dict) else x


def _marker(layer: nn.Module, trial: _Trial) -> Path | None:
    """A file in torch's cache that says that a layer like this was compiled here; None if the cache has no folder."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        folder = Path(cache_dir())
    except (
        ImportError,
        AttributeError,
        OSError,
    ):  # a private module of torch, which other versions may not have
        return None
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in layer.named_parameters()]
    kinds = [_kind(value) for value in (*trial.args, *itertools.chain(*sorted(trial.kwargs.items())))]
    device = trial.device.type
    facts = (
        torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), device, trial.learns,
        torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device)), repr(layer), shapes, kinds,
    )  # fmt: skip
    return folder / "remask_layers" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _kind(x: Any) -> str:
    """What compiled code depends on. It takes other sizes, too, but torch may then have to compile once more."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)}"
    if isinstance(x, tuple | list):
        return str([_kind(part) for part in x])
    return repr(x) if isinstance(x, bool | int | float | str | None) else type(x).__name__


def can_compile(device: torch.device) -> bool:
    """Whether torch can compile a small function for the device. For the CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(4, device=device))
    except Exception:  # see `_decide`
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
