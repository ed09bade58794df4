"""Muon or AdamW for the hidden matrices, AdamW for embeddings, heads and vectors; the learning rate by step.

Weight decay is for the hidden matrices and nothing else. Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix by a Newton-Schulz iteration; its updates are
scaled to the size of AdamW's (Liu et al., Muon is Scalable, 2025).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.errors import BadConfig
from lib.sections.models import TrainingConfig
from lib.training.freezing import head_parameters


def learning_rate_factor(step: int, settings: TrainingConfig) -> float:
    """Rise from 0, stay at 1, fall to 0: a function of the step, so that a resumed run cannot get it wrong."""
    warmup = max(1.0, settings.warmup_fraction * settings.steps)
    decay = max(1.0, settings.decay_fraction * settings.steps)
    return min(1.0, (step + 1) / warmup, (settings.steps - step) / decay)


class Optimizer:
    """The pair of optimisers over a model's named parameters, saved and loaded as named tensors.

    Parameters that are frozen for a while have no gradient then and no state: theirs starts with their first update.

    Raises BadConfig for `muon` and a model that has no hidden matrices.
    """

    def __init__(self, model: nn.Module, settings: TrainingConfig):
        self.settings = settings
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = hidden_matrices(model)
        if settings.optimizer == "muon" and not matrices:
            raise BadConfig(
                f"training.optimizer is muon, but {type(model).__name__} has no hidden matrices (weights of linear layers "
                "that are neither embedding nor head), which Muon is for; set training.optimizer to adamw"
            )
        own_rate = head_parameters(model) if settings.head_learning_rate is not None else set()
        hidden = {
            "group": "hidden matrices",
            "params": [p for n, p in self.parameters.items() if n in matrices - own_rate],
            "weight_decay": settings.weight_decay,
        }
        # Vectors, heads and embeddings are not decayed: their scale is their meaning.
        rest = {
            "group": "embeddings, vectors" if own_rate else "embeddings, heads, vectors",
            "params": [p for n, p in self.parameters.items() if n not in matrices | own_rate],
            "weight_decay": 0.0,
        }
        head = {
            "group": "head",
            "params": [p for n, p in self.parameters.items() if n in own_rate],
            "weight_decay": 0.0,
            "lr": settings.head_learning_rate,
        }
        self.parts: list[torch.optim.Optimizer] = []
        if settings.optimizer == "muon" and hidden["params"]:
            self.parts.append(
                torch.optim.Muon(
                    [hidden],
                    lr=settings.muon_learning_rate,
                    momentum=settings.muon_momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
            hidden = {**hidden, "params": []}
        groups = [g for g in (hidden, rest, head) if g["params"]]
        if groups:
            self.parts.append(
                torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
            )
        self._base = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def groups(self) -> list[dict[str, Any]]:
        """Which weights are updated how, for the record: the groups that the optimisers hold."""
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
            for part, rates in zip(self.parts, self._base, strict=True)
            for group, rate in zip(part.param_groups, rates, strict=True)
        ]

    def gradient_norm(self) -> float:
        """Clip the gradients to `gradient_clip` and return their norm before that."""
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip))

    def step(self, step: int) -> None:
        """Update every parameter at this step's learning rate and forget the gradients."""
        factor = learning_rate_factor(step, self.settings)
        for part, rates in zip(self.parts, self._base, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every moment by `<parameter>/<moment>`."""
        tensors = {}
        for name, p in self.parameters.items():
            for part in self.parts:
                for moment, value in part.state.get(p, {}).items():
                    tensors[f"{name}/{moment}"] = value.detach().clone().contiguous()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        owner = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for name, value in tensors.items():
            parameter, _, moment = name.rpartition("/")
            p = self.parameters[parameter]
            owner[id(p)].state[p][moment] = value.to(p.device)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the 2-D weights of linear layers that are neither (tied to) an embedding nor part of a head.

    Linear layers are told by their class, `nn.Linear` or GPT-2's transposed `Conv1D`, not by their names, which differ
    from family to family. Transformer blocks that a head has of its own, such as a critic's, count as hidden.

    Under adapters these are the matrices A and B of LoRA, which are linear layers themselves: they are all that changes
    a hidden layer, and decay draws their product to 0, which is the pretrained layer. The frozen layers that they wrap
    are named too, but do not learn, so that no optimiser takes them up.
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
    for module in model.modules():  # a policy has a value head, and the ranker inside it a head of its own
        if module is model or hasattr(module, "backbone_names"):
            heads |= {id(module.get_parameter(name)) for name in head_parameters(module)}
    hidden = linear - embeddings - (heads - in_blocks)
    return {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) in hidden}
