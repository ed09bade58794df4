"""The documents of a run as detectors read them: texts, windows of tokens, and which of them and of their tokens are synthetic.

Without labels beside the text, every candidate is a document: the original text, and texts that the generator rewrote.

Legend: D documents, W windows.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lib import randomness, schema
from lib.artifacts import Stage
from lib.config import Config
from lib.detection import Windows
from lib.log import say

COLUMNS = ["example_id", "candidate_id", "split", "kind", "text", "token_ids", "token_labels", "label"]


@dataclass(frozen=True)
class LabelledDocuments:
    """Documents of one split.

    Attributes:
        names: (D,) of the documents; groups: (D,) of each.
        synthetic: (D,) bool, whether the label is not that of original text.
        texts: (W,) of the windows; ids: (W,) their tokens; classes: (W,) the class of each token, 0 outside of spans.
        document: (W,) number of the document of each window.
        gaps: (W,) what is between a window and the one before: a space where the tokenizer dropped it. None: nothing.
    """

    names: list[str]
    groups: np.ndarray
    synthetic: np.ndarray
    texts: list[str]
    ids: list[np.ndarray]
    classes: list[np.ndarray]
    document: np.ndarray
    gaps: list[str] | None = None

    @cached_property
    def windows(self) -> Windows:
        return Windows(self.document, np.array([max(len(ids), 1) for ids in self.ids]))

    @cached_property
    def whole_texts(self) -> list[str]:
        """(D,) the texts of the documents."""
        found: list[list[str]] = [[] for _ in self.names]
        for window, document in enumerate(self.document.tolist()):
            found[document].append(self.gap(window) + self.texts[window])
        return ["".join(parts) for parts in found]

    def gap(self, window: int) -> str:
        """What is between a window and the one before it in its document."""
        is_first = window == 0 or self.document[window - 1] != self.document[window]
        return "" if self.gaps is None or is_first else self.gaps[window]

    def of_document(self, number: int) -> range:
        """The windows of a document."""
        first = self.windows.first
        end = first[number + 1] if number + 1 < len(first) else len(self.document)
        return range(int(first[number]), int(end))

    def __len__(self) -> int:
        return len(self.names)


def read_documents(stage: Stage, config: Config, split: str, limit: int) -> LabelledDocuments:
    """The documents of a split: all, or a random sample of at most about `limit`, which a line says."""
    share = min(1.0, limit / max(_count_documents(stage, config, split), 1))

    def is_chosen(name: str) -> bool:
        return share >= 1 or randomness.hash_fraction(config.seed, "documents for detection", name) < share

    groups, behind_space = _groups(stage, config, split, is_chosen)
    number: dict[str, int] = {}
    group_of: list[str] = []
    synthetic: list[bool] = []
    texts: list[str] = []
    ids: list[np.ndarray] = []
    classes: list[np.ndarray] = []
    document: list[int] = []
    gaps: list[str] = []
    for row in _rows(stage, split):
        name = _name(row, config)
        if not is_chosen(name):
            continue
        if name not in number:
            number[name] = len(number)
            group_of.append(groups[row["example_id"]])
            synthetic.append(False)
        synthetic[number[name]] |= _is_synthetic(row, config)
        texts.append(row["text"])
        ids.append(np.asarray(row["token_ids"], np.int64))
        classes.append(np.asarray(row["token_labels"], np.int64))
        document.append(number[name])
        dropped = row["example_id"] in behind_space and texts[-1][:1].strip() == texts[-1][:1]
        gaps.append(" " if dropped and not (len(texts) > 1 and texts[-2][-1:].isspace()) else "")
    if share < 1:
        say(f"detection reads a random sample of {len(number):,} documents of the split {split}")
    return LabelledDocuments(
        list(number),
        np.array(group_of),
        np.array(synthetic, bool),
        texts,
        ids,
        classes,
        np.array(document, np.int64),
        gaps,
    )


def _rows(stage: Stage, split: str) -> Iterator[dict]:
    for table in stage.tables("02_generate_candidates", "candidates", schema.CANDIDATES, COLUMNS, rows=4096):
        for row in table.to_pylist():
            if row["split"] == split:
                yield row


def _examples(stage: Stage, split: str) -> Iterator[tuple[str, str, str | None]]:
    """(id, group, record) of the examples of a split, in order."""
    columns = ["example_id", "group", "split", "record"]
    for table in stage.tables("01_prepare_dataset", "examples", schema.EXAMPLES, columns):
        rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
        yield from ((example, group, record) for example, group, of, record in rows if of == split)


def _count_documents(stage: Stage, config: Config, split: str) -> int:
    """The windows of a document follow each other."""
    if not config.data.has_labels:
        return sum(1 for _ in _examples(stage, split)) * config.candidates.per_example
    return sum(1 for _ in itertools.groupby(_document_of(example) for example, *_ in _examples(stage, split)))


def _groups(
    stage: Stage, config: Config, split: str, is_chosen: Callable[[str], bool]
) -> tuple[dict[str, str], set[str]]:
    """(the groups of the examples of which a document is chosen, those of them behind white space)."""
    numbers = range(config.candidates.per_example)

    def is_needed(example: str) -> bool:
        if config.data.has_labels:
            return is_chosen(_document_of(example))
        return any(is_chosen(f"{example}/{number}") for number in numbers)

    groups: dict[str, str] = {}
    behind_space: set[str] = set()
    for example, group, record in _examples(stage, split):
        if is_needed(example):
            groups[example] = group
            if record is not None and json.loads(record).get("behind_space"):
                behind_space.add(example)
    return groups, behind_space


def _document_of(example: str) -> str:
    return example.rpartition(":")[0]


def _name(row: dict, config: Config) -> str:
    if config.data.has_labels:
        return _document_of(row["example_id"])
    return f"{row['example_id']}/{row['candidate_id']}"


def _is_synthetic(row: dict, config: Config) -> bool:
    data = config.data
    if not data.has_labels:
        return row["kind"] != "original"
    if data.label_key is None:
        return any(row["token_labels"])
    return row["label"] != 0 if data.label_classes is not None else row["label"] < 1
