"""The parts of a stage: tables that are written as folders of files, each complete on its own.

    <stage>/candidates/part_00000.parquet      one file per table and part
    <stage>/parts/part_00000.json              the manifest of the part, written last: with it, the part is complete

A part is a function of its number and of its key. The key is a digest of everything else that it depends on: settings,
code, and hashes of what it reads. A part with another key counts as absent. So to make a table, to resume it and to share
it out are the same: make the parts that are not there.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import durable
from lib.errors import BadData
from lib.runs import plain
from lib.stage.table_files import TableFile, TableFiles
from lib.table_writer import KeyHashes, TableWriter

if TYPE_CHECKING:
    import pyarrow as pa

    from lib.schema import TableSchema

MANIFESTS = "parts"  # the folder of the parts' manifests


def file_name(number: int, suffix: str = ".parquet") -> str:
    return f"part_{number:05d}{suffix}"


def part_key(*dependencies: Any) -> str:
    """The digest of what parts depend on, as JSON can hold it."""
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Parts:
    """The parts of the tables that one stage writes. It can be sent to worker processes.

    Attributes:
        folder: of the stage.
        key: of the parts.
        schemas: name of a table -> its schema.
        metadata: stored in every file.
    """

    folder: Path
    key: str
    schemas: Mapping[str, "TableSchema"]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def path(self, table: str, number: int) -> Path:
        return self.folder / table / file_name(number)

    def manifest(self, number: int) -> dict[str, Any] | None:
        """The manifest of a part; None if the part is absent, has another key, or has lost a file."""
        try:
            found = durable.read_json(self._manifest_path(number))
            if found["key"] != self.key:
                return None
            sizes = {name: self.path(name, number).stat().st_size for name in self.schemas}
            return found if all(found["tables"][n]["bytes"] == size for n, size in sizes.items()) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of the parts that are absent."""
        return [number for number in numbers if self.manifest(number) is None]

    @contextlib.contextmanager
    def writing(self, number: int) -> Iterator["PartWriter"]:
        """Write a part. It is there when the block ends without an error, and otherwise absent."""
        manifest = self._manifest_path(number)
        manifest.parent.mkdir(exist_ok=True)
        manifest.unlink(missing_ok=True)  # of another key: its files are replaced now
        with contextlib.ExitStack() as stack:
            writers = {}
            for name, schema in self.schemas.items():
                self.path(name, number).parent.mkdir(exist_ok=True)
                temporary = stack.enter_context(durable.replacing(self.path(name, number)))
                writers[name] = stack.enter_context(_closing(TableWriter(temporary, schema, self.metadata)))
            part = PartWriter(writers)
            yield part
        tables = {name: describe(self.path(name, number), writer) for name, writer in writers.items()}
        content = {"part": number, "key": self.key, "tables": tables, "counters": plain(part.counters)}
        if part.environment:
            content["environment"] = part.environment
        durable.write_json(manifest, content)

    def _manifest_path(self, number: int) -> Path:
        return self.folder / MANIFESTS / file_name(number, ".json")


class PartWriter:
    """Writes the tables of one part.

    Attributes:
        counters: figures of the part for its manifest, as JSON can hold them.
        environment: of the models that made the part, if any did: device, precision, versions; see `Runtime.of_parts`.
    """

    def __init__(self, writers: Mapping[str, TableWriter]):
        self._writers = writers
        self.counters: dict[str, Any] = {}
        self.environment: dict[str, str] = {}

    def write(self, table: str, rows: "pa.Table") -> None:
        """Append rows to one of the tables, as a row group."""
        self._writers[table].write(rows)


@contextlib.contextmanager
def _closing(writer: TableWriter) -> Iterator[TableWriter]:
    try:
        yield writer
    finally:
        writer.close()


def describe(path: Path, writer: TableWriter) -> dict[str, Any]:
    """The record of a file for a manifest."""
    return {
        "rows": writer.num_rows,
        "sha256": durable.sha256_file(path),
        "bytes": path.stat().st_size,
        "columns": writer.columns,
    }


@dataclass
class MadeParts:
    """All parts of a stage, complete.

    Attributes:
        parts: where they are.
        count: their number.
    """

    parts: Parts
    count: int

    @property
    def counters(self) -> Iterator[dict[str, Any]]:
        """The counters of every part, in order."""
        for number in range(self.count):
            yield self.manifest(number)["counters"]

    def different_environments(self) -> dict[str, list[str]]:
        """In what the environments differ in which models made the parts: `device` -> the devices, for example."""
        found: dict[str, set[str]] = {}
        for number in range(self.count):
            for name, value in self.manifest(number).get("environment", {}).items():
                found.setdefault(name, set()).add(value)
        return {name: sorted(values) for name, values in found.items() if len(values) > 1}

    def manifest(self, number: int) -> dict[str, Any]:
        found = self.parts.manifest(number)
        if found is None:
            raise BadData(
                f"part {number} in {self.parts.folder} was removed while it was needed; run the command again"
            )
        return found

    def table(self, name: str, number: int) -> TableFiles:
        """One part of a table."""
        found, path = self.manifest(number)["tables"][name], self.parts.path(name, number)
        file = TableFile(path, found["sha256"], found["rows"])
        return TableFiles(path.parts[-3], name, (file,), "the same command")

    def remove_others(self) -> None:
        """Remove manifests of parts beyond the last one, and what killed workers left."""
        names = {file_name(number, ".json") for number in range(self.count)}
        for path in (self.parts.folder / MANIFESTS).glob("part_*"):
            if path.name not in names:
                path.unlink()

    def record(self, table: str) -> dict[str, Any]:
        """The record of a table for the stage's manifest: its parts, and one hash over theirs.

        Files that belong to no part are removed. Raises BadData if two rows have the same key.
        """
        folder = self.parts.folder / table
        folder.mkdir(exist_ok=True)
        parts, columns = {}, {}
        for number in range(self.count):
            found = self.manifest(number)["tables"][table]
            columns = found["columns"] if found["rows"] or not columns else columns
            parts[file_name(number)] = {key: found[key] for key in ("rows", "sha256", "bytes")}
        for path in folder.iterdir():
            if path.name not in parts:
                path.unlink()
        lines = (f"{name} {part['sha256']}\n" for name, part in sorted(parts.items()))
        self._refuse_repeated_keys(table)
        return {
            "path": table,
            "sha256": hashlib.sha256(
                "".join(lines).encode()
            ).hexdigest(),  # as `durable.sha256_folder` gives it
            "bytes": sum(part["bytes"] for part in parts.values()),
            "rows": sum(part["rows"] for part in parts.values()),
            "columns": columns,
            "parts": list(parts.values()),
        }

    def _refuse_repeated_keys(self, table: str) -> None:
        import pyarrow.parquet as pq

        from lib.schema import key_hashes

        schema = self.parts.schemas[table]
        if not schema.key or self.count < 2:  # the writer of a part has checked its keys
            return
        hashes = KeyHashes()
        for number in range(self.count):
            found = pq.read_table(self.parts.path(table, number), columns=list(schema.key))
            hashes.add(key_hashes(found, schema))
        if hashes.are_repeated():
            raise BadData(f"table {schema.name}: two rows have the same {schema.key}")
