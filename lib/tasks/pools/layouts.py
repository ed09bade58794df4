"""Layouts of files with candidates and rewards. A row of any of them becomes the same thing: an `Entry` per candidate.

| layout | columns                                                                | a row is                             |
|--------|------------------------------------------------------------------------|--------------------------------------|
| pools  | prompt, candidates, rewards; also query, docs, labels                  | a prompt with all its candidates     |
| rows   | prompt or id, candidate, reward                                        | one candidate                        |
| pairs  | prompt, chosen, rejected: texts, chat messages, or lists of them       | candidates with reward 1 and 0       |
| tuples | anchor, positive, negative, negative_1, negative_2, ...; or pos, neg   | candidates with reward 1 and 0       |

The config may also call the layout of labelled lists `lists`, and that of RewardBench 2, whose chosen and rejected texts
are lists, `rewardbench`. Rows of the same id, or without ids of the same prompt, are one pool.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lib.errors import did_you_mean
from lib.tasks.pools.values import (
    RowFault,
    as_list,
    chat_text,
    described,
    identity,
    is_chat,
    parsed_number,
    without_shared_turns,
)
from lib.user_files.faults import Fault

# Names that a role may have in a file, the most usual one first. `pools.keys` adds a name of the user's own
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "query", "question", "anchor", "instruction"),
    "id": ("id", "prompt_id", "query_id", "qid", "question_id"),
    "candidates": ("candidates", "docs", "documents", "passages", "responses"),
    "rewards": ("rewards", "labels", "scores", "relevance"),
    "candidate": ("candidate", "doc", "document", "passage", "response", "answer", "text"),
    "reward": ("reward", "label", "score", "relevance"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "positive": ("positive", "pos", "positives"),
    "negative": ("negative", "neg", "negatives"),
    "kind": ("kind", "kinds", "writers", "writer", "models"),
    "teacher": ("teacher", "teacher_scores", "teacher_score"),
    "split": ("split",),
    "group": ("group",),
    "tag": ("tag", "tags", "subset"),
}
NEEDED = {  # by which a layout is recognised, in this order
    "pairs": ("chosen", "rejected"),
    "tuples": ("positive", "negative"),
    "pools": ("candidates",),
    "rows": ("candidate",),
}
ALIASES = {"lists": "pools", "rewardbench": "pairs"}
ONE_OR_ALL = {"reward": "rewards", "rewards": "reward", "candidate": "candidates", "candidates": "candidate"}
ONCE, SAME, PREFERRED = 0, 1, 2
_NUMBERED = re.compile(r"(negative|neg)_\d+")
_NUMBER = re.compile(r"_?\d+$")


@dataclass(frozen=True)
class Entry:
    """One candidate as the file states it.

    Attributes:
        reward: None where the file has none.
        kind: who or what wrote it.
        teacher: the score of another model.
        repeats: ONCE if a pool must not have it twice, SAME if it may repeat with the same reward, PREFERRED if it may
            win one pair and lose another.
    """

    text: str
    reward: float | None
    kind: str | None = None
    teacher: float | None = None
    repeats: int = 0


@dataclass(frozen=True)
class PoolRow:
    """What one row of a file says about a pool. The prompt is None where the row has only an id."""

    pool_id: str | None
    prompt: str | None
    entries: list[Entry]
    split: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The layout of a file: its name, and the column of every role that the file has."""

    name: str
    columns: dict[str, str]

    def read(self, record: Mapping[str, Any], texts_only: bool = False) -> PoolRow:
        """The pool, or the part of one, that a row states.

        Args:
            texts_only: all values are texts, as in a .csv file; rewards are parsed. A blank one is no value, other than a
                blank candidate.

        Raises:
            RowFault: the row lacks a column, or a value has another type than the layout says.
        """
        if texts_only:
            kept = self.columns.get("candidate") if self.name == "rows" else None
            record = {c: v if c == kept or not _is_blank(v) else None for c, v in record.items()}
        prompt = self._prompt(record)
        if self.name == "pairs":
            prompt, entries = self._pair(record, prompt)
        elif self.name == "tuples":
            entries = self._tuple(record)
        elif self.name == "rows":
            entries = [self._row(record, texts_only)]
        else:
            entries = self._pool(record)
        pool_id = self._optional(record, "id")
        if prompt is None and pool_id is None:
            wanted = self.columns.get("prompt", NAMES["prompt"][0])
            raise RowFault(
                Fault(
                    "no prompt", f"keys {str(list(record))[:120]}", f"a text under '{wanted}', or an id",
                    "give one, or name the column in pools.keys",
                )
            )  # fmt: skip
        return PoolRow(
            pool_id,
            prompt,
            entries,
            self._optional(record, "split"),
            self._optional(record, "group"),
            self._tags(record),
        )

    @property
    def unread(self) -> list[str]:
        """Columns of candidates that this layout does not read, although another one does."""
        if self.name not in ("pairs", "tuples"):
            return []
        return [
            self.columns[role] for role in ("reward", "rewards", "kind", "teacher") if role in self.columns
        ]

    # --- the layouts -----------------------------------------------------------------------------------------------

    def _pool(self, record: Mapping[str, Any]) -> list[Entry]:
        texts = self._list(record, "candidates")
        if not texts:
            raise RowFault(
                Fault("no candidates", "an empty list", "at least one candidate", "fix or remove it")
            )
        rewards = self._beside(record, "rewards", len(texts))
        kinds = self._beside(record, "kind", len(texts))
        teacher = self._beside(record, "teacher", len(texts))
        return [
            Entry(
                self._text(text, "candidates", k),
                self._number(rewards[k], "rewards", k),
                None if kinds[k] is None else str(kinds[k]),
                self._number(teacher[k], "teacher", k),
            )
            for k, text in enumerate(texts)
        ]

    def _row(self, record: Mapping[str, Any], texts_only: bool) -> Entry:
        def number(role: str) -> float | None:
            value = record.get(self.columns[role]) if role in self.columns else None
            if texts_only and isinstance(value, str):
                value = parsed_number(value)
            return self._number(value, role)

        if "reward" in self.columns and self.columns["reward"] not in record:
            raise RowFault(self._missing(record, "reward"))
        text = self._text(self._value(record, "candidate"), "candidate")
        kind = record.get(self.columns["kind"]) if "kind" in self.columns else None
        return Entry(text, number("reward"), None if kind is None else str(kind), number("teacher"))

    def _pair(self, record: Mapping[str, Any], prompt: str | None) -> tuple[str | None, list[Entry]]:
        sides = [self._side(record, role) for role in ("chosen", "rejected")]
        prompt, sides = without_shared_turns(prompt, sides)
        entries = [
            Entry(self._text(text, role, k), reward, repeats=PREFERRED)
            for role, reward, side in zip(("chosen", "rejected"), (1.0, 0.0), sides, strict=True)
            for k, text in enumerate(side)
        ]
        if not entries:
            raise RowFault(Fault("no candidates", "empty lists", "a chosen or a rejected text", "fix it"))
        self._refuse_both(entries)
        return prompt, entries

    def _tuple(self, record: Mapping[str, Any]) -> list[Entry]:
        """Negatives are in the order of the file: a column `negative` before `negative_1`."""
        first = self.columns["negative"]
        columns = [first, *(name for name in record if is_numbered(name, first) and name != first)]
        entries = [
            Entry(self._text(text, "positive", k), 1.0, repeats=SAME)
            for k, text in enumerate(self._side(record, "positive"))
        ]
        for name in columns:  # a tuple with fewer negatives than others has nulls
            values = [v for v in as_list(record.get(name)) if v is not None]
            texts = [self._text(text, "negative", k, name) for k, text in enumerate(values)]
            entries += [Entry(text, 0.0, repeats=SAME) for text in texts]
        self._refuse_both(entries)
        return entries

    def _refuse_both(self, entries: list[Entry]) -> None:
        """Raises RowFault if one text of a row is both right and wrong."""
        right, wrong = ({identity(e.text) for e in entries if e.reward == reward} for reward in (1.0, 0.0))
        if both := sorted(right & wrong):
            found = f"{both[0][:40]!r} is both right and wrong"
            raise RowFault(Fault("contradicting rewards", found, "different texts", "fix or remove the row"))

    # --- values ----------------------------------------------------------------------------------------------------

    def _prompt(self, record: Mapping[str, Any]) -> str | None:
        value = record.get(self.columns["prompt"]) if "prompt" in self.columns else None
        return None if value is None else self._text(value, "prompt")

    def _optional(self, record: Mapping[str, Any], role: str) -> str | None:
        value = record.get(self.columns[role]) if role in self.columns else None
        return None if value is None or value == "" else str(value)

    def _tags(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        value = record.get(self.columns["tag"]) if "tag" in self.columns else None
        return tuple(str(v) for v in as_list(value) if v is not None and v != "")

    def _missing(self, record: Mapping[str, Any], role: str) -> Fault:
        column = self.columns[role]
        advice = f"fix the row, or set pools.keys{did_you_mean(column, list(record))}"
        return Fault("no " + role, f"keys {str(list(record))[:160]}", f"a key '{column}'", advice)

    def _value(self, record: Mapping[str, Any], role: str) -> Any:
        if self.columns[role] not in record:
            raise RowFault(self._missing(record, role))
        return record[self.columns[role]]

    def _side(self, record: Mapping[str, Any], role: str) -> list[Any]:
        """The texts or chats of a role; a single one is a list of one."""
        value = self._value(record, role)
        return as_list(self._text(value, role) if value is None else value)

    def _list(self, record: Mapping[str, Any], role: str) -> Sequence[Any]:
        value = self._value(record, role)
        if not isinstance(value, list | tuple):
            raise RowFault(
                Fault("not a list", described(value), f"a list under '{self.columns[role]}'", "fix the row")
            )
        return value

    def _beside(self, record: Mapping[str, Any], role: str, count: int) -> Sequence[Any]:
        """The list of a role with one value for each of `count` candidates; all None where the file has no such column."""
        if role not in self.columns or record.get(self.columns[role], "") is None:
            return [None] * count
        values = self._list(record, role)
        if len(values) != count:
            raise RowFault(
                Fault(
                    "wrong length", f"{len(values)} values under '{self.columns[role]}' for {count} candidates",
                    "one value per candidate", "fix the row",
                )
            )  # fmt: skip
        return values

    def _text(self, value: Any, role: str, index: int | None = None, column: str | None = None) -> str:
        if is_chat(value):
            value = chat_text(value)
        if not isinstance(value, str):
            where = self._where(role, index, column)
            kind = "null text" if value is None else "not text"
            raise RowFault(Fault(kind, f"{described(value)} {where}", f"a text {where}", "fix the row"))
        return value

    def _number(self, value: Any, role: str, index: int | None = None) -> float | None:
        if value is None:
            return None
        if not isinstance(value, int | float | Decimal):
            raise RowFault(self._no_number(value, role, index))
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            found = f"{number} {self._where(role, index)}"
            raise RowFault(Fault("not finite", found, "a finite number", "fix it, or remove the candidate"))
        return number

    def _no_number(self, value: Any, role: str, index: int | None) -> Fault:
        where = self._where(role, index)
        return Fault("not a number", f"{described(value)} {where}", f"a number {where}", "fix the row")

    def _where(self, role: str, index: int | None, column: str | None = None) -> str:
        column = column or self.columns.get(role, role)
        return f"under '{column}'" + ("" if index is None else f", place {index}")


def is_numbered(name: str, negative: str = "negative") -> bool:
    """Whether a column holds further negatives: negative_1, or as the column `negative` is called, with another number."""
    own = re.compile(re.escape(_NUMBER.sub("", negative)) + r"_?\d+")
    return _NUMBERED.fullmatch(name) is not None or own.fullmatch(name) is not None


def keys_of(columns: Collection[str], keys: Mapping[str, str]) -> dict[str, str]:
    """Those of `pools.keys` whose columns there are. Numbered negatives stand for the one that is named."""
    return {
        role: column
        for role, column in keys.items()
        if column in columns or (role == "negative" and any(is_numbered(n, column) for n in columns))
    }


def absent_columns(columns: Collection[str], keys: Mapping[str, str]) -> list[Fault]:
    """A fault for each column of `pools.keys` that no row has. `columns`: those that some row has."""
    return [
        Fault(
            "no such column", f"columns {str(sorted(columns))[:160]}", f"a column '{column}', the {role} of pools.keys",
            f"correct pools.keys.{role}{did_you_mean(column, sorted(columns))}",
        )
        for role, column in keys.items()
        if role not in keys_of(columns, keys)
    ]  # fmt: skip


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def recognise(record: Any, keys: Mapping[str, str], name: str = "auto") -> Layout:
    """The layout of a file, from one of its rows.

    Args:
        keys: role -> column, for columns with names of the user's own.
        name: a layout of the config; auto takes the first one whose columns the row has.

    Raises:
        RowFault: the row has the columns of no layout, or lacks some of the named one.
    """
    if not isinstance(record, Mapping):
        raise RowFault(Fault("not a record", described(record), "one record per row", "fix or remove it"))
    columns = {role: column for role, column in keys.items() if column in record}
    stated = {*keys, *(ONE_OR_ALL[role] for role in keys if role in ONE_OR_ALL)}  # these have no other name
    for role, names in NAMES.items():
        found = next((n for n in names if n in record and n not in columns.values()), None)
        if role not in stated and found is not None:
            columns[role] = found
    if "negative" not in columns:
        named = keys.get("negative", "negative")
        numbered = next((n for n in record if is_numbered(n, named)), None)
        columns |= {} if numbered is None else {"negative": numbered}
    if "candidate" in columns and "candidates" not in columns:
        columns = _one_value(columns, record, keys)
    name = ALIASES.get(name, name)
    for layout, needed in NEEDED.items() if name == "auto" else ((name, NEEDED[name]),):
        if all(role in columns for role in needed):
            return Layout(layout, columns)
    wanted = " or ".join(f"{n} ({', '.join(NAMES[r][0] for r in roles)})" for n, roles in NEEDED.items())
    expected = wanted if name == "auto" else ", ".join(NAMES[r][0] for r in NEEDED[name])
    raise RowFault(
        Fault(
            "unknown layout", f"keys {str(list(record))[:160]}", f"the columns of {expected}",
            "name the columns in pools.keys, such as pools.keys.candidates=answers",
        )
    )  # fmt: skip


def _one_value(columns: dict[str, str], record: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, str]:
    """Columns of the layout rows: a name such as `relevance`, whose value is one number, is the reward."""
    if "rewards" not in columns or "rewards" in keys or isinstance(record[columns["rewards"]], list):
        return columns
    columns = dict(columns)
    column = columns.pop("rewards")
    return {"reward": column} | columns


def reward_fault(entry: Entry, low: float, high: float) -> Fault | None:
    """What is wrong with the reward of a candidate; None if nothing is. `low` and `high`: pools.reward_range."""
    if entry.reward is not None and not low <= entry.reward <= high:
        advice = "set pools.reward_range to the range of your rewards, such as pools.reward_range=[0,10]"
        return Fault("reward out of range", f"{entry.reward:g}", f"a number from {low:g} to {high:g}", advice)
    return None
