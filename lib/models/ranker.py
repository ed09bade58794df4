"""The candidate ranker: a score for each of the K candidates of one prompt."""

from torch import Tensor, nn


class CandidateRanker(nn.Module):
    """An encoder with one unbounded score per sequence, over pools of candidates.

    `encoder` is any model whose forward gives `logits` (B, 1) for (B, T) ids. The text task has no prompt, so
    every candidate is a sequence of its own.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, K) scores of (N, K, T) ids with (N, K, T) bool validity."""
        pools, candidates, length = input_ids.shape
        flat = attention_mask.view(-1, length)
        mask = None if bool(flat.all()) else flat
        logits = self.encoder(input_ids=input_ids.view(-1, length), attention_mask=mask).logits  # (N K, 1)
        return logits.view(pools, candidates)
