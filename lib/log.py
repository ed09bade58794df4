"""What a stage prints: lines on the screen and in its log.txt, and a progress bar.

On a terminal the progress bar is tqdm's. Elsewhere it is one line every 30 seconds, so that logs stay small.
"""

import re
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TypeVar

T = TypeVar("T")
_file: IO[str] | None = None
_silent = False
HEARTBEAT_SECONDS = 30.0
# What moves the cursor, changes colours or titles, or turns the direction of writing; line ends and tabs are no danger
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def log_to(path: Path | None) -> None:
    """From now on, append every line to `path`, too. None closes the file."""
    global _file
    if _file is not None:
        _file.close()
    if path is None:
        _file = None
        return
    # A file name that is not UTF-8 is written as an escape
    _file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - closed above


def silence() -> None:
    """From now on, print nothing: of several processes, the main one speaks for all."""
    global _silent
    _silent = True


def printable_line(text: str) -> str:
    """The text for a terminal: control characters, which could move the cursor or change its title, become escapes.

    Line ends and tabs stay. Text of a user's file can be a part of any message.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print a line for the user on standard error: standard output is for results, which can be piped."""
    if _silent:
        return
    text = printable_line(text)
    bar = Progress.current
    if bar is not None and bar.on_terminal:
        bar.clear()
    print(text, file=sys.stderr, flush=True)
    if _file is not None:
        print(text, file=_file, flush=True)


class Progress:
    """A progress bar over `total` steps, with values beside it.

    with Progress("generator", 700, start=100) as progress:
        progress.update(step, loss="2.31", speed="21k tokens/s")
    """

    current: "Progress | None" = None

    def __init__(self, label: str, total: int, start: int = 0):
        self.label, self.total, self.start, self.step = label, total, start, start
        self.on_terminal = sys.stderr.isatty() and not _silent
        self._begin = self._last = time.monotonic()
        self._bar = None

    def __enter__(self) -> "Progress":
        if self.on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, initial=self.start, desc=self.label, leave=False, dynamic_ncols=True
            )
        Progress.current = self
        return self

    def __exit__(self, *_) -> None:
        Progress.current = None
        if self._bar is not None:
            self._bar.close()

    def clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    def update(self, step: int, **values: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(step - self.step)
        self.step = step
        now = time.monotonic()
        if not self.on_terminal and now - self._last >= HEARTBEAT_SECONDS:
            self._last = now
            done = step - self.start
            seconds_left = (now - self._begin) / max(done, 1) * (self.total - step)
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            say(f"{self.label}: step {step}/{self.total}  {text}  {seconds_left:.0f} s left")


def with_progress(label: str, items: Collection[T]) -> Iterator[T]:
    """The items, with a progress bar over them."""
    with Progress(label, len(items)) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)
