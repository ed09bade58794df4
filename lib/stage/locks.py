"""Locks on the stages of a run and on their units, and recovery after a crash that interrupted a replacement.

A unit is a part of a stage with a folder and a manifest of its own, such as the model 04_train/judge. Who works on a unit,
or reads it, also shares the lock of its stage, so that nobody replaces the whole stage meanwhile.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from lib import durable
from lib.errors import Busy, CannotCreate
from lib.log import say
from lib.runs import display_path, stage_of
from lib.stage.unfinished import MARKER

SECONDS_FOR_THE_DOCTOR = 1.0  # which tries a lock and gives it up at once
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def with_stages(names: Iterable[str]) -> list[str]:
    """The names, each once; before the name of a unit that of its stage."""
    return list(dict.fromkeys(name for unit in names for name in (stage_of(unit), unit)))


class StageLocks:
    """Locks that one process holds on stages and units of a run, until `close`.

    The lock files lie in `<run>/.locks`: a stage's folder may be replaced while the stage is locked. A run on a disk that can
    only be read keeps the files that it has; what has none is not locked, since nobody can change it from here.

    Args:
        places: stage -> the folder that has it in place of the run.
    """

    def __init__(self, run_dir: Path, places: Mapping[str, Path] | None = None):
        self._run_dir = run_dir
        self._places = dict(places or {})
        self._held = contextlib.ExitStack()
        self._files: dict[str, IO[str]] = {}

    def lock(self, stage_name: str, *, shared: bool, subject: str = "") -> None:
        """Lock a stage or a unit: shared to read it, exclusive to make it. Raises Busy if another process forbids that.

        `subject` names in the message what is locked, if it is no stage.
        """
        handle = _open(self._file(stage_name))
        if handle is None:
            return
        self._held.enter_context(handle)
        self._files[stage_name] = handle
        try:
            _take(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except BlockingIOError:
            raise Busy(
                f"another process is at work on {subject or stage_name} in {display_path(self._run_dir)}; "
                "wait until it has finished, or use another --run_dir"
            ) from None

    def make_exclusive(self, stage_name: str) -> None:
        """Turn a shared lock into an exclusive one. Raises Busy, and gives up the lock, if others hold it, too.

        The lock is released in between. So of several processes that do this at the end of their work, the last one
        succeeds: at that time nobody else holds the lock, except the doctor, for a moment.
        """
        handle = self._files[stage_name]
        fcntl.flock(handle, fcntl.LOCK_UN)
        try:
            _take(handle, fcntl.LOCK_EX)
        except BlockingIOError:
            raise Busy(f"another process is at work on {stage_name}") from None

    def close(self) -> None:
        """Release all locks."""
        self._held.close()

    @contextlib.contextmanager
    def alone(self, what: str, waiting: str = "") -> Iterator[None]:
        """Wait for the lock file `what`, and hold it while the block runs.

        `waiting` is said if another process holds it; give it if the block may take long.
        """
        opened = _open(self._file(what))
        if opened is None:
            yield
            return
        with opened as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    say(waiting)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _file(self, name: str) -> Path:
        """The lock file. A model's name is an identifier, so the files of two names are never the same."""
        return self._place(name) / ".locks" / name.replace("/", "--")

    def _place(self, name: str) -> Path:
        return self._places.get(name, self._run_dir)

    def recover(self, stage_name: str) -> None:
        """Finish a replacement of the stage's folder that a crash interrupted.

        Several readers may get here at once, since they share the stage's lock. A lock of its own lets in one at a time.
        """
        folder = self._place(stage_name) / stage_name
        new, old = (durable.beside(folder, suffix) for suffix in (durable.NEW, durable.OLD))
        if not (new.exists() or old.exists()) or not os.access(folder.parent, os.W_OK):
            return  # of a run that can only be read, nothing can be repaired
        with self.alone(f"{stage_name}.recovery"):
            complete = (new / "manifest.json").exists()
            if new.exists() and (complete or not (folder.exists() or old.exists())):
                if complete:
                    (new / MARKER).unlink(missing_ok=True)
                durable.replace_folder(folder, new)
            durable.recover_folder(folder)
            durable.remove(old)


def _take(handle: IO[str], kind: int) -> None:
    """Take a lock. Raises BlockingIOError if another process holds it for longer than the doctor does."""
    end = time.monotonic() + SECONDS_FOR_THE_DOCTOR
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


def _open(file: Path) -> IO[str] | None:
    """A lock file, made if it is absent; None if that is impossible, since the run can only be read. Raises CannotCreate."""
    try:
        file.parent.mkdir(exist_ok=True)
        return open(file, "a+")
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise CannotCreate(f"cannot create {file}: {error.strerror}") from None
    return open(file) if os.access(file, os.R_OK) else None
