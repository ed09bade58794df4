"""Weights that do not learn, divided among the processes: torch's FSDP2 (`fully_shard`, Zhao et al. 2023).

Each process keeps 1 / W of the frozen weights, for W processes. Before a layer computes, the processes send each other
their shares of its weights. After it, what came from the others is dropped. This exchange copies and never adds, so
results have the same bits as with whole weights in each process. Weights that learn stay whole in every process, and
their gradients are added by `gradients.py`.

Each forward or backward pass of such a model is an exchange. So all processes call it equally often, in the same order:
see `Processes.passes_together`.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lib.engine.processes import Processes, exchanging


def shard_mesh(processes: Processes, device: torch.device) -> Any:
    """The processes among which weights are divided. All processes call it together."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (processes.size,))


def shard_frozen(model: nn.Module, pieces: Iterable[nn.Module], mesh: Any) -> None:
    """Divide the weights of `model` that do not learn, in place. Nothing is exchanged here.

    Args:
        model: its forward must be called as `model(...)`, since the rest of its frozen weights is gathered there.
        pieces: modules of the model, such as its layers. The frozen weights of a piece are gathered together.
        mesh: from `shard_mesh`.
    """
    from torch.distributed.fsdp import fully_shard

    learning = {p for p in model.parameters() if p.requires_grad}
    for piece in [*pieces, model]:
        fully_shard(piece, mesh=mesh, reshard_after_forward=True, ignored_params=learning)


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor. For a divided one all processes call it together."""
    if not _is_divided(tensor):
        return tensor
    with exchanging():
        return cast(Any, tensor).full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of the model are divided among the processes."""
    return any(_is_divided(p) for p in model.parameters())


def _is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes a second to import
