"""A hostile or broken file, the command that is given it, and the exit codes with which it may be refused."""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.scenarios import BASES

USAGE, DATA, MISSING, CREATE, CONFIG = 2, 65, 66, 73, 78


@dataclass(frozen=True)
class Place:
    """Where one case works.

    Attributes:
        folder: for its files; nothing else is there.
        run: the folder of its run, which does not exist yet.
        bases: folders of complete runs, `text` and `finqa`, of the same settings.
        secret: a file outside that no command may read.
        canary: a file that code of a hostile file would write.
    """

    folder: Path
    run: Path
    bases: Path
    secret: Path
    canary: Path

    def file(self, name: str, content: bytes | str) -> Path:
        """Write a file of this case."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def stages(self, *names: str, base: str = "text") -> None:
        """Copy complete stages into the run."""
        self.run.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copytree(self.bases / base / name, self.run / name, symlinks=True)

    def command(self, stage: str, *settings: str, base: str = "text", more: Iterable[str] = ()) -> list[str]:
        words = [word for setting in settings for word in ("--set", setting)]
        return [f"{stage}.py", *BASES[base], *words, *more, "--run_dir", str(self.run)]

    def payload(self) -> str:
        """Python code that writes the canary."""
        return f"open({str(self.canary)!r}, 'w').write('hostile code ran')"


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        group: what kind of file it is.
        make: writes the files and returns the command line.
        codes: exit codes that the documents state for such an input. 0 is among them only where the input is harmless.
    """

    group: str
    name: str
    make: Callable[[Place], list[str]]
    codes: tuple[int, ...] = (DATA,)


def pickled(place: Place) -> bytes:
    """A pickle that writes the canary when it is loaded."""
    code = place.payload().encode()
    return (
        b"\x80\x02cbuiltins\nexec\nq\x00X" + len(code).to_bytes(4, "little") + code + b"q\x01\x85q\x02Rq\x03."
    )


def fifo(path: Path) -> Path:
    """A named pipe that nobody writes to: whoever opens it for reading waits forever."""
    os.mkfifo(path)
    return path
