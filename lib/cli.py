"""The command line of the seven scripts, and how errors become exit codes.

No flags are added for settings: these belong into the config, and --set changes one. This module imports neither torch
nor pyarrow, so that --help answers at once.
"""

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lib import outside
from lib.config import Config, load_config
from lib.config_files import replaced_by_quick_test
from lib.engine.processes import current, start, world_size
from lib.errors import (
    BadConfig,
    CannotCreate,
    CannotWrite,
    MissingInput,
    RemaskError,
    Terminated,
    UsageError,
    did_you_mean,
)
from lib.log import printable_line, say, silence
from lib.neighbours import share_with_neighbours
from lib.runs import OUTPUTS, STAGES, RunArgs, display_path, find_run
from lib.sections.models import MODE_ALIASES, MODES

SECONDS_TO_SIGNAL = 0.05
STOPPED = "stopped by SIGTERM; run the same command again to continue"
SECONDS_FOR_OTHERS = 3.0  # how long the process that reports an error waits for the others to fail, too


def user_path(text: str) -> Path:
    """A path of the command line. `~` is the home folder, also where the shell does not expand it (--score=~/a.txt)."""
    return Path(os.path.expanduser(text))


def share_of_parts(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`, with 0 <= i < n."""
    share, _, shares = text.partition("/")
    if not (share.isdecimal() and shares.isdecimal() and int(share) < int(shares)):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not I/N with 0 <= I < N, such as 0/4, 1/4, 2/4 and 3/4"
        )
    return int(share), int(shares)


EPILOG = """\
The scripts 00 to 06 run in order. They share one folder, the run, and need the same --config, --quick_test and --set:

  python 00_check_data.py --quick_test --run_dir outputs/demo
  python 01_prepare_dataset.py --quick_test --run_dir outputs/demo
  ...

`make pipeline` runs all of them. A script that has finished does nothing when it is run again; a script that was
interrupted continues. configs/default.yaml lists all settings.
"""


class _Parser(argparse.ArgumentParser):
    """Refuses an unknown flag and suggests the closest known one. Abbreviations are not accepted."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
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
    description: str,
    *,
    with_mode: bool = False,
    with_stream: bool = False,
    with_score: bool = False,
    with_parts: bool = False,
) -> _Parser:
    parser = _Parser(description)
    add = parser.add_argument
    add("--version", action=_Version, help="show the version and the git commit, and exit")
    add(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML file with the settings that differ from configs/default.yaml; may be given several times, "
        "later files win",
    )
    add(
        "--run_dir",
        type=user_path,
        metavar="DIR",
        help="the folder of the run. Default: the newest run in outputs/; script 00 continues the newest run with the "
        "same settings, or starts a new one",
    )
    add(
        "--quick_test",
        action="store_true",
        help="try out the pipeline: small models and little data, by the quick_test blocks of the config files",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one setting, such as --set models.judge.training.steps=100; may be given several times",
    )
    add(
        "--overwrite",
        action="store_true",
        help="make the outputs of this script again; the old outputs stay until the new ones are complete",
    )
    add(
        "--resume",
        action="store_true",
        help="fail if there is no unfinished work to continue (unfinished work is continued without this flag, too)",
    )
    if with_mode:
        add(
            "--mode",
            choices=[*MODES, *MODE_ALIASES],
            metavar="MODE",
            help=f"train only the models of this mode ({', '.join(MODES)}). Default: all models",
        )
        add(
            "--only",
            action="append",
            default=[],
            metavar="NAME",
            help="train only the model of this name; may be given several times. With --overwrite, no other model changes",
        )
    if with_parts:
        add(
            "--part",
            type=share_of_parts,
            metavar="I/N",
            help="make only every N-th part of the tables, from part I on (0 to N - 1). For job arrays: the last of N commands "
            "completes the stage",
        )
    if with_stream:
        add(
            "--stream",
            action="store_true",
            help="make new candidates, in shards, while 04_train.py trains on them",
        )
    if with_score:
        add(
            "--score",
            type=user_path,
            metavar="FILE",
            help="instead of sampling, score each token of this text: a .txt, .jsonl, .csv, .parquet, ... file or a folder "
            "of them. Write --score=-name.txt for a name that begins with a dash",
        )
        add(
            "--rank",
            type=user_path,
            metavar="FILE",
            help="instead of sampling, rank the candidates of this file by a trained ranker: a .jsonl, .json, .csv or .parquet file "
            "with prompts and candidates, rewards not needed",
        )
        add(
            "--out_dir",
            type=user_path,
            metavar="DIR",
            help="with --score or --rank: write into this folder. Default: into the run, which may be read-only",
        )
    return parser


def run_stage(
    main: Callable[[Config, RunArgs], Any],
    description: str | None,
    *,
    with_processes: bool = False,
    **flags: bool,
) -> None:
    """Parse the command line, load the config and run `main(config, args)`. Errors end with the exit codes of lib.errors.

    Args:
        with_processes: a launcher such as torchrun may start the script several times, as one training.
        flags: groups of flags that only some scripts have, such as `with_stream=True`; see `make_parser`.
    """
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _deliver_again
    try:
        _run_stage(main, description, with_processes, flags)
    except Terminated:  # it came while the message of another error was made
        _fail(STOPPED, 143)


def _run_stage(
    main: Callable[[Config, RunArgs], Any],
    description: str | None,
    with_processes: bool,
    flags: dict[str, bool],
) -> None:
    try:
        _join_processes(with_processes)
        parser = make_parser(description or "", **flags)
        options = parser.parse(sys.argv[1:])
        if (line := share_with_neighbours()) is not None:
            say(line)
        config = load_config(options.config, quick_test=options.quick_test, overrides=options.overrides)
        is_first = Path(sys.argv[0]).stem == STAGES[0]  # the others do not repeat it
        if (
            options.quick_test
            and is_first
            and (line := replaced_by_quick_test(options.config, options.overrides))
        ):
            say(line)
        if is_first:
            outside.refuse_unknown_starts(config)  # before stages 01 to 03 have worked for nothing
        if options.overwrite and options.resume:
            raise UsageError("--overwrite and --resume contradict each other; give one of them")
        part = getattr(options, "part", None)
        if part and (options.overwrite or getattr(options, "stream", False)):
            raise UsageError(
                f"--part cannot be used with {'--overwrite' if options.overwrite else '--stream'}: several commands work on the "
                "same stage. Use another --run_dir, or run without --part"
            )
        if getattr(options, "score", None) and options.rank:
            raise UsageError("--score and --rank are two things to do; give one of them")
        out_dir = getattr(options, "out_dir", None)
        if out_dir and not (options.score or options.rank):
            raise UsageError("--out_dir is for --score and --rank; a stage itself is a part of its run")
        mode = getattr(options, "mode", None)
        if mode and options.only:
            raise UsageError("--mode and --only both select models; give one of them")
        args = RunArgs(
            run_dir=options.run_dir,
            quick_test=options.quick_test,
            overwrite=options.overwrite,
            resume=options.resume,
            command=tuple([Path(sys.argv[0]).name, *sys.argv[1:]]),
            only_mode=MODE_ALIASES.get(mode, mode) if mode else None,
            only=tuple(dict.fromkeys(getattr(options, "only", ()))),
            stream=getattr(options, "stream", False),
            part=part,
            score=getattr(options, "score", None),
            rank=getattr(options, "rank", None),
            out_dir=out_dir,
        )
        main(config, args)
        current().close()
    except RemaskError as error:
        _fail(str(error), error.exit_code)
    except Terminated:
        _fail(STOPPED, 143)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130)
    except OSError as error:
        known = as_remask_error(error)
        if known is None:
            raise
        _fail(str(known), known.exit_code)
    except BaseException as error:
        # Arrow and safetensors raise errors of their own when the disk is full
        cause = as_remask_error(error)
        if cause is None:
            raise
        _fail(str(cause), cause.exit_code)


def with_run_dir(words: list[str]) -> list[str]:
    """The words of a command line with --run_dir. If it is absent, script 00 chooses the run.

    Words that script 00 refuses stay as they are: it says what is wrong with them.
    """
    try:
        options = make_parser("").parse(words)
        if options.run_dir is not None:
            return words
        config = load_config(options.config, quick_test=options.quick_test, overrides=options.overrides)
        run = find_run(STAGES[0], config, RunArgs(), OUTPUTS)
    except RemaskError:
        return words
    return [*words, "--run_dir", display_path(run)]


def as_remask_error(error: BaseException) -> RemaskError | None:
    """An error of the operating system or of the device as a message for the user. None if it is a bug of this project."""
    number = getattr(error, "errno", None)
    where = getattr(error, "filename", None) or "a file"
    text = str(error)
    if "does not have a deterministic implementation" in text:
        return BadConfig(
            f"torch has no deterministic kernel for an operation on this device: {text.splitlines()[0]} Set device=cpu"
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return CannotWrite(
            f"the disk is full, while writing {where}. Complete outputs are intact. Free some space and run the same command again"
        )
    if number in (errno.EIO, errno.EROFS, errno.EFBIG) or "File too large" in text:
        return CannotWrite(f"writing {where} failed: {os.strerror(number) if number else text}")
    if number in (errno.ENAMETOOLONG, errno.ELOOP):
        return MissingInput(f"{where} cannot be opened: {os.strerror(number)}")
    if number in (errno.EACCES, errno.EPERM):
        return CannotCreate(f"no permission to use {where}")
    return None


def _join_processes(allowed: bool) -> None:
    """Join the other processes of a launcher.

    Raises:
        UsageError: the script runs in one process.
        BadConfig: the launcher's variables are incomplete or wrong.
    """
    if not allowed and world_size(os.environ) > 1:
        raise UsageError(
            "this script runs in one process; torchrun is for 04_train.py and 05_train_critic.py. Start it with python"
        )
    if allowed and not start().is_main:
        silence()


def _fail(message: str, code: int) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one process has failed
    if current().first_to_fail(message):
        print(printable_line(f"{Path(sys.argv[0]).name}: error: {message}"), file=sys.stderr, flush=True)
        if current().size > 1:
            current().wait_for_failures(SECONDS_FOR_OTHERS)
    raise SystemExit(code)


def _terminate(signum, frame) -> NoReturn:
    raise Terminated


def _deliver_again(unraisable: Any) -> None:
    """Python ignores an interruption that comes while it removes an object. Send the signal again, a moment later."""
    number = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
        return
    timer = threading.Timer(SECONDS_TO_SIGNAL, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
