"""Drawing tokens from logits with keyed noise: one uniform number per token, by inversion of the distribution.

Inversion needs a single random number where Gumbel noise needs one per word of the vocabulary, and it has none
of the bias that fp32 Gumbel noise has (Zheng et al., Masked Diffusion Models are Secretly Time-Agnostic, 2024).
"""

import torch
from torch import Tensor


def draw(
    logits: Tensor,
    noise: Tensor,
    forbidden: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A token per row and how sure the model was of it.

    Args:
        logits: (N, V).
        noise: (N,) uniform in [0, 1).
        forbidden: (F,) ids that are never drawn: the special ones.
        temperature: one for all, or (N, 1).
        top_k: keep the k likeliest (0: all); top_p: keep the likeliest that hold this much probability.

    Returns:
        (N,) ids, and (N,) their probabilities at temperature 1 over all allowed tokens.
    """
    logits = logits.float().index_fill(1, forbidden, -torch.inf)
    plain = torch.softmax(logits, -1)
    unheated = isinstance(temperature, float) and temperature == 1.0
    shares = plain if unheated else torch.softmax(logits / temperature, -1)
    if 0 < top_k < shares.shape[1]:
        limit = shares.topk(top_k, dim=-1).values[:, -1:]
        shares = torch.where(shares >= limit, shares, 0.0)
    if top_p < 1.0:
        ordered, order = torch.sort(shares, dim=-1, descending=True, stable=True)
        before = running_sum(ordered) - ordered  # a token stays while those before it hold less than top_p
        kept = torch.where(before < top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
        shares = torch.zeros_like(shares).scatter(1, order, kept)
    rising = running_sum(shares)
    ids = (rising <= noise.double()[:, None] * rising[:, -1:]).sum(-1).clamp(max=shares.shape[1] - 1)
    return ids, plain.gather(1, ids[:, None]).squeeze(1)


def running_sum(shares: Tensor) -> Tensor:
    """(..., V) float64 sums of probabilities up to each. In whole units of 2^-52: integers add up to the same in any
    order, so that a GPU gives the same bits each time, which its cumsum of floats does not."""
    return (shares.double() * 2.0**52).long().cumsum(-1).double() * 2.0**-52


def probability_of(tokens: Tensor, logits: Tensor, forbidden: Tensor) -> Tensor:
    """(...) probability of each token (...) under its logits (..., V), the forbidden ids left out."""
    shares = torch.softmax(logits.float().index_fill(-1, forbidden, -torch.inf), -1)
    return shares.gather(-1, tokens[..., None]).squeeze(-1)
