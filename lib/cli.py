"""The command line that all seven scripts share, and the way errors become exit codes.

The flags are frozen: knobs belong into the config (--set changes one). Importing this module imports neither
torch nor pyarrow, so that --help answers at once.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lib.config import Config, load_config
from lib.errors import (
    BadConfig,
    CannotCreate,
    CannotWrite,
    Interrupted,
    RemaskError,
    UsageError,
    did_you_mean,
)
from lib.runs import RunArgs
from lib.sections.models import MODE_ALIASES, MODES


def user_path(text: str) -> Path:
    """A path as given on the command line; ~ is the home, also where the shell leaves it, as in --score=~/a.txt."""
    return Path(os.path.expanduser(text))


class _Parser(argparse.ArgumentParser):
    """Refuses unknown flags with the nearest right one, and never guesses abbreviations."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [f for action in self._actions for f in action.option_strings if f.startswith("--")]
            word = unknown[0].split("=")[0]
            raise UsageError(
                f"unknown argument {unknown[0]}{did_you_mean(word, flags)} (see {self.prog} --help)"
            )
        return args


class _Version(argparse.Action):
    """Print the version and the commit, and end. Git is asked only when the flag is given."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser, *_) -> None:
        from lib.code_version import version_text

        print(version_text())
        parser.exit()


def make_parser(
    description: str, *, with_mode: bool = False, with_stream: bool = False, with_score: bool = False
) -> _Parser:
    parser = _Parser(description)
    add = parser.add_argument
    add("--version", action=_Version, help="show the version and the git commit, and exit")
    add(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="settings over configs/default.yaml; may be given several times, later ones win",
    )
    add(
        "--run_dir",
        type=user_path,
        metavar="DIR",
        help="the run's folder (default: 00 continues or starts the newest matching run in outputs/, the others use the newest)",
    )
    add(
        "--quick_test",
        action="store_true",
        help="also apply the configs' quick_test blocks: the same run, small",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one setting, such as training.steps=100; may be given several times",
    )
    add(
        "--overwrite",
        action="store_true",
        help="make this stage's outputs again; the old ones stay until the new ones are complete",
    )
    add("--resume", action="store_true", help="insist on continuing unfinished work (it is continued anyway)")
    if with_mode:
        add("--mode", choices=[*MODES, *MODE_ALIASES], help="train only the models of this mode")
    if with_stream:
        add(
            "--stream",
            action="store_true",
            help="go on making shards of fresh candidates while stage 04 trains",
        )
    if with_score:
        add(
            "--score",
            type=user_path,
            metavar="FILE",
            help="score this text (.txt, .jsonl, .csv, .parquet, ... or a folder of them) token by token instead of sampling; a name "
            "that begins with a dash is given as --score=-name.txt",
        )
    return parser


def run_stage(
    main: Callable[[Config, RunArgs], Any],
    description: str | None,
    *,
    with_mode: bool = False,
    with_stream: bool = False,
    with_score: bool = False,
) -> None:
    """Parse the command line, load the config, run `main(config, args)`, exit with the documented code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        parser = make_parser(
            description or "", with_mode=with_mode, with_stream=with_stream, with_score=with_score
        )
        options = parser.parse(sys.argv[1:])
        config = load_config(options.config, quick_test=options.quick_test, overrides=options.overrides)
        if options.overwrite and options.resume:
            raise UsageError("--overwrite and --resume contradict each other; give one of them")
        mode = getattr(options, "mode", None)
        args = RunArgs(
            run_dir=options.run_dir,
            quick_test=options.quick_test,
            overwrite=options.overwrite,
            resume=options.resume,
            command=tuple([Path(sys.argv[0]).name, *sys.argv[1:]]),
            only_mode=MODE_ALIASES.get(mode, mode) if mode else None,
            stream=getattr(options, "stream", False),
            score=getattr(options, "score", None),
        )
        main(config, args)
    except RemaskError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130)
    except OSError as error:
        known = as_remask_error(error)
        if known is None:
            raise
        _fail(str(known), known.exit_code)
    except BaseException as error:
        # Arrow and safetensors wrap a full disk in errors of their own
        cause = as_remask_error(error)
        if cause is None:
            raise
        _fail(str(cause), cause.exit_code)


def as_remask_error(error: BaseException) -> RemaskError | None:
    """What the operating system refused, in a user's words; None if it is a fault of ours."""
    number = getattr(error, "errno", None)
    where = getattr(error, "filename", None) or "a file"
    text = str(error)
    if "does not have a deterministic implementation" in text:
        return BadConfig(
            f"torch has no kernel for this device that gives the same bits each time: {text.splitlines()[0]} Set device=cpu"
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return CannotWrite(
            f"the disk is full while writing {where}; what was complete before still is. Free some space and run the same command again"
        )
    if number in (errno.EIO, errno.EROFS, errno.EFBIG) or "File too large" in text:
        return CannotWrite(f"writing {where} failed: {os.strerror(number) if number else text}")
    if number in (errno.EACCES, errno.EPERM):
        return CannotCreate(f"no permission for {where}")
    return None


def _fail(message: str, code: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _terminate(signum, frame) -> NoReturn:
    raise Interrupted("stopped by SIGTERM; run the same command again to continue", 143)
