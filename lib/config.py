"""Merge the config files and check them. lib/sections/ has names, types and limits; configs/default.yaml has the values.

`load_config` merges in this order, and later values win: configs/default.yaml, every --config in order, their
`quick_test:` blocks (with --quick_test), --set. Unknown keys, wrong types and values out of range are reported together,
each with file, line and the closest known name. A loaded Config is frozen and complete: written to YAML and loaded again,
it is the same.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from lib import durable, own_code
from lib.errors import BadConfig, MissingInput, UsageError, did_you_mean
from lib.labels import class_names
from lib.sections.base import Section
from lib.sections.critic import CriticConfig
from lib.sections.data import (
    CandidatesConfig,
    DataConfig,
    LabelsConfig,
    RewardsConfig,
    StreamConfig,
    TokenizerConfig,
)
from lib.sections.executor import ExecutorConfig
from lib.sections.finqa import FinqaConfig, RankerConfig
from lib.sections.masking import MASKINGS, RATIOS, STAGES_OF, DiffusionConfig
from lib.sections.models import (
    ArchitectureConfig,
    GeneratorConfig,
    ModelSpec,
    TrainingConfig,
    dependency_order,
)
from lib.sections.pools import PoolFilesConfig
from lib.sections.pretrained import PretrainedConfig
from lib.sections.sampler import SamplerConfig
from lib.strict_yaml import MAX_CHARACTERS, Location, parse_scalar, parse_yaml

ROOT = Path(__file__).resolve().parent.parent
STREAM_SOURCES = ("masked_lm", "random_tokens")  # can give the same example new candidates in each epoch
MAX_DEPTH = 20  # parts of a key
MAX_LISTED = 20  # problems in one message
VERBATIM = (  # texts that keep the spaces at both ends
    "sampler.prompt", "sampler.infill", "ranker.yes_no.question", "ranker.yes_no.yes", "ranker.yes_no.no",
)  # fmt: skip
DEFAULTS = ROOT / "configs" / "default.yaml"


class Config(Section):
    seed: Annotated[int, Field(ge=0)]
    task: str
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    executor: ExecutorConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    pretrained: PretrainedConfig
    architecture: ArchitectureConfig
    training: TrainingConfig
    diffusion: DiffusionConfig
    generator: GeneratorConfig
    candidates: CandidatesConfig
    stream: StreamConfig
    labels: LabelsConfig
    rewards: RewardsConfig
    finqa: FinqaConfig
    pools: PoolFilesConfig
    ranker: RankerConfig
    models: dict[str, ModelSpec]
    critic: CriticConfig
    sampler: SamplerConfig

    @model_validator(mode="after")
    def _check(self):
        if self.stream.enabled and self.candidates.source not in STREAM_SOURCES:
            raise ValueError(
                f"stream.enabled needs new candidates in each epoch, and candidates.source {self.candidates.source} has "
                f"none; set candidates.source to {' or '.join(STREAM_SOURCES)}"
            )
        if self.labels.path is not None and self.candidates.source != "original_only":
            raise ValueError(
                "labels.path has labels of unchanged texts: set candidates.source to original_only and "
                "candidates.per_example to 1"
            )
        self._check_labels()
        self._check_pretrained()
        dependency_order(self.models)  # refuses models that start from each other
        for name, spec in self.models.items():
            if not name.isidentifier():
                raise ValueError(
                    f"model name '{name}' must consist of letters, digits and _, since it becomes a folder"
                )
            if self.data.fractions.get(spec.split, 0) <= 0:
                raise ValueError(
                    f"models.{name} trains on split '{spec.split}', whose share in data.fractions is 0"
                )
        return self

    @property
    def has_own_labels(self) -> bool:
        """Whether judge and inspector learn from labels of the user."""
        return self.labels.path is not None or self.data.has_labels

    def class_names(self, spec: ModelSpec) -> tuple[str, ...] | None:
        """The names that the user gave to the classes of a model; None if there are none."""
        return class_names(spec.mode, spec.target_type, self.data.label_classes, self.data.span_classes)

    def _check_labels(self) -> None:
        """Raises ValueError if labels beside the text do not fit to other settings."""
        if not self.data.has_labels:
            return
        if self.task != "text" or self.labels.path is not None:
            other = "labels.path" if self.labels.path is not None else f"task {self.task}"
            raise ValueError(
                f"data.label_key and data.spans_key cannot be used with {other}: set one to null"
            )
        if self.candidates.source != "original_only":
            raise ValueError(
                "data.label_key and data.spans_key have labels of unchanged texts: set candidates.source to "
                "original_only and candidates.per_example to 1"
            )
        for name, spec in self.models.items():
            if spec.mode == "token_classifier" and self.data.spans_key is None:
                raise ValueError(
                    f"models.{name} learns classes of tokens, and data.spans_key is null: set models.{name} to null"
                )
            names = self.class_names(spec)
            if names is not None and spec.num_classes != len(names):
                raise ValueError(
                    f"models.{name}.num_classes is {spec.num_classes}, but the classes are {', '.join(names)}: set it to "
                    f"{len(names)}"
                )

    def _check_pretrained(self) -> None:
        """Raise ValueError if a causal model has a pretrained backbone."""
        causal = [
            f"models.{name}"
            for name, spec in self.models.items()
            if spec.architecture.family == "pretrained" and spec.effective_attention == "causal"
        ]
        if causal:
            raise ValueError(
                f"{', '.join(causal)}: a pretrained masked LM is bidirectional and cannot be causal; give this model "
                "architecture: {family: remask_gpt}"
            )

    def slice(self, uses: Iterable[str]) -> dict[str, Any]:
        """The named sections, or single keys such as `ranker.prompt`, as plain data.

        An unknown name gives None: the manifest of another version may have it.
        """
        dump = self.model_dump(mode="json")

        def at(path: str) -> Any:
            node: Any = dump
            for key in path.split("."):
                node = node.get(key) if isinstance(node, dict) else None
            return node

        return {path: at(path) for path in uses}


def load_config(
    paths: Sequence[str | Path] = (), *, quick_test: bool = False, overrides: Sequence[str] = ()
) -> Config:
    """Merge the files and overrides in the order that the module describes, and validate the result.

    Raises:
        MissingInput: a file does not exist.
        BadConfig: something in a file is wrong. The message lists all problems.
        UsageError: an override is not KEY=VALUE.
    """
    files = [DEFAULTS, *(Path(os.path.expanduser(p)) for p in paths)]
    merged: dict[str, Any] = {}
    where: dict[tuple, Location] = {}
    quick_blocks = []
    for file in files:
        whole, locations = _read(file)
        tree = {name: value for name, value in whole.items() if name != "quick_test"}
        block = whole.get("quick_test")
        if isinstance(block, dict):
            quick_blocks.append((block, {k[1:]: v for k, v in locations.items() if k[:1] == ("quick_test",)}))
        elif block is not None:
            raise BadConfig(
                f"{locations['quick_test',]}: quick_test is {block!r}: expected a section with settings"
            )
        _merge(merged, _without_dropped_models(tree, merged))
        where.update(locations)
    for block, locations in quick_blocks if quick_test else []:
        _merge(merged, _without_dropped_models(block, merged))
        where.update(locations)
    for text in overrides:
        _apply_override(merged, where, text)
    return _validate(_expand(merged), where)


def _read(file: Path) -> tuple[dict, dict]:
    """What `parse_yaml` says of the file. The result is shared: nobody changes it."""
    try:
        with open(file, "rb") if file.is_relative_to("/dev/fd") else durable.open_file(file) as opened:
            text = opened.read(4 * MAX_CHARACTERS + 1).decode("utf-8-sig")
    except FileNotFoundError:
        existing = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")))
        raise MissingInput(f"config file {file} does not exist; existing ones: {existing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"config file {file} cannot be read: {error}") from None
    return _parsed(text, str(file))


# Reading the defaults takes most of the time of load_config, and one process may load many configs
_parsed = functools.lru_cache(maxsize=16)(parse_yaml)


def _merge(into: dict, other: dict) -> None:
    """Deep merge. `data.fractions` and a masking block of another type replace the old block as a whole."""
    for name, value in other.items():
        old = into.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            if name == "fractions" or ("type" in value and value["type"] != old.get("type")):
                into[name] = _copy(value)
            else:
                _merge(old, value)
        else:
            into[name] = _copy(value)


def _without_dropped_models(block: dict, merged: dict) -> dict:
    """The block without changes to models that an earlier config set to null. With a `mode`, such a model returns."""
    models, earlier = block.get("models"), merged.get("models")
    if not isinstance(models, dict) or not isinstance(earlier, dict):
        return block
    dropped = {name for name, spec in earlier.items() if spec is None}
    kept = {n: s for n, s in models.items() if n not in dropped or (isinstance(s, dict) and "mode" in s)}
    return block | {"models": kept}


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _apply_override(merged: dict, where: dict, text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UsageError(f"--set {text}: expected KEY=VALUE, such as --set training.steps=100")
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
    node[keys[-1]] = leaf
    for depth in range(1, len(keys) + 1):
        where[keys[:depth]] = Location("--set " + text, 0)


def _expand(merged: dict) -> dict:
    """Complete `architecture` and `training` of each model from the top-level sections.

    A model that is null is dropped. Unknown keys stay where they are, so that the validation reports each of them once.
    """
    models = merged.get("models")
    if isinstance(models, dict):
        merged["models"] = models = {name: spec for name, spec in models.items() if spec is not None}
    owners = [("generator", merged.get("generator")), ("critic", merged.get("critic"))]
    owners += [("models", spec) for spec in models.values()] if isinstance(models, dict) else []
    for name, owner in owners:
        for section, kind in (("architecture", ArchitectureConfig), ("training", TrainingConfig)):
            if not isinstance(owner, dict) or (name, section) == ("critic", "architecture"):
                continue
            base, changes = merged.get(section), owner.get(section, {})
            if isinstance(base, dict) and isinstance(changes, dict):
                owner[section] = {k: v for k, v in base.items() if k in kind.model_fields} | changes
    return merged


def _validate(merged: dict, where: dict) -> Config:
    try:
        config = Config.model_validate(merged)
        if lines := [_at(path, where) + f"{'.'.join(path)} is true or false: give a number or a text"
                     for path in _booleans_as_numbers(merged, config.model_dump(), ())]:  # fmt: skip
            raise BadConfig("the config is wrong:\n  " + "\n  ".join(lines))
        if config.pretrained.code_sha256 is not None:
            own_code.allow(config.pretrained.code_sha256)
        return config
    except ValidationError as error:
        problems, given = error.errors(), merged.get("models")
        models = (
            [n for n, m in given.items() if isinstance(m, dict) and "mode" in m]
            if isinstance(given, dict)
            else []
        )
        lines = sorted({_explain(problem, where, models) for problem in problems[:MAX_LISTED]})
        if len(problems) > MAX_LISTED:
            lines.append(f"and {len(problems) - MAX_LISTED:,} more")
        raise BadConfig("the config is wrong:\n  " + "\n  ".join(lines)) from None


def _booleans_as_numbers(given: Any, taken: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The settings for which true or false was given and taken as 1 or 0."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for name, value in given.items():
            yield from _booleans_as_numbers(value, taken.get(name), (*path, str(name)))
    elif isinstance(given, list) and isinstance(taken, list | tuple):
        for value, other in zip(given, taken, strict=False):
            yield from _booleans_as_numbers(value, other, path)
    elif isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield path


def _at(keys: tuple[str, ...], where: dict) -> str:
    """`FILE:LINE: ` of the longest known beginning of a key, or nothing."""
    location = next((where[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in where), None)
    return f"{location}: " if location else ""


def _explain(problem: Any, where: dict, models: Iterable[str]) -> str:
    """One line: file and line, key, what is wrong, what is expected."""
    # pydantic puts the tag of a union into the path; it is not a key of the config
    loc = problem["loc"]
    path = tuple(p for i, p in enumerate(loc) if not (p in (*MASKINGS, *RATIOS) and _is_tag(loc, i)))
    keys = tuple(p for p in path if isinstance(p, str))
    prefix = _at(keys, where)
    name = ".".join(str(p) for p in path)
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{prefix}{name}: unknown key{did_you_mean(str(path[-1]), _known_keys(path[:-1]))}"
    if kind == "missing":
        if "stages" in path or "modifiers" in path:
            return f"{prefix}{name}: missing"
        if path[0] == "models" and path[-1] == "mode":
            return f"{prefix}models.{path[1]}: a new model needs a mode{did_you_mean(path[1], models)}"
        return f"{prefix}{name}: missing, although configs/default.yaml has it: another file replaced its section"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{prefix}{name}: {message}" if name else f"{prefix}{message}"
    return f"{prefix}{name} is {given!r}: {message[0].lower()}{message[1:]}"


def _is_tag(loc: tuple, position: int) -> bool:
    """Whether part `position` of pydantic's path is the type of a masking, of its ratios, or of a stage."""
    before = loc[:position]
    return before[-1:] in (("masking",), ("ratios",)) or (
        before[-2:-1] == ("stages",) and isinstance(before[-1], int)
    )


def _known_keys(path: tuple) -> list[str]:
    """Field names of the section at `path` in the config."""
    parts = [part for part in path if isinstance(part, str)]
    fields: Any = Config
    if parts[:1] == ["models"]:
        fields, parts = ModelSpec, parts[2:]
    for part in parts:
        field = fields.model_fields.get(part) if fields is not None else None
        annotation = field.annotation if field else None
        if annotation is not None and type(None) in get_args(annotation):  # an optional section
            annotation = get_args(annotation)[0]
        fields = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    if fields is not None:
        return list(fields.model_fields)
    kinds: dict[str, Any] = (
        STAGES_OF if "stages" in parts else {"masking": MASKINGS, "ratios": RATIOS}.get(parts[-1], {})
    )
    return list(dict.fromkeys(field for kind in kinds.values() for field in kind.model_fields))
