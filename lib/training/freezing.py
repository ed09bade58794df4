"""Which weights learn, and when: a backbone that waits until its new head has settled.

Knows modules and the loop's settings. A head is what is not backbone; which that is, a family of ours says by the names of
tensors, a wrapper by its `backbone_names`, any other model of transformers by its `base_model_prefix`.
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
    """How the names of the parameters begin that a model shares with other modes; ("",) where all are."""
    own = getattr(model, "backbone_names", None)
    if own is not None:
        return own
    if isinstance(model, SequenceRanker):
        return tuple(f"encoder.{name}" for name in backbone_of(model.encoder))
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is not None:
        backbone = family.backbone
    elif isinstance(model, PreTrainedModel) and model.base_model is not model:
        backbone = (f"{model.base_model_prefix}.",)
    else:
        return ("",)
    bare = not any(
        name.startswith(backbone) for name, _ in model.named_parameters()
    )  # a backbone without a head
    return ("",) if bare else backbone


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that no other mode has."""
    backbone = backbone_of(model)
    return {name for name, _ in model.named_parameters() if not name.startswith(backbone)}


class Freezing:
    """The backbone of a model, still until `unfreeze_at_step` or for good.

    [CLS] is a row of the backbone's embedding that masked language models never train: sequence models that start from one
    would be left with a random vector, so that this row learns with the head.

    Args:
        cls_id: the row, for objectives that put [CLS] in front.

    Raises BadConfig for a model without a head, of which nothing would learn.
    """

    def __init__(self, model: nn.Module, settings: TrainingConfig, cls_id: int | None):
        self.until: float = 0
        if settings.freeze_backbone:
            self.until = settings.steps if settings.unfreeze_at_step is None else settings.unfreeze_at_step
        heads = head_parameters(model)
        if self.until and not heads:
            raise BadConfig(
                "training.freeze_backbone is true, but all of this model is backbone: nothing would learn. It is for "
                "models with a head of their own, such as token classifiers"
            )
        # Weights that never learn, such as those under adapters, are none of our business
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
        """What waits and until when, for the record; None where nothing does."""
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
        """Freeze or free the backbone as this step wants it; called before every step, also the first after a resume."""
        frozen = step < self.until
        for parameter in self._parameters.values():
            parameter.requires_grad_(not frozen or parameter is self._embedding)
        if frozen and self._embedding is not None and self._hook is None:
            self._hook = self._embedding.register_hook(self._only_cls)
        if not frozen and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _only_cls(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[self._cls_id] = gradient[self._cls_id]
        return kept
