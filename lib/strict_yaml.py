"""Strict YAML: duplicate keys are errors, `1e-4` is a number, `no` and `12:30` are text.

PyYAML follows YAML 1.1: `1e-4` is a string, `12:30` is 750, `010` is 8, and a repeated key silently replaces the first
one. Here the keys of a mapping are plain words, and only `true` and `false` are booleans. Anchors, aliases and tags are
refused: a few lines of them can stand for a billion values. The line of every key is kept for error messages.
"""

import contextlib
import re
from typing import NamedTuple

import yaml

from lib.errors import BadConfig

MAX_CHARACTERS = 2**18


class Location(NamedTuple):
    file: str
    line: int  # from 1; 0 for the command line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class _Loader(yaml.SafeLoader):
    """SafeLoader with the implicit types of YAML 1.2's core schema only."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own protocol

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (& and *) are not read; write the value itself",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.MarkedYAMLError(
                problem=f"tags ({event.tag}) are not read; write the value alone",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


_POINT = r"(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_EXPONENT = r"[0-9][0-9_]*[eE][-+]?[0-9]+"

for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"~|null|", "~n\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", rf"[-+]?(?:{_POINT}|{_EXPONENT})|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first]
    )


def parse_yaml(text: str, file: str) -> tuple[dict, dict[tuple, Location]]:
    """The mapping in `text` and the Location of every key path in it. Raises BadConfig."""
    if len(text) > MAX_CHARACTERS:
        raise BadConfig(f"{file}: {len(text):,} characters; a config has at most {MAX_CHARACTERS:,}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        locations: dict[tuple, Location] = {}
        if node is None or (node.tag == "tag:yaml.org,2002:null" and not node.value):
            return {}, locations
        if not isinstance(node, yaml.MappingNode):
            raise BadConfig(f"{file}: expected `key: value` lines, found a {node.id}")
        _note_keys(node, (), file, locations)
        return loader.construct_document(node), locations
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise BadConfig(f"{file}{line}: not valid YAML: {error.problem or error}") from None
    except RecursionError:
        raise BadConfig(f"{file}: not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadConfig(f"{file}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_scalar(text: str, source: str):
    """The value after `=` on the command line, with the same type as in a file.

    A complete list, mapping or quoted text is read as such. Everything else is one plain value up to the end: `To be: or
    # not` and `[MASK] is` are text.
    """
    word = text.strip()
    if word[:1] in ("[", "{", '"', "'"):
        with contextlib.suppress(BadConfig):
            return parse_yaml(f"value: {word}", source)[0]["value"]
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, word, (True, False)) if word else "tag:yaml.org,2002:str"
        return loader.construct_object(yaml.ScalarNode(tag, word))
    finally:
        loader.dispose()


def _note_keys(node: yaml.Node, path: tuple, file: str, locations: dict) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _note_keys(child, path, file, locations)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise BadConfig(f"{file}:{line}: a key must be a plain word")
        key_node.tag = "tag:yaml.org,2002:str"  # a model may be called 1 or null
        name = key_node.value
        if name in first_lines:
            raise BadConfig(
                f"{file}:{line}: '{name}' is given here and on line {first_lines[name]}; keep one of them"
            )
        first_lines[name] = line
        locations[(*path, name)] = Location(file, line)
        _note_keys(value_node, (*path, name), file, locations)
