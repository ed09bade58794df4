"""The splits that files give to pools. Pools of one group have one split: one that gives none takes that of its group."""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lib.tasks.pools.disjoint_sets import DisjointSets
from lib.tasks.pools.near_duplicates import SIMILAR_PROMPT, PromptGroups


class Conflict(NamedTuple):
    """Two pools that belong together and have different splits.

    Attributes:
        number, earlier: of the pools. Among pools that share a group or a prompt, `earlier` is the first with a split.
        similar: their prompts are only similar, which is allowed.
        split, other: the splits of the two.
    """

    number: int
    earlier: int
    similar: bool
    split: str
    other: str


class GivenSplits:
    """The split of each pool, by number. Pools are added in order, from 0.

    Pools that share a group or a prompt must have one split. They are a class, also if other pools link them. The first split
    that the files give to a class holds for all of it. Similar prompts may have two splits.

    Memory holds 8 bytes per pool, and 8 per pair of similar prompts.

    Args:
        groups: what unites the pools. Each pool is added to it, too.
    """

    def __init__(self, groups: PromptGroups):
        self._groups, self._classes = groups, DisjointSets()
        self._similar = array("i")  # pairs of numbers, the later one first
        self._given = array("i")  # number of the split of each pool; 0 for none
        self._names: list[str | None] = [None]
        self._number_of: dict[str | None, int] = {None: 0}

    def add(self, prompt: str, split: str | None, group: str | None) -> None:
        """Add the next pool, with the split and the group that the files give it."""
        number = self._classes.add()
        if split not in self._number_of:
            self._number_of[split] = len(self._names)
            self._names.append(split)
        self._given.append(self._number_of[split])
        for linked, how in self._groups.add(prompt, group):
            if how == SIMILAR_PROMPT:
                self._similar.extend((number, linked))
            else:
                self._classes.unite(number, linked)

    def settle(self) -> Iterator[Conflict]:
        """After the last pool, give each pool without a split one. Yields the conflicts.

        It takes that of its class; or else that of a class with a similar prompt; or else that of prompts which others in
        between make similar.
        """
        given, pairs = np.array(self._given, np.int32), np.array(self._similar, np.int64).reshape(-1, 2)
        if not given.any():
            return
        roots = self._classes.roots()
        first = np.full(len(given), -1)  # of the class of a root: the first pool with a split
        with_split = np.flatnonzero(given)[::-1]
        first[roots[with_split]] = with_split  # of several, the last that is written holds
        first = first[roots]
        of_class = np.where(first >= 0, given[first], 0)
        wrong = np.flatnonzero((given > 0) & (given != of_class))

        # 1. Pools of classes without a split
        both_ways = np.concatenate([pairs, pairs[:, ::-1]])
        order = np.argsort(-both_ways[:, 1], kind="stable")  # the first pool with a split is written last
        both_ways = both_ways[order]
        to, by = both_ways[(of_class[both_ways[:, 0]] == 0) & (of_class[both_ways[:, 1]] > 0)].T
        near = of_class.copy()  # of the class of a root
        near[roots[to]] = of_class[by]
        splits = near[roots]
        components = self._groups.roots()
        of_component = np.zeros(len(given), np.int32)
        known = np.flatnonzero(splits)[::-1]
        of_component[components[known]] = splits[known]
        splits = np.where(splits > 0, splits, of_component[components])
        self._given = array("i", np.where(given > 0, given, splits).astype(np.int32).tobytes())

        # 2. Conflicts
        for number in wrong.tolist():
            names = (str(self._names[n]) for n in (given[number], of_class[number]))
            yield Conflict(number, int(first[number]), False, *names)
        for number, linked in pairs[splits[pairs[:, 0]] != splits[pairs[:, 1]]].tolist():
            names = (str(self._names[splits[n]]) for n in (number, linked))
            yield Conflict(number, linked, True, *names)

    def of(self, number: int) -> str | None:
        """The split of a pool; None if neither the files nor its group give one."""
        return self._names[self._given[number]]
