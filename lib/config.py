"""Check the merged config. lib/sections/ has names, types and limits; configs/default.yaml has the values.

`load_config` merges in this order, and later values win: configs/default.yaml, every --config in order, their
`quick_test:` blocks (with --quick_test), --set. Unknown keys, wrong types and values out of range are reported together,
each with file, line and the closest known name. A loaded Config is frozen and complete: written to YAML and loaded again,
it is the same.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from lib import own_code
from lib.config_files import DEFAULTS, KINDS, MAX_LISTED, at_keys, merge_all, read
from lib.errors import BadConfig, did_you_mean
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

ROOT = DEFAULTS.parent.parent
STREAM_SOURCES = ("masked_lm", "random_tokens")  # can give the same example new candidates in each epoch
FOREIGN_GROUPS = {  # what a task has in place of data.group_key
    "pools": "pools.keys={group: COLUMN}",
    "finqa": "finqa.group=page or finqa.group=report",
}
WITH_PROMPTS = ("programs", "file")  # sources of candidates whose examples have prompts


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
        self._check_convolution()
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

    @property
    def only_detects(self) -> bool:
        """Whether a run has labels beside the text, and no generator that samples: stage 06 then compares detectors."""
        return self.data.has_labels and self.critic.method == "none"

    def class_names(self, spec: ModelSpec) -> tuple[str, ...] | None:
        """The names that the user gave to the classes of a model; None if there are none."""
        return class_names(spec.mode, spec.target_type, self.data.label_classes, self.data.span_classes)

    def _check_labels(self) -> None:
        """Raises ValueError if labels and groups beside the text do not fit to other settings."""
        if self.data.group_key is not None and self.task in FOREIGN_GROUPS:
            raise ValueError(
                f"data.group_key has no effect on task {self.task}: set it to null, and {FOREIGN_GROUPS[self.task]}"
            )
        divides = self.data.split == "contiguous" or self.data.split_unit == "block"
        if self.data.keeps_documents_whole and divides:
            raise ValueError(
                "data.label_key, data.spans_key and data.group_key keep whole documents in one split: set data.split to hash and "
                "data.split_unit to document"
            )
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
            scores = self.data.label_key is not None and self.data.label_classes is None
            if scores and spec.mode == "sequence_scorer" and spec.target_type == "classification":
                raise ValueError(
                    f"models.{name} learns classes of documents, and without data.label_classes the labels are scores: set "
                    f"models.{name}.target_type to score, or name the classes in data.label_classes"
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

    def _check_convolution(self) -> None:
        """Raise ValueError if a model cannot have the convolution of the backbone that it gets.

        Its weights belong to neighbours on both sides, or to those before a token alone. It would mix candidates that a ranker reads in a
        row. Stage 04 looks at folders that models start from.
        """
        with_prompts, made = self.candidates.source in WITH_PROMPTS, {}
        for name in dependency_order(self.models):
            spec = self.models[name]
            ranks_texts = spec.mode == "ranker" and with_prompts
            if spec.start == "scratch":
                has_own = not (ranks_texts and self.ranker.encoder)
                made[name] = (spec.architecture.conv_width if has_own else 0, spec.effective_attention)
            elif spec.start == "02_generate_candidates":
                width = 0 if self.generator.checkpoint else self.generator.architecture.conv_width
                made[name] = (width, "bidirectional")
            else:
                made[name] = made.get(spec.start, (0, spec.effective_attention))
            width, attention = made[name]
            if not width:
                continue
            said = f"the backbone of models.{name} has a convolution (conv_width {width})"
            if ranks_texts and self.ranker.attention == "prefix" and attention == "bidirectional":
                raise ValueError(
                    f"{said}, which would mix the candidates of a prompt: set ranker.attention to full, or conv_width to 0"
                )
            if spec.effective_attention != attention and not ranks_texts:
                raise ValueError(
                    f"{said} of a model that is {attention}, and the model is {spec.effective_attention}: set models.{name}.start to "
                    f"scratch, or conv_width to 0 where {spec.start} is made"
                )

    def slice(self, uses: Iterable[str]) -> dict[str, Any]:
        """The named sections, or single keys such as `ranker.prompt`, as plain data.

        An unknown name gives None: the manifest of another version may have it.
        """
        dump = self.model_dump(mode="json")

        return {path: at_keys(dump, path.split(".")) for path in uses}


def load_config(
    paths: Sequence[str | Path] = (), *, quick_test: bool = False, overrides: Sequence[str] = ()
) -> Config:
    """Merge the files and overrides in the order that the module describes, and validate the result.

    Raises:
        MissingInput: a file does not exist.
        BadConfig: something in a file is wrong. The message lists all problems.
        UsageError: an override is not KEY=VALUE.
    """
    merged, where = merge_all(paths, quick_test, overrides)
    return _validate(_expand(merged), where)


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
        known = _known_keys(path[:-1])
        if path[-1] in known:  # of another type
            return f"{prefix}{name}: type {loc[-2]} has no such setting"
        return f"{prefix}{name}: unknown key{did_you_mean(str(path[-1]), known)}"
    if kind == "missing":
        if "stages" in path or "modifiers" in path:
            return f"{prefix}{name}: missing"
        if path[0] == "models" and path[-1] == "mode":
            return f"{prefix}models.{path[1]}: a new model needs a mode{did_you_mean(path[1], models)}"
        return f"{prefix}{name}: missing, although configs/default.yaml has it: another file replaced its section"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{prefix}{name}: {message}" if name else f"{prefix}{message}"
    if kind == "tuple_type":
        example = at_keys(read(DEFAULTS)[0], keys) or [given]
        return f"{prefix}{name} is {given!r}: expected a list, such as {json.dumps(example)}"
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
    kinds = STAGES_OF if "stages" in parts else KINDS.get(parts[-1], {})
    return list(dict.fromkeys(field for kind in kinds.values() for field in kind.model_fields))
