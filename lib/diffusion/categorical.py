"""Drawing tokens from logits with keyed noise: one uniform number per token, by inversion of the distribution.

Gumbel noise needs a random number per vocabulary entry, and in fp32 it is biased (Zheng et al., Masked Diffusion Models are
Secretly Time-Agnostic, 2024). Inversion needs one number and has no such bias.
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
    """Sample a token per row, with the probability that the model gives it.

    Args:
        logits: (N, V).
        noise: (N,) uniform in [0, 1).
        forbidden: (F,) ids that are never sampled: the special ones.
        temperature: one for all, or (N, 1).
        top_k: keep the k most likely tokens; 0: all.
        top_p: keep the most likely tokens that together have this probability.

    Returns:
        (N,) ids, and (N,) their probabilities at temperature 1 over all allowed tokens.
    """
    logits = logits.float().index_fill(1, forbidden, -torch.inf)
    plain = torch.softmax(logits, -1)
    is_plain = isinstance(temperature, float) and temperature == 1.0
    shares = plain if is_plain else torch.softmax(logits / temperature, -1)
    if 0 < top_k < shares.shape[1]:
        limit = shares.topk(top_k, dim=-1).values[:, -1:]
        shares = torch.where(shares >= limit, shares, 0.0)
    if top_p < 1.0:
        ordered, order = torch.sort(shares, dim=-1, descending=True, stable=True)
        before = running_sum(ordered) - ordered  # a token is kept while those before it have less than top_p
        kept = torch.where(before < top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
        shares = torch.zeros_like(shares).scatter(1, order, kept)
    cdf = running_sum(shares)
    ids = (cdf <= noise.double()[:, None] * cdf[:, -1:]).sum(-1).clamp(max=shares.shape[1] - 1)
    return ids, plain.gather(1, ids[:, None]).squeeze(1)


def running_sum(shares: Tensor) -> Tensor:
    """(..., V) float64 cumulative sums of probabilities.

    The sums are of integers, in units of 2^-52. They do not depend on the order, so a GPU returns the same bits each time. Its
    cumsum of floats does not.
    """
    return (shares.double() * 2.0**52).long().cumsum(-1).double() * 2.0**-52


def probability_of(tokens: Tensor, logits: Tensor, forbidden: Tensor) -> Tensor:
    """(...) probability of each token (...) under its logits (..., V), without the forbidden ids."""
    shares = torch.softmax(logits.float().index_fill(-1, forbidden, -torch.inf), -1)
    return shares.gather(-1, tokens[..., None]).squeeze(-1)
