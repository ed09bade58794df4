"""The model that a policy gradient trains: a ranker as policy, and a head that predicts the reward of a pool."""

import torch
from torch import Tensor, nn

from lib import randomness


class ValueHead(nn.Module):
    """Predicts the expected reward of a pool from the mean of its candidates' features.

    The mean does not depend on the order of the candidates. The weights are a function of `seed`.

    Args:
        hidden: size D of the features.
        width: size of the hidden layer.
        detach: no gradient reaches the features. A policy with a critic then trains like one without.
    """

    def __init__(self, hidden: int, width: int = 64, seed: int = 0, detach: bool = True):
        super().__init__()
        self.detach = detach
        with torch.random.fork_rng():
            torch.manual_seed(randomness.key(seed, "value head weights") % 2**63)
            self.norm = nn.LayerNorm(hidden)
            self.inner = nn.Linear(hidden, width)
            self.outer = nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """(N,) expected rewards from (N, K, D) features. Features of absent candidates may have any value."""
        features = (features.detach() if self.detach else features).to(self.inner.weight.dtype)
        masked = features.masked_fill(~present.unsqueeze(-1), 0)
        mean = masked.sum(1) / present.sum(1, keepdim=True)  # (N, D)
        return self.outer(nn.functional.gelu(self.inner(self.norm(mean)))).squeeze(-1)


class ActorCritic(nn.Module):
    """A policy, which is any ranker, and its value head: one model for the optimiser and the checkpoint."""

    # All but the value head: it starts untrained and may have a learning rate of its own
    backbone_names = ("policy.",)

    def __init__(self, policy: nn.Module, value: ValueHead):
        super().__init__()
        self.policy, self.value = policy, value
