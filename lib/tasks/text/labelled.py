"""Labels beside the text: read from the row of a document, checked, and moved to the characters of the clean text."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.digest_table import DigestTable
from lib.label_values import (
    InvalidLabel,
    Span,
    class_of,
    from_cell,
    plain,
    score_of,
    spans_in_json,
    spans_of,
)
from lib.sections.data import DataConfig
from lib.user_files.faults import Fault

ADVICE = "fix the value, or leave the row out"
_WHITE = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
_REMOVED = np.array(  # control characters that cleaning removes
    [*range(0x09), *range(0x0E, 0x1C), *range(0x7F, 0x85), *range(0x86, 0xA0), 0xFEFF], np.uint32
)


@dataclass(frozen=True)
class RawLabels:
    """What stands beside a text, as the file has it. None: no value.

    Attributes:
        in_cells: values of delimited text are all strings.
    """

    label: Any = None
    spans: Any = None
    group: Any = None
    in_cells: bool = False


@dataclass(frozen=True)
class TextLabels:
    """The labels of a document; see `lib.tasks.Document`. Spans count characters of the clean text.

    `visible`: the same spans in visible characters, which are equal for texts that differ in white space.
    """

    group: str | None = None
    label: float | None = None
    spans: tuple[Span, ...] | None = None
    visible: tuple[Span, ...] | None = None


def raw_labels(record: dict[str, Any], data: DataConfig, in_cells: bool) -> RawLabels:
    """The values of a row under the keys of the config."""
    keys = (data.label_key, data.spans_key, data.group_key)
    label, spans, group = (None if key is None else record.get(key) for key in keys)
    return RawLabels(label, spans, group, in_cells)


def read_labels(
    raw: RawLabels | None, before: Any, after: str, data: DataConfig
) -> tuple[TextLabels, list[Fault]]:
    """The labels of a document, and their faults.

    Args:
        raw: None for a text without a row, such as that of a .txt file.
        before, after: the text of the file, and the same text after cleaning.
    """
    found: dict[str, Any] = {}
    faults: list[Fault] = []
    if raw is None:
        advice = "give a .jsonl, .csv, .tsv or .parquet file, or leave it out"
        missing = "label" if data.has_labels else "group"
        expected = f"a row with text and {missing}"
        return TextLabels(), [Fault(f"no {missing}", "a text without fields", expected, advice)]
    if data.group_key is not None:
        if _is_missing(raw.group):
            faults.append(Fault("no group", "no value", f"a value under '{data.group_key}'", ADVICE))
        else:
            found["group"] = plain(raw.group)
    for key, name, value in (("label", data.label_key, raw.label), ("spans", data.spans_key, raw.spans)):
        if name is None:
            continue
        try:
            if _is_missing(value):
                expected = "a list, [] if there is nothing" if key == "spans" else "a label"
                raise InvalidLabel("no label", "no value", f"{expected} under '{name}'")
            found[key] = (
                _label(value, raw, data) if key == "label" else _spans(value, str(before), after, data)
            )
        except InvalidLabel as error:
            expected = error.expected if name in error.expected else f"{error.expected}, under '{name}'"
            faults.append(Fault(error.kind, error.found, expected, _advice(error, value, data, key)))
    if found.get("spans"):
        before_each = np.append(0, np.cumsum(_is_ink(after)))  # visible characters before each character
        found["visible"] = tuple(
            (int(before_each[start]), int(before_each[end]), kind) for start, end, kind in found["spans"]
        )
    return TextLabels(**found), faults


def _is_missing(value: Any) -> bool:
    """Whether there is no value: null, NaN (null in tables), or an empty cell."""
    return (
        value is None
        or (isinstance(value, float) and value != value)
        or (isinstance(value, str) and not value.strip())
    )


def _label(value: Any, raw: RawLabels, data: DataConfig) -> float:
    if data.label_classes is not None:
        return float(class_of(value, data.label_classes))
    return score_of(from_cell(value, float) if raw.in_cells else value)


def _advice(error: InvalidLabel, value: Any, data: DataConfig, key: str) -> str:
    """What to do. `key`: label or spans."""
    if error.kind == "label not a number" and isinstance(value, str):
        return "fix the value or, if it is the name of a class, list the names in data.label_classes"
    if error.kind == "label out of range":
        return "fix the value or, if it is the number of a class, name the classes in data.label_classes"
    if error.kind == "unknown class":
        setting = "data.label_classes" if key == "label" else "data.span_classes"
        return f"fix the value, add the class to {setting}, or set data.drop=[unknown class]"
    return "fix it, leave the row out, or set data.drop=[no label]" if error.kind == "no label" else ADVICE


def _spans(value: Any, before: str, after: str, data: DataConfig) -> tuple[Span, ...]:
    """The spans, in characters of the clean text."""
    spans = spans_of(spans_in_json(value), data.span_classes)
    if spans and spans[-1][1] > len(before):
        raise InvalidLabel(
            "malformed span", list(spans[-1]), f"an end within the {len(before):,} characters of the text"
        )
    return spans if before == after else moved(spans, before, after)


def moved(spans: tuple[Span, ...], before: str, after: str) -> tuple[Span, ...]:
    """The spans on a text whose line ends, control characters and white space have changed.

    Visible characters are the same in both texts, and in the same order. So a span keeps its visible characters; white space at
    its ends belongs to it if it did before. A span without visible characters vanishes.
    """
    ink_before, ink_after = (np.flatnonzero(_is_ink(text)) for text in (before, after))
    assert len(ink_before) == len(ink_after), "cleaning changed visible characters"
    result: list[Span] = []
    for start, end, class_id in spans:
        first, stop = np.searchsorted(ink_before, [start, end])  # numbers of its visible characters
        if first == stop:
            continue
        new_start, new_end = int(ink_after[first]), int(ink_after[stop - 1]) + 1
        if ink_before[first] > start:  # from the end of the visible character before it
            new_start = int(ink_after[first - 1]) + 1 if first else 0
        if ink_before[stop - 1] + 1 < end:
            new_end = int(ink_after[stop]) if stop < len(ink_after) else len(after)
        if result and result[-1][1] > new_start:
            new_start = result[-1][1]
        result.append((new_start, new_end, class_id))
    return tuple(result)


def _is_ink(text: str) -> np.ndarray:
    """(characters,) bool: whether a character is visible, and so is in the clean text."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return ~np.isin(points, _WHITE) & ~np.isin(points, _REMOVED)


@dataclass
class LabelledTexts:
    """The labels of all documents: contradictions between equal texts, and how often each class occurs."""

    data: DataConfig
    known: DigestTable
    counts: Counter[int] = field(default_factory=Counter)

    def contradiction(self, digest: bytes, source: str, place: str, labels: TextLabels) -> Fault | None:
        """The fault of a text that occurred before with other labels. `digest`: of the text; `place`: in its `source`."""
        words, whole = self.in_words(labels), repr((labels.label, labels.visible))
        if not self.data.has_labels or self.known.add(digest, json.dumps([source, place, words, whole])):
            return None
        its_source, other, other_words, other_whole = json.loads(str(self.known.get(digest)))
        if other_whole == whole:
            return None
        other = other if its_source == source else f"{its_source}, {other},"
        found = f"{words}, but {other} has the same text with {other_words}"
        keys = " and ".join(
            f"'{key}'" for key in (self.data.label_key, self.data.spans_key) if key is not None
        )
        expected = f"the same label under {keys} for the same text"
        return Fault("contradicting labels", found, expected, "fix one, or leave one row out")

    def count(self, labels: TextLabels) -> None:
        """Count a document that is kept."""
        if labels.label is not None and self.data.label_classes is not None:
            self.counts[int(labels.label)] += 1

    def absent_classes(self) -> Iterator[Fault]:
        """A fault for each class without documents."""
        for number, name in enumerate(self.data.label_classes or ()):
            if not self.counts[number]:
                advice = "give documents of this class, or take its name out of data.label_classes"
                yield Fault("class without documents", name, "documents of every class", advice)

    def in_words(self, labels: TextLabels) -> str:
        """The labels of a document, for messages."""
        parts = []
        if labels.label is not None:
            names = self.data.label_classes
            parts.append(f"label {labels.label:g}" if names is None else names[int(labels.label)])
        if labels.spans is not None:
            parts.append(f"spans {[list(span) for span in labels.spans]}"[:80])
        return "; ".join(parts)
