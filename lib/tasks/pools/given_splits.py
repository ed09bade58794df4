"""The splits that files give to pools. Pools of one group have one split: one that gives none takes that of its group."""

from array import array

import numpy as np

from lib.tasks.pools.near_duplicates import PromptGroups


class GivenSplits:
    """The split of each pool, by number. Pools are added in order, from 0. Memory holds 4 bytes per pool.

    Args:
        groups: what unites the pools. Each pool is added to it, too.
    """

    def __init__(self, groups: PromptGroups):
        self._groups = groups
        self._numbers = array("i")  # of the split of each pool; 0 for none
        self._names: list[str | None] = [None]
        self._number_of: dict[str | None, int] = {None: 0}

    def add(self, prompt: str, split: str | None, group: str | None) -> list[tuple[int, str, str, str]]:
        """Add the next pool, with the split and the group that the files give it.

        Returns (earlier pool, how it is united with this one, split of this one, split of the earlier one) wherever two
        splits differ.
        """
        number, conflicts = len(self._numbers), []
        if split not in self._number_of:
            self._number_of[split] = len(self._names)
            self._names.append(split)
        self._numbers.append(self._number_of[split])
        for other, how in self._groups.add(prompt, group):
            own, its = self._numbers[number], self._numbers[other]
            self._numbers[number] = own or its
            self._numbers[other] = its or own
            if own and its and own != its:
                conflicts.append((other, how, str(self._names[own]), str(self._names[its])))
        return conflicts

    def settle(self) -> None:
        """Give each pool without a split that of its group, after the last pool was added."""
        splits = np.array(self._numbers, np.int32)
        if (splits == 0).all() or (splits > 0).all():
            return
        roots = self._groups.roots()
        of_group = np.zeros(len(splits), np.int32)
        given = np.flatnonzero(splits)[::-1]  # the first pool of a group decides: it is written last
        of_group[roots[given]] = splits[given]
        self._numbers = array("i", np.where(splits > 0, splits, of_group[roots]).tobytes())

    def of(self, number: int) -> str | None:
        """The split of a pool; None if neither it nor its group has one."""
        return self._names[self._numbers[number]]
