"""Locks on the stages of a run, and recovery after a crash that interrupted the replacement of a stage's folder."""

import contextlib
import fcntl
from pathlib import Path

from lib import durable
from lib.errors import Busy, CannotCreate
from lib.runs import display_path
from lib.stage.unfinished import MARKER


class StageLocks:
    """Locks that one process holds on stages of a run, until `close`.

    The lock files lie in `<run>/.locks`: a stage's folder may be replaced while the stage is locked.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._folder = run_dir / ".locks"
        self._held = contextlib.ExitStack()

    def lock(self, stage_name: str, *, shared: bool) -> None:
        """Lock a stage: shared to read it, exclusive to make it. Raises Busy if another process forbids that."""
        file = self._folder / stage_name
        try:
            file.parent.mkdir(exist_ok=True)
            handle = self._held.enter_context(open(file, "a+"))  # noqa: SIM115
        except OSError as error:
            raise CannotCreate(f"cannot create {file}: {error.strerror}") from None
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another process is at work on {stage_name} in {display_path(self._run_dir)}; "
                "wait until it has finished, or use another --run_dir"
            ) from None

    def close(self) -> None:
        """Release all locks."""
        self._held.close()

    def recover(self, stage_name: str) -> None:
        """Finish a replacement of the stage's folder that a crash interrupted.

        Several readers may get here at once, since they share the stage's lock. A lock of its own lets in one at a time.
        """
        folder = self._run_dir / stage_name
        new, old = (durable.beside(folder, suffix) for suffix in (durable.NEW, durable.OLD))
        if not new.exists() and not old.exists():
            return
        with open(self._folder / f"{stage_name}.recovery", "a+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            complete = (new / "manifest.json").exists()
            if new.exists() and (complete or not (folder.exists() or old.exists())):
                if complete:
                    (new / MARKER).unlink(missing_ok=True)
                durable.replace_folder(folder, new)
            durable.recover_folder(folder)
            durable.remove(old)
