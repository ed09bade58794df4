"""Bring a ranker to the device that it is trained or evaluated on, or divide it among the devices of several processes."""

from collections.abc import Callable
from typing import Any, TypeVar

from lib.engine.sharding import shard_frozen, shard_mesh
from lib.errors import BadConfig
from lib.models.checkpointing import transformer_layers
from lib.models.ranker import CandidateRanker
from lib.runtime import Runtime

Loaded = TypeVar("Loaded", bound=tuple[Any, ...])


def on_device(load: Callable[[], Loaded], shard: bool, runtime: Runtime) -> Loaded:
    """What `load` returns, a ranker first, with the ranker on the device of this process.

    Args:
        load: reads the ranker into the memory of the CPU.
        shard: divide the weights that do not learn among the processes. Each machine then holds one whole copy at a
            time: its processes load one after another, and keep their share only. All processes call this together.
    """
    processes = runtime.processes
    if not shard or processes.size == 1:
        loaded = load()
        loaded[0].one_pass = shard  # so that one process has the bits of several
        loaded[0].to(runtime.device)
        return loaded
    processes.passes_together = True
    mesh = shard_mesh(processes, runtime.device)
    with processes.in_turn():
        loaded = load()
        divide(loaded[0], mesh)
        loaded[0].to(runtime.device)
    return loaded


def divide(ranker: CandidateRanker, mesh: Any) -> None:
    """Divide the frozen weights of a ranker. Each layer and the embedding of tokens are gathered when they compute.

    Raises BadConfig for a backbone without layers that can be told apart: all of its weights would be gathered at once.
    """
    layers = transformer_layers(ranker.backbone)
    if not layers:
        raise BadConfig(
            f"ranker.shard is true, but {type(ranker.base).__name__} has no layers of transformers that can be gathered one "
            "after another; set it to false"
        )
    ranker.one_pass = True
    shard_frozen(ranker.backbone, [ranker.base.get_input_embeddings(), *layers], mesh)
