"""Measurements, each a command: `python -m benchmarks.NAME --help`. docs/benchmarks.md lists them."""

import sys
from types import TracebackType


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that is meant for users ends a benchmark with its message alone, as it ends a stage."""
    from lib.cli import as_remask_error
    from lib.errors import RemaskError

    known = error if isinstance(error, RemaskError) else as_remask_error(error)
    if known is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {known}", file=sys.stderr)


sys.excepthook = _say
