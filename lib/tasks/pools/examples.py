"""Stage 01 for pools: a pool becomes an example. Its prompt is the prompt, its target the best candidate.

Splits that the files give are kept. Without them, a hash of the group decides: a group is all prompts that are nearly the
same, or have the same value in the user's column `group`. If the files give no split held_out, a share of the training
groups is held out; another share is the split selection.
"""

import json
from collections.abc import Iterable, Iterator

from lib.config import Config
from lib.randomness import hash_fraction
from lib.tasks import Document, Dropped, Example


def prepare(config: Config, documents: Iterable[Document]) -> Iterator[Example | Dropped]:
    """An example for each pool. Iterates over the documents twice."""
    given: set[str] = set()
    for document in documents:
        given.add(json.loads(document.content).get("split") or "")
    for document in documents:
        record = json.loads(document.content)
        rewards = record["rewards"]
        yield Example(
            example_id=record["id"],
            prompt=record["prompt"],
            target=record["candidates"][rewards.index(max(rewards))],
            split=split_of(record.get("split"), record["group"], given, config),
            group=record["group"],
            record=document.content,
            tags=record.get("tags"),
        )


def split_of(split: str | None, group: str, given: set[str], config: Config) -> str:
    """The split of a pool. `given`: all splits that the files give, "" for pools without one."""
    fractions, seed = config.data.fractions, config.seed
    if split not in (None, "train"):
        return str(split)
    if "held_out" not in given and hash_fraction(seed, "pools held out", group) < fractions["held_out"]:
        return "held_out"
    if (
        "selection" not in given
        and hash_fraction(seed, "pools selection", group) < config.data.selection_fraction
    ):
        return "selection"
    return "train"
