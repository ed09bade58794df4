"""Sets of numbers that are united step by step (union-find)."""

from array import array

import numpy as np


class DisjointSets:
    """The numbers from 0 on, each in one set. The root of a set is its first number. Memory holds 4 bytes per number."""

    def __init__(self) -> None:
        self._parent = array("i")

    def add(self) -> int:
        """The next number, in a set of its own."""
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def __len__(self) -> int:
        return len(self._parent)

    def root(self, number: int) -> int:
        """The first number of the set of a number."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def unite(self, one: int, other: int) -> None:
        a, b = self.root(one), self.root(other)
        self._parent[max(a, b)] = min(a, b)

    def roots(self) -> np.ndarray:
        """(numbers,) the root of each."""
        return np.fromiter(map(self.root, range(len(self._parent))), np.int64, len(self._parent))
