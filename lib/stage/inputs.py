"""The inputs of a stage: outputs of earlier stages, checked against their hashes, and files from outside outputs/."""

from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import durable
from lib.config import Config
from lib.errors import BadConfig, MissingInput
from lib.outside import HubModel
from lib.runs import (
    command,
    display_path,
    load_manifest,
    printable,
    refuse_without_units,
    stage_of,
)
from lib.stage.parts import file_name
from lib.stage.table_files import TableFile, TableFiles, Verified
from lib.stage.unfinished import config_changes

if TYPE_CHECKING:
    import pyarrow as pa

    from lib.schema import TableSchema


def upstream_manifest(
    run_dir: Path, stage_name: str, folder: Path, config: Config, ignores: Iterable[str]
) -> dict:
    """The manifest of an earlier stage or unit in `folder`.

    Raises:
        MissingInput: the stage has not finished.
        BadData: an earlier version of the project made it.
        BadConfig: it was made with other settings than `config`, those named in `ignores` aside.
    """
    where = display_path(run_dir)
    manifest = load_manifest(folder)
    if manifest is None:
        if stage_of(stage_name) != stage_name:
            refuse_without_units(run_dir, stage_of(stage_name))
        raise MissingInput(
            f"{stage_name} has not finished in {where}, and its outputs are needed; "
            f"run `{command(stage_name, '--run_dir', where)}` first, with the same --config"
        )
    differing = [
        change
        for change in config_changes(manifest["config"], config.slice(manifest["config"]))
        if change.split(":")[0] not in tuple(ignores)
    ]
    if differing:
        raise BadConfig(
            f"{stage_name} in {where} was made with another config:\n  "
            + "\n  ".join(differing)
            + "\ngive the same --config, --quick_test and --set as before, or use another --run_dir"
        )
    return manifest


def describe_inputs(
    upstream: dict[str, dict], files: Iterable[Path | HubModel], digests: MutableMapping[Path, str]
) -> dict[str, dict]:
    """The inputs for the manifest: all outputs of earlier stages, and outside files with their hashes.

    Args:
        upstream: stage -> its manifest.
        files: files and folders, named by their content; models of the hub, named by their commit.
        digests: hashes of files that are known; those that are computed here are added.

    Raises:
        MissingInput: a file cannot be read.
    """
    inputs: dict[str, dict] = {}
    for stage_name, manifest in upstream.items():
        for output, record in manifest["outputs"].items():
            entry = {
                "stage": stage_name,
                "path": f"{stage_name}/{record['path']}",
                "sha256": record["sha256"],
            }
            inputs[f"{stage_name}/{output}"] = entry | ({"rows": record["rows"]} if "rows" in record else {})
    for path in dict.fromkeys(files):
        if isinstance(path, HubModel):
            inputs[path.name] = {"path": path.name, "revision": path.commit}
            continue
        try:
            digest = digests[path] = digests.get(path) or durable.sha256(path)
        except OSError as error:
            raise MissingInput(f"{path} cannot be read: {error.strerror}") from None
        name, full_name = printable(path.name), printable(path)
        inputs[name if name not in inputs else full_name] = {"path": full_name, "sha256": digest}
    return inputs


class UpstreamReader:
    """Reads the outputs of earlier stages. The first access to a file compares its hash with the manifest.

    Attributes:
        run_dir: the folder of the run.
    """

    run_dir: Path
    _upstream: dict[str, dict]  # stage -> its manifest
    _verified: Verified

    def folder_of_stage(self, stage_name: str) -> Path:
        """The folder of an earlier stage or unit."""
        return self.run_dir / stage_name

    def reads_stage(self, stage_name: str) -> bool:
        """Whether this stage reads the outputs of that one."""
        return stage_name in self._upstream

    def read(
        self, stage_name: str, output: str, schema: "TableSchema", columns: list[str] | None = None
    ) -> "pa.Table":
        """A whole table of an earlier stage, checked against its hash and schema."""
        import pyarrow as pa

        batches = list(self.batches(stage_name, output, schema, columns))
        return pa.Table.from_batches(batches) if batches else schema.arrow.empty_table()

    def table(self, stage_name: str, output: str) -> "TableFiles":
        """The files of a table of an earlier stage, which worker processes can read, too."""
        record = self._record(stage_name, output)
        path = self.folder_of_stage(stage_name) / record["path"]
        files = (TableFile(path, record["sha256"], record["rows"]),)
        if "parts" in record:
            files = tuple(
                TableFile(path / file_name(number), part["sha256"], part["rows"])
                for number, part in enumerate(record["parts"])
            )
        return TableFiles(stage_name, output, files, command(stage_name, "--overwrite"), self._verified)

    def batches(
        self,
        stage_name: str,
        output: str,
        schema: "TableSchema",
        columns: list[str] | None = None,
        rows: int | None = 65536,
    ) -> Iterator["pa.RecordBatch"]:
        """The same table in batches of `rows` rows, so that memory does not grow with it. The last one may have fewer.

        None: one batch for each row group, as the table was written. Their sizes follow the length of the texts.
        """
        return self.table(stage_name, output).batches(schema, columns, rows)

    def tables(
        self,
        stage_name: str,
        output: str,
        schema: "TableSchema",
        columns: list[str] | None = None,
        rows: int = 65536,
    ) -> Iterator["pa.Table"]:
        """Like `batches`, but each batch is a table."""
        return self.table(stage_name, output).tables(schema, columns, rows)

    def rows(self, stage_name: str, output: str) -> int:
        """Number of rows of an earlier stage's table, from its manifest."""
        return self._record(stage_name, output)["rows"]

    def bytes_of(self, stage_name: str, output: str) -> int:
        """Size of an output of an earlier stage on the disk, from its manifest."""
        return self._record(stage_name, output)["bytes"]

    def has_output(self, stage_name: str, output: str) -> bool:
        return output in self._upstream[stage_name]["outputs"]

    def folder_of(self, stage_name: str, output: str) -> Path:
        """A folder (tokenizer, model) that an earlier stage wrote, checked against its hash."""
        return self._verified_path(stage_name, output)

    def sha256_of(self, stage_name: str, output: str) -> str:
        """The hash of an earlier stage's output, from its manifest."""
        return self._record(stage_name, output)["sha256"]

    def table_metadata(self, stage_name: str, output: str) -> dict[str, str]:
        """The metadata that an earlier stage stored in the file of a table."""
        return self.table(stage_name, output).metadata()

    def upstream_stats(self, stage_name: str) -> dict:
        return self._upstream[stage_name]["stats"]

    def _record(self, stage_name: str, output: str) -> dict[str, Any]:
        record = self._upstream[stage_name]["outputs"].get(output)
        if record is None:
            raise MissingInput(f"{stage_name} in {display_path(self.run_dir)} has no output '{output}'")
        return record

    def _verified_path(self, stage_name: str, output: str) -> Path:
        record = self._record(stage_name, output)
        files = TableFiles(stage_name, output, (), command(stage_name, "--overwrite"), self._verified)
        return files.check(self.folder_of_stage(stage_name) / record["path"], record["sha256"])
