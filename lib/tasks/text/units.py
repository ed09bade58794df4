"""Divide texts into units, as the tokenizer of another model reads them. A unit is masked and replaced as a whole.

A unit is one token, or several tokens that share characters: the bytes of one character, or the tokens of a character that
the normaliser expands. White space belongs to no unit, and so it is never masked. Characters that the normaliser removes
(accents, joiners) belong to the unit beside them. Characters outside the masked units stay unchanged, to the byte.

Legend: B texts, M tokens of all texts, U units of all texts. Positions of characters are those in the concatenated texts.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lib.errors import BadData
from lib.surfaces import Surfaces

_WHITE = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
_PROBES = 20  # words that are encoded to find the special tokens around a text


@dataclass(frozen=True)
class Reading:
    """Tokens and units of some texts.

    Attributes:
        ids: (M,) token ids, without the special tokens around a text.
        text_of_token: (M,) index of the text.
        unit_of_token: (M,) index of the unit; -1 for tokens without visible characters.
        start, end: (U,) characters of the unit.
        text_of_unit: (U,) index of the text.
        first, last: (U,) first and last token of the unit.
        known: (U,) bool, the tokenizer knows all tokens of the unit.
        space_before: (U,) bool, a space precedes the unit, according to its tokens.
        space_token_before: (U,) bool, that space is a token of its own, which stays.
        is_single_token: (U,) bool, the unit is one token.
        line_ends: (U,) bool, a line ends between the unit and the next one.
        bounds: (B + 1,) positions at which the texts begin and end.
    """

    ids: np.ndarray
    text_of_token: np.ndarray
    unit_of_token: np.ndarray
    start: np.ndarray
    end: np.ndarray
    text_of_unit: np.ndarray
    first: np.ndarray
    last: np.ndarray
    known: np.ndarray
    space_before: np.ndarray
    space_token_before: np.ndarray
    is_single_token: np.ndarray
    line_ends: np.ndarray
    bounds: np.ndarray

    @cached_property
    def index_in_text(self) -> np.ndarray:
        """(U,) the index of each unit in its text."""
        return np.arange(len(self.text_of_unit)) - np.searchsorted(self.text_of_unit, self.text_of_unit)

    def by_text(self, values: np.ndarray) -> np.ndarray:
        """(B, largest number of units in a text), from (U,) values; 0 or False after the last unit."""
        table = np.zeros((len(self.bounds) - 1, int(self.index_in_text.max(initial=-1)) + 1), values.dtype)
        table[self.text_of_unit, self.index_in_text] = values
        return table


class Reader:
    """Reads texts with a fast tokenizer. The name of a special token in a text is ordinary text.

    Attributes:
        prefix, suffix: special ids that the tokenizer adds before and after a text.
    """

    def __init__(self, tokenizer: Any):
        self.surfaces = Surfaces.of(tokenizer)
        core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
        self._core = core
        self._unknown = np.zeros(len(self.surfaces.cores), bool)
        self._unknown[[i for i in tokenizer.all_special_ids if i < len(self._unknown)]] = True
        self.prefix, self.suffix = _special_ids_around(tokenizer, self.surfaces)
        self.is_one_word = lru_cache(4096)(self._is_one_word)

    @classmethod
    def of(cls, tokenizer: Any) -> "Reader":
        """The reader of a tokenizer, cached on it."""
        if not hasattr(tokenizer, "_remask_reader"):
            tokenizer._remask_reader = cls(tokenizer)
        return tokenizer._remask_reader

    def _is_one_word(self, left: str, right: str) -> bool:
        """Whether two adjacent characters belong to one word."""
        both = left + right
        if self._core.normalizer is not None:
            both = self._core.normalizer.normalize_str(both)
        if self._core.pre_tokenizer is None:
            return True
        return len(self._core.pre_tokenizer.pre_tokenize_str(both)) == 1

    def read(self, texts: list[str]) -> Reading:
        """Tokens and units of the texts."""
        # 1. Tokens and their characters, without white space at both ends
        coded = self._core.encode_batch(list(texts), add_special_tokens=False)
        text_of_token = np.repeat(np.arange(len(texts)), [len(e.ids) for e in coded])
        ids = np.concatenate([np.asarray(e.ids, np.int64) for e in coded])
        spans = np.concatenate([np.asarray(e.offsets, np.int64).reshape(-1, 2) for e in coded])
        bounds = np.concatenate([[0], np.cumsum([len(t) for t in texts])])
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        edge = _Edges(np.isin(points, _WHITE))
        start, end = (spans + bounds[text_of_token, None]).T
        start = np.minimum(edge.next_ink[start], end)
        end = np.maximum(edge.ink_before[end], start)
        visible = np.flatnonzero((start < end) & ~self.surfaces.blank[ids])
        start, end = start[visible], end[visible]

        # 2. Units: a token that shares characters with an earlier one joins its unit
        reached = np.maximum.accumulate(end)
        opens = np.concatenate([[True], start[1:] >= reached[:-1]])[: len(visible)]
        unit = np.cumsum(opens) - 1
        begin = np.flatnonzero(opens)
        first = visible[begin]
        last = visible[np.append(begin[1:], len(visible)) - 1] if len(begin) else first
        text = text_of_token[first]
        if len(begin):
            start, end = np.minimum.reduceat(start, begin), np.maximum.reduceat(end, begin)
            known = np.logical_and.reduceat(~self._unknown[ids[visible]], begin)
        else:
            known = np.zeros(0, bool)
        unit_of_token = np.full(len(ids), -1)
        unit_of_token[visible] = unit

        # 3. Characters that the normaliser removed, up to the next white space
        follows = np.append(text[1:] == text[:-1], False)[: len(text)]
        limit = np.where(follows, np.append(start[1:], 0)[: len(text)], bounds[text + 1])
        end = np.minimum(edge.next_white[end], limit)
        previous_end = np.where(
            np.append(False, follows[:-1])[: len(text)], np.append(0, end[:-1])[: len(text)], bounds[text]
        )
        start = np.maximum(edge.white_before[start], previous_end)

        # 4. Spaces and line ends
        inner = np.append(False, follows[:-1])[: len(text)]
        previous = np.append(0, last[:-1])[: len(text)]
        space_token = inner & (first - previous > 1)
        space = space_token | (inner & self._space_between(ids, coded, first, previous))
        feeds = np.append(0, np.cumsum(points == 10))
        line_ends = (
            feeds[np.where(follows, np.append(start[1:], 0)[: len(text)], bounds[text + 1])] > feeds[end]
        )
        single = np.bincount(unit, minlength=len(text)) == 1
        return Reading(
            ids, text_of_token, unit_of_token, start, end, text, first, last, known, space, space_token, single, line_ends,
            bounds,
        )  # fmt: skip

    def _space_between(
        self, ids: np.ndarray, coded: list, first: np.ndarray, previous: np.ndarray
    ) -> np.ndarray:
        """(U,) bool, whether a space separates a unit from the previous one, according to the tokens."""
        if self.surfaces.says_spaces:
            return self.space_between(ids[previous], ids[first])
        words = np.concatenate(
            [np.asarray([-1 if w is None else w for w in e.word_ids], np.int64) for e in coded]
        )
        return words[first] != words[previous]

    def space_between(self, left: Any, right: Any) -> Any:
        """Whether a space separates two adjacent ids, according to the tokens."""
        s = self.surfaces
        return (s.begins[right] | s.ends[left]) & ~s.opens[left]


class _Edges:
    """The nearest visible character and the nearest white space, for every position from 0 to C in C characters.

    Attributes:
        next_ink: the first visible character at or after the position.
        ink_before: the end of the last visible character before the position.
        next_white, white_before: the same for white space.
    """

    def __init__(self, white: np.ndarray):
        self.next_ink, self.ink_before = self._both(~white)
        self.next_white, self.white_before = self._both(white)

    @staticmethod
    def _both(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position, count = np.arange(len(wanted) + 1), len(wanted)
        ahead = np.where(np.append(wanted, True), position, count)
        behind = np.where(np.append(True, wanted), position, 0)
        return np.minimum.accumulate(ahead[::-1])[::-1], np.maximum.accumulate(behind)


def _special_ids_around(tokenizer: Any, surfaces: Surfaces) -> tuple[list[int], list[int]]:
    """Special ids that the tokenizer adds before and after a text."""
    for i in np.flatnonzero(surfaces.writable & ~surfaces.partial)[:_PROBES]:
        coded = tokenizer(surfaces.write([int(i)]), return_special_tokens_mask=True)
        text = np.flatnonzero(np.asarray(coded["special_tokens_mask"]) == 0)
        if len(text):
            ids = [int(i) for i in coded["input_ids"]]
            return ids[: text[0]], ids[text[-1] + 1 :]
    raise BadData(
        f"the masked LM's tokenizer has {len(tokenizer)} tokens, but encodes the words of its own vocabulary as special "
        "tokens; give generator.checkpoint a folder with the tokenizer that the model was trained with"
    )
