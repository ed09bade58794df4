"""A stage's folder in outputs/run_NNN: what it read, what it wrote, and the manifest that says it is complete.

`Stage` is the only thing that touches outputs/. The manifest is written last, so its existence means that the
stage is complete; entering a complete stage again with the same config and inputs does nothing, with others it
is refused.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import durable
from lib.config import Config
from lib.errors import BadConfig, BadData, Busy, CannotCreate, MissingInput, UsageError
from lib.log import log_to, say
from lib.runs import (
    OUTPUTS,
    STAGES,
    RunArgs,
    changes,
    check_stage_name,
    code_version,
    environment,
    find_run,
    load_manifest,
    plain,
    printable,
    validate_manifest,
)
from lib.table_writer import TableWriter

if TYPE_CHECKING:
    import pyarrow as pa

    from lib.schema import TableSchema


@dataclass
class Stage:
    """One stage of one run, as a context manager.

    Args:
        script: `__file__` of the numbered script; its stem names the stage.
        config, args: as loaded by lib.cli.
        uses: top-level config sections that the result depends on.
        reads: earlier stages whose tables and folders are read.
        files: files outside outputs/ that are read (raw data, checkpoints), hashed at entry.
        restarts: unfinished work is not worth keeping: begin again, also when config or inputs have changed.
        check: called before --overwrite removes what is there; what it raises leaves that as it was.
        ignores: settings such as `data.text_key` in which earlier stages may differ.
        outputs_root: where runs live; tests give their own.

    In the body, first `if stage.finished: return`.
    """

    script: str
    config: Config
    args: RunArgs
    uses: Iterable[str]
    reads: Iterable[str] = ()
    files: Iterable[Path] = ()
    restarts: bool = False
    check: Callable[["Stage"], None] | None = None
    ignores: tuple[str, ...] = ()
    outputs_root: Path = OUTPUTS
    stats: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def __enter__(self) -> "Stage":
        self.name = Path(self.script).stem
        check_stage_name(self.name)
        self.run_dir = find_run(self.name, self.config, self.args, self.outputs_root)
        self.folder = self.run_dir / self.name
        self._check_run_dir()
        self._config = self.config.slice(self.uses)
        self._outputs: dict[str, dict] = {}
        self._upstream = {name: self._load_upstream(name) for name in self.reads}
        self._verified: set[tuple[str, str]] = set()
        self._locks = contextlib.ExitStack()
        try:
            self._enter_locked()
        except BaseException:
            self._locks.close()
            raise
        return self

    def _enter_locked(self) -> None:
        for name in self.reads:
            self._lock(name, fcntl.LOCK_SH)
        self._lock(self.name, fcntl.LOCK_EX)
        self._inputs = self._gather_inputs()
        if self.args.overwrite and self.folder.exists():
            if self.check is not None:
                self.check(self)
            shutil.rmtree(self.folder)
        self.finished = self._is_finished()
        self.resuming = False
        if self.finished:
            say(f"{self.name} in {self._shown(self.run_dir)} is up to date")
            return
        self._begin()

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None and not self.finished and not self._incomplete:
                self._write_manifest()
        finally:
            log_to(None)
            self._locks.close()

    _incomplete = False

    def leave_incomplete(self, reason: str) -> None:
        """End without a manifest although nothing failed: more is to be done under the same config."""
        self._incomplete = True
        say(reason)

    # ------------------------------------------------------------------------------ entering

    def _check_run_dir(self) -> None:
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise CannotCreate(f"--run_dir {self.run_dir} is a file; give a folder")
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotCreate(f"cannot create the run folder {self.run_dir}: {error.strerror}") from None

    def _load_upstream(self, name: str) -> dict:
        manifest = load_manifest(self.run_dir / name)
        if manifest is None:
            raise MissingInput(
                f"{self.name} needs {name}, which has not finished in {self._shown(self.run_dir)}; "
                f"run `python {name}.py --run_dir {self._shown(self.run_dir)}` first, with the same --config"
            )
        differing = [
            change
            for change in changes(manifest["config"], self.config.slice(manifest["config"]))
            if change.split(":")[0] not in self.ignores
        ]
        if differing:
            raise BadConfig(
                f"{name} in {self._shown(self.run_dir)} was made with another config than this command has:\n  "
                + "\n  ".join(differing)
                + "\ngive the same --config, --quick_test and --set, or another --run_dir"
            )
        return manifest

    def _lock(self, stage_name: str, kind: int) -> None:
        folder = self.run_dir / ".locks"
        try:
            folder.mkdir(exist_ok=True)
            file = self._locks.enter_context(open(folder / stage_name, "a+"))  # noqa: SIM115
        except OSError as error:
            raise CannotCreate(f"cannot create {folder / stage_name}: {error.strerror}") from None
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another process is at work on {stage_name} in {self._shown(self.run_dir)}; wait for it, or use another --run_dir"
            ) from None

    def _gather_inputs(self) -> dict[str, dict]:
        inputs: dict[str, dict] = {}
        for name, manifest in self._upstream.items():
            for output, record in manifest["outputs"].items():
                entry = {"stage": name, "path": f"{name}/{record['path']}", "sha256": record["sha256"]}
                inputs[f"{name}/{output}"] = entry | ({"rows": record["rows"]} if "rows" in record else {})
        for path in self.files:
            try:
                digest = durable.sha256_folder(path) if path.is_dir() else durable.sha256_file(path)
            except OSError as error:
                raise MissingInput(f"{path} cannot be read: {error.strerror}") from None
            name, shown = printable(path.name), printable(path)
            inputs[name if name not in inputs else shown] = {"path": shown, "sha256": digest}
        return inputs

    def _is_finished(self) -> bool:
        manifest = load_manifest(self.folder)
        if manifest is None:
            if self.args.resume and not self._marker.exists():
                raise UsageError(
                    f"--resume: {self.name} has nothing unfinished in {self._shown(self.run_dir)}"
                )
            return False
        self._refuse_if_changed(manifest["config"], manifest["inputs"], "was made with")
        for name, record in manifest["outputs"].items():
            path = self.folder / record["path"]
            size = (
                durable.folder_bytes(path) if path.is_dir() else path.stat().st_size if path.exists() else -1
            )
            if size != record["bytes"]:
                raise BadData(
                    f"{path}, output '{name}' of the finished {self.name}, is missing or was changed; "
                    "run the stage again with --overwrite"
                )
        if self.args.resume:
            raise UsageError(
                f"--resume: {self.name} has finished in {self._shown(self.run_dir)}; nothing to resume"
            )
        return True

    def _refuse_if_changed(self, config: dict, inputs: dict, verb: str) -> None:
        differing = changes(config, json.loads(json.dumps(self._config)))
        old = {name: entry["sha256"] for name, entry in inputs.items()}
        new = {name: entry["sha256"] for name, entry in self._inputs.items()}
        differing += [f"input {line}" for line in changes(old, new)]
        if differing:
            raise BadConfig(
                f"{self.name} in {self._shown(self.run_dir)} {verb} another config or other inputs:\n  "
                + "\n  ".join(differing)
                + "\npass --overwrite to make it again, or choose another --run_dir"
            )

    @property
    def _marker(self) -> Path:
        return self.folder / "unfinished.json"

    def _begin(self) -> None:
        """Mark the folder as unfinished work of this config and these inputs, or check that it is."""
        try:
            if self._marker.exists() and not self.restarts:
                marker = json.loads(self._marker.read_text(encoding="utf-8"))
                self._refuse_if_changed(marker["config"], marker["inputs"], "was begun with")
                self.resuming = True
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                durable.write_json(self._marker, {"config": self._config, "inputs": self._inputs})
        except (ValueError, KeyError) as error:
            raise BadData(f"{self._marker} is damaged ({error}); run again with --overwrite") from None
        except OSError as error:
            raise CannotCreate(f"cannot write into {self.folder}: {error.strerror}") from None
        if self.name == STAGES[0]:
            durable.write_json(self.run_dir / "config.json", self.config.model_dump(mode="json"))
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        log_to(self.folder / "log.txt")
        say(f"{self.name}: {'continuing' if self.resuming else 'starting'} in {self._shown(self.run_dir)}")

    # ------------------------------------------------------------------------- reading, writing

    def _verified_path(self, stage_name: str, output: str) -> Path:
        record = self._upstream[stage_name]["outputs"].get(output)
        if record is None:
            raise MissingInput(f"{stage_name} in {self._shown(self.run_dir)} has no output '{output}'")
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

    def _write_manifest(self) -> None:
        manifest = {
            "manifest_version": 1,
            "stage": self.name,
            "run": printable(os.path.basename(os.path.abspath(self.run_dir))) or "/",
            "quick_test": self.args.quick_test,
            "command": [printable(word) for word in self.args.command],
            "started_at": self._started.isoformat(timespec="seconds"),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
            "config": self._config,
            "inputs": self._inputs,
            "outputs": self._outputs,
            "stats": plain(self.stats),
            "code": code_version(),
            "environment": environment() | plain(self.environment),
        }
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
        validate_manifest(manifest)
        durable.write_json(self.folder / "manifest.json", manifest)
        self._marker.unlink(missing_ok=True)
        say(f"{self.name}: done in {manifest['seconds']:.1f} s")
        following = STAGES.index(self.name) + 1 if self.name in STAGES else len(STAGES)
        if following < len(STAGES) and os.environ.get("REMASK_MAKE") is None:
            say(f"next: python {STAGES[following]}.py --run_dir {shlex.quote(self._shown(self.run_dir))}")

    def shown(self, path: Path) -> str:
        """The path as a user would type it."""
        return self._shown(path)

    @staticmethod
    def _shown(path: Path) -> str:
        """The path as a user would type it."""
        return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)
