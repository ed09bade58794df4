"""A user's labels, joined with the examples of a run: a score in [0, 1] or token classes for each example.

They replace the rewards and token labels that stage 03 would compute. lib/label_files.py reads them from files.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.errors import BadData

Key = str | tuple[str, int]  # an example id, or (split, number of the example in the split)
MAX_LISTED = 8
OUTSIDE = "unlabelled"  # class 0 of tokens: outside of all spans


def class_names(
    mode: str, target_type: str, label_classes: Sequence[str] | None, span_classes: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The names that the user gave to the classes of a model of this mode; None if there are none."""
    if mode == "token_classifier" and span_classes is not None:
        return (OUTSIDE, *span_classes)
    if mode == "sequence_scorer" and target_type == "classification" and label_classes is not None:
        return tuple(label_classes)
    return None


@dataclass(frozen=True)
class Label:
    """The label of one example: `score`, or `spans` (start, end, class), or both. Spans are sorted and do not overlap."""

    score: float | None = None
    spans: tuple[tuple[int, int, int], ...] | None = None


@dataclass(frozen=True)
class LabelFault:
    """What is wrong with the label of one example."""

    kind: str
    source: str
    example: str
    found: str
    expected: str


@dataclass
class Labels:
    """All valid labels of a path, and the faults of the others."""

    by_key: dict[Key, Label] = field(default_factory=dict)
    faults: list[LabelFault] = field(default_factory=list)

    def refuse_faults(self) -> None:
        """Raises BadData that lists the first faults, if there are any."""
        if self.faults:
            first = "; ".join(
                f"{f.example or f.source}: {f.kind}, {f.found}" for f in self.faults[:MAX_LISTED]
            )
            raise BadData(
                f"{len(self.faults):,} labels are wrong ({first}); 00_check_data.py --overwrite lists them all"
            )

    def of(self, ids: Sequence[str], splits: Sequence[str]) -> list[Label]:
        """The labels of all examples, in their order. Raises BadData that names the examples without a label."""
        next_number = dict.fromkeys(splits, 0) | {"train": 0}
        found, missing = [], []
        for example, split in zip(ids, splits, strict=True):
            numbered_in = "train" if split == "selection" else split  # selection was taken out of train
            label = self.by_key.get(example, self.by_key.get((numbered_in, next_number[numbered_in])))
            next_number[numbered_in] += 1
            if label is None:
                missing.append(example)
            found.append(label)
        if missing:
            more = f" and {len(missing) - MAX_LISTED:,} more" if len(missing) > MAX_LISTED else ""
            raise BadData(
                f"labels.path has no label for {len(missing):,} of {len(ids):,} examples: "
                f"{', '.join(missing[:MAX_LISTED])}{more}; give each a label, or remove these texts from data.path"
            )
        return found


def classes_of(text: str, offsets: Sequence[tuple[int, int]], label: Label, example: str) -> np.ndarray:
    """(T,) int8 class of each token: that of its first labelled character, 0 if it has none.

    `offsets`: the characters (start, end) of each token. Raises BadData for a span that ends beyond the text.
    """
    by_character = np.zeros(len(text), np.int8)
    for start, end, class_id in label.spans or ():
        if end > len(text):
            raise BadData(
                f"labels.path: the span [{start}, {end}, {class_id}] of {example} ends beyond its {len(text)} characters"
            )
        by_character[start:end] = class_id
    labelled = np.flatnonzero(by_character)
    starts, ends = np.asarray(offsets, int).reshape(-1, 2).T
    first = np.append(labelled, len(text))[np.searchsorted(labelled, starts)]
    return np.where(first < ends, np.append(by_character, 0)[first], 0).astype(np.int8)


@dataclass
class LabelCounts:
    """What labels beside the text say, document by document.

    Attributes:
        classes, span_classes: names of the classes; None for scores, and for span classes by number.
    """

    classes: Sequence[str] | None
    span_classes: Sequence[str] | None
    labelled: int = 0
    total: float = 0.0  # sum of the labels
    by_class: Counter[str] = field(default_factory=Counter)
    spans: Counter[str] = field(default_factory=Counter)

    def add(self, label: float | None, spans: Sequence[dict[str, int]] | None) -> None:
        """Count the labels of a document."""
        if label is not None:
            self.labelled, self.total = self.labelled + 1, self.total + label
            if self.classes is not None:
                self.by_class[self.classes[int(label)]] += 1
        names = self.span_classes
        self.spans.update(str(s["class"]) if names is None else names[s["class"] - 1] for s in spans or ())

    def summary(self) -> dict[str, Any]:
        """Figures for the manifest."""
        found: dict[str, Any] = {}
        if self.classes is not None:
            found["documents_by_class"] = dict(self.by_class)
        elif self.labelled:
            found |= {"labelled": self.labelled, "mean": self.total / self.labelled}
        return found | ({"spans_by_class": dict(self.spans)} if self.spans else {})

    def line(self) -> str:
        """The same figures as a line for the user; empty without labels."""
        parts = [f"{name} {count:,}" for name, count in sorted(self.by_class.items())]
        if self.classes is None and self.labelled:
            parts.append(f"{self.labelled:,} scores, mean {self.total / self.labelled:.3f}")
        parts += [f"spans of {name}: {count:,}" for name, count in sorted(self.spans.items())]
        return f"labels: {', '.join(parts)}" if parts else ""


class LabelledExamples:
    """Labels joined with the examples of a run.

    Args:
        ids, splits: the examples that need labels.
        tokenizer: of the run. Classes of characters become classes of its tokens.

    Raises:
        BadData: an example has no label.
    """

    def __init__(self, labels: Labels, ids: Sequence[str], splits: Sequence[str], tokenizer: Any):
        self.by_id = dict(zip(ids, labels.of(ids, splits), strict=True))
        self.num_unused = len(labels.by_key) - len(self.by_id)
        self.tokenizer = tokenizer
        self.counts: Counter[int] = Counter()  # class -> tokens

    def rewards(
        self, rows: Sequence[dict]
    ) -> tuple[np.ndarray, dict[str, np.ndarray], list[np.ndarray] | None]:
        """(rewards, named terms, token classes of each row or None) for rows of the table of candidates.

        A score is the reward. Without scores, the reward is the fraction of tokens of class 0.
        """
        labels = [self.by_id[row["example_id"]] for row in rows]
        classes = None
        if labels[0].spans is not None:
            classes = [self._classes(row, label) for row, label in zip(rows, labels, strict=True)]
            values, counts = np.unique(np.concatenate(classes), return_counts=True)
            self.counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if labels[0].score is not None:
            reward = np.array([label.score for label in labels], float)
        else:
            reward = np.array([float((row == 0).mean()) if len(row) else 1.0 for row in classes or ()])
        return reward, {"label": reward}, classes

    def _classes(self, row: dict, label: Label) -> np.ndarray:
        encoded = self.tokenizer(
            row["text"], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        if list(encoded["input_ids"]) != list(row["token_ids"]):
            raise BadData(
                f"the tokenizer now gives other tokens for {row['example_id']} than in stage 01; run stage 01 again"
            )
        return classes_of(row["text"], encoded["offset_mapping"], label, row["example_id"])

    def summary(self) -> dict[str, Any]:
        """Figures for the manifest."""
        return {
            "examples": len(self.by_id),
            "unused": self.num_unused,
            "tokens_by_class": dict(self.counts),
        }

    def line(self) -> str:
        """The same figures as a line for the user."""
        parts = [f"{len(self.by_id):,} examples have your labels"]
        if self.num_unused:
            parts.append(f"{self.num_unused:,} labels match no example and are not used")
        if self.counts:
            counts = ", ".join(f"{class_id}: {count:,}" for class_id, count in sorted(self.counts.items()))
            parts.append(f"tokens by class: {counts}")
        return "; ".join(parts)
