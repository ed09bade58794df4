"""A stage's folder in outputs/run_NNN: what it read, what it wrote, and the manifest that says it is complete.

`Stage` is the only thing that touches outputs/. The manifest is written last, so its existence means that the
stage is complete; entering a complete stage again with the same config and inputs does nothing, with others it
is refused. Other code is no reason to refuse it: that is said in a line, and kept in the manifests of those who
read it.

--overwrite works in `<stage>.new` and leaves what is there alone until the new outputs are complete. Then the two
change places, which a crash can interrupt at any point: the next command finishes it. An attempt that failed or was
killed goes on when the same command is given again.
"""

import contextlib
import fcntl
import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import code_version, durable
from lib.config import Config
from lib.errors import BadConfig, BadData, Busy, CannotCreate, MissingInput, UsageError
from lib.log import log_to, say
from lib.outside import HubModel
from lib.runs import (
    OUTPUTS,
    STAGES,
    RunArgs,
    changes,
    check_stage_name,
    environment,
    find_run,
    load_manifest,
    plain,
    printable,
    store_config,
    validate_manifest,
    versions,
)
from lib.stage_tables import StageTables, shown_path

MARKER = "unfinished.json"
NO_RESULT = (".allow_inexact_resume",)  # settings that may change before a training goes on, or after it


@dataclass
class Stage(StageTables):
    """One stage of one run, as a context manager.

    Args:
        script: `__file__` of the numbered script; its stem names the stage.
        config, args: as loaded by lib.cli.
        uses: top-level config sections that the result depends on.
        reads: earlier stages whose tables and folders are read.
        files: what is read from outside outputs/ (raw data, checkpoints, models of the hub), hashed at entry; see
            lib.outside.
        restarts: unfinished work is not worth keeping: begin again, also when config or inputs have changed.
        check: called before any work; what it raises leaves everything as it was.
        ignores: settings such as `data.text_key` in which earlier stages may differ.
        outputs_root: where runs live; tests give their own.

    Attributes:
        code: hashes of the files that this stage can import, by path; see lib.code_version.

    In the body, first `if stage.finished: return`.
    """

    script: str
    config: Config
    args: RunArgs
    uses: Iterable[str]
    reads: Iterable[str] = ()
    files: Iterable[Path | HubModel] = ()
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
        self._check_run_dir()
        self._place = self.run_dir / self.name
        self._config = self.config.slice(self.uses)
        self._outputs, self._verified = {}, set()
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
        for name in (*self.reads, self.name):
            _recover(self.run_dir / name, self._locks_folder / f"{name}.recovery")
        self.code = code_version.code_files(self.script, self.config.task)
        self._upstream = {name: self._load_upstream(name) for name in self.reads}
        self._inputs = self._gather_inputs()
        self.folder = self._choose_folder()
        self.finished = not self.args.overwrite and self._is_finished()
        if self.finished:
            return
        if self.check is not None:
            self.check(self)
        self._begin()

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None and not self.finished and not self._incomplete:
                self._complete()
        finally:
            log_to(None)
            self._locks.close()

    _incomplete = False
    resuming = False

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

    @property
    def _locks_folder(self) -> Path:
        return self.run_dir / ".locks"

    def _lock(self, stage_name: str, kind: int) -> None:
        file = self._locks_folder / stage_name
        try:
            file.parent.mkdir(exist_ok=True)
            handle = self._locks.enter_context(open(file, "a+"))  # noqa: SIM115
        except OSError as error:
            raise CannotCreate(f"cannot create {file}: {error.strerror}") from None
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another process is at work on {stage_name} in {shown_path(self.run_dir)}; wait for it, or use another --run_dir"
            ) from None

    def _load_upstream(self, name: str) -> dict:
        manifest = load_manifest(self.run_dir / name)
        if manifest is None:
            raise MissingInput(
                f"{self.name} needs {name}, which has not finished in {shown_path(self.run_dir)}; "
                f"run `python {name}.py --run_dir {shown_path(self.run_dir)}` first, with the same --config"
            )
        differing = [
            change
            for change in _config_changes(manifest["config"], self.config.slice(manifest["config"]))
            if change.split(":")[0] not in self.ignores
        ]
        if differing:
            raise BadConfig(
                f"{name} in {shown_path(self.run_dir)} was made with another config than this command has:\n  "
                + "\n  ".join(differing)
                + "\ngive the same --config, --quick_test and --set, or another --run_dir"
            )
        return manifest

    def _gather_inputs(self) -> dict[str, dict]:
        inputs: dict[str, dict] = {}
        for name, manifest in self._upstream.items():
            for output, record in manifest["outputs"].items():
                entry = {"stage": name, "path": f"{name}/{record['path']}", "sha256": record["sha256"]}
                inputs[f"{name}/{output}"] = entry | ({"rows": record["rows"]} if "rows" in record else {})
        for path in dict.fromkeys(self.files):
            if isinstance(path, HubModel):
                inputs[path.name] = {"path": path.name, "revision": path.commit}
                continue
            try:
                digest = durable.sha256_folder(path) if path.is_dir() else durable.sha256_file(path)
            except OSError as error:
                raise MissingInput(f"{path} cannot be read: {error.strerror}") from None
            name, shown = printable(path.name), printable(path)
            inputs[name if name not in inputs else shown] = {"path": shown, "sha256": digest}
        return inputs

    def _choose_folder(self) -> Path:
        """Where to work. With --overwrite beside what is there, going on with an attempt at the very same."""
        if not self.args.overwrite or not self._place.exists() or self._was_begun_by_this(self._place):
            return self._place
        beside = durable.beside(self._place, durable.NEW)
        if not self._was_begun_by_this(beside):
            durable.remove(beside)
        return beside

    def _was_begun_by_this(self, folder: Path) -> bool:
        """Whether a folder holds unfinished work of --overwrite with this config, these inputs and this code."""
        if (folder / "manifest.json").exists():
            return False
        try:
            marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            same_code = marker["code"] == self.code or self._allows_inexact_resume
            same_inputs = marker["inputs"] == self._marker_now()["inputs"]
            same_config = not _config_changes(marker["config"], self._marker_now()["config"])
            return marker["overwrite"] and same_code and same_inputs and same_config
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _is_finished(self) -> bool:
        where = shown_path(self.run_dir)
        manifest = load_manifest(self._place)
        if manifest is None:
            if self.args.resume and not (self._place / MARKER).exists():
                raise UsageError(f"--resume: {self.name} has nothing unfinished in {where}")
            return False
        self._refuse_if_changed(manifest["config"], manifest["inputs"], "was made with")
        for name, record in manifest["outputs"].items():
            path = self._place / record["path"]
            size = (
                durable.folder_bytes(path) if path.is_dir() else path.stat().st_size if path.exists() else -1
            )
            if size != record["bytes"]:
                raise BadData(
                    f"{path}, output '{name}' of the finished {self.name}, is missing or was changed; "
                    "run the stage again with --overwrite"
                )
        if self.args.resume:
            raise UsageError(f"--resume: {self.name} has finished in {where}; nothing to resume")
        other = differences(manifest, self.code)
        line = f"{self.name} in {where} is up to date"
        if other:
            line += f", but was made by other code ({_in_words(other)}); it stays as it is, --overwrite makes it again"
        if durable.beside(self._place, durable.NEW).exists():
            line += f" (an attempt to make it again is unfinished in {self.name}{durable.NEW}; --overwrite goes on with it)"
        say(line)
        return True

    def _refuse_if_changed(self, config: dict, inputs: dict, verb: str) -> None:
        differing = _config_changes(config, json.loads(json.dumps(self._config)))
        old, new = (
            {name: entry.get("sha256", entry.get("revision")) for name, entry in which.items()}
            for which in (inputs, self._inputs)
        )
        differing += [f"input {line}" for line in changes(old, new)]
        if differing:
            raise BadConfig(
                f"{self.name} in {shown_path(self.run_dir)} {verb} another config or other inputs:\n  "
                + "\n  ".join(differing)
                + "\npass --overwrite to make it again, or choose another --run_dir"
            )

    # ------------------------------------------------------------------------------ working

    @property
    def _marker(self) -> Path:
        return self.folder / MARKER

    @property
    def _allows_inexact_resume(self) -> bool:
        return '"allow_inexact_resume": true' in json.dumps(self._config)

    def _marker_now(self) -> dict:
        marker = {"config": self._config, "inputs": self._inputs, "code": self.code, "mixed": [],
                  "overwrite": self.args.overwrite}  # fmt: skip
        return json.loads(json.dumps(marker))

    def _begin(self) -> None:
        """Mark the folder as unfinished work of this config, these inputs and this code, or check that it is."""
        self._mixed: list[str] = []
        try:
            self.resuming = self._marker.exists() and not self.restarts
            if self.resuming:
                marker = json.loads(self._marker.read_text(encoding="utf-8"))
                self._refuse_if_changed(marker["config"], marker["inputs"], "was begun with")
                self._take_up(marker)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                durable.write_json(self._marker, self._marker_now())
        except (ValueError, KeyError) as error:
            raise BadData(f"{self._marker} is damaged ({error}); run again with --overwrite") from None
        except OSError as error:
            raise CannotCreate(f"cannot write into {self.folder}: {error.strerror}") from None
        if self.name == STAGES[0]:
            store_config(self.run_dir, self.config)
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        log_to(self.folder / "log.txt")
        place = f" ({self.folder.name} until it is complete)" if self.folder != self._place else ""
        say(
            f"{self.name}: {'continuing' if self.resuming else 'starting'} in {shown_path(self.run_dir)}{place}"
        )
        self._upstream_differs = {name: d for name in self._upstream if (d := self._differences(name))}
        if self._upstream_differs:
            each = "; ".join(f"{name} ({_in_words(d)})" for name, d in self._upstream_differs.items())
            say(f"made by other code, and used as they are: {each}")

    def _differences(self, name: str) -> dict[str, Any]:
        return differences(self._upstream[name], code_version.code_files(name, self.config.task))

    def _take_up(self, marker: dict) -> None:
        """Note what of the code has changed since the work was begun, if there is work to keep."""
        changed = code_version.changed_files(marker.get("code", {}), self.code)
        kept = [p for p in self.folder.iterdir() if p.name not in (MARKER, "log.txt") and p.suffix != ".tmp"]
        if changed and kept:
            say(
                f"{self.name} was begun by other code ({code_version.shown(changed)}); what is complete stays as it is"
            )
            self._mixed = sorted({*marker.get("mixed", []), *changed})
        else:
            self._mixed = marker.get("mixed", []) if kept else []
        now = self._marker_now() | {"mixed": self._mixed, "overwrite": marker.get("overwrite", False)}
        if now != marker:
            durable.write_json(self._marker, now)

    def shown(self, path: Path) -> str:
        """A path of this stage as a user would type it when the stage is complete."""
        return shown_path(self._place / path.relative_to(self.folder))

    def _complete(self) -> None:
        """Write the manifest; what --overwrite made then takes the place of what was there."""
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
            "code": code_version.commit()
            | {"files": self.code, "mixed": self._mixed, "upstream_differs": self._upstream_differs},
            "environment": environment() | plain(self.environment),
        }
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
        validate_manifest(manifest)
        durable.write_json(self.folder / "manifest.json", manifest)
        self._marker.unlink(missing_ok=True)
        if self.folder != self._place:
            durable.replace_folder(self._place, self.folder)
            self.folder = self._place
        say(f"{self.name}: done in {manifest['seconds']:.1f} s")
        following = STAGES.index(self.name) + 1 if self.name in STAGES else len(STAGES)
        if following < len(STAGES) and os.environ.get("REMASK_MAKE") is None:
            say(f"next: python {STAGES[following]}.py --run_dir {shlex.quote(shown_path(self.run_dir))}")


def differences(manifest: Mapping[str, Any], code: Mapping[str, str]) -> dict[str, Any]:
    """How the code that made a stage differs from the code as it is now: {"files": [...], "versions": {...}}, or {}."""
    recorded = manifest.get("code", {})
    files = {*code_version.changed_files(recorded.get("files", {}), code), *recorded.get("mixed", [])}
    before = manifest.get("environment", {})
    library = {n: f"{before[n]} -> {v}" for n, v in versions().items() if before.get(n, v) != v}
    return ({"files": sorted(files)} if files else {}) | ({"versions": library} if library else {})


def _in_words(other: dict[str, Any]) -> str:
    parts = [code_version.shown(other["files"])] if "files" in other else []
    return "; ".join(parts + [f"{name} {change}" for name, change in other.get("versions", {}).items()])


def _config_changes(old: Any, new: Any) -> list[str]:
    return [line for line in changes(old, new) if not line.split(":")[0].endswith(NO_RESULT)]


def _recover(folder: Path, lock: Path) -> None:
    """Finish a change of places that a crash cut off. Whoever reads the stage may do it, one at a time."""
    new, old = (durable.beside(folder, suffix) for suffix in (durable.NEW, durable.OLD))
    if not new.exists() and not old.exists():
        return
    with open(lock, "a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        complete = (new / "manifest.json").exists()
        if new.exists() and (complete or not (folder.exists() or old.exists())):
            (new / MARKER).unlink(missing_ok=True) if complete else None
            durable.replace_folder(folder, new)
        durable.recover_folder(folder)
        durable.remove(old)
