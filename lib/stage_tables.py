"""The tables, files and folders of a stage: those of earlier stages, checked against their hashes, and its own.

`StageTables` is the half of `lib.artifacts.Stage` that reads and writes.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import durable
from lib.errors import BadData, MissingInput
from lib.runs import plain
from lib.table_writer import TableWriter

if TYPE_CHECKING:
    import pyarrow as pa

    from lib.schema import TableSchema


class StageTables:
    """Reads outputs of earlier stages and writes this one's.

    Attributes:
        run_dir: of the run.
        folder: where this stage writes. `<stage>.new` while --overwrite makes it again, `<stage>` otherwise.
    """

    run_dir: Path
    folder: Path
    _upstream: dict[str, dict]  # stage -> its manifest
    _verified: set[tuple[str, str]]  # (stage, output) whose hash was compared
    _outputs: dict[str, dict]

    def _verified_path(self, stage_name: str, output: str) -> Path:
        record = self._upstream[stage_name]["outputs"].get(output)
        if record is None:
            raise MissingInput(f"{stage_name} in {shown_path(self.run_dir)} has no output '{output}'")
        path = self.run_dir / stage_name / record["path"]
        if (stage_name, output) not in self._verified:
            if not path.exists():
                raise MissingInput(f"{path} is gone; run `python {stage_name}.py --overwrite` again")
            digest = durable.sha256_folder(path) if path.is_dir() else durable.sha256_file(path)
            if digest != record["sha256"]:
                raise BadData(
                    f"{path} is damaged or was changed: its sha256 is not the one in {stage_name}/manifest.json; "
                    f"run `python {stage_name}.py --overwrite` again"
                )
            self._verified.add((stage_name, output))
        return path

    def has_output(self, stage_name: str, output: str) -> bool:
        return output in self._upstream[stage_name]["outputs"]

    def read(
        self, stage_name: str, output: str, schema: "TableSchema", columns: list[str] | None = None
    ) -> "pa.Table":
        """A whole table of an earlier stage, checked against its hash and schema."""
        import pyarrow as pa

        batches = list(self.batches(stage_name, output, schema, columns))
        return pa.Table.from_batches(batches) if batches else schema.arrow.empty_table()

    def batches(
        self,
        stage_name: str,
        output: str,
        schema: "TableSchema",
        columns: list[str] | None = None,
        rows: int = 65536,
    ) -> Iterator["pa.RecordBatch"]:
        """The same in batches, so that memory does not grow with the table."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._verified_path(stage_name, output)
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            missing = [f.name for f in schema.arrow if f.name not in file.schema_arrow.names]
            if missing:
                raise BadData(f"{path}: columns {missing} are missing; it was written by another version")
            yield from file.iter_batches(batch_size=rows, columns=columns)
        except pa.ArrowException as error:
            raise BadData(f"{path} cannot be read: {error}") from None

    def tables(
        self,
        stage_name: str,
        output: str,
        schema: "TableSchema",
        columns: list[str] | None = None,
        rows: int = 65536,
    ) -> Iterator["pa.Table"]:
        """`batches` as tables."""
        import pyarrow as pa

        for batch in self.batches(stage_name, output, schema, columns, rows):
            yield pa.Table.from_batches([batch])

    def rows(self, stage_name: str, output: str) -> int:
        """Number of rows of an earlier stage's table, from its manifest."""
        return self._upstream[stage_name]["outputs"][output]["rows"]

    def folder_of(self, stage_name: str, output: str) -> Path:
        """A folder output (tokenizer, model) of an earlier stage, checked against its hash."""
        return self._verified_path(stage_name, output)

    def sha256_of(self, stage_name: str, output: str) -> str:
        """The hash of an earlier stage's output, from its manifest."""
        return self._upstream[stage_name]["outputs"][output]["sha256"]

    def table_metadata(self, stage_name: str, output: str) -> dict[str, str]:
        """What the writer of an earlier stage's table put into the file beside its rows."""
        import pyarrow.parquet as pq

        found = pq.read_schema(self._verified_path(stage_name, output)).metadata or {}
        return {k.decode(): v.decode() for k, v in found.items() if not k.startswith(b"ARROW:")}

    def upstream_stats(self, stage_name: str) -> dict:
        return self._upstream[stage_name]["stats"]

    def write(self, name: str, table: "pa.Table", schema: "TableSchema") -> None:
        with self.writer(name, schema) as writer:
            writer.write(table)

    @contextlib.contextmanager
    def writer(
        self, name: str, schema: "TableSchema", metadata: Mapping[str, str] | None = None
    ) -> Iterator["TableWriter"]:
        """Write `<name>.parquet` piece by piece; it appears, whole, when the block ends well.

        `metadata` goes into the file itself, for whoever reads it without the manifest.
        """
        path = self.folder / f"{name}.parquet"
        with durable.replacing(path) as temporary:
            writer = TableWriter(temporary, schema, metadata)
            try:
                yield writer
            finally:
                writer.close()
        self._outputs[name] = {
            "path": path.name,
            "sha256": durable.sha256_file(path),
            "bytes": path.stat().st_size,
            "rows": writer.num_rows,
            "columns": writer.columns,
        }

    def write_json(self, name: str, value: Any) -> None:
        """Write `<name>.json` and declare it as an output."""
        durable.write_json(self.folder / f"{name}.json", plain(value))
        self.add_file(name, self.folder / f"{name}.json")

    def add_file(self, name: str, path: Path) -> None:
        """Declare a file already written in the stage's folder as an output."""
        self._outputs[name] = {
            "path": path.relative_to(self.folder).as_posix(),
            "sha256": durable.sha256_file(path),
            "bytes": path.stat().st_size,
        }

    def add_folder(self, name: str, folder: Path) -> None:
        """Declare a folder already written in the stage's folder as an output."""
        self._outputs[name] = {
            "path": folder.relative_to(self.folder).as_posix(),
            "sha256": durable.sha256_folder(folder),
            "bytes": durable.folder_bytes(folder),
            "files": sum(1 for p in folder.rglob("*") if p.is_file()),
        }


def shown_path(path: Path) -> str:
    """The path as a user would type it."""
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)
