"""Activation checkpointing (Chen et al. 2016): layers keep their inputs only, and compute the rest again for gradients."""

from torch import nn
from transformers import PreTrainedModel

from lib.errors import BadConfig


def checkpoint_activations(model: nn.Module, label: str) -> None:
    """Let every transformer layer of the model forget its activations, in training only.

    Gradients stay the same: a layer is computed again with the same dropout. The model may wrap its backbone, also in
    peft's adapters. The checkpoints are not reentrant, so a frozen embedding in front of the layers is no obstacle.

    Args:
        label: of the model, for messages.

    Raises BadConfig for a model whose layers cannot be checkpointed.
    """
    backbones = _outermost(model)
    refused = [type(m).__name__ for m in backbones if not m.supports_gradient_checkpointing]
    if refused or not backbones:
        raise BadConfig(
            f"{label}: training.activation_checkpointing is true, but {', '.join(refused) or type(model).__name__} cannot "
            "compute its layers twice; set it to false, and training.parts higher to save memory"
        )
    for backbone in backbones:
        backbone.activation_checkpointing_enable({"use_reentrant": False})


def _outermost(module: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers inside a module that are not part of another one."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]
