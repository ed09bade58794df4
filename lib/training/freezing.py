"""Which weights are trained at which step: the backbone may stay frozen until its new head has settled.

A head is everything outside the backbone. What belongs to the backbone is known from the family's tensor names, from a
wrapper's `backbone_names`, or from the `base_model_prefix` of any other transformers model. The adapter of a pretrained
backbone belongs to it, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.errors import BadConfig
from lib.models.families import FAMILIES
from lib.models.ranker import SequenceRanker
from lib.sections.models import TrainingConfig


def backbone_of(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the parameters that a model shares with other modes; ("",) if it shares all."""
    prefixes = getattr(model, "backbone_names", None)
    if prefixes is not None:
        return prefixes
    if isinstance(model, SequenceRanker):
        return tuple(f"encoder.{name}" for name in backbone_of(model.encoder))
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is not None:
        backbone = family.backbone
    elif isinstance(model, PreTrainedModel) and model.base_model is not model:
        backbone = (f"{model.base_model_prefix}.",)
    else:
        return ("",)
    # A bare backbone without a head has its parameters under no prefix
    bare = not any(name.startswith(backbone) for name, _ in model.named_parameters())
    return ("",) if bare else backbone


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that only this mode has."""
    backbone = backbone_of(model)
    return {name for name, _ in model.named_parameters() if not name.startswith(backbone)}


class Freezing:
    """Freezes the backbone of a model until `unfreeze_at_step`, or for the whole training.

    The embedding of [CLS] is an exception and is trained with the head. Masked language models never train this row,
    so a sequence model that starts from one would keep a random vector there.

    Args:
        cls_id: the row of [CLS], for objectives that put [CLS] in front of their inputs.

    Raises BadConfig for a model without a head: nothing of it would be trained.
    """

    def __init__(self, model: nn.Module, settings: TrainingConfig, cls_id: int | None):
        self.until: float = 0
        if settings.freeze_backbone:
            self.until = settings.steps if settings.unfreeze_at_step is None else settings.unfreeze_at_step
        heads = head_parameters(model)
        if self.until and not any(p.requires_grad for n, p in model.named_parameters() if n in heads):
            raise BadConfig(
                "training.freeze_backbone is true, but this model has no head that learns, so nothing would learn. Set it only for "
                "models with a head, such as token classifiers"
            )
        # Skip permanently frozen parameters, such as those under LoRA adapters
        self._parameters = {
            name: p for name, p in model.named_parameters() if name not in heads and p.requires_grad
        }
        self._embedding: Tensor | None = None
        inner: Any = model.encoder if isinstance(model, SequenceRanker) else model
        if cls_id is not None and hasattr(inner, "get_input_embeddings"):
            weight = inner.get_input_embeddings().weight
            if weight.requires_grad:
                self._embedding = weight
        self._cls_id = cls_id
        self._hook: Any = None

    def record(self) -> dict[str, Any] | None:
        """Which weights are frozen and until which step, for the training manifest; None if none are."""
        if not self.until:
            return None
        names = [name for name, p in self._parameters.items() if p is not self._embedding]
        return {
            "until_step": self.until,
            "tensors": len(names),
            "parameters": sum(self._parameters[name].numel() for name in names),
            "only_cls_learns": [name for name, p in self._parameters.items() if p is self._embedding],
            "names": names,
        }

    def at(self, step: int) -> None:
        """Freeze or unfreeze the backbone for a step. Called before every step, also the first one after a resume."""
        frozen = step < self.until
        for parameter in self._parameters.values():
            parameter.requires_grad_(not frozen or parameter is self._embedding)
        if frozen and self._embedding is not None and self._hook is None:
            self._hook = self._embedding.register_hook(self._only_cls)
        if not frozen and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _only_cls(self, gradient: Tensor) -> Tensor:
        """The gradient of the embedding, 0 in all rows but that of [CLS]."""
        kept = torch.zeros_like(gradient)
        kept[self._cls_id] = gradient[self._cls_id]
        return kept
