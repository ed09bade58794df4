"""Groups of prompts that are the same or nearly so, which must not be divided between two splits.

The similarity of two prompts is the Jaccard index of their sets of words and of pairs of adjacent words. MinHash estimates
it (Broder, 1997), and bands of its numbers find prompts that may be similar (locality-sensitive hashing).
"""

import numpy as np
import pandas as pd

from lib import randomness
from lib.digest_table import DigestTable, digest
from lib.ranking.words import words_of
from lib.tasks.pools.disjoint_sets import DisjointSets

NUMBERS = 120  # minima per prompt
ROWS = range(
    6, 0, -1
)  # minima per band: the first number that finds `FOUND` of the pairs at the threshold is taken
FOUND, ERROR = 0.99, 0.05  # ERROR: the standard error of an estimate is at most this
PIECE = 2048  # words and pairs that are hashed at a time
SAME_PROMPT, SIMILAR_PROMPT, SAME_GROUP = (
    "same prompt",
    "similar prompt",
    "same group",
)  # why two pools are united
_MULTIPLIERS = randomness.bits(randomness.key(0, "minhash multipliers"), 0, NUMBERS)[0] | np.uint64(1)
_SHIFTS = randomness.bits(randomness.key(0, "minhash shifts"), 0, NUMBERS)[0]
_PAIR = np.uint64(0x9E3779B97F4A7C15)


def minima(prompt: str) -> np.ndarray:
    """(NUMBERS,) uint32: the minimum of each hash function over the words and pairs of a prompt."""
    words = words_of(prompt) or [prompt]
    single = pd.util.hash_array(np.array(words, dtype=object), categorize=False)
    pairs = (single[:-1] * _PAIR) ^ (single[1:] + (single[:-1] >> np.uint64(7)))
    shingles = np.unique(np.concatenate([single, pairs]))
    lowest = np.full(NUMBERS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), PIECE):
        mixed = shingles[start : start + PIECE, None] * _MULTIPLIERS + _SHIFTS
        mixed ^= mixed >> np.uint64(29)
        lowest = np.minimum(lowest, (mixed * _PAIR).min(0))
    return (lowest >> np.uint64(32)).astype(np.uint32)


def plain(prompt: str) -> str:
    """The prompt without differences of case and white space."""
    return " ".join(prompt.lower().split())


def same_prompt(one: str, other: str) -> bool:
    """Whether two prompts have a text, and differ at most in case and white space."""
    return plain(one) == plain(other) != ""


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """The estimated Jaccard index of two prompts. Its standard error is at most `ERROR`."""
    return float((one == other).mean())


def rows_per_band(threshold: float) -> int:
    """The largest number of minima per band by which a pair of this similarity has an equal band in `FOUND` of the cases."""
    misses = ((1 - threshold**rows) ** (NUMBERS // rows) for rows in ROWS)
    return next((r for r, miss in zip(ROWS, misses, strict=True) if miss <= 1 - FOUND), ROWS[-1])


class PromptGroups:
    """Unites prompts that are similar, by number. Prompts are added in order, from 0.

    Args:
        threshold: prompts of at least this similarity are united, as far as an estimate can tell: those of an estimate that is
            lower by up to its standard error, too. None unites only prompts with the same words.

    Memory holds 4 bytes per prompt. The minima are in temporary files.
    """

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self._rows = rows_per_band(threshold or 1.0)
        self._sets = DisjointSets()
        self._tables = tuple(DigestTable() for _ in range(5))
        self._bands, self._minima, self._exact, self._words, self._named = self._tables

    def __enter__(self) -> "PromptGroups":
        return self

    def __exit__(self, *error) -> None:
        for table in self._tables:
            table.__exit__(*error)

    def add(self, prompt: str, group: str | None = None) -> list[tuple[int, str]]:
        """Add the next prompt, with the group that the user gave it.

        Returns the numbers of earlier prompts that it was united with, each with the reason. `SAME_PROMPT`: only case and
        white space may differ. `SIMILAR_PROMPT`: the words are the same or nearly so. `SAME_GROUP`: it is the first prompt of
        the given group.
        """
        number = self._sets.add()
        found: list[tuple[int, str]] = []
        if group is not None and not self._named.add(key := digest(group), number):
            found.append((int(self._named.get(key) or 0), SAME_GROUP))
        found += self._alike(number, prompt)
        for other, _ in found:
            self._sets.unite(number, other)
        return found

    def _alike(self, number: int, prompt: str) -> list[tuple[int, str]]:
        """Earlier prompts that are the same or similar, each with the reason."""
        text = plain(prompt)
        if not text:
            return []
        if not self._exact.add(key := digest(text), number):
            return [(int(self._exact.get(key) or 0), SAME_PROMPT)]
        words = digest(" ".join(words_of(prompt)) or text)
        if not self._words.add(words, number):
            return [(int(self._words.get(words) or 0), SIMILAR_PROMPT)]
        if self.threshold is None:
            return []
        return [(other, SIMILAR_PROMPT) for other in self._similar(number, prompt)]

    def _similar(self, number: int, prompt: str) -> list[int]:
        """Earlier prompts of at least the threshold's similarity. Keeps the minima of this one."""
        own = minima(prompt)
        self._minima.set(number.to_bytes(8, "little"), own.tobytes())
        found: set[int] = set()
        for band in range(NUMBERS // self._rows):
            key = band.to_bytes(2, "little") + own[band * self._rows : (band + 1) * self._rows].tobytes()
            earlier = self._bands.get(key)
            if earlier is None:
                self._bands.set(key, number)
            elif int(earlier) not in found:
                stored = self._minima.get(int(earlier).to_bytes(8, "little"))
                other = np.frombuffer(bytes(stored or b""), np.uint32)
                if similarity(own, other) >= (self.threshold or 0) - ERROR:
                    found.add(int(earlier))
        return sorted(found)

    def root(self, number: int) -> int:
        """The first prompt of the group of a prompt."""
        return self._sets.root(number)

    def __len__(self) -> int:
        return len(self._sets)

    def roots(self) -> np.ndarray:
        """(prompts,) the first prompt of the group of each."""
        return self._sets.roots()

    def sizes(self) -> np.ndarray:
        """(prompts,) size of each group at its root; 0 elsewhere."""
        return np.bincount(self.roots(), minlength=len(self))
