"""SIGINT and SIGTERM during a training: the current step is finished first."""

import signal
from typing import ClassVar


class StopRequest:
    """While active, SIGINT and SIGTERM are stored in `signal` and have no other effect.

    Code that waits for a long time checks `StopRequest.noted()`.
    """

    _active: ClassVar["StopRequest | None"] = None

    def __init__(self) -> None:
        self.signal = 0

    @classmethod
    def noted(cls) -> int:
        """The signal that the active request has received, 0 for none."""
        return cls._active.signal if cls._active else 0

    def __enter__(self) -> "StopRequest":
        self._old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        except ValueError:  # only the main thread can set handlers; elsewhere the caller handles signals
            self._old = {}
        StopRequest._active = self
        return self

    def __exit__(self, *_) -> None:
        StopRequest._active = None
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.signal = number
