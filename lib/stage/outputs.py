"""The outputs of a stage: tables, JSON files and folders, each with its record for the manifest."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import durable
from lib.engine.processes import Processes
from lib.errors import BadData
from lib.runs import command, plain
from lib.table_writer import TableWriter

if TYPE_CHECKING:
    import pyarrow as pa

    from lib.schema import TableSchema


class OutputWriter:
    """Writes the outputs of a stage and records them.

    Attributes:
        folder: where the stage writes: `<stage>`, or `<stage>.new` while --overwrite makes it again.
        processes: those that run the stage. The main one writes; in the others these methods do nothing.
    """

    folder: Path
    processes: Processes
    _outputs: dict[str, dict]  # name -> path, sha256, bytes and, for tables, rows and columns

    def write(self, name: str, table: "pa.Table", schema: "TableSchema") -> None:
        """Write a table to `<name>.parquet`."""
        with self.writer(name, schema) as writer:
            writer.write(table)

    @contextlib.contextmanager
    def writer(
        self, name: str, schema: "TableSchema", metadata: Mapping[str, str] | None = None
    ) -> Iterator["TableWriter"]:
        """Write `<name>.parquet` piece by piece. The file appears only when the block ends without an error.

        `metadata` is stored in the file itself, for readers that have no manifest.
        """
        path = self.folder / f"{name}.parquet"
        with durable.replacing(path) as temporary:
            writer = TableWriter(temporary, schema, metadata)
            try:
                yield writer
            finally:
                writer.close()
        self.add_file(name, path)
        self._outputs[name] |= {"rows": writer.num_rows, "columns": writer.columns}

    def write_json(self, name: str, value: Any) -> None:
        """Write `<name>.json` and declare it as an output."""
        if not self.processes.is_main:
            return
        durable.write_json(self.folder / f"{name}.json", plain(value))
        self.add_file(name, self.folder / f"{name}.json")

    def write_page(self, name: str, file: str, html: str) -> None:
        """Write an HTML page into the stage's folder and declare it as the output `name`."""
        if not self.processes.is_main:
            return
        durable.write_text(self.folder / file, html)
        self.add_file(name, self.folder / file)

    def output_sha256(self, name: str) -> str:
        """The hash of an output that this stage has declared."""
        return self._outputs[name]["sha256"]

    def add_file(self, name: str, path: Path) -> None:
        """Declare a file that was already written in the stage's folder as an output."""
        if not self.processes.is_main:
            return
        self._outputs[name] = {
            "path": path.relative_to(self.folder).as_posix(),
            "sha256": durable.sha256_file(path),
            "bytes": path.stat().st_size,
        }

    def add_folder(self, name: str, folder: Path) -> None:
        """Declare a folder that was already written in the stage's folder as an output."""
        if not self.processes.is_main:
            return
        self._outputs[name] = {
            "path": folder.relative_to(self.folder).as_posix(),
            "sha256": durable.sha256_folder(folder),
            "bytes": durable.folder_bytes(folder),
            "files": sum(1 for p in folder.rglob("*") if p.is_file()),
        }


def check_sizes(folder: Path, manifest: dict) -> None:
    """Raises BadData if an output of a finished stage is missing or has another size than its manifest says."""
    for name, record in manifest["outputs"].items():
        path = folder / record["path"]
        size = durable.folder_bytes(path) if path.is_dir() else path.stat().st_size if path.exists() else -1
        if size != record["bytes"]:
            raise BadData(
                f"{path}, output '{name}' of the finished {manifest['stage']}, is missing or was changed; "
                f"run `{command(manifest['stage'], '--overwrite')}`"
            )
