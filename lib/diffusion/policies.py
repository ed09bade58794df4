"""Re-masking policies: which of the tokens written so far are taken back after a round.

A policy gives every token a suspicion in [0, 1]; the sampler takes back the most suspicious ones, as many as the
schedule says. `extra_pass` says whether it needs a forward pass of its own after each round, which is counted.

    none              nothing is taken back: ancestral sampling in a random order (Sahoo et al., MDLM, 2024)
    random            any token
    confidence        tokens the generator was unsure of when it wrote them (ReMDM-conf, Wang et al., 2025)
    confidence_fresh  tokens the generator finds unlikely now that it sees the whole text
    critic            tokens the critic takes for errors, given the whole text (Token-Critic, Lezama et al., 2022)
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class View:
    """What a policy may look at after a round, all tokens written. Legend: B rows, T positions."""

    noise: Tensor  # (B, T) uniform
    written_confidence: Tensor  # (B, T) probability of each token when it was written
    fresh_confidence: Callable[[], Tensor]  # (B, T) probability of each token now; one forward pass
    critic_error: Callable[
        [], Tensor
    ]  # (B, T) calibrated chance that each token is an error; one forward pass


@dataclass(frozen=True)
class Policy:
    name: str
    extra_pass: bool
    suspicion: Callable[[View], Tensor] | None  # None: nothing is ever taken back


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("none", False, None),
        Policy("random", False, lambda view: view.noise),
        Policy("confidence", False, lambda view: 1 - view.written_confidence),
        Policy("confidence_fresh", True, lambda view: 1 - view.fresh_confidence()),
        Policy("critic", True, lambda view: view.critic_error()),
    )
}


def rounds_for(policy: Policy, nfe: int) -> int:
    """Rounds that fit into `nfe` forward passes: a round is one, and one more to judge it unless it is the last."""
    return max(1, (nfe + 1) // 2 if policy.extra_pass else nfe)
