"""Pools of one prompt and K candidates as token ids, and their packing into rows `prompt | c1 | c2 | ... | cK`.

Padding may be on either side of the input. Masks mark it, never an id.

Shapes: N pools, K candidates, P prompt tokens, S candidate tokens, B rows, T tokens of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.devices import to_device

PADDING, PROMPT = -1, 0  # owners of a token; the owner of a candidate's token is its number from 1


@dataclass(frozen=True)
class Pools:
    """Prompts with their candidates, as arrays or tensors. A candidate without a valid token is absent.

    Attributes:
        prompt_ids: (N, P) integers.
        prompt_mask: (N, P) bool, True for real tokens.
        candidate_ids: (N, K, S) integers.
        candidate_mask: (N, K, S) bool.
    """

    prompt_ids: Any
    prompt_mask: Any
    candidate_ids: Any
    candidate_mask: Any

    def tensors(self) -> "Pools":
        """The same pools as tensors, on the same device."""
        return Pools(
            torch.as_tensor(self.prompt_ids).long(),
            torch.as_tensor(self.prompt_mask).bool(),
            torch.as_tensor(self.candidate_ids).long(),
            torch.as_tensor(self.candidate_mask).bool(),
        )

    def rows(self, which) -> "Pools":
        """Some of the pools, by a slice or by indices."""
        return Pools(
            self.prompt_ids[which],
            self.prompt_mask[which],
            self.candidate_ids[which],
            self.candidate_mask[which],
        )

    def present(self) -> Tensor:
        """(N, K) bool: whether the candidate is present."""
        return torch.as_tensor(self.candidate_mask).bool().any(-1)

    def separate(self) -> "Pools":
        """One pool per present candidate, in order: (M, P) prompts, repeated, and (M, 1, S) candidates."""
        pools = self.tensors()
        row, index = pools.present().nonzero(as_tuple=True)  # (M,), (M,)
        return Pools(
            pools.prompt_ids[row],
            pools.prompt_mask[row],
            pools.candidate_ids[row, index].unsqueeze(1),
            pools.candidate_mask[row, index].unsqueeze(1),
        )


@dataclass(frozen=True)
class Packed:
    """Pools as rows without padding inside; the rows are padded on the right.

    Attributes:
        ids: (B, T).
        owner: (B, T) PADDING, PROMPT, or the number of the candidate from 1.
        positions: (B, T); those of a candidate continue from its prompt's length; 0 for padding.
        num_candidates: K.
        longest: tokens of the longest pair of a prompt and one candidate.
    """

    ids: Tensor
    owner: Tensor
    positions: Tensor
    num_candidates: int
    longest: int

    def to(self, device: torch.device) -> "Packed":
        ids, owner, positions = (to_device(x, device) for x in (self.ids, self.owner, self.positions))
        return Packed(ids, owner, positions, self.num_candidates, self.longest)

    def visible(self, is_causal: bool) -> Tensor:
        """(B, 1, T, T) bool: which token (last) a token (third) may attend to.

        Every token attends to the prompt, a candidate's token also to its candidate, the prompt to itself only. In a causal
        model, a token attends only to positions that are not later. Padding attends to padding, so that no row is empty.
        """
        key, query = self.owner.unsqueeze(1), self.owner.unsqueeze(2)
        visible = (key == PROMPT) | (key == query)  # (B, T, T)
        if is_causal:
            visible = visible & (self.positions.unsqueeze(1) <= self.positions.unsqueeze(2))
        return visible.unsqueeze(1)

    def members(self) -> Tensor:
        """(B, K, T) bool: the tokens of each candidate."""
        number = torch.arange(1, self.num_candidates + 1, device=self.owner.device)
        return self.owner.unsqueeze(1) == number[:, None]


def pack(pools: Pools) -> Packed:
    """Pools as rows `prompt | c1 | ... | cK` of valid tokens only."""
    pools = pools.tensors()
    prompt, candidates = pools.prompt_mask, pools.candidate_mask
    rows, num_candidates, width = candidates.shape
    prompt_length = prompt.sum(1)  # (N,)
    lengths = candidates.sum(2)  # (N, K)
    number = torch.arange(1, num_candidates + 1, device=prompt.device)
    after_prompt = prompt_length[:, None, None] + candidates.cumsum(2) - 1  # (N, K, S)
    valid = torch.cat((prompt, candidates.flatten(1)), 1)  # (N, P + K S)
    ids = torch.cat((pools.prompt_ids, pools.candidate_ids.flatten(1)), 1)
    owner = torch.cat(
        (torch.full_like(prompt, PROMPT, dtype=torch.long),
         number.repeat_interleave(width).expand(rows, -1)), 1
    ).masked_fill(~valid, PADDING)  # fmt: skip
    positions = torch.cat((prompt.cumsum(1) - 1, after_prompt.flatten(1)), 1).masked_fill(~valid, 0)
    order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # valid tokens first, in order
    order = order[:, : int(valid.sum(1).max())]  # (N, T)
    return Packed(
        ids.gather(1, order),
        owner.gather(1, order),
        positions.gather(1, order),
        num_candidates,
        longest=int((prompt_length + lengths.amax(1)).max()),
    )


def last_token_index(mask: Tensor) -> Tensor:
    """(...) index of the rightmost True of a mask (..., T); 0 if there is none."""
    index = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, index, 0).amax(-1)


def first_token_index(mask: Tensor) -> Tensor:
    """(...) index of the leftmost True of a mask (..., T); 0 if there is none."""
    return mask.to(torch.uint8).argmax(-1)
