"""
Every config key and every flag with every slip of one letter: is it refused, and is the right name suggested?

A slip drops a letter, doubles it, swaps it with the next one, or hits the key beside it. A slip that gives another known name
is no slip. Keys are tried as `--set KEY=VALUE`, twenty at a time, since one message lists twenty problems.

    python -m benchmarks.typos                 # all slips, some minutes
    python -m benchmarks.typos --share 0.1     # every tenth
"""

import argparse
import importlib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from benchmarks.provenance import provenance
from benchmarks.result_files import add_out, write
from lib.cli import make_parser
from lib.config import load_config
from lib.config_files import MAX_LISTED
from lib.errors import BadConfig, UsageError

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "_", "1234567890")
BESIDE = {c: row[i + 1 : i + 2] or row[i - 1 : i] for row in ROWS for i, c in enumerate(row)} | {"_": "-"}
FLAGS: dict[str, dict[str, bool]] = {
    "00_check_data": {},
    "01_prepare_dataset": {"with_parts": True},
    "02_generate_candidates": {"with_stream": True, "with_parts": True},
    "04_train": {"with_mode": True},
    "06_sample": {"with_score": True},
}


def slips(word: str) -> Iterator[str]:
    """The word with each slip of one letter, without those that change nothing."""
    found = set()
    for i, c in enumerate(word):
        found.add(word[:i] + word[i + 1 :])
        found.add(word[:i] + c + word[i:])
        found.add(word[:i] + word[i + 1 : i + 2] + c + word[i + 2 :])
        found.add(word[:i] + BESIDE.get(c, "x") + word[i + 1 :])
    yield from sorted(found - {word, ""})


def keys_of(section: Any) -> Iterator[tuple[str, ...]]:
    """The paths of all settings of a config, sections and models included."""
    for name in type(section).model_fields if isinstance(section, BaseModel) else section:
        value = getattr(section, name) if isinstance(section, BaseModel) else section[name]
        yield (name,)
        is_section = isinstance(value, BaseModel) or (isinstance(value, dict) and name == "models")
        yield from ((name, *rest) for rest in keys_of(value)) if is_section else ()


def wrong_keys() -> list[tuple[str, str, str]]:
    """(path with a slip in its last word, the slip, the right word)."""
    paths = list(keys_of(load_config()))
    known = set(paths)
    return [
        (".".join((*path[:-1], slip)), slip, path[-1])
        for path in paths
        for slip in slips(path[-1])
        if (*path[:-1], slip) not in known
    ]


def try_keys(wrong: list[tuple[str, str, str]]) -> tuple[list[str], list[str]]:
    """(keys that were accepted, keys without the right suggestion)."""
    accepted, unsuggested = [], []
    for start in range(0, len(wrong), MAX_LISTED):
        group, taken = [], set()
        for entry in wrong[start : start + MAX_LISTED]:
            taken.add(entry[0])
            group.append(entry)
        message = _message_of(group)
        for path, slip, right in group:
            line = next(
                (ln for ln in message.splitlines() if re.search(rf"(?<![\w.]){re.escape(path)}(?![\w])", ln)),
                None,
            )
            if line is None:
                line = _message_of([(path, slip, right)])
            if not line:
                accepted.append(path)
            elif f"did you mean '{right}'" not in line:
                unsuggested.append(path)
    return accepted, unsuggested


def _message_of(group: list[tuple[str, str, str]]) -> str:
    """What is said of these keys; empty if they are accepted."""
    try:
        load_config(overrides=[f"{path}=1" for path, _, _ in group])
    except BadConfig as error:
        return str(error)
    return ""


def try_flags() -> tuple[int, list[str], list[str]]:
    """(slips of flags, those that were accepted, those without the right suggestion)."""
    accepted, unsuggested, count = [], [], 0
    for script, kinds in FLAGS.items():
        parser = make_parser(importlib.import_module(script).__doc__ or "", **kinds)
        flags = {f for action in parser._actions for f in action.option_strings if f.startswith("--")}
        for flag in sorted(flags):
            for slip in slips(flag[2:]):
                if f"--{slip}" in flags:
                    continue
                count += 1
                try:
                    parser.parse([f"--{slip}", "1"])
                    accepted.append(f"{script} --{slip}")
                except UsageError as error:
                    if f"did you mean '{flag}'" not in str(error):
                        unsuggested.append(f"{script} --{slip}")
    return count, accepted, unsuggested


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the slips of keys")
    add_out(parser)
    args = parser.parse_args()
    wrong = wrong_keys()[:: max(1, round(1 / args.share))]
    accepted, unsuggested = try_keys(wrong)
    flags, accepted_flags, unsuggested_flags = try_flags()
    rows = [
        {"of": "config keys", "slips": len(wrong), "accepted": len(accepted), "suggested": len(wrong) - len(unsuggested) - len(accepted)},
        {"of": "flags", "slips": flags, "accepted": len(accepted_flags), "suggested": flags - len(unsuggested_flags) - len(accepted_flags)},
    ]  # fmt: skip
    for row in rows:
        share = row["suggested"] / row["slips"]
        print(
            f"{row['of']}: {row['slips']:,} slips, {row['accepted']} accepted, {share:.1%} with the right suggestion"
        )
    print("accepted:", (accepted + accepted_flags)[:20])
    print("without the right suggestion:", (unsuggested + unsuggested_flags)[:40])
    if args.share == 1:
        write(args.out, "typos", {"rows": rows}, provenance())
    return int(bool(accepted or accepted_flags))


if __name__ == "__main__":
    raise SystemExit(main())
