"""Errors that a user can cause or fix, each with its exit code.

Any other exception is a bug of this project and keeps its traceback.

| code | class         | meaning                                                             |
|------|---------------|---------------------------------------------------------------------|
| 2    | UsageError    | the command line is wrong                                           |
| 65   | BadData       | the data, or a file of an earlier stage, is wrong or damaged        |
| 66   | MissingInput  | an input is missing; the message says how to make it                |
| 73   | CannotCreate  | a file or folder cannot be created                                  |
| 74   | CannotWrite   | writing failed: disk full, device error                             |
| 75   | Busy          | another process is at work on this stage; try again later           |
| 75   | ProcessLost   | another process of the same training has ended; run again           |
| 76   | NonFiniteLoss | the loss became NaN or infinite; training stopped before the update |
| 78   | BadConfig     | a config file or --set is wrong, or disagrees with the run          |
| 130  | Interrupted   | Ctrl-C (SIGINT); 143 for SIGTERM. Run again to continue             |
"""

import difflib
from collections.abc import Iterable


class RemaskError(Exception):
    """Base class. `str(error)` is the whole message for the user."""

    exit_code = 70


class UsageError(RemaskError):
    exit_code = 2


class BadData(RemaskError):
    exit_code = 65


class MissingInput(RemaskError):
    exit_code = 66


class CannotCreate(RemaskError):
    exit_code = 73


class CannotWrite(RemaskError):
    exit_code = 74


class Busy(RemaskError):
    exit_code = 75


class ProcessLost(RemaskError):
    """Another process of the same training has ended. The training continues from its checkpoint when it is run again."""

    exit_code = 75


class NonFiniteLoss(RemaskError):
    exit_code = 76


class BadConfig(RemaskError):
    exit_code = 78


class Interrupted(RemaskError):
    """SIGINT (exit code 130) or SIGTERM (143), raised at a point where the work can be continued."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """SIGTERM (exit code 143), raised wherever a script is. It is no Exception: code that catches those must not keep it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?` if a known word is similar, otherwise the list of known words."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
