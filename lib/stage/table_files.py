"""The files of a table that an earlier stage wrote: one file, or a folder of parts. Readers see one table.

A `TableFiles` can be sent to worker processes. Each process compares the hash of a file when it first reads it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lib import durable
from lib.errors import BadData, MissingInput

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lib.schema import TableSchema

Verified = set[tuple[str, str, str]]  # (stage, output, hash) that were compared


@dataclass(frozen=True)
class TableFile:
    path: Path
    sha256: str
    rows: int


@dataclass(frozen=True)
class TableFiles:
    """A table as a sequence of Parquet files.

    Attributes:
        stage, output: what the table is.
        files: in the order of their rows.
        again: the command that makes them, for messages.
        verified: hashes that this process has compared.
    """

    stage: str
    output: str
    files: tuple[TableFile, ...]
    again: str
    verified: Verified = field(default_factory=set, compare=False)

    def __reduce__(self):
        return TableFiles, (
            self.stage,
            self.output,
            self.files,
            self.again,
        )  # another process compares for itself

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def part(self, number: int) -> "TableFiles":
        """The table of one file."""
        return TableFiles(self.stage, self.output, self.files[number : number + 1], self.again, self.verified)

    def check(self, path: Path, sha256: str) -> Path:
        """The path, after its hash was compared. Raises MissingInput or BadData."""
        key = (self.stage, f"{self.output}/{path.name}", sha256)
        if key not in self.verified:
            if not path.exists():
                raise MissingInput(f"{path} is missing; run `{self.again}` again")
            try:
                found = durable.sha256(path)
            except OSError as error:
                raise BadData(f"{path} cannot be read ({error.strerror}); run `{self.again}` again") from None
            if found != sha256:
                raise BadData(
                    f"{path} is damaged or was changed: its sha256 is not the one in {self.stage}/manifest.json; "
                    f"run `{self.again}` again"
                )
            self.verified.add(key)
        return path

    def batches(
        self,
        schema: "TableSchema",
        columns: list[str] | None = None,
        rows: int | None = 65536,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator["pa.RecordBatch"]:
        """The rows [start, stop) in batches of `rows` rows; the last one may have fewer. Memory holds about one batch.

        `rows` None: one batch for each row group.
        """
        import pyarrow as pa

        if rows is None:
            yield from self._pieces(schema, columns, rows, start, stop)
            return
        waiting: list[pa.RecordBatch] = []
        missing = rows
        for batch in self._pieces(schema, columns, rows, start, stop):
            while batch.num_rows:
                waiting.append(batch.slice(0, missing))
                batch = batch.slice(missing)
                missing -= waiting[-1].num_rows
                if not missing:
                    yield from _joined(waiting)
                    waiting, missing = [], rows
        if waiting:
            yield from _joined(waiting)

    def tables(
        self,
        schema: "TableSchema",
        columns: list[str] | None = None,
        rows: int = 65536,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator["pa.Table"]:
        """Like `batches`, but each batch is a table."""
        import pyarrow as pa

        for batch in self.batches(schema, columns, rows, start, stop):
            yield pa.Table.from_batches([batch])

    def metadata(self) -> dict[str, str]:
        """The metadata that the first file has for readers without a manifest."""
        import pyarrow.parquet as pq

        if not self.files:
            return {}
        file = self.files[0]
        found = pq.read_schema(self.check(file.path, file.sha256)).metadata or {}
        return {k.decode(): v.decode() for k, v in found.items() if not k.startswith(b"ARROW:")}

    def _pieces(
        self, schema: "TableSchema", columns: list[str] | None, rows: int | None, start: int, stop: int | None
    ) -> Iterator["pa.RecordBatch"]:
        """The rows [start, stop) as the files give them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        stop, first = self.rows if stop is None else min(stop, self.rows), 0
        for file in self.files:
            low, high = max(start - first, 0), min(stop - first, file.rows)
            first += file.rows
            if low >= high:
                continue
            path = self.check(file.path, file.sha256)
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as opened:
                    names = opened.schema_arrow.names
                    if missing := [f.name for f in schema.arrow if f.name not in names]:
                        raise BadData(
                            f"{path}: columns {missing} are missing; another version of this project wrote the table"
                        )
                    yield from _sliced(opened, columns, rows, low, high)
            except pa.ArrowException as error:
                raise BadData(f"{path} cannot be read: {error}") from None


def _sliced(
    file: "pq.ParquetFile", columns: list[str] | None, rows: int | None, low: int, high: int
) -> Iterator["pa.RecordBatch"]:
    """The rows [low, high) of a file. Row groups without such rows are not read."""
    groups, before, begin = [], 0, 0
    for number in range(file.num_row_groups):
        count = file.metadata.row_group(number).num_rows
        if begin < high and begin + count > low:
            before = begin if not groups else before
            groups.append(number)
        begin += count
    at = before
    for batch in _batches(file, columns, rows, groups):
        kept = batch.slice(max(low - at, 0), max(min(high - at, batch.num_rows) - max(low - at, 0), 0))
        at += batch.num_rows
        if kept.num_rows:
            yield kept


def _batches(
    file: "pq.ParquetFile", columns: list[str] | None, rows: int | None, groups: list[int]
) -> Iterator["pa.RecordBatch"]:
    if rows is not None:
        yield from file.iter_batches(batch_size=rows, row_groups=groups, columns=columns)
        return
    for group in groups:
        size = file.metadata.row_group(group).num_rows
        yield from file.iter_batches(batch_size=size, row_groups=[group], columns=columns)


def _joined(batches: list["pa.RecordBatch"]) -> list["pa.RecordBatch"]:
    import pyarrow as pa

    return batches if len(batches) == 1 else pa.Table.from_batches(batches).combine_chunks().to_batches()
