"""Strict YAML: values are what they look like, and what is doubtful is refused with its line."""

import random
import re
import string

import pytest

from lib.errors import BadConfig
from lib.strict_yaml import Location, parse_scalar, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("12:30", "12:30"), ("010", "010"), ("no", "no"), ("yes", "yes"),
     ("true", True), ("null", None), ("~", None), ("-7", -7), ("1_000", 1000), ("2026-01-01", "2026-01-01"),
     ("[1, a]", [1, "a"]), ("", ""), (".inf", float("inf")), ("0x10", "0x10"), ("'5'", "5")],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text, value):
    assert parse_scalar(text, "test") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: 1\nb: 2\na: 3\n", "f:3: 'a' is given here and on line 1"), ("a: {b: 1, b: 2}", "'b' is given here"),
     ("- 1\n", "expected `key: value` lines"), ("a: [1", "not valid YAML"), ("a: 1\n---\nb: 2\n", "not valid YAML"),
     ("a: !!python/object/apply:os.system ['x']", "not valid YAML"), ("? [1]\n: 2\n", "a key must be a plain word")],
)  # fmt: skip
def test_bad_yaml_says_where(text, message):
    with pytest.raises(BadConfig, match=re.escape(message)):
        parse_yaml(text, "f")


def test_random_bytes_never_crash_the_parser():
    rng, refused = random.Random(0), 0
    for _ in range(2000):
        text = "".join(rng.choice(string.printable + ":-{}[]&*!|>'\"%@`") for _ in range(rng.randrange(60)))
        try:
            parse_yaml(text, "f")
        except BadConfig as error:
            refused += str(error).startswith("f")
    assert refused > 1000


@pytest.mark.parametrize(
    "text",
    ["To be: or not", "Hello # world", "[MASK] is to be", "#1", "- item", "@x", "%a", "!!python/name:os.system", "*a",
     "{a", "'tis", "one\n\ntwo"],
)  # fmt: skip
def test_on_the_command_line_text_needs_no_quotes(text):
    assert parse_scalar(text, "test") == text


def test_every_key_has_its_place():
    tree, places = parse_yaml("a: 1\nb:\n  c: {d: 2}\n  # a comment\n  e: [{f: 3}]\n", "f")
    assert tree == {"a": 1, "b": {"c": {"d": 2}, "e": [{"f": 3}]}}
    assert places["a",] == Location("f", 1) and places["b", "c", "d"] == Location("f", 3)
    assert str(places["b", "e"]) == "f:5" and str(Location("--set a=1", 0)) == "--set a=1"


def test_a_key_is_text_as_it_is_written():
    tree, places = parse_yaml("1: a\nnull: b\n1e3: {true: c}\n", "file")
    assert tree == {"1": "a", "null": "b", "1e3": {"true": "c"}}
    assert set(places) == {("1",), ("null",), ("1e3",), ("1e3", "true")}
    with pytest.raises(BadConfig, match="given here and on line 1"):
        parse_yaml("1: a\n'1': b\n", "file")


def test_an_empty_file_holds_nothing():
    for text in ("", "# only a comment\n", "---\n"):
        assert parse_yaml(text, "f") == ({}, {})


def test_anchors_and_depth_are_refused():
    with pytest.raises(BadConfig, match=r"f:1: .*anchors and aliases"):
        parse_yaml("a: &x {b: 1}\nc: *x\n", "f")
    deep = "a: " + "[" * 1200 + "]" * 1200
    with pytest.raises(BadConfig, match="not valid YAML"):
        parse_yaml(deep, "f")
