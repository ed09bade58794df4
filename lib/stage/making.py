"""How a stage makes its parts: those that are not there, by the executor of the config; with --part i/n, a share of them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import durable
from lib.config import Config
from lib.errors import Busy
from lib.executors import Work, open_executor
from lib.log import Progress, say
from lib.room import say_room
from lib.runs import RunArgs, command, display_path, load_manifest
from lib.stage.locks import StageLocks
from lib.stage.parts import MANIFESTS, MadeParts, Parts, part_key
from lib.stage.unfinished import Dependencies

if TYPE_CHECKING:
    from lib.schema import TableSchema

MAX_LISTED = 10  # part numbers in one message


class PartsMaker(ABC):
    """Makes the parts of a stage's tables, and declares them as outputs."""

    name: str
    folder: Path
    run_dir: Path
    config: Config
    args: RunArgs
    finished: bool
    environment: dict[str, Any]
    _final_folder: Path
    _dependencies: Dependencies
    _locks: StageLocks
    _outputs: dict[str, dict]

    def parts(
        self,
        schemas: Mapping[str, "TableSchema"],
        metadata: Mapping[str, str] | None = None,
        also: Any = None,
    ) -> Parts:
        """The parts of some tables of this stage.

        Args:
            metadata: stored in every file, for readers that have no manifest.
            also: what the parts depend on besides settings, inputs and code of the stage, as JSON can hold it.
        """
        return Parts(
            self.folder, part_key(self._dependencies.digest, also), dict(schemas), dict(metadata or {})
        )

    def make_parts(
        self, parts: Parts, work: Work, count: int, label: str, num_bytes: int = 0
    ) -> MadeParts | None:
        """Make the parts 0 to `count` - 1 that are absent.

        `num_bytes`: what all parts take on the disk, estimated from above; it is said before the first part is made.

        Returns them, or None if other commands have to make some of them (--part). Then the stage stays incomplete.
        """
        share, shares = self.args.part or (0, 1)
        own = range(share, count, shares)
        absent = parts.missing(own)
        if len(absent) < len(own):
            say(f"{label}: {len(own) - len(absent)} of {len(own)} parts are complete already")
        if num_bytes and absent:
            say_room(self.folder, num_bytes * len(absent) // count, label)
        with (
            Progress(label, len(own), start=len(own) - len(absent)) as progress,
            open_executor(self.config.executor, work) as executor,
        ):
            for done, _ in enumerate(executor.make(absent), start=len(own) - len(absent) + 1):
                progress.update(done)
        if self.args.part is not None and not self._is_left_alone(parts, count, label):
            return None
        return MadeParts(parts, count)

    def add_parts(self, made: MadeParts) -> None:
        """Declare the tables of complete parts as outputs. Raises BadData if two rows of a table have the same key.

        If models made the parts in different environments, that is said, and stands in the manifest: their bits may differ.
        """
        made.remove_others()
        if different := made.different_environments():
            each = "; ".join(f"{name}: {', '.join(values)}" for name, values in different.items())
            say(f"WARNING: parts of {self.name} were made in different environments ({each}), so another run may give "
                "other bits; --overwrite makes all of them again")  # fmt: skip
            self.environment["different_in_parts"] = different
        for table in made.parts.schemas:
            self._outputs[table] = made.record(table)

    def trained(self, folders: Iterable[Path]) -> list[str]:
        """Hashes of those of the folders that this stage has made and declared, such as models."""
        own = {self.folder / record["path"]: record["sha256"] for record in self._outputs.values()}
        return [own[folder] for folder in folders if folder in own]

    def make_once(self, name: str, make: Callable[[Path], None]) -> None:
        """Make the output folder `name`, which all parts need, and declare it. Nothing to do if an earlier command made it.

        `make` fills a temporary folder, which then replaces the folder.
        """
        folder, note = self.folder / name, self.folder / MANIFESTS / f"{name}.json"
        with self.alone(name):
            if _read(note) != {"key": self._dependencies.digest, "sha256": durable.sha256_folder(folder)}:
                with durable.replacing_folder(folder) as temporary:
                    make(temporary)
                note.parent.mkdir(exist_ok=True)
                sha256 = durable.sha256_folder(folder)
                durable.write_json(note, {"key": self._dependencies.digest, "sha256": sha256})
        self.add_folder(name, folder)

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """While active, no other command with --part makes the same thing, such as a tokenizer. It waits for its turn."""
        with self._locks.alone(
            f"{self.name}.{what}", waiting=f"another process makes the {what}; waiting for it"
        ):
            yield

    @abstractmethod
    def add_folder(self, name: str, folder: Path) -> None:
        """Declare a folder as an output."""

    @abstractmethod
    def leave_incomplete(self, reason: str) -> None:
        """End without a manifest and without an error."""

    def _is_left_alone(self, parts: Parts, count: int, label: str) -> bool:
        """Whether this command, which has --part, is the last one: all parts are there, and it completes the stage."""
        where = display_path(self.run_dir)
        plain = f"`{command(self.name, '--run_dir', where)}`"
        if absent := parts.missing(range(count)):
            _, shares = self.args.part or (0, 1)
            numbers = sorted({number % shares for number in absent})
            listed = ", ".join(f"{number}/{shares}" for number in numbers[:MAX_LISTED])
            more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
            self.leave_incomplete(
                f"{label}: {len(absent)} of {count} parts are missing; --part {listed}{more} makes them. The last command "
                f"completes the stage, and so does {plain} with the same settings"
            )
            return False
        try:
            self._locks.make_exclusive(self.name)
        except Busy:
            self.leave_incomplete(f"{label}: all parts are there; another process completes the stage")
            return False
        if load_manifest(self._final_folder) is not None:
            self.leave_incomplete(f"{self.name} in {where} was completed by another process")
            return False
        return True


def _read(file: Path) -> Any:
    """The content of a JSON file; None if it is missing or damaged."""
    try:
        return durable.read_json(file)
    except (OSError, ValueError):
        return None
