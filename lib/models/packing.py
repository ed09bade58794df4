"""Pools of one prompt and K candidates as token ids, and their packing into rows `prompt | c1 | c2 | ... | cK`.

Padding may be on either side of the input. Masks mark it, never an id.

Shapes: N pools, K candidates, P prompt tokens, S candidate tokens, B rows, T tokens of a row.
"""

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
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
    """Some pools as rows without padding inside; the rows are padded on the right.

    A row holds one or more segments `prompt | c | c | ...`. A large pool has several, each with a copy of its prompt.

    Attributes:
        ids: (B, T).
        owner: (B, T) PADDING, PROMPT, or the number of the candidate in its row, from 1.
        segment: (B, T) number of the segment in its row, from 0; PADDING for padding.
        positions: (B, T); those of a candidate continue from its prompt's length; 0 for padding.
        num_candidates: C, the largest number of candidates in a row.
        longest: tokens of the longest pair of a prompt and one candidate.
        pool, candidate: (M,) the pool and the index in it of each candidate that is present.
        row, number: (M,) its row, and its number in the row, from 0.
    """

    ids: Tensor
    owner: Tensor
    segment: Tensor
    positions: Tensor
    num_candidates: int
    longest: int
    pool: Tensor
    candidate: Tensor
    row: Tensor
    number: Tensor

    def to(self, device: torch.device) -> "Packed":
        return replace(
            self,
            **{
                f.name: to_device(v, device)
                for f in fields(self)
                if isinstance(v := getattr(self, f.name), Tensor)
            },
        )

    def visible(self, is_causal: bool) -> Tensor:
        """(B, 1, T, T) bool: which token (last) a token (third) may attend to.

        Every token attends to the prompt of its segment, a candidate's token also to its candidate, the prompt to itself only. In
        a causal model, a token attends only to positions that are not later. Padding attends to padding, so that no row is empty.
        """
        key, query = self.owner.unsqueeze(1), self.owner.unsqueeze(2)
        same_segment = self.segment.unsqueeze(1) == self.segment.unsqueeze(2)
        visible = ((key == PROMPT) | (key == query)) & same_segment  # (B, T, T)
        if is_causal:
            visible = visible & (self.positions.unsqueeze(1) <= self.positions.unsqueeze(2))
        return visible.unsqueeze(1)

    def members(self) -> Tensor:
        """(B, C, T) bool: the tokens of each candidate."""
        number = torch.arange(1, self.num_candidates + 1, device=self.owner.device)
        return self.owner.unsqueeze(1) == number[:, None]


def pack(pools: Pools) -> Packed:
    """Pools as rows `prompt | c1 | ... | cK` of valid tokens only, one row for each pool."""
    tokens = _Tokens.of(pools)
    first = tokens.first
    pieces = _Pieces(np.arange(tokens.num_pools), first[:-1], first[1:], np.arange(tokens.num_pools))
    return tokens.packed(pieces)


def pack_by_tokens(pools: Pools, width: int, one_pass: bool = False) -> list[Packed]:
    """Pools of any sizes as rows of about equal length, for few forward passes.

    A large pool may continue in another row, with another copy of its prompt; the scores are the same. Prompts of similar length share a pass, so that short ones are not read in long rows.

    Args:
        width: D of the backbone, which decides the length of the rows (`best_length`).
        one_pass: put all rows into one pass, for models that several processes read together.
    """
    tokens = _Tokens.of(pools)
    lengths = best_length(tokens.prompt_length, width)
    kinds = np.zeros(len(lengths), int) if one_pass else np.ceil(np.log2(lengths)).astype(int)
    passes = []
    for kind in np.unique(kinds):
        chosen = np.flatnonzero(kinds == kind)
        fill = (lambda *given: [_cheapest(*given)]) if one_pass else _groups
        passes += [tokens.packed(p) for p in fill(tokens, chosen, float(lengths[chosen].max()), width)]
    return passes


SHORTEST_ROW = 256


def best_length(prompt: np.ndarray, width: int) -> np.ndarray:
    """(N,) length of the rows that a large pool is cheapest to read in, for (N,) prompt lengths P.

    A row of T tokens costs about 12 D^2 T + 2 D T^2 multiplications per layer. C tokens of candidates in rows of T have
    C / (T - P) copies of the prompt. The cost is lowest at T = P + sqrt(P (6 D + P)).
    """
    prompt = prompt.astype(np.float64)
    return np.maximum(np.ceil(prompt + np.sqrt(prompt * (6 * width + prompt))), SHORTEST_ROW)


@dataclass(frozen=True)
class _Pieces:
    """S segments: candidates `first` to `end` (of all present ones) of pool `pool`, in row `row`. Sorted by row."""

    pool: np.ndarray
    first: np.ndarray
    end: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class _Tokens:
    """The valid tokens of N pools with M present candidates, one after another.

    Attributes:
        prompt_ids, candidate_ids: all tokens of prompts, and of candidates.
        prompt_start, prompt_length: (N,). start, length: (M,). pool, index: (M,) of each candidate.
    """

    num_pools: int
    prompt_ids: np.ndarray
    prompt_start: np.ndarray
    prompt_length: np.ndarray
    candidate_ids: np.ndarray
    start: np.ndarray
    length: np.ndarray
    pool: np.ndarray
    index: np.ndarray

    @classmethod
    def of(cls, pools: Pools) -> "_Tokens":
        prompt_ids, prompt, ids, mask = (
            np.asarray(a.cpu() if isinstance(a, Tensor) else a)
            for a in (pools.prompt_ids, pools.prompt_mask, pools.candidate_ids, pools.candidate_mask)
        )
        prompt, mask = prompt.astype(bool), mask.astype(bool)
        prompt_length, all_lengths = prompt.sum(1), mask.sum(2)
        pool, index = np.nonzero(all_lengths)
        length = all_lengths[pool, index]
        return cls(
            len(prompt), prompt_ids[prompt], np.cumsum(prompt_length) - prompt_length, prompt_length, ids[mask],
            np.cumsum(length) - length, length, pool, index,
        )  # fmt: skip

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """(M + 1,) tokens of all candidates before each one, and of all."""
        return np.append(0, np.cumsum(self.length))

    @functools.cached_property
    def first(self) -> np.ndarray:
        """(N + 1,) the first candidate of each pool, and M."""
        return np.searchsorted(self.pool, np.arange(self.num_pools + 1))

    @functools.cached_property
    def totals(self) -> np.ndarray:
        """(N,) tokens of each pool."""
        return self.prompt_length + np.bincount(self.pool, self.length, self.num_pools).astype(np.int64)

    def packed(self, pieces: _Pieces) -> Packed:
        """The rows of some segments."""
        # 1. Where segments and their candidates begin in their rows
        sizes = pieces.end - pieces.first
        owned = _ranges(pieces.first, sizes)  # candidates, segment by segment
        of = np.repeat(np.arange(len(sizes)), sizes)  # their segments
        length, prompt = self.length[owned], self.prompt_length[pieces.pool]
        before = np.cumsum(length) - length
        tokens = prompt + np.bincount(of, length, len(sizes)).astype(np.int64)
        begin = _within(tokens, pieces.row)
        opening = np.append(before, 0)[np.minimum(np.cumsum(sizes) - sizes, len(before))]
        inside = before - np.repeat(opening, sizes)
        column = begin[of] + prompt[of] + inside
        row = pieces.row[of]
        number = _within(np.ones_like(row), row)
        # 2. The tokens
        num_rows = int(pieces.row.max()) + 1 if len(pieces.row) else 0
        widest = int((begin + tokens).max()) if len(tokens) else 0
        shape = (num_rows, widest)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        owner, segment = np.full(shape, PADDING, np.int64), np.full(shape, PADDING, np.int64)
        segment_number = _within(np.ones_like(pieces.row), pieces.row)
        where = np.repeat(pieces.row, prompt), _ranges(begin, prompt)
        ids[where] = self.prompt_ids[_ranges(self.prompt_start[pieces.pool], prompt)]
        owner[where], segment[where] = PROMPT, np.repeat(segment_number, prompt)
        positions[where] = _ranges(np.zeros_like(prompt), prompt)
        where = np.repeat(row, length), _ranges(column, length)
        ids[where] = self.candidate_ids[_ranges(self.start[owned], length)]
        owner[where], segment[where] = np.repeat(number + 1, length), np.repeat(segment_number[of], length)
        positions[where] = _ranges(prompt[of], length)
        return Packed(
            *(torch.from_numpy(a) for a in (ids, owner, segment, positions)),
            num_candidates=int(number.max(initial=-1)) + 1,
            longest=int((self.prompt_length[self.pool[owned]] + length).max(initial=0)),
            **{
                name: torch.from_numpy(np.ascontiguousarray(a))
                for name, a in (("pool", self.pool[owned]), ("candidate", self.index[owned]), ("row", row), ("number", number))
            },
        )  # fmt: skip


def _groups(tokens: _Tokens, pools: np.ndarray, length: float, width: int) -> list[_Pieces]:
    """Segments of some pools for one forward pass or, where that is clearly cheaper, for two: large pools and small ones."""
    together = _cheapest(tokens, pools, length, width)
    cost, total = _cost(tokens, together, width), tokens.totals[pools]
    least = float((total * (1 + np.minimum(total, length) / (6 * width))).sum())
    if cost <= (1 + WORTH_DIVIDING) * least or len(pools) > MANY_POOLS:
        return [together]
    order = pools[np.argsort(-total, kind="stable")]
    found = [(cost, [together])]
    for size in sorted({len(order) * share // 4 for share in (1, 2, 3)} - {0}):
        parts = [_cheapest(tokens, part, length, width) for part in (order[:size], order[size:])]
        found.append((sum(_cost(tokens, part, width) for part in parts), parts))
    return min(found, key=lambda item: item[0])[1]


WORTH_DIVIDING = 0.1  # share of the least cost above which two forward passes are tried


def _cheapest(tokens: _Tokens, pools: np.ndarray, length: float, width: int) -> _Pieces:
    """Segments of some pools in rows of the length, near `length`, at which the rows cost least.

    Rows are filled in two ways. Either every row is filled to its end, so that many pools are divided, or only pools that are longer
    than a row are.
    """
    needed = float(
        (tokens.prompt_length[tokens.pool] + tokens.length)[np.isin(tokens.pool, pools)].max(initial=1)
    )
    whole = int(tokens.totals[pools].sum())  # all of them in one row: longer rows would be the same
    lengths = sorted({min(int(max(length * share, needed)), whole) for share in SHARES})
    if len(pools) > MANY_POOLS:
        return _filled(tokens, pools, int(max(length, needed)), True)
    found = [_filled(tokens, pools, size, divides) for size in lengths for divides in (True, False)]
    return min(found, key=lambda pieces: _cost(tokens, pieces, width))


MANY_POOLS = 64  # fill rows well in any order, so that one length is enough
SHARES = (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # of `best_length`: lengths of rows that are tried


def _cost(tokens: _Tokens, pieces: _Pieces, width: int) -> float:
    """What the rows cost, as in `best_length`, in multiplications per 12 D^2."""
    ends = tokens.ends
    sizes = tokens.prompt_length[pieces.pool] + ends[pieces.end] - ends[pieces.first]
    rows = np.bincount(pieces.row, sizes)
    return len(rows) * float(rows.max(initial=0)) * (1 + float(rows.max(initial=0)) / (6 * width))


def _filled(tokens: _Tokens, pools: np.ndarray, length: int, divides: bool) -> _Pieces:
    """Segments of some pools in rows of at most `length` tokens.

    With `divides`, a pool continues in the next row where it does not fit into the rest of this one. Otherwise only pools
    that are longer than a row are divided, and each segment goes to the first row that has room (first fit decreasing).
    """
    ends, first, total = tokens.ends, tokens.first, tokens.totals
    found: list[tuple[int, int, int, int]] = []
    room = [length]
    for pool in pools[np.argsort(-total[pools], kind="stable")].tolist():
        at, stop, prompt = int(first[pool]), int(first[pool + 1]), int(tokens.prompt_length[pool])
        while at < stop:
            whole = prompt + int(ends[stop] - ends[at])
            row = len(room) - 1
            if not divides:
                row = next((r for r, left in enumerate(room) if left >= min(whole, length)), len(room))
            else:
                longest = prompt + int(tokens.length[at])
                row += longest > room[row] and room[row] < length  # not even one more candidate fits
            if row == len(room):
                room.append(length)
            end = int(np.searchsorted(ends, ends[at] + room[row] - prompt, side="right")) - 1
            end = min(max(end, at + 1), stop)
            found.append((pool, at, end, row))
            room[row] -= prompt + int(ends[end] - ends[at])
            at = end
    pieces = np.array(found, np.int64).reshape(-1, 4)
    return _Pieces(*pieces[np.argsort(pieces[:, 3], kind="stable")].T)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, `lengths` of them, one range after another."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()))


def _within(sizes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The sum of the sizes before each item in its group. Items of a group are adjacent."""
    before = np.cumsum(sizes) - sizes
    opens = np.append(True, group[1:] != group[:-1])[: len(group)]
    return before - np.repeat(before[opens], np.diff(np.append(np.flatnonzero(opens), len(group))))


PASS_TOKENS = {"cpu": 1024}  # at least, of a forward pass over rows of similar length; without a number: any
MAX_PASS_TOKENS = 2**15  # of a forward pass in which each candidate has its own row
SIMILAR = 0.8  # the shortest row of a pass as a share of the longest


def by_length(pools: Pools, device: str) -> list[Pools]:
    """The same pools several times, each with other candidates present: those whose rows have a similar length."""
    least = PASS_TOKENS.get(device)
    mask = torch.as_tensor(pools.candidate_mask).bool()
    pool, index = mask.any(-1).nonzero(as_tuple=True)
    length = (torch.as_tensor(pools.prompt_mask).bool().sum(1)[pool] + mask[pool, index].sum(-1)).numpy()
    order = np.argsort(-length, kind="stable")
    cuts, start = [], 0
    for at, tokens in enumerate(length[order]):
        longest = int(length[order[start]])
        full = least is not None and (at - start) * longest >= least
        if (full and tokens < SIMILAR * longest) or (
            at > start and (at + 1 - start) * longest > MAX_PASS_TOKENS
        ):
            cuts.append(at)
            start = at
    if not cuts:
        return [pools]
    parts = []
    for chosen in np.split(order, cuts):
        kept = torch.zeros(mask.shape[:2], dtype=torch.bool)
        kept[pool[chosen], index[chosen]] = True
        parts.append(replace(pools, candidate_mask=mask & kept.unsqueeze(-1)))
    return parts


def last_token_index(mask: Tensor) -> Tensor:
    """(...) index of the rightmost True of a mask (..., T); 0 if there is none."""
    index = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, index, 0).amax(-1)


def first_token_index(mask: Tensor) -> Tensor:
    """(...) index of the leftmost True of a mask (..., T); 0 if there is none."""
    return mask.to(torch.uint8).argmax(-1)
