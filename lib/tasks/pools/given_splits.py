"""The splits that files give to pools. Pools of one group have one split: one that gives none takes that of its group."""

from array import array
from typing import NamedTuple

import numpy as np

from lib.tasks.pools.disjoint_sets import DisjointSets
from lib.tasks.pools.near_duplicates import SIMILAR_PROMPT, PromptGroups

_NONE = -1


class Conflict(NamedTuple):
    """A pool that belongs to pools of two splits.

    Attributes:
        earlier: number of an earlier pool with the other split.
        how: what unites the pool with it: `SAME_GROUP`, `SAME_PROMPT` or `SIMILAR_PROMPT`.
        split: of the pool, or of those with which it shares its group or prompt.
        other: the split of the earlier pool.
    """

    earlier: int
    how: str
    split: str
    other: str


class GivenSplits:
    """The split of each pool, by number. Pools are added in order, from 0. Memory holds 16 bytes per pool.

    Pools that share a group or a prompt must have one split: they are a class. Similar prompts may have two.

    Args:
        groups: what unites the pools. Each pool is added to it, too.
    """

    def __init__(self, groups: PromptGroups):
        self._groups, self._classes = groups, DisjointSets()
        self._giver = array("i")  # of the class of this root: the first pool whose split the files give
        self._similar = array("i")  # the same, or else that of a class with a similar prompt
        self._splits = array("i")  # number of the split of each pool; 0 for none
        self._names: list[str | None] = [None]
        self._number_of: dict[str | None, int] = {None: 0}

    def add(self, prompt: str, split: str | None, group: str | None) -> list[Conflict]:
        """Add the next pool, with the split and the group that the files give it. Returns wherever two splits differ.

        A pool that belongs to two classes of different splits joins the first: without it, they are no conflict.
        """
        number, conflicts = self._classes.add(), []
        if split not in self._number_of:
            self._number_of[split] = len(self._names)
            self._names.append(split)
        self._splits.append(self._number_of[split])
        for givers in (self._giver, self._similar):
            givers.append(_NONE if split is None else number)
        for linked, how in self._groups.add(prompt, group):
            roots = [self._classes.root(n) for n in (number, linked)]
            givers = self._giver if how != SIMILAR_PROMPT else self._similar
            own, its = (givers[root] for root in roots)
            if _NONE not in (own, its) and self._splits[own] != self._splits[its]:
                names = (str(self._names[self._splits[n]]) for n in (own, its))
                conflicts.append(Conflict(its, how, *names))
                continue
            if how != SIMILAR_PROMPT:
                self._classes.unite(number, linked)
                self._keep_first(self._giver, roots)
            self._keep_first(self._similar, roots)
        return conflicts

    @staticmethod
    def _keep_first(givers: array, roots: list[int]) -> None:
        """Both classes have the first giver of the two, if any."""
        given = [givers[root] for root in roots if givers[root] != _NONE]
        for root in roots:
            givers[root] = min(given, default=_NONE)

    def settle(self) -> None:
        """Give each pool without a split that of its class, or of similar prompts, after the last pool was added."""
        splits = np.array(self._splits, np.int32)
        if (splits == 0).all() or (splits > 0).all():
            return
        for sets in (self._classes, self._groups):
            roots = sets.roots()
            of_set = np.zeros(len(splits), np.int32)
            given = np.flatnonzero(splits)[::-1]  # the first pool of a set decides: it is written last
            of_set[roots[given]] = splits[given]
            splits = np.where(splits > 0, splits, of_set[roots])
        self._splits = array("i", splits.tobytes())

    def of(self, number: int) -> str | None:
        """The split of a pool; None if neither it nor its group has one."""
        return self._names[self._splits[number]]
