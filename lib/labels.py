"""A user's own labels: a score in [0, 1] or token classes for each example, in place of what stage 03 would reckon.

| labels.path           | content                                                                                    |
|-----------------------|--------------------------------------------------------------------------------------------|
| a .json file          | a map: example id -> 0.7, or [[start, end, class], ...], or {"score": 0.7, "spans": [...]}  |
|                       | or a list of records {"example_id": "novel:12", "score": 0.7, "spans": [...]}              |
| a .jsonl file         | such a record per line                                                                     |
| a .csv or .tsv file   | columns example_id, score, spans; the spans as JSON                                        |
| a .parquet file       | columns example_id, score (a number), spans (a list of {start, end, class})                |
| a folder              | train_labels.json, held_out_labels.json: maps of the n-th example of the split -> score;    |
|                       | the split `selection` is numbered as a part of train                                       |

All but .parquet may be packed with gzip (.json.gz). Spans are characters of the passage, `end` not included; classes
count from 1, 0 is what no span covers. An empty list of spans says "looked at, nothing found"; null, {} and an empty
cell say nothing, and are no label. Example ids are those of examples.parquet, such as "novel:12". A class of the whole
text is a score: with target_type classification and n classes, class c is any score in the c-th of n equal bands of
[0, 1], such as (c + 0.5) / n for c from 0.

Knows files, ids and a tokenizer; not what is learned from them.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import BadData, MissingInput
from lib.user_files import Faulty, Row, decoded, kind_of, rows, whole

COLUMNS = ("example_id", "score", "spans")
Key = str | tuple[str, int]  # an example id, or split and number
SPLITS = ("train", "held_out")
MOST_CLASSES = 127  # what the tables hold
SHOWN = 8


@dataclass(frozen=True)
class Label:
    """Of one example: `score`, or `spans` (start, end, class) that do not overlap, in order; or both."""

    score: float | None = None
    spans: tuple[tuple[int, int, int], ...] | None = None


@dataclass(frozen=True)
class Fault:
    """What is wrong with the label of one example."""

    kind: str
    source: str
    example: str
    found: str
    expected: str


@dataclass
class Labels:
    """All labels of a path, and what was wrong with others."""

    by_key: dict[Key, Label] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def refuse_faults(self) -> None:
        """Raises BadData that shows the first faults, if there are any."""
        if self.faults:
            first = "; ".join(f"{f.example or f.source}: {f.kind}, {f.found}" for f in self.faults[:SHOWN])
            raise BadData(
                f"{len(self.faults):,} labels are wrong ({first}); 00_check_data.py --overwrite lists them all"
            )

    def of(self, ids: Sequence[str], splits: Sequence[str]) -> list[Label]:
        """The labels of all examples, in their order. Raises BadData that names those without one."""
        numbers = dict.fromkeys(splits, 0) | {"train": 0}
        found, missing = [], []
        for example, own in zip(ids, splits, strict=True):
            split = (
                "train" if own == "selection" else own
            )  # which is taken out of train, and is numbered with it
            label = self.by_key.get(example, self.by_key.get((split, numbers[split])))
            numbers[split] += 1
            if label is None:
                missing.append(example)
            found.append(label)
        if missing:
            more = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
            raise BadData(
                f"labels.path has no label for {len(missing):,} of {len(ids):,} examples: "
                f"{', '.join(missing[:SHOWN])}{more}; give each a label, or leave these texts out of data.path"
            )
        return found


def files_of(path: str) -> list[Path]:
    """The files that hold the labels. Raises MissingInput when there are none, BadData for another kind of file."""
    given = Path(path)
    if given.is_dir():
        names = [f"{split}_labels.json" for split in SPLITS]
        found = [next((f for f in (given / n, given / f"{n}.gz") if f.exists()), given / n) for n in names]
        if absent := [file.name for file in found if not file.exists()]:
            raise MissingInput(f"labels.path: {given} lacks {', '.join(absent)}")
        return found
    if not given.exists():
        raise MissingInput(
            f"labels.path: {given} does not exist; expected a .json, .jsonl, .csv, .tsv or .parquet file, or a folder "
            "with train_labels.json and held_out_labels.json"
        )
    if kind_of(given).removesuffix(".gz") in ("", ".txt"):
        raise BadData(
            f"labels.path: {given} has the ending '{given.suffix}'; expected .json, .jsonl, .csv, .tsv (each also as "
            ".gz) or .parquet"
        )
    return [given]


def read_labels(path: str) -> Labels:
    """All labels, with every fault. Raises MissingInput, and BadData for a file that is no map or table at all."""
    labels = Labels()
    for file in files_of(path):
        split = file.name.partition("_labels.json")[0] if Path(path).is_dir() else None
        try:
            if kind_of(file).removesuffix(".gz") == ".json":
                _read_json(labels, file, split)
            else:
                _read_records(labels, file, rows(file, wanted=COLUMNS))
        except Faulty as faulty:
            raise BadData(f"labels.path: {file} cannot be read: {faulty}") from None
        except OSError as error:
            raise BadData(f"labels.path: {file} cannot be read: {error.strerror or error}") from None
    kinds = {(label.score is not None, label.spans is not None) for label in labels.by_key.values()}
    if len(kinds) > 1:
        labels.faults.append(
            Fault("mixed labels", path, "", "scores for some examples, spans for others", "the same for all")
        )
    if not labels.by_key and not labels.faults:
        labels.faults.append(Fault("no labels", path, "", "none", "a label for every example"))
    return labels


class _Map(list):
    """A JSON map as its pairs: repeated names are still there, and {} is not []. A dictionary would keep the last."""


def _read_json(labels: Labels, file: Path, split: str | None) -> None:
    text, fault = decoded(whole(file))
    if text is None:
        assert fault is not None
        raise Faulty(fault)
    try:
        value = json.loads(text, object_pairs_hook=_Map)
    except (ValueError, RecursionError) as error:
        raise BadData(f"labels.path: {file} is not JSON: {error}") from None
    if isinstance(value, _Map):
        for name, given in value:
            _add(labels, str(file), split, name, given)
    elif split is None and isinstance(value, list) and all(isinstance(record, _Map) for record in value):
        found = (Row(i, f"record {i}", _as_dict(record)) for i, record in enumerate(value))
        _read_records(labels, file, found)
    else:
        raise BadData(
            f"labels.path: {file} must be a map of example ids to labels, {{...}}"
            + (", or a list of records with example_id and score or spans" if split is None else "")
        )


def _as_dict(value: Any) -> Any:
    """Maps as dictionaries, at any depth; one with a repeated name stays what it is, and is refused later."""
    if isinstance(value, _Map):
        names = [name for name, _ in value]
        return {n: _as_dict(v) for n, v in value} if len(set(names)) == len(names) else value
    return [_as_dict(item) for item in value] if isinstance(value, list) else value


def _read_records(labels: Labels, file: Path, found: Iterable[Row]) -> None:
    """Labels from rows with example_id and score or spans; other columns are not read."""
    is_table = kind_of(file).removesuffix(".gz") in (".csv", ".tsv", ".parquet")
    for row in found:
        if row.fault is not None:
            if row.fault.severity == "error":
                labels.faults.append(
                    Fault(row.fault.kind, str(file), row.location, row.fault.found, row.fault.expected)
                )
            continue
        problem = _problem_of_names(list(row.value)) if isinstance(row.value, dict) else "is no record"
        if problem and is_table:
            raise BadData(f"labels.path: {file} {problem}")
        if problem:
            expected = "a record with example_id and score or spans"
            labels.faults.append(Fault("malformed label", str(file), row.location, problem, expected))
            continue
        name, score, spans = (row.value.get(column) for column in COLUMNS)
        if kind_of(file).startswith((".csv", ".tsv")):
            score, spans = _from_cell(score, float), _from_cell(spans, json.loads)
        if name is None or name == "":
            found_, expected = "no example_id", "the id of an example"
            labels.faults.append(Fault("malformed label", str(file), row.location, found_, expected))
            continue
        _add(labels, str(file), None, str(name), {"score": score, "spans": spans}, row.location)


def _problem_of_names(names: list[str]) -> str | None:
    """What is wrong with the keys of a record or the columns of a table."""
    for name in names:
        plain = name.strip().lower().rstrip("s")
        meant = next((column for column in COLUMNS if column.rstrip("s") == plain), None)
        if meant is not None and meant not in names:
            return f"has '{name}'; did you mean '{meant}'?"
    if "example_id" in names and {"score", "spans"} & set(names):
        return None
    return f"has columns {str(names)[:200]}; expected example_id and score or spans"


def _from_cell(cell: str | None, read: Callable[[str], Any]) -> Any:
    """The value in a cell of delimited text: None if it is empty, the text itself if it cannot be read."""
    cell = (cell or "").strip()
    if not cell:
        return None
    try:
        return read(cell) if "_" not in cell else cell  # Python takes 1_0 for a number
    except (ValueError, RecursionError):
        return cell


def _add(labels: Labels, source: str, split: str | None, name: str, given: Any, place: str = "") -> None:
    def wrong(kind: str, found: object, expected: str) -> None:
        where = f"{name} ({place})" if place else name
        labels.faults.append(Fault(kind, source, where, str(found)[:80], expected))

    key: Key = name
    if split is not None:
        if not (name.isascii() and name.isdigit()):
            return wrong("malformed label", f"the key {name!r}", "the number of an example, from 0")
        key = (split, int(name))
    if key in labels.by_key:
        return wrong("repeated label", "a second label", "one label per example")
    given = _as_dict(given)
    if given is None or isinstance(given, _Map):
        found = "null" if given is None else f"a name twice, {list(given)}"
        return wrong("malformed label", found, "a number, a list of spans, or a map of score and spans")
    if not isinstance(given, dict):
        given = {"spans": given} if isinstance(given, list) else {"score": given}
    score, spans = given.get("score"), given.get("spans")
    if set(given) - {"score", "spans"} or (score is None and spans is None):
        return wrong("malformed label", given, "score or spans; [] if there is nothing to be found")
    if score is not None:
        if not isinstance(score, int | float) or isinstance(score, bool):
            return wrong("label not a number", repr(score), "a number in [0, 1]")
        if isinstance(score, float) and not math.isfinite(score):
            return wrong("label not finite", score, "a number in [0, 1]")
        if not 0 <= score <= 1:
            return wrong("label out of range", score, "a number in [0, 1]")
    if spans is not None:
        spans = [_as_triple(span) for span in spans] if isinstance(spans, list) else spans
        if problem := _problem_of(spans):
            return wrong("malformed span", *problem)
    ordered = tuple(sorted(tuple(span) for span in spans)) if spans is not None else None
    labels.by_key[key] = Label(None if score is None else float(score), ordered)


def _as_triple(span: Any) -> Any:
    """[start, end, class] of a span that names them; others as they are."""
    named = isinstance(span, dict) and set(span) == {"start", "end", "class"}
    return [span["start"], span["end"], span["class"]] if named else span


def _problem_of(spans: Any) -> tuple[str, str] | None:
    """(found, expected) of the first span that cannot be."""
    if not isinstance(spans, list):
        return repr(spans), "a list of [start, end, class]"
    for span in spans:
        whole = isinstance(span, list | tuple) and len(span) == 3
        if not whole or not all(isinstance(v, int) and not isinstance(v, bool) for v in span):
            return repr(span), "[start, end, class], three whole numbers"
        start, end, kind = span
        if not 0 <= start < end:
            return repr(span), "0 <= start < end"
        if not 1 <= kind <= MOST_CLASSES:
            return repr(span), f"a class from 1 to {MOST_CLASSES}"
    ordered = sorted(spans)
    for one, other in itertools.pairwise(ordered):
        if other[0] < one[1]:
            return f"{one} and {other}", "spans that do not overlap"
    return None


def classes_of(text: str, offsets: Sequence[tuple[int, int]], label: Label, example: str) -> np.ndarray:
    """(T,) int8 class of each token, by the characters (start, end) it stands for: that of its first labelled one.

    Raises BadData for a span beyond the text.
    """
    by_character = np.zeros(len(text), np.int8)
    for start, end, kind in label.spans or ():
        if end > len(text):
            raise BadData(
                f"labels.path: the span [{start}, {end}, {kind}] of {example} ends beyond its {len(text)} characters"
            )
        by_character[start:end] = kind
    labelled = np.flatnonzero(by_character)
    starts, ends = np.asarray(offsets, int).reshape(-1, 2).T
    first = np.append(labelled, len(text))[np.searchsorted(labelled, starts)]
    return np.where(first < ends, np.append(by_character, 0)[first], 0).astype(np.int8)


class LabelledExamples:
    """Labels joined with a run's examples.

    Args:
        ids, splits: the examples that are to have labels.
        tokenizer: of the run; classes of characters become classes of its tokens.

    Raises:
        BadData: an example has no label.
    """

    def __init__(self, labels: Labels, ids: Sequence[str], splits: Sequence[str], tokenizer: Any):
        self.by_id = dict(zip(ids, labels.of(ids, splits), strict=True))
        self.unused = len(labels.by_key) - len(self.by_id)
        self.tokenizer = tokenizer
        self.counts: Counter[int] = Counter()  # class -> tokens

    def rewards(
        self, rows: Sequence[dict]
    ) -> tuple[np.ndarray, dict[str, np.ndarray], list[np.ndarray] | None]:
        """(rewards, named terms, classes of each row's tokens if there are any) of rows of the candidates' table.

        Scores are rewards as they are. Where there are only classes, the reward is the share of tokens of class 0.
        """
        labels = [self.by_id[row["example_id"]] for row in rows]
        classes = None
        if labels[0].spans is not None:
            classes = [self._classes(row, label) for row, label in zip(rows, labels, strict=True)]
            kinds, counts = np.unique(np.concatenate(classes), return_counts=True)
            self.counts.update(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))
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
            raise BadData(f"{row['example_id']} is tokenised in another way than before; run stage 01 again")
        return classes_of(row["text"], encoded["offset_mapping"], label, row["example_id"])

    def summary(self) -> dict[str, Any]:
        """Figures for the manifest."""
        return {"examples": len(self.by_id), "unused": self.unused, "tokens_by_class": dict(self.counts)}

    def line(self) -> str:
        """The same for people."""
        parts = [f"{len(self.by_id):,} examples have labels of yours"]
        if self.unused:
            parts.append(f"{self.unused:,} labels belong to no example and are not used")
        if self.counts:
            kinds = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(self.counts.items()))
            parts.append(f"tokens by class: {kinds}")
        return "; ".join(parts)
