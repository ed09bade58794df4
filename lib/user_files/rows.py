"""Read the rows of a file of records: .jsonl, .json, .csv, .tsv and .parquet."""

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import did_you_mean
from lib.user_files import decoding
from lib.user_files.decoding import decode, first_utf8_fault, length_fault, open_bytes, read_bytes, utf8_fault
from lib.user_files.faults import Fault, UnreadableFile, kind_of

MAX_RATIO, MAX_ROWS_PER_BYTE = 200, 100  # of a Parquet file; real texts shrink by less than 20 times


class Row(NamedTuple):
    """One row, or the fault of it. `number`: the line, from 1, for .jsonl; otherwise the row, from 0."""

    number: int
    location: str
    value: Any = None
    fault: Fault | None = None


def read_rows(
    path: Path, columns: Mapping[str, str] | None = None, wanted: Sequence[str] = ()
) -> Iterator[Row]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, one at a time. A row that cannot be read has a fault.

    Args:
        columns: for tables, the columns that are read and must exist, each with the setting that names it. None: all
            columns. In other formats a row is one whole JSON value.
        wanted: further column names by which the delimiter of a .csv is recognised.

    Raises:
        OSError: the file cannot be opened.
    """
    kind = kind_of(path).removesuffix(".gz")
    count = 0
    try:
        if kind == ".jsonl":
            found = _json_lines(path)
        elif kind == ".json":
            found = _json_list(path)
        elif kind == ".parquet":
            found = _parquet(path, columns)
        else:
            found = _delimited(path, columns, (*(columns or ()), *wanted))
        for row in found:
            yield row
            count += 1
    except UnreadableFile as error:
        yield Row(count, f"after {count:,} rows" if count else "", fault=error.fault)
        return
    if not count:
        fault = Fault("empty", "no rows", "rows of text", "it is left out", "warning")
        yield Row(0, "", fault=fault)


def _json_lines(path: Path) -> Iterator[Row]:
    offset = 0  # bytes of the file before the next line
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(decoding.MAX_BYTES + 1), b""), 1):
            if len(line) > decoding.MAX_BYTES:
                raise UnreadableFile(length_fault(f"in line {number}"))
            start, offset = offset, offset + len(line)
            row = Row(number, f"line {number}")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield row._replace(value=json.loads(text))
            except UnicodeDecodeError as error:
                yield row._replace(fault=utf8_fault(error, start))
            except (ValueError, RecursionError) as error:
                found = f"{text[:60]!r}: {error}"
                yield row._replace(
                    fault=Fault("not JSON", found, "one JSON object per line", "fix or remove the line")
                )


def _json_list(path: Path) -> Iterator[Row]:
    text, fault = decode(read_bytes(path))
    if text is None:
        raise UnreadableFile(fault or Fault("encoding", "bytes", "UTF-8", "convert it"))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(
            Fault("not JSON", str(error)[:120], "a list of records", "fix the file")
        ) from None
    if not isinstance(values, list):
        found = f"{type(values).__name__} {str(values)[:40]}"
        advice = "give one list of records, [{...}, ...], or one record per line in a .jsonl file"
        raise UnreadableFile(Fault("no list", found, "a list of records", advice))
    for number, value in enumerate(values):
        yield Row(number, f"record {number}", value)


def _delimited(path: Path, columns: Mapping[str, str] | None, wanted: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(decoding.MAX_BYTES)
    last = 0  # line on which the previous row ended
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        try:
            top = [_read_line(text)]
            while top[-1].isspace():
                top.append(_read_line(text))
            if not top[-1]:
                return
            lines = itertools.chain(top, iter(lambda: _read_line(text), ""))
            reader = csv.reader(lines, delimiter=_delimiter(top[-1], wanted), strict=True)
            filled = (fields for fields in reader if fields)  # a blank line is not a row
            header = [name.strip() for name in next(filled)]
            _check_columns(columns, header)
            last = reader.line_num
            for number, fields in enumerate(filled):
                location, last = f"row {number}, line {last + 1}", reader.line_num
                if len(fields) < len(header) or any(fields[len(header) :]):
                    found = f"{len(fields)} fields, {str(fields)[:60]}"
                    advice = "put double quotes around a text that contains the delimiter"
                    fault = Fault("malformed row", found, f"{len(header)} fields as in the header", advice)
                    yield Row(number, location, fault=fault)
                else:
                    yield Row(number, location, dict(zip(header, fields, strict=False)))
        except UnicodeDecodeError:
            raise UnreadableFile(first_utf8_fault(path)) from None
        except csv.Error as error:
            advice = "fix this line; nothing after it was read"
            raise UnreadableFile(
                Fault("damaged", f"line {last + 1}: {error}", "delimited text", advice)
            ) from None
        finally:
            with contextlib.suppress(ValueError):
                text.detach()  # `open_bytes` closes the file


def _read_line(text: io.TextIOWrapper) -> str:
    line = text.readline(decoding.MAX_BYTES + 1)
    if len(line) > decoding.MAX_BYTES:
        raise UnreadableFile(length_fault("in a line"))
    return line


def _delimiter(header: str, wanted: Sequence[str]) -> str:
    """The delimiter, out of comma, semicolon and tab, that finds the most wanted names in the header, then the most fields."""

    def score(delimiter: str) -> tuple[int, int]:
        fields = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        return sum(name in fields for name in wanted), len(fields)

    return max(",;\t", key=score)


def _check_columns(columns: Mapping[str, str] | None, names: Sequence[str]) -> None:
    """Raises UnreadableFile unless a table has all columns, and none twice."""
    for name, setting in (columns or {}).items():
        if name not in names:
            fault = Fault(
                "no text" if setting == "data.text_key" else "no column",
                f"columns {str(list(names))[:200]}",
                f"a column '{name}'",
                f"set {setting}{did_you_mean(name, names)}",
            )
            raise UnreadableFile(fault)
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        found = f"{', '.join(repeated)} more than once"
        raise UnreadableFile(
            Fault("repeated column", found, "a different name for each column", "rename them")
        )


def _refuse_bomb(metadata: Any, size: int) -> None:
    """Raises UnreadableFile if a small file says that it holds far more than a real table of its size."""
    rows = metadata.num_rows
    held = sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
    if (rows > 2**20 and rows > MAX_ROWS_PER_BYTE * size) or (
        held > decoding.MAX_BYTES and held > MAX_RATIO * size
    ):
        found = f"{rows:,} rows, {held:,} bytes in a file of {size:,}"
        raise UnreadableFile(
            Fault("too long", found, "a table of real texts", "write the table again, without padding")
        )


def _parquet(path: Path, columns: Mapping[str, str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path if _is_text(path) else path.open("rb"))
        _refuse_bomb(file.metadata, path.stat().st_size)
        _check_columns(columns, file.schema_arrow.names)
        chosen = None if columns is None else list(columns)
        for batch in file.iter_batches(batch_size=64, columns=chosen):
            for record in _records(batch):
                yield Row(number, f"row {number}", record)
                number += 1
    except (PermissionError, FileNotFoundError):
        raise  # for the caller, as with the other kinds
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        fault = Fault("damaged", str(error)[:120], "a Parquet file that can be read", "write the file again")
        yield Row(number, f"row {number}", fault=fault)


def _is_text(path: Path) -> bool:
    """Whether the name of a file is UTF-8, which pyarrow needs to open it by name."""
    return str(path).encode("utf-8", "replace").decode() == str(path)


def _records(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch. Raises UnreadableFile for a date, a duration or a time zone that Python does not have."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except (OverflowError, ValueError) as error:
                found = f"column '{name}' of type {column.type}: {str(error)[:80]}"
                advice = "write this column as text, or leave it out"
                raise UnreadableFile(
                    Fault("unreadable column", found, "values that Python can hold", advice)
                ) from None
        raise
