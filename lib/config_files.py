"""Read config files and merge them, with the line that each setting comes from. What the settings mean is in lib/config.py.

Maps merge, and later values win. Two kinds of maps are replaced as a whole: the fractions of the splits, and a masking or
ratios of another type. `--set` follows the same rules.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lib import durable
from lib.errors import BadConfig, MissingInput, UsageError
from lib.sections.masking import MASKINGS, RATIOS
from lib.strict_yaml import MAX_CHARACTERS, Location, parse_scalar, parse_yaml

DEFAULTS = Path(__file__).resolve().parent.parent / "configs" / "default.yaml"
# Maps whose type has settings of its own
KINDS: dict[str, dict[str, Any]] = {"masking": MASKINGS, "ratios": RATIOS}
MAX_DEPTH = 20  # parts of a key
MAX_LISTED = 20  # problems in one message
VERBATIM = (  # texts that keep the spaces at both ends
    "sampler.prompt", "sampler.infill", "ranker.yes_no.question", "ranker.yes_no.yes", "ranker.yes_no.no",
)  # fmt: skip


def merge_all(
    paths: Sequence[str | Path], quick_test: bool, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[tuple, Location]]:
    """The merged settings as they are given, and where each of them comes from."""
    files = [DEFAULTS, *(Path(os.path.expanduser(p)) for p in paths)]
    merged: dict[str, Any] = {}
    where: dict[tuple, Location] = {}
    quick_blocks = []
    for file in files:
        whole, locations = read(file)
        tree = {name: value for name, value in whole.items() if name != "quick_test"}
        block = whole.get("quick_test")
        if isinstance(block, dict):
            quick_blocks.append((block, {k[1:]: v for k, v in locations.items() if k[:1] == ("quick_test",)}))
        elif block is not None:
            raise BadConfig(
                f"{locations['quick_test',]}: quick_test is {block!r}: expected a section with settings"
            )
        if dropped := _dropped_models(tree, merged):
            location, name = locations["models", dropped[0]], f"models.{dropped[0]}"
            raise BadConfig(
                f"{location}: {name} was set to null by an earlier config; give it a mode to bring it back"
            )
        _merge(merged, tree)
        where.update(locations)
    for block, locations in quick_blocks if quick_test else []:
        # The block of a file cannot know which models another file removes
        for name in _dropped_models(block, merged):
            block = block | {"models": {n: spec for n, spec in block["models"].items() if n != name}}
        _merge(merged, block)
        where.update(locations)
    for text in overrides:
        _apply_override(merged, where, text)
    return merged, where


def replaced_by_quick_test(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> str:
    """A line about the settings of the user's files that --quick_test replaces; empty if it replaces none.

    A user's file is one outside of configs/. Its own `quick_test:` block is no surprise to the user.
    """
    plain, before = merge_all(paths, False, overrides)
    small, after = merge_all(paths, True, overrides)
    lines = []
    for keys, location in before.items():
        old, new = at_keys(plain, keys), at_keys(small, keys)
        by_the_project = not _is_shipped(location) and _is_shipped(after[keys])
        if by_the_project and old != new and not isinstance(old, dict):
            lines.append(f"{'.'.join(keys)}={_text(old)} ({location}) by {_text(new)}")
    if len(lines) > MAX_LISTED:
        lines[MAX_LISTED:] = [f"and {len(lines) - MAX_LISTED:,} more"]
    return f"--quick_test replaces {', '.join(lines)}; --set KEY=VALUE keeps a setting" if lines else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read(file: Path) -> tuple[dict, dict]:
    """What `parse_yaml` says of the file. The result is shared: nobody changes it."""
    try:
        content = (
            _content_of_pipe(file) if file.is_relative_to("/dev/fd") else _content(durable.open_file(file))
        )
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        shipped = (path.relative_to(DEFAULTS.parent.parent) for path in DEFAULTS.parent.rglob("*.yaml"))
        existing = ", ".join(sorted(map(str, shipped)))
        raise MissingInput(f"config file {file} does not exist; existing ones: {existing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"config file {file} cannot be read: {error}") from None
    return _parsed(text, str(file))


def _content(opened: IO[bytes]) -> bytes:
    with opened:
        return opened.read(4 * MAX_CHARACTERS + 1)


@functools.cache
def _content_of_pipe(file: Path) -> bytes:
    """Kept, since a pipe such as `--config <(make_config)` can be read only once."""
    return _content(open(file, "rb"))


# Reading the defaults takes most of the time of load_config, and one process may load many configs
_parsed = functools.lru_cache(maxsize=16)(parse_yaml)


def _merge(into: dict, other: dict) -> None:
    """Deep merge. `data.fractions`, and a masking or ratios of another type, replace the old block as a whole."""
    for name, value in other.items():
        old = into.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and not _replaces(name, old, value):
            _merge(old, value)
        else:
            into[name] = _copy(value)


def _replaces(name: str, old: dict, new: dict) -> bool:
    """Whether the map replaces the old one as a whole."""
    is_other_type = name in KINDS and "type" in new and new["type"] != old.get("type")
    return name == "fractions" or is_other_type


def _dropped_models(block: dict, merged: dict) -> list[str]:
    """The models that an earlier config set to null and that the block changes. With a `mode`, such a model returns."""
    models, earlier = block.get("models"), merged.get("models")
    if not isinstance(models, dict) or not isinstance(earlier, dict):
        return []
    dropped = {name for name, spec in earlier.items() if spec is None}
    returns = {name for name, spec in models.items() if isinstance(spec, dict) and "mode" in spec}
    return [name for name, spec in models.items() if name in dropped - returns and spec is not None]


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _apply_override(merged: dict, where: dict, text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UsageError(f"--set {text}: expected KEY=VALUE, such as --set models.judge.training.steps=100")
    keys = tuple(path.strip().split("."))
    if len(keys) > MAX_DEPTH:
        raise UsageError(f"--set {text[:60]}...: a key has at most {MAX_DEPTH} parts")
    node = merged
    for k in keys[:-1]:
        node = node.setdefault(k, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise BadConfig(f"--set {text}: '{k}' is not a section")
    leaf = parse_scalar(value, f"--set {text}")
    if isinstance(node.get(keys[-1]), str) and not isinstance(leaf, str | None):
        leaf = value  # a text setting stays text: 12 and [MASK] would be a number and a list
    if path.strip() in VERBATIM and leaf == value.strip():
        leaf = value  # without quotes: spaces at both ends belong to the text
    if keys[-2:-1] and keys[-1] == "type":
        _drop_settings_of_other_type(keys[-2], node, leaf)
    _merge(node, {keys[-1]: leaf})
    location = Location("--set " + text, 0)
    where.update({keys[:depth]: location for depth in range(1, len(keys))})
    where.update({path: location for path in _paths(leaf, keys)})


def _drop_settings_of_other_type(name: str, block: dict, new_type: Any) -> None:
    """Remove what a masking or ratios of the new type does not have. What --set gave for the new type stays."""
    kinds = KINDS.get(name, {})
    old, new = kinds.get(str(block.get("type"))), kinds.get(str(new_type))
    if old is not None and new is not None:
        for setting in old.model_fields.keys() - new.model_fields.keys():
            block.pop(setting, None)


def _paths(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The path of a value and those of all settings in it."""
    yield keys
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, (*keys, name))


def at_keys(tree: Any, keys: Sequence[str]) -> Any:
    """The value at a path; None if it is absent."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _is_shipped(location: Location) -> bool:
    """Whether a setting stands in a file of configs/."""
    return bool(location.line) and Path(location.file).resolve().is_relative_to(DEFAULTS.parent)
