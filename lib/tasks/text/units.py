"""Texts as another model's tokenizer reads them, cut into units: what is masked and replaced as a whole.

A unit is one token, or several that share characters: the bytes of one character, tokens of a character that the
normaliser spells out. White space belongs to no unit and so is never masked; characters that the normaliser takes out
(accents, joiners) belong to the unit that they stand at. Untouched characters stay as they are to the byte.

Legend: B texts, M tokens of all texts one after the other, U units of all texts likewise. Places are those in the texts
one after the other.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lib.errors import BadData
from lib.surfaces import Surfaces

_WHITE = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
_PROBES = 20  # words of the vocabulary that are read to see what a tokenizer puts around a text


@dataclass(frozen=True)
class Reading:
    """Tokens and units of some texts.

    Attributes:
        ids: (M,) tokens without those that a tokenizer puts around a text.
        owner: (M,) the text of each.
        unit_of: (M,) the unit of each, -1 for those that show nothing.
        start, end: (U,) characters of the units.
        home: (U,) the text of each.
        first, last: (U,) tokens.
        known: (U,) bool, the tokenizer knows all of it.
        apart: (U,) bool, its tokens say that a space stands in front.
        held: (U,) bool, and this is said by a token in front, which stays.
        lone: (U,) bool, one token only.
        line_ends: (U,) bool, a line ends between it and the next unit.
        bounds: (B + 1,) where the texts begin and end.
    """

    ids: np.ndarray
    owner: np.ndarray
    unit_of: np.ndarray
    start: np.ndarray
    end: np.ndarray
    home: np.ndarray
    first: np.ndarray
    last: np.ndarray
    known: np.ndarray
    apart: np.ndarray
    held: np.ndarray
    lone: np.ndarray
    line_ends: np.ndarray
    bounds: np.ndarray

    @cached_property
    def number(self) -> np.ndarray:
        """(U,) the number of each unit in its text."""
        return np.arange(len(self.home)) - np.searchsorted(self.home, self.home)

    def by_text(self, values: np.ndarray) -> np.ndarray:
        """(B, most units of a text) of (U,) values, 0 or False behind the last."""
        table = np.zeros((len(self.bounds) - 1, int(self.number.max(initial=-1)) + 1), values.dtype)
        table[self.home, self.number] = values
        return table


class Reader:
    """Reads texts with a fast tokenizer. What stands in a text is text, also where it spells a special token.

    Attributes:
        prefix, suffix: special ids that the tokenizer puts around a text.
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
        self.prefix, self.suffix = _around(tokenizer, self.surfaces)
        self.fuses = lru_cache(4096)(self._fuses)

    @classmethod
    def of(cls, tokenizer: Any) -> "Reader":
        """The reader of a tokenizer, kept on it."""
        if not hasattr(tokenizer, "_remask_reader"):
            tokenizer._remask_reader = cls(tokenizer)
        return tokenizer._remask_reader

    def _fuses(self, left: str, right: str) -> bool:
        """Whether two characters side by side are of one word."""
        both = left + right
        if self._core.normalizer is not None:
            both = self._core.normalizer.normalize_str(both)
        if self._core.pre_tokenizer is None:
            return True
        return len(self._core.pre_tokenizer.pre_tokenize_str(both)) == 1

    def read(self, texts: list[str]) -> Reading:
        """Tokens and units of the texts."""
        # 1. Tokens and their stretches, without the white space at both ends
        coded = self._core.encode_batch(list(texts), add_special_tokens=False)
        owner = np.repeat(np.arange(len(texts)), [len(e.ids) for e in coded])
        ids = np.concatenate([np.asarray(e.ids, np.int64) for e in coded])
        spans = np.concatenate([np.asarray(e.offsets, np.int64).reshape(-1, 2) for e in coded])
        bounds = np.concatenate([[0], np.cumsum([len(t) for t in texts])])
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        edge = _Edges(np.isin(points, _WHITE))
        start, end = (spans + bounds[owner, None]).T
        start = np.minimum(edge.next_ink[start], end)
        end = np.maximum(edge.ink_before[end], start)
        shown = np.flatnonzero((start < end) & ~self.surfaces.blank[ids])
        start, end = start[shown], end[shown]

        # 2. Units: tokens that share characters with one before them join it
        reached = np.maximum.accumulate(end)
        opens = np.concatenate([[True], start[1:] >= reached[:-1]])[: len(shown)]
        unit = np.cumsum(opens) - 1
        begin = np.flatnonzero(opens)
        first = shown[begin]
        last = shown[np.append(begin[1:], len(shown)) - 1] if len(begin) else first
        home = owner[first]
        if len(begin):
            start, end = np.minimum.reduceat(start, begin), np.maximum.reduceat(end, begin)
            known = np.logical_and.reduceat(~self._unknown[ids[shown]], begin)
        else:
            known = np.zeros(0, bool)
        unit_of = np.full(len(ids), -1)
        unit_of[shown] = unit

        # 3. Characters that the normaliser took out, up to the next white space
        follows = np.append(home[1:] == home[:-1], False)[: len(home)]
        limit = np.where(follows, np.append(start[1:], 0)[: len(home)], bounds[home + 1])
        end = np.minimum(edge.next_white[end], limit)
        behind = np.where(
            np.append(False, follows[:-1])[: len(home)], np.append(0, end[:-1])[: len(home)], bounds[home]
        )
        start = np.maximum(edge.white_before[start], behind)

        # 4. Spaces
        inner = np.append(False, follows[:-1])[: len(home)]
        previous = np.append(0, last[:-1])[: len(home)]
        held = inner & (first - previous > 1)
        apart = held | (inner & self._apart(ids, coded, first, previous))
        feeds = np.append(0, np.cumsum(points == 10))
        line_ends = (
            feeds[np.where(follows, np.append(start[1:], 0)[: len(home)], bounds[home + 1])] > feeds[end]
        )
        lone = np.bincount(unit, minlength=len(home)) == 1
        return Reading(
            ids, owner, unit_of, start, end, home, first, last, known, apart, held, lone, line_ends, bounds
        )  # fmt: skip

    def _apart(self, ids: np.ndarray, coded: list, first: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """(U,) bool, whether the tokens say that a space stands between a unit and the one before it."""
        if self.surfaces.says_spaces:
            return self.apart(ids[previous], ids[first])
        words = np.concatenate(
            [np.asarray([-1 if w is None else w for w in e.word_ids], np.int64) for e in coded]
        )
        return words[first] != words[previous]

    def apart(self, left: Any, right: Any) -> Any:
        """Whether ids side by side say that a space stands between them."""
        s = self.surfaces
        return (s.begins[right] | s.ends[left]) & ~s.opens[left]


class _Edges:
    """The nearest characters that are or are not white space, for every place from 0 to C in C characters.

    next_ink: the first other character from here on; ink_before: the place behind the last one in front of here;
    next_white, white_before: the same of white space.
    """

    def __init__(self, white: np.ndarray):
        self.next_ink, self.ink_before = self._both(~white)
        self.next_white, self.white_before = self._both(white)

    @staticmethod
    def _both(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place, count = np.arange(len(wanted) + 1), len(wanted)
        ahead = np.where(np.append(wanted, True), place, count)
        behind = np.where(np.append(True, wanted), place, 0)
        return np.minimum.accumulate(ahead[::-1])[::-1], np.maximum.accumulate(behind)


def _around(tokenizer: Any, surfaces: Surfaces) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts in front of a text and behind it."""
    for i in np.flatnonzero(surfaces.writable & ~surfaces.partial)[:_PROBES]:
        coded = tokenizer(surfaces.write([int(i)]), return_special_tokens_mask=True)
        text = np.flatnonzero(np.asarray(coded["special_tokens_mask"]) == 0)
        if len(text):
            ids = [int(i) for i in coded["input_ids"]]
            return ids[: text[0]], ids[text[-1] + 1 :]
    raise BadData(
        f"the masked LM's tokenizer has {len(tokenizer)} tokens, and finds none in the words of its own vocabulary; "
        "give generator.checkpoint a folder with the tokenizer that the model was trained with"
    )
