"""NorMuon, Muon or AdamW for the hidden matrices, AdamW for embeddings, heads and vectors; the learning rate schedule.

Weight decay applies to the hidden matrices only. Muon orthogonalises the momentum of a matrix by a Newton-Schulz
iteration (Jordan et al., 2024). Its updates are scaled to the size of AdamW's (Liu et al., Muon is Scalable, 2025).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.errors import BadConfig
from lib.sections.models import TrainingConfig
from lib.training.freezing import head_parameters
from lib.training.muon import Muon, NorMuon


def learning_rate_factor(step: int, settings: TrainingConfig, *, of_muon: bool = False) -> float:
    """Factor of the learning rates at a step: linear warmup, constant 1, linear decay to 0.

    It depends on the step alone, so that a resumed training needs no schedule state. `of_muon`: for its matrices, whose
    decay may have another length.
    """
    warmup = max(1.0, settings.warmup_fraction * settings.steps)
    share = settings.muon_decay_fraction if of_muon else None
    decay = max(1.0, (settings.decay_fraction if share is None else share) * settings.steps)
    return min(1.0, (step + 1) / warmup, (settings.steps - step) / decay)


class Optimizer:
    """Muon and AdamW, or AdamW alone, over a model's named parameters. The state is saved and loaded as named tensors.

    A parameter that is frozen for the first steps has no gradient and no state; its state starts with its first update.

    Args:
        dtype: in which Muon orthogonalises; see `Runtime.matrix_dtype`.

    Attributes:
        parameters: name -> parameter, of those that are trained.
        optimizers: one or two of torch's.

    Raises BadConfig for `muon` and a model without hidden matrices.
    """

    def __init__(self, model: nn.Module, settings: TrainingConfig, dtype: torch.dtype = torch.float32):
        self.settings = settings
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = hidden_matrices(model)
        if settings.optimizer != "adamw" and not matrices:
            raise BadConfig(
                f"training.optimizer is {settings.optimizer}, but {type(model).__name__} has no hidden matrices (weights of linear layers "
                "that are neither embedding nor head); Muon updates nothing else. Set training.optimizer to adamw"
            )
        separate_head = head_parameters(model) if settings.head_learning_rate is not None else set()
        hidden = {
            "group": "hidden matrices",
            "params": [p for n, p in self.parameters.items() if n in matrices - separate_head],
            "weight_decay": settings.weight_decay,
        }
        # No weight decay: the scale of embeddings, heads and vectors matters
        rest = {
            "group": "embeddings, vectors" if separate_head else "embeddings, heads, vectors",
            "params": [p for n, p in self.parameters.items() if n not in matrices | separate_head],
            "weight_decay": 0.0,
        }
        head = {
            "group": "head",
            "params": [p for n, p in self.parameters.items() if n in separate_head],
            "weight_decay": 0.0,
            "lr": settings.head_learning_rate,
        }
        self.optimizers: list[torch.optim.Optimizer] = []
        if settings.optimizer != "adamw" and hidden["params"]:
            kind = Muon if settings.optimizer == "muon" else NorMuon
            self.optimizers.append(
                kind(
                    [hidden],
                    lr=settings.muon_learning_rate,
                    momentum=settings.muon_momentum,
                    adjust_lr_fn="match_rms_adamw",
                    dtype=dtype,
                )
            )
            hidden = {**hidden, "params": []}
        groups = [g for g in (hidden, rest, head) if g["params"]]
        if groups:
            self.optimizers.append(
                torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
            )
        self._full_rates = [[group["lr"] for group in part.param_groups] for part in self.optimizers]

    @property
    def has_muon(self) -> bool:
        return any(isinstance(part, Muon) for part in self.optimizers)

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups with their settings and the names of their weights, for the training manifest."""
        names = {id(p): n for n, p in self.parameters.items()}
        return [
            {
                "group": group["group"],
                "optimizer": type(part).__name__,
                "learning_rate": rate,
                "weight_decay": group["weight_decay"],
                "tensors": len(group["params"]),
                "parameters": sum(p.numel() for p in group["params"]),
                "names": [names[id(p)] for p in group["params"]],
            }
            for part, rates in zip(self.optimizers, self._full_rates, strict=True)
            for group, rate in zip(part.param_groups, rates, strict=True)
        ]

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to the norm `gradient_clip`. Returns their norm before clipping, on the device."""
        return nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip)

    def step(self, step: int) -> None:
        """Update every parameter with this step's learning rate, and clear the gradients."""
        for part, rates in zip(self.optimizers, self._full_rates, strict=True):
            factor = learning_rate_factor(step, self.settings, of_muon=isinstance(part, Muon))
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All moments, named `<parameter>/<moment>`."""
        tensors = {}
        for name, p in self.parameters.items():
            for part in self.optimizers:
                for moment, value in part.state.get(p, {}).items():
                    tensors[f"{name}/{moment}"] = value.detach().clone().contiguous()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        owner = {
            id(p): part for part in self.optimizers for group in part.param_groups for p in group["params"]
        }
        for name, value in tensors.items():
            parameter, _, moment = name.rpartition("/")
            p = self.parameters[parameter]
            owner[id(p)].state[p][moment] = value.to(p.device)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the 2-D weights of linear layers that are neither (tied to) an embedding nor part of a head.

    A linear layer is recognised by its class, `nn.Linear` or GPT-2's transposed `Conv1D`. Names of layers differ from
    family to family. Transformer blocks inside a head, such as a critic's, count as hidden.

    With LoRA adapters of peft these are the matrices A and B, which are linear layers too. Weight decay draws their product
    to 0, and so the layer to its pretrained weights. The frozen layers under the adapters are named as well, but have
    no gradient, so no optimizer updates them. `LowRank` adapters of a pretrained masked LM are parameters without a
    layer: AdamW updates them, without weight decay. The published figures of critics with an adapter were measured so.
    """
    linear: set[int] = set()
    in_blocks: set[int] = set()
    embeddings: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            linear.add(id(module.weight))
        elif isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
        elif isinstance(module, nn.ModuleList):
            in_blocks |= {id(p) for p in module.parameters()}
    heads: set[int] = set()
    for module in model.modules():  # a policy has a value head; the ranker inside it has a score head
        if module is model or hasattr(module, "backbone_names"):
            heads |= {id(module.get_parameter(name)) for name in head_parameters(module)}
    hidden = linear - embeddings - (heads - in_blocks)
    return {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) in hidden}
