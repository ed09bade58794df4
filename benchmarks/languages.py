"""
A language in which correct and wrong sentences can be decided exactly, and a character n-gram judge.

`Sums`: sentences such as `[(47+85=132)];`. The sum must be correct and every bracket must be closed in the right order. These
are dependencies between distant tokens that are each likely alone.

Legend: B texts, T positions, V vocabulary, n order.
"""

import re
from dataclasses import dataclass

import numpy as np

from lib import randomness

OPEN, CLOSE = "([{", ")]}"
MOST_BRACKETS = 2
_SENTENCE = re.compile(r"([(\[{]*)(\d+)\+(\d+)=(\d+)([)\]}]*)")


@dataclass(frozen=True)
class Sums:
    """Sums of two numbers with `digits` digits, in brackets. All numbers have leading zeros; the result has one more digit."""

    digits: int = 2

    def text(self, sentences: int, seed: int) -> str:
        """A text of that many correct sentences."""
        noise = randomness.uniform(randomness.key(seed, "sums"), np.arange(sentences), 3 + MOST_BRACKETS)
        numbers = np.floor(noise[:, :2] * 10**self.digits).astype(int)
        depth = np.floor(noise[:, 2] * (MOST_BRACKETS + 1)).astype(int)
        kinds = np.floor(noise[:, 3:] * len(OPEN)).astype(int)
        rows = zip(numbers.tolist(), depth.tolist(), kinds.tolist(), strict=True)
        return "".join(self._sentence(a, b, kind[:d]) for (a, b), d, kind in rows)

    def _sentence(self, a: int, b: int, kinds: list[int]) -> str:
        opened = "".join(OPEN[k] for k in kinds)
        closed = "".join(CLOSE[k] for k in reversed(kinds))
        return f"{opened}{a:0{self.digits}}+{b:0{self.digits}}={a + b:0{self.digits + 1}}{closed};"

    def right(self, sentence: str) -> bool:
        """Whether a sentence without its semicolon belongs to the language."""
        match = _SENTENCE.fullmatch(sentence)
        if match is None:
            return False
        opened, a, b, c, closed = match.groups()
        if (len(a), len(b), len(c)) != (self.digits, self.digits, self.digits + 1):
            return False
        mirrored = "".join(CLOSE[OPEN.index(bracket)] for bracket in reversed(opened))
        return len(opened) <= MOST_BRACKETS and mirrored == closed and int(a) + int(b) == int(c)

    def sentences(self, text: str) -> list[str]:
        """The sentences of a text. The first and the last piece do not count, since they may be cut."""
        return text.split(";")[1:-1]

    def judge(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """((B,) correct sentences, (B,) sentences) of each text."""
        pieces = [self.sentences(text) for text in texts]
        right = np.array([sum(map(self.right, row)) for row in pieces], float)
        return right, np.array([len(row) for row in pieces], float)


class NgramJudge:
    """Interpolated Kneser-Ney over token ids (Kneser and Ney, 1995; Chen and Goodman, 1999), one discount per order.

    It is cheap and independent of every network. n-grams are numbers to the base V in sorted arrays; look-ups bisect, so that
    there is no loop over tokens.
    """

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int = 6):
        """`ids`: (M,) text to learn from. V^order must fit into 63 bits."""
        if vocab_size**order >= 2**63:
            raise ValueError(f"{vocab_size} tokens to the power of {order} do not fit into 63 bits")
        self.vocab_size, self.order = vocab_size, order
        self._levels = [_Level.of(ids, n, n == order, vocab_size) for n in range(1, order + 1)]

    def nll(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) nats of each token, given up to order - 1 tokens before it."""
        share = np.full(ids.shape, 1 / self.vocab_size)
        for n, level in enumerate(self._levels, start=1):
            if ids.shape[1] < n:
                break
            codes = _codes(ids, n, self.vocab_size)  # (B, T - n + 1)
            share[:, n - 1 :] = level.interpolate(codes, share[:, n - 1 :], self.vocab_size)
        return -np.log(share)


@dataclass(frozen=True)
class _Level:
    """n-grams of one order with their counts; below the highest order, the number of different tokens before them."""

    grams: np.ndarray  # (G,) sorted codes
    counts: np.ndarray  # (G,)
    contexts: np.ndarray  # (C,) sorted codes of their first n - 1 tokens
    totals: np.ndarray  # (C,) sum of the counts of all continuations
    kinds: np.ndarray  # (C,) number of different continuations
    discount: float

    @classmethod
    def of(cls, ids: np.ndarray, n: int, highest: bool, base: int) -> "_Level":
        if highest:
            grams, counts = np.unique(_codes(ids[None], n, base)[0], return_counts=True)
        else:
            longer = np.unique(_codes(ids[None], n + 1, base)[0])
            grams, counts = np.unique(longer % base**n, return_counts=True)  # without the token in front
        contexts, first = np.unique(grams // base, return_index=True)
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / (ones + 2 * twos) if ones else 0.5
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))
        return cls(grams, counts, contexts, totals, kinds, float(discount))

    def interpolate(self, codes: np.ndarray, lower: np.ndarray, base: int) -> np.ndarray:
        """Probability of each n-gram's last token. An unknown context uses the lower order."""
        count = _look_up(self.grams, self.counts, codes)
        total, kinds = (_look_up(self.contexts, v, codes // base) for v in (self.totals, self.kinds))
        seen = np.maximum(total, 1)
        mixed = np.maximum(count - self.discount, 0) / seen + self.discount * kinds / seen * lower
        return np.where(total > 0, mixed, lower)


def _codes(ids: np.ndarray, n: int, base: int) -> np.ndarray:
    """(B, T - n + 1) every n-gram as one number."""
    length = ids.shape[1] - n + 1
    codes = np.zeros((len(ids), length), np.int64)
    for offset in range(n):
        codes = codes * base + ids[:, offset : offset + length]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
