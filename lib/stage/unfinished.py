"""Unfinished work of a stage: what it was started with, and whether a later command may continue it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import code_version, durable
from lib.errors import BadConfig, BadData, CannotCreate
from lib.log import say
from lib.runs import changes
from lib.stage.parts import MANIFESTS

MARKER = "unfinished.json"
LOG_FILE = "log.txt"
TRAINING_LOG = "metrics.jsonl"  # of every model that has begun to learn
# Ends of the names of settings that change no result, and may differ
NO_RESULT = (".allow_inexact_resume", ".tracker", "stream.max_backlog", "stream.timeout_seconds")


def config_changes(old: Any, new: Any) -> list[str]:
    """The settings that differ and may change a result, one line each."""
    return changes(result_settings(old), result_settings(new))


def result_settings(config: Any, path: str = "") -> Any:
    """A slice of the config without the settings that change no result."""
    if not isinstance(config, Mapping):
        return config
    full = {key: f"{path}.{key}" if path else key for key in config}
    return {
        key: result_settings(value, full[key])
        for key, value in config.items()
        if not full[key].endswith(NO_RESULT)
    }


@dataclass(frozen=True)
class Dependencies:
    """What the result of a stage depends on.

    Attributes:
        config: the slice of the config, as JSON holds it.
        inputs: name -> path and sha256, or the revision of a model of the hub.
        code: path -> hash; see lib.code_version.
        again: the flags that make the stage again, for messages.
    """

    config: dict[str, Any]
    inputs: dict[str, dict]
    code: dict[str, str]
    again: str = "--overwrite"

    def changes_since(self, config: Any, inputs: Mapping[str, dict]) -> list[str]:
        """What differs from an earlier config and earlier inputs, one line each. Code does not count."""
        old, new = (
            {name: entry.get("sha256", entry.get("revision")) for name, entry in entries.items()}
            for entries in (inputs, self.inputs)
        )
        return config_changes(config, self.config) + [f"input {line}" for line in changes(old, new)]

    def refuse_changes(self, record: Mapping[str, Any], subject: str) -> None:
        """Raises BadConfig if a manifest, or a record of unfinished work, has another config or other inputs.

        `subject` begins the message: `04_train in outputs/run_001 was made with`.
        """
        if differing := self.changes_since(record["config"], record["inputs"]):
            raise BadConfig(
                f"{subject} another config or other inputs:\n  "
                + "\n  ".join(differing)
                + f"\npass {self.again} to make it again, or choose another --run_dir"
            )

    @property
    def digest(self) -> str:
        """One hash of everything: what was made under it is the same."""
        content = json.dumps([result_settings(self.config), self.inputs, self.code], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def allow_inexact_resume(self) -> bool:
        return '"allow_inexact_resume": true' in json.dumps(self.config)


class UnfinishedWork:
    """The file `unfinished.json` of a stage's folder: it is there from the start of the work until it is complete.

    Attributes:
        mixed_code: files of code that changed while the stage was being made, and of which results are kept.
    """

    def __init__(self, folder: Path, dependencies: Dependencies):
        self.folder, self.path = folder, folder / MARKER
        self.mixed_code: list[str] = []
        self._dependencies = dependencies

    def exists(self) -> bool:
        return self.path.exists()

    def start(self, overwrite: bool) -> None:
        """Mark the folder as unfinished. `overwrite`: whether the command had this flag."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            durable.write_json(self.path, self._content([], overwrite))
        except OSError as error:
            raise self._not_writable(error) from None

    def resume(self, stage: str) -> None:
        """Continue the work. If the code has changed since and something is kept, say so and record which files did.

        `stage` is its name for messages. Raises BadConfig if the work was begun with another config or other inputs.
        """
        try:
            record = self._read()
            self._dependencies.refuse_changes(record, f"{stage} was begun with")
            self._note_changed_code(record, stage)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadData(
                f"{self.path} is damaged ({error}); run again with {self._dependencies.again}"
            ) from None
        except OSError as error:
            raise self._not_writable(error) from None

    def _note_changed_code(self, record: dict[str, Any], stage: str) -> None:
        changed = code_version.changed_files(record.get("code", {}), self._dependencies.code)
        kept, has_parts = self._is_something_kept(), (self.folder / MANIFESTS).exists()
        if changed and (kept or has_parts):
            outcomes = ["what is already complete is kept"] if kept and not has_parts else []
            outcomes += ["trained models are kept"] if kept and has_parts else []
            outcomes += ["parts that it made are made again"] if has_parts else []
            files = code_version.name_files(changed)
            say(f"{stage} was begun with different code ({files}); {', and '.join(outcomes)}")
        self.mixed_code = sorted({*record.get("mixed", []), *changed}) if kept else []
        content = self._content(self.mixed_code, record.get("overwrite", False))
        if content != record:
            durable.write_json(self.path, content)

    def _is_something_kept(self) -> bool:
        """Whether the folder has work that other code would continue.

        The key of a part has the hashes of the code, and so has that of what all parts need. So of a stage that makes parts, only
        models that learn are kept.
        """
        if (self.folder / MANIFESTS).exists():
            return any((path / TRAINING_LOG).exists() for path in self.folder.iterdir())
        own = (MARKER, *(path.name for path in self.folder.glob("log*.txt")))
        return any(path.name not in own and path.suffix != ".tmp" for path in self.folder.iterdir())

    def _not_writable(self, error: OSError) -> CannotCreate:
        return CannotCreate(f"cannot write into {self.folder}: {error.strerror}")

    def is_same_attempt(self) -> bool:
        """Whether the folder holds unfinished work of --overwrite with this config, these inputs and this code."""
        if (self.folder / "manifest.json").exists():
            return False
        now = self._dependencies
        try:
            record = self._read()
            same_code = record["code"] == now.code or now.allow_inexact_resume
            same_inputs = record["inputs"] == now.inputs
            same_config = not config_changes(record["config"], now.config)
            return record["overwrite"] and same_code and same_inputs and same_config
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def finish(self) -> None:
        """Remove the mark: the work is complete."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        return durable.read_json(self.path)

    def _content(self, mixed: list[str], overwrite: bool) -> dict[str, Any]:
        now = self._dependencies
        content = {"config": now.config, "inputs": now.inputs, "code": now.code, "mixed": mixed}
        return json.loads(json.dumps(content | {"overwrite": overwrite}))


def choose_folder(final: Path, dependencies: Dependencies, overwrite: bool) -> Path:
    """The folder to work in: the final one or, with --overwrite, `<stage>.new` beside it.

    `<stage>.new` may hold the same attempt, unfinished; another attempt is removed.
    """
    if not overwrite or not final.exists() or UnfinishedWork(final, dependencies).is_same_attempt():
        return final
    new = durable.beside(final, durable.NEW)
    if not UnfinishedWork(new, dependencies).is_same_attempt():
        durable.remove(new)
    return new


class Attempt:
    """The units that one command with --overwrite has made again. The same command goes on after an interruption.

    The file lies in the folder of the stage until the command has ended. Its name is a digest of all that the units
    depend on, so that only the same command finds it.

    Attributes:
        done: the units that are made.
    """

    def __init__(self, folder: Path, chosen: tuple[str, ...], dependencies: Dependencies):
        code = {} if dependencies.allow_inexact_resume else dependencies.code
        key = json.dumps([chosen, result_settings(dependencies.config), dependencies.inputs, code])
        self.path = folder / f"overwrite_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        try:
            self.done = set(durable.read_json(self.path))
        except (OSError, ValueError, TypeError):
            self.done = set()

    def add(self, name: str) -> None:
        self.done.add(name)
        durable.write_json(self.path, sorted(self.done))

    def finish(self) -> None:
        """Remove the file: the next command makes all units again."""
        if self.path.exists():  # otherwise a run that can only be read would refuse
            durable.remove_temporaries(self.path.parent, f"{self.path.name}.*.tmp")
            self.path.unlink(missing_ok=True)
