"""Read a user's labels from files.

| labels.path           | content                                                                                    |
|-----------------------|--------------------------------------------------------------------------------------------|
| a .json file          | a map: example id -> 0.7, or [[start, end, class], ...], or {"score": 0.7, "spans": [...]}  |
|                       | or a list of records {"example_id": "novel:12", "score": 0.7, "spans": [...]}              |
| a .jsonl file         | such a record per line                                                                     |
| a .csv or .tsv file   | columns example_id, score, spans; the spans as JSON                                        |
| a .parquet file       | columns example_id, score (a number), spans (a list of {start, end, class})                |
| a folder              | train_labels.json, held_out_labels.json: maps of the n-th example of the split -> score;    |
|                       | the examples of the split `selection` are numbered as part of train                        |

All but .parquet may be compressed with gzip (.json.gz). Example ids are those of the table examples, such as "novel:12".

Spans count characters of the passage; `end` is exclusive. Classes count from 1, and class 0 is what no span covers. An
empty list of spans means "checked, nothing found". null, {} and an empty cell are not labels.

A class of the whole text is a score. With target_type classification and n classes, [0, 1] is divided into n equal
bands, and class c (from 0) is any score in its band, such as (c + 0.5) / n.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.errors import BadData, MissingInput
from lib.label_values import InvalidLabel, from_cell, score_of, spans_of
from lib.labels import Key, Label, LabelFault, Labels
from lib.user_files.decoding import decode, read_bytes
from lib.user_files.faults import UnreadableFile, kind_of
from lib.user_files.rows import Row, read_rows

COLUMNS = ("example_id", "score", "spans")
SPLITS = ("train", "held_out")


def files_of(path: str) -> list[Path]:
    """The files of labels.path. Raises MissingInput when there are none, BadData for another kind of file."""
    root = Path(path)
    if root.is_dir():
        names = [f"{split}_labels.json" for split in SPLITS]
        files = [next((f for f in (root / n, root / f"{n}.gz") if f.exists()), root / n) for n in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise MissingInput(f"labels.path: {root} lacks {', '.join(missing)}")
        return files
    if not root.exists():
        raise MissingInput(
            f"labels.path: {root} does not exist; expected a .json, .jsonl, .csv, .tsv or .parquet file, or a folder "
            "with train_labels.json and held_out_labels.json"
        )
    if kind_of(root).removesuffix(".gz") in ("", ".txt"):
        raise BadData(
            f"labels.path: {root} has the ending '{root.suffix}'; expected .json, .jsonl, .csv, .tsv (each also as "
            ".gz) or .parquet"
        )
    return [root]


def read_labels(path: str) -> Labels:
    """All labels of labels.path, and all faults. Raises MissingInput, and BadData for a file that is neither map nor table."""
    labels = Labels()
    for file in files_of(path):
        split = file.name.partition("_labels.json")[0] if Path(path).is_dir() else None
        try:
            if kind_of(file).removesuffix(".gz") == ".json":
                _read_json(labels, file, split)
            else:
                _read_records(labels, file, read_rows(file, wanted=COLUMNS))
        except UnreadableFile as error:
            raise BadData(f"labels.path: {file} cannot be read: {error}") from None
        except OSError as error:
            raise BadData(f"labels.path: {file} cannot be read: {error.strerror or error}") from None
    kinds = {(label.score is not None, label.spans is not None) for label in labels.by_key.values()}
    if len(kinds) > 1:
        labels.faults.append(
            LabelFault(
                "mixed labels", path, "", "scores for some examples, spans for others", "the same for all"
            )
        )
    if not labels.by_key and not labels.faults:
        labels.faults.append(LabelFault("no labels", path, "", "none", "a label for every example"))
    return labels


class _PairList(list):
    """A JSON map as a list of pairs. It keeps repeated names, of which a dictionary would keep only the last."""


def _read_json(labels: Labels, file: Path, split: str | None) -> None:
    text, fault = decode(read_bytes(file))
    if text is None:
        assert fault is not None
        raise UnreadableFile(fault)
    try:
        value = json.loads(text, object_pairs_hook=_PairList)
    except (ValueError, RecursionError) as error:
        raise BadData(f"labels.path: {file} is not JSON: {error}") from None
    if isinstance(value, _PairList):
        for name, label in value:
            _add(labels, str(file), (name, split), label)
    elif split is None and isinstance(value, list) and all(isinstance(v, _PairList) for v in value):
        records = (Row(i, f"record {i}", _as_dict(record)) for i, record in enumerate(value))
        _read_records(labels, file, records)
    else:
        raise BadData(
            f"labels.path: {file} must be a map of example ids to labels, {{...}}"
            + (", or a list of records with example_id and score or spans" if split is None else "")
        )


def _as_dict(value: Any) -> Any:
    """Pair lists as dictionaries, at any depth. One with a repeated name stays a pair list and is refused later."""
    if isinstance(value, _PairList):
        names = [name for name, _ in value]
        return {n: _as_dict(v) for n, v in value} if len(set(names)) == len(names) else value
    return [_as_dict(item) for item in value] if isinstance(value, list) else value


def _read_records(labels: Labels, file: Path, rows: Iterable[Row]) -> None:
    """Add the labels of rows with example_id and score or spans. Other columns are not read."""
    is_table = kind_of(file).removesuffix(".gz") in (".csv", ".tsv", ".parquet")

    def add_fault(kind: str, row: Row, found: str, expected: str) -> None:
        labels.faults.append(LabelFault(kind, str(file), row.location, found, expected))

    for row in rows:
        if row.fault is not None:
            if row.fault.severity == "error":
                add_fault(row.fault.kind, row, row.fault.found, row.fault.expected)
            continue
        problem = _problem_of_names(list(row.value)) if isinstance(row.value, dict) else "is not a record"
        if problem and is_table:
            raise BadData(f"labels.path: {file} {problem}")
        if problem:
            add_fault("malformed label", row, problem, "a record with example_id and score or spans")
            continue
        name, score, spans = (row.value.get(column) for column in COLUMNS)
        if kind_of(file).startswith((".csv", ".tsv")):
            score, spans = from_cell(score, float), from_cell(spans, json.loads)
        if name is None or name == "":
            add_fault("malformed label", row, "no example_id", "the id of an example")
            continue
        _add(labels, str(file), (str(name), None), {"score": score, "spans": spans}, row.location)


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


def _add(labels: Labels, source: str, key: tuple[str, str | None], value: Any, location: str = "") -> None:
    """Add a label, or its fault.

    Args:
        key: (example id, None), or (number of the example as text, its split).
        value: the label as JSON: a score, a list of spans, or a map of both.
        location: the row in the file, for messages.
    """
    name, split = key
    try:
        found = _key(name, split)
        if found in labels.by_key:
            raise InvalidLabel("repeated label", "a second label", "one label per example")
        labels.by_key[found] = _parse_label(value)
    except InvalidLabel as error:
        example = f"{name} ({location})" if location else name
        labels.faults.append(LabelFault(error.kind, source, example, error.found, error.expected))


def _key(name: str, split: str | None) -> Key:
    if split is None:
        return name
    if not (name.isascii() and name.isdigit() and len(name) < 19):
        raise InvalidLabel("malformed label", f"the key {name!r}", "the number of an example, from 0")
    return split, int(name)


def _parse_label(value: Any) -> Label:
    value = _as_dict(value)
    if value is None or isinstance(value, _PairList):
        found = "null" if value is None else f"a repeated name, {list(value)}"
        raise InvalidLabel("malformed label", found, "a number, a list of spans, or a map of score and spans")
    if not isinstance(value, dict):
        value = {"spans": value} if isinstance(value, list) else {"score": value}
    score, spans = value.get("score"), value.get("spans")
    if set(value) - {"score", "spans"} or (score is None and spans is None):
        raise InvalidLabel("malformed label", value, "score or spans; [] if there is nothing to be found")
    return Label(None if score is None else score_of(score), None if spans is None else spans_of(spans))
