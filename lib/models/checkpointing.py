"""Activation checkpointing (Chen et al. 2016): layers keep their inputs only, and compute the rest again for gradients."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lib.errors import BadConfig


def checkpoint_activations(model: nn.Module, label: str) -> None:
    """Let every transformer layer of the model forget its activations, wherever gradients are computed.

    Gradients stay the same: a layer is computed again with the same dropout. The model may wrap its backbone, also in
    peft's adapters. The checkpoints are not reentrant, so a frozen embedding in front of the layers is no obstacle.
    transformers' own switch does nothing in evaluation mode, in which policies are trained.

    Args:
        label: of the model, for messages.

    Raises BadConfig for a model whose layers transformers does not compute twice.
    """
    layers: list[Any] = transformer_layers(model)
    if not layers:
        raise BadConfig(
            f"{label}: training.activation_checkpointing is true, but {type(model).__name__} has no layers that can be "
            "computed twice; set it to false, and training.parts higher to save memory"
        )
    for layer in layers:
        layer.forward = forgetful(layer.forward)


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that transformers can compute twice."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `forward` that keeps only its inputs, and is computed again where its gradients are."""

    @wraps(forward)
    def forward_again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    forward_again.is_forgetful = True  # pyright: ignore[reportFunctionMemberAccess]
    return forward_again


def is_forgetful(layer: nn.Module) -> bool:
    """Whether the layer keeps only its inputs, also if its `forward` was replaced once more since."""
    return hasattr(layer.forward, "is_forgetful")
