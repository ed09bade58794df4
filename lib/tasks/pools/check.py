"""Stage 00 for pools: all problems of the rows and of the pools, and the valid pools.

| kind                   | meaning                                                                              |
|------------------------|--------------------------------------------------------------------------------------|
| unknown layout         | a file has the columns of no layout                                                  |
| no prompt, no candidate, ... | a row lacks a column that the layout needs                                     |
| not text, null text, not a list, not a number, wrong length | a value has another type than the layout says    |
| contradicting prompts  | one id has two prompts                                                               |
| prompt in two splits   | the same prompt is in two splits that the files give                                 |
| contradicting groups   | one prompt has two groups                                                            |
| group in two splits    | pools of the same `group` have different splits in the files                         |
| unknown split          | a split is neither train, selection, held_out nor test, nor one of their usual names |
| empty candidate        | a candidate has no visible character                                                 |
| no reward, no rewards  | a candidate, or none of a pool, has a reward                                         |
| no teacher             | a candidate has no teacher's score, while others of its split have one               |
| not finite, reward out of range | a reward is NaN or infinite, or outside pools.reward_range                  |
| contradicting rewards  | a pool has the same candidate twice, with different rewards                          |
| too many candidates    | a pool has more than pools.max_candidates                                            |
| no such column         | no row has a column that pools.keys names                                            |
| repeated candidate     | a pool has the same candidate twice, with the same reward: the first one is kept     |
| no wrong candidate, no right candidate | all rewards of a pool are equal: a ranker cannot be measured on it   |
| one candidate          | a pool has one candidate                                                             |
| empty prompt           | a pool has no prompt: its candidates are ranked by themselves                        |
| similar prompts in two splits | prompts of two given splits are nearly the same                               |
| unread column          | a file of pairs or tuples has a column that only other layouts read                   |
| few groups             | most prompts are so similar that they are one group, which cannot be divided         |

The last eight are warnings. `data.drop` names errors whose rows are left out. In pairs, one text may be chosen in one row and
rejected in another: its reward is the share of its pairs that it wins.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.sections.pools import PoolFilesConfig
from lib.tasks import Document, Problem
from lib.tasks.pools.given_splits import Conflict, GivenSplits
from lib.tasks.pools.layouts import PREFERRED, SAME, Entry, reward_fault
from lib.tasks.pools.near_duplicates import PromptGroups, same_prompt
from lib.tasks.pools.reading import problem, read_into
from lib.tasks.pools.store import SPLITS, FoundPool, PoolStore, split_name
from lib.tasks.pools.values import identity, is_visible
from lib.tasks.text.check import DROPPABLE as UNREADABLE
from lib.user_files.faults import Fault

DROPPABLE = (
    *UNREADABLE, "unknown layout", "not a record", "no prompt", "no candidates", "no candidate", "no rewards", "no reward",
    "no teacher", "no chosen", "no rejected", "no positive", "not a list", "not a number", "wrong length", "contradicting prompts",
    "prompt in two splits", "contradicting groups", "group in two splits", "no such column", "unknown split", "empty candidate", "not finite", "reward out of range", "contradicting rewards",
    "too many candidates",
)  # fmt: skip
LARGEST_GROUP = 0.5  # share of the pools above which one group is reported
_SHOWN = 60  # characters of a text in a message


def check(config: Config) -> Iterator[Document | Problem]:
    """Valid pools as JSON, and problems. Raises BadConfig if `data.drop` names an unknown kind."""
    drop = frozenset(config.data.drop)
    for kind in sorted(drop - set(DROPPABLE)):
        raise BadConfig(
            f"data.drop: '{kind}' is not a kind of problem that can be dropped{did_you_mean(kind, DROPPABLE)}"
        )
    errors = kept = 0
    for item in _check(config):
        if isinstance(item, Problem) and item.kind in drop and item.severity == "error":
            item = Problem(
                **(vars(item) | {"severity": "warning", "advice": "it is left out; see data.drop"})
            )
        errors += isinstance(item, Problem) and item.severity == "error"
        kept += isinstance(item, Document)
        yield item
    if not kept and not errors:
        fault = Fault(
            "no pools", "no valid pool", "pools of candidates with rewards", "see docs/your_candidates.md"
        )
        yield problem(fault, config.data.path, "")


def _check(config: Config) -> Iterator[Document | Problem]:
    settings = config.pools
    with PoolStore() as store, PromptGroups(settings.near_duplicates) as groups:
        yield from read_into(store, config)
        given, wrong_splits = GivenSplits(groups), set()
        for prompt, split, group in store.prompts():
            given.add(prompt, split_name(split), group)
        for conflict in given.settle():
            if not conflict.similar:
                wrong_splits.add(conflict.number)
            yield _two_splits(store, conflict)
        yield from _few_groups(config, store, groups)
        # A teacher scores a whole split or none of it. Pools without a split may come into train
        taught = {given.of(number) or "train" for number in store.numbers_with_teacher()}
        for pool in store.pools():
            split = given.of(pool.number)
            faults = list(pool_faults(pool, settings, with_rewards=True))
            faults += _untaught(pool) if (split or "train") in taught else ()
            entries, more = merged(pool, settings)
            faults += more
            if split is not None and split not in SPLITS.values():
                found, known = f"'{split}'", "train, selection, held_out (dev, validation) or test"
                faults.append((pool.location, Fault("unknown split", found, known, "fix the column 'split'")))
            yield from (problem(fault, pool.source, f"{place} ({pool.pool_id})") for place, fault in faults)
            if (
                pool.number not in wrong_splits
                and not any(f.severity == "error" for _, f in faults)
                and entries
            ):
                group = store.id_of(groups.root(pool.number))
                yield Document(pool.pool_id, as_json(pool, entries, split, group, bool(taught)), pool.source)


def _two_splits(store: PoolStore, conflict: Conflict) -> Problem:
    """The problem of two pools that belong together and have different splits."""
    numbers = conflict.number, conflict.earlier
    (source, location), (its_source, its_location) = map(store.place_of, numbers)
    ids = [store.id_of(n) for n in numbers]
    (prompt, group), (its_prompt, its_group) = map(store.prompt_and_group_of, numbers)
    earlier = " ".join(filter(None, (its_source if its_source != source else "", its_location)))
    found = f"{ids[0]} of {conflict.split} and {ids[1]} of {conflict.other} ({earlier}): {prompt[:_SHOWN]!r}"
    if conflict.similar:
        advice = "results may be too good; remove one of them"
        fault = Fault("similar prompts in two splits", found, "different prompts", advice, "warning")
    elif same_prompt(prompt, its_prompt):
        fault = Fault("prompt in two splits", found, "one split per prompt", "remove it from one of them")
    elif group is not None and group == its_group:
        advice = "give its pools one split, or another group"
        fault = Fault("group in two splits", found, "one split per group", advice)
    else:
        found += "; other pools, of the group or prompt of each, link them"
        advice = "give linked pools one split, or other groups"
        fault = Fault("group in two splits", found, "one split for groups that share a prompt", advice)
    return problem(fault, source, f"{location} ({ids[0]})")


def _few_groups(config: Config, store: PoolStore, groups: PromptGroups) -> Iterator[Problem]:
    """A warning if most prompts are one group: then no split by groups is possible."""
    if len(groups) < 10 or (largest := int(groups.sizes().max())) <= LARGEST_GROUP * len(groups):
        return
    fault = Fault(
        "few groups", f"{largest:,} of {len(groups):,} prompts are nearly the same, or have the same group",
        "prompts that can be divided into splits",
        "set pools.near_duplicates to a higher number or to null, or give a column 'split'", "warning",
    )  # fmt: skip
    yield problem(fault, config.data.path, "")


def pool_faults(
    pool: FoundPool, settings: PoolFilesConfig, with_rewards: bool
) -> Iterator[tuple[str, Fault]]:
    """(place, fault) of the candidates of a pool. `with_rewards`: every candidate needs a reward in pools.reward_range."""
    different = len(
        {identity(entry.text) for entry in pool.entries}
    )  # a text counts once, in however many pairs it is
    if different > settings.max_candidates:
        found = f"{different} candidates"
        advice = "remove some, or raise pools.max_candidates"
        yield pool.location, Fault("too many candidates", found, f"at most {settings.max_candidates}", advice)
    if not is_visible(pool.prompt):
        advice = "its candidates are ranked without a prompt"
        yield pool.location, Fault("empty prompt", "no text", "a prompt", advice, "warning")
    if with_rewards and all(entry.reward is None for entry in pool.entries):
        found = f"none of {len(pool.entries)} candidates has one"
        yield (
            pool.location,
            Fault("no rewards", found, "a number for each candidate", "give them, or set pools.keys"),
        )
        with_rewards = False
    for k, (entry, place) in enumerate(zip(pool.entries, pool.places, strict=True)):
        if not is_visible(entry.text):
            found = f"candidate {k} has no visible character"
            yield place, Fault("empty candidate", found, "a text", "fix it, or remove the candidate")
        if entry.reward is None and with_rewards:
            found = f"candidate {k} has none: {entry.text[:_SHOWN]!r}"
            yield (
                place,
                Fault(
                    "no reward", found, "a number for each candidate", "give it, or name pools.keys.reward"
                ),
            )
        elif with_rewards and (fault := reward_fault(entry, *settings.reward_range)) is not None:
            yield place, fault._replace(found=f"candidate {k}: {fault.found}")


def _untaught(pool: FoundPool) -> Iterator[tuple[str, Fault]]:
    """The fault of each candidate without a teacher's score."""
    for k, (entry, place) in enumerate(zip(pool.entries, pool.places, strict=True)):
        if entry.teacher is None:
            found = f"candidate {k} has none: {entry.text[:_SHOWN]!r}"
            advice = "give it, or give no candidate of the split one"
            yield place, Fault("no teacher", found, "a teacher's score for each candidate", advice)


def merged(pool: FoundPool, settings: PoolFilesConfig) -> tuple[list[Entry], list[tuple[str, Fault]]]:
    """(the candidates with each text once, faults of repeated texts and of equal rewards). See `identity` for what is once."""
    places: dict[str, list[int]] = {}
    for k, entry in enumerate(pool.entries):
        if is_visible(entry.text):
            places.setdefault(identity(entry.text), []).append(k)
    entries: list[Entry] = []
    faults: list[tuple[str, Fault]] = []
    for text, numbers in places.items():
        same = [pool.entries[k] for k in numbers]
        first, rewards = same[0], [entry.reward for entry in same]
        if first.repeats == PREFERRED and None not in rewards:
            wins = sum(reward or 0.0 for reward in rewards) / len(rewards)
            entries.append(replace(first, reward=wins))
            continue
        entries.append(first)
        if first.repeats == SAME and len(set(rewards)) == 1:
            continue
        for k in numbers[1:]:
            found = f"candidate {k} repeats candidate {numbers[0]}: {text[:_SHOWN]!r}"
            if pool.entries[k].reward != first.reward:
                both = f", rewards {pool.entries[k].reward} and {first.reward}"
                fault = Fault(
                    "contradicting rewards", found + both, "one reward per candidate", "keep one of them"
                )
            else:
                advice = "the first one is kept"
                fault = Fault("repeated candidate", found, "different candidates", advice, "warning")
            faults.append((pool.places[k], fault))
    return entries, [*faults, *_undecided(pool, entries, settings)]


def _undecided(
    pool: FoundPool, entries: list[Entry], settings: PoolFilesConfig
) -> Iterator[tuple[str, Fault]]:
    """The fault of a pool with one candidate, or with equal rewards."""
    rewards = {entry.reward for entry in entries if entry.reward is not None}
    if len(entries) == 1:
        advice = "it teaches a ranker only with a pointwise loss"
        yield pool.location, Fault("one candidate", "1 candidate", "at least 2", advice, "warning")
    elif len(rewards) == 1 and any(
        0 < (entry.reward or 0) < 1 for entry in entries if entry.repeats == PREFERRED
    ):
        found = f"{entries[0].text[:_SHOWN]!r} is chosen as often as it is rejected"
        yield (
            pool.location,
            Fault("contradicting rewards", found, "one side that is chosen", "keep one of the pairs"),
        )
    elif len(rewards) == 1:
        high = rewards.pop() >= relevant_reward(settings)
        kind = "no wrong candidate" if high else "no right candidate"
        found = f"all {len(entries)} rewards are equal"
        advice = "it teaches a ranker only with a pointwise loss, and is not measured"
        yield pool.location, Fault(kind, found, "different rewards", advice, "warning")


def relevant_reward(settings: PoolFilesConfig) -> float:
    """The reward in the file from which a candidate counts as right."""
    low, high = settings.reward_range
    return low + settings.relevant * (high - low)


def as_json(
    pool: FoundPool, entries: list[Entry], split: str | None, group: str, with_teacher: bool = False
) -> str:
    """What stages 01 and 02 read. It does not depend on the layout of the file.

    `with_teacher`: some pools have the scores of a teacher. Then every record has them, of null where a pool has none.
    """
    record: dict[str, Any] = {
        "id": pool.pool_id,
        "prompt": pool.prompt,
        "candidates": [entry.text for entry in entries],
        "rewards": [entry.reward for entry in entries],
        "group": group,
    }
    optional = {
        "split": split,
        "tags": list(pool.tags) or None,
        "kinds": [entry.kind for entry in entries],
    }
    for name, value in optional.items():
        if value is not None and not (isinstance(value, list) and all(v is None for v in value)):
            record[name] = value
    if with_teacher:
        record["teacher"] = [entry.teacher for entry in entries]
    return json.dumps(record, ensure_ascii=False)
