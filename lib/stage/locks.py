"""Locks on the stages of a run and on their units, and recovery after a crash that interrupted a replacement.

A unit is a part of a stage with a folder and a manifest of its own, such as the model 04_train/judge. Who works on a unit,
or reads it, also shares the lock of its stage, so that nobody replaces the whole stage meanwhile.
"""

import contextlib
import fcntl
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib import durable
from lib.errors import Busy, CannotCreate
from lib.runs import display_path, stage_of
from lib.stage.unfinished import MARKER


def with_stages(names: Iterable[str]) -> list[str]:
    """The names, each once; before the name of a unit that of its stage."""
    return list(dict.fromkeys(name for unit in names for name in (stage_of(unit), unit)))


class StageLocks:
    """Locks that one process holds on stages and units of a run, until `close`.

    The lock files lie in `<run>/.locks`: a stage's folder may be replaced while the stage is locked.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._folder = run_dir / ".locks"
        self._held = contextlib.ExitStack()

    def lock(self, stage_name: str, *, shared: bool, subject: str = "") -> None:
        """Lock a stage or a unit: shared to read it, exclusive to make it. Raises Busy if another process forbids that.

        `subject` names in the message what is locked, if it is no stage.
        """
        file = self._file(stage_name)
        try:
            file.parent.mkdir(exist_ok=True)
            handle = self._held.enter_context(open(file, "a+"))  # noqa: SIM115
        except OSError as error:
            raise CannotCreate(f"cannot create {file}: {error.strerror}") from None
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another process is at work on {subject or stage_name} in {display_path(self._run_dir)}; "
                "wait until it has finished, or use another --run_dir"
            ) from None

    def close(self) -> None:
        """Release all locks."""
        self._held.close()

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Wait for the lock file `what`, and hold it while the block runs. For work of an instant."""
        with open(self._file(what), "a+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _file(self, name: str) -> Path:
        """The lock file. A model's name is an identifier, so the files of two names are never the same."""
        return self._folder / name.replace("/", "--")

    def recover(self, stage_name: str) -> None:
        """Finish a replacement of the stage's folder that a crash interrupted.

        Several readers may get here at once, since they share the stage's lock. A lock of its own lets in one at a time.
        """
        folder = self._run_dir / stage_name
        new, old = (durable.beside(folder, suffix) for suffix in (durable.NEW, durable.OLD))
        if not new.exists() and not old.exists():
            return
        with self.alone(f"{stage_name}.recovery"):
            complete = (new / "manifest.json").exists()
            if new.exists() and (complete or not (folder.exists() or old.exists())):
                if complete:
                    (new / MARKER).unlink(missing_ok=True)
                durable.replace_folder(folder, new)
            durable.recover_folder(folder)
            durable.remove(old)
