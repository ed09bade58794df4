"""docs/configuration.md is current, and holds every setting with a type, a default and a meaning."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from lib.config import DEFAULTS, ROOT, Config
from lib.config_reference import PAGE, comments, field_type, flow, page
from lib.sections.base import AboveZero, BelowOne, Positive, Section, UserPath
from lib.sections.masking import Masking
from lib.sections.models import ModelSpec, TrainingConfig


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m lib.config_reference"


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of all settings; sections that are shared by models count once."""
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        shared = prefix and kind is TrainingConfig
        inner = isinstance(kind, type) and issubclass(kind, BaseModel) and not shared
        found += keys_of(kind, f"{prefix}{name}.") if inner else [prefix + name]  # type: ignore[arg-type]
    return found


def test_every_setting_has_a_type_a_default_and_a_meaning():
    rows = {}
    for line in page().splitlines():
        if line.startswith("| `"):
            key, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows[key.strip("` ")] = cells
    expected = [k for k in keys_of(Config) if k != "models" and not k.startswith("generator.architecture.")]
    expected += [f"models.<name>.{name}" for name in ModelSpec.model_fields if name != "modifiers"]
    for key in expected:
        assert key in rows, f"{key} is not on the page"
        kind, default, meaning = rows[key]
        assert kind and meaning, f"{key} has no {'type' if not kind else 'comment in configs/default.yaml'}"
        assert default or key.endswith((".architecture", ".training")), f"{key} has no default"


def test_every_comment_of_the_defaults_belongs_to_a_key():
    """None is lost because it stands after its key, or has another indentation."""
    text = DEFAULTS.read_text(encoding="utf-8")
    used = " ".join(comments(text).values())
    body = text.split("\n\n", 1)[1]  # without the head of the file
    for line in body.splitlines():
        if line.strip().startswith("#"):
            assert line.strip("# ") in used, line


def test_a_comment_belongs_to_the_key_below_it_or_before_it():
    text = """# head

# of a,
# on two lines
a:
  b: 1  # of b
  # of c
  c: "no # comment"   # nor the end
  d: 'it''s # text'
  e: {f: 1, g: [2, 3]}  # of e
# not of h: another margin
  h: plain # of h
  i:
    # of j
    j: null

  # of k

  k: 1
"""
    assert comments(text) == {
        ("a",): "of a, on two lines",
        ("a", "b"): "of b",
        ("a", "c"): "of c nor the end",
        ("a", "e"): "of e",
        ("a", "h"): "of h",
        ("a", "i", "j"): "of j",
    }


class Example(Section):
    whole: Positive
    between: Annotated[int, Field(ge=1, le=64)]
    share: BelowOne
    above: AboveZero | None
    word: Literal["a", "b"]
    many: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]
    pair: tuple[AboveZero, AboveZero]
    by_split: dict[Literal["train"], AboveZero]
    path: UserPath | None
    masking: Masking
    training: TrainingConfig
    flag: bool


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("whole", "integer ≥ 1"), ("between", "integer in [1, 64]"), ("share", "number in [0, 1)"),
        ("above", "number > 0 or `null`"), ("word", "`a`, `b`"), ("many", "list of integers ≥ 2, not empty"),
        ("pair", "[number > 0, number > 0]"), ("by_split", "map from `train` to number > 0"),
        ("path", "path or name or `null`"), ("masking", "a [masking](#masking)"),
        ("training", "settings of [`training`](#training)"), ("flag", "`true`, `false`"),
    ],
)  # fmt: skip
def test_types_and_limits_in_words(name, text):
    assert field_type(Example.model_fields[name]) == text


def test_values_as_yaml():
    assert flow({"a": [0.1, None], "b": True, "c": ""}) == '{a: [0.1, null], b: true, c: ""}'


def test_the_page_names_every_shipped_config():
    text = page()
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert f"`{file.relative_to(ROOT)}`" in text
