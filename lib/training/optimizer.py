"""Muon for the hidden matrices, AdamW for embeddings, heads and vectors; the learning rate by step.

Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix by a Newton-Schulz iteration; its updates are
scaled to the size of AdamW's (Liu et al., Muon is Scalable, 2025).
"""

import torch
from torch import Tensor, nn

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
    """

    def __init__(self, model: nn.Module, settings: TrainingConfig):
        self.settings = settings
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = hidden_matrices(model)
        own_rate = head_parameters(model) if settings.head_learning_rate is not None else set()
        head = [p for n, p in self.parameters.items() if n in own_rate]
        hidden = [p for n, p in self.parameters.items() if n in matrices - own_rate]
        rest = [p for n, p in self.parameters.items() if n not in matrices | own_rate]
        self.parts: list[torch.optim.Optimizer] = []
        if settings.optimizer == "muon" and hidden:
            self.parts.append(
                torch.optim.Muon(
                    hidden,
                    lr=settings.muon_learning_rate,
                    momentum=settings.muon_momentum,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
            hidden = []
        # Vectors, heads and embeddings are not decayed: their scale is their meaning.
        groups = [
            {"params": hidden, "weight_decay": settings.weight_decay},
            {"params": rest, "weight_decay": 0.0},
            {"params": head, "weight_decay": 0.0, "lr": settings.head_learning_rate},
        ]
        groups = [g for g in groups if g["params"]]
        if groups:
            self.parts.append(
                torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
            )
        self._base = [[group["lr"] for group in part.param_groups] for part in self.parts]

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
    """Names of the weights of Linear layers inside transformer blocks: what Muon is made for."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}.":
            names.add(f"{name}.weight")
    return names
