"""The one typed home of every knob: names, types and limits. The values are in configs/default.yaml.

`load_config` merges, later wins: configs/default.yaml < every --config in order < their `quick_test:` blocks
(with --quick_test) < --set. Unknown keys, wrong types and values out of range are refused together, each with
file, line and the nearest right name. A loaded Config is frozen and complete: printing it to YAML and loading
that again gives the same Config.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lib.errors import BadConfig, MissingInput, UsageError, did_you_mean
from lib.strict_yaml import Location, parse_scalar, parse_yaml

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = ROOT / "configs" / "default.yaml"

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]

MODES = ("language_model", "token_classifier", "sequence_scorer", "ranker")
MODE_ALIASES = {  # names of earlier versions
    "unmasking": "language_model",
    "remasking_binary": "token_classifier",
    "token_classification": "token_classifier",
    "sequence_scoring": "sequence_scorer",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    path: str
    text_key: str
    id_key: str | None
    min_document_characters: Positive
    whitespace: Literal["keep", "squeeze"]
    passages: Literal["fixed", "paragraph"]
    passage_characters: Positive
    deduplicate: Literal["none", "document", "paragraph"]
    split: Literal["hash", "contiguous"]
    split_unit: Literal["document", "block"]
    block_characters: Positive
    fractions: dict[Literal["train", "held_out", "reference"], Fraction]

    @model_validator(mode="after")
    def _check(self):
        if abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"fractions {self.fractions} must add up to 1")
        if self.fractions.get("train", 0) <= 0 or self.fractions.get("held_out", 0) <= 0:
            raise ValueError("fractions of train and held_out must be above 0")
        if self.block_characters < self.passage_characters:
            raise ValueError(
                f"block_characters ({self.block_characters}) must be at least passage_characters "
                f"({self.passage_characters})"
            )
        return self


class TokenizerConfig(Section):
    kind: Literal["character", "bpe"]
    vocab_size: Annotated[int, Field(ge=16)]
    unknown: Literal["error", "unk"]


class ArchitectureConfig(Section):
    family: Literal["remask_gpt", "ltg_bert"]
    layers: Positive
    width: Positive
    heads: Positive
    inner_width: Positive | None
    context: Annotated[int, Field(ge=2)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    bias: bool
    position_buckets: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _check(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 2 x heads ({2 * self.heads}): RoPE turns pairs"
            )
        if self.family == "ltg_bert" and self.context <= self.position_buckets // 2:
            raise ValueError(
                f"context ({self.context}) must exceed half of position_buckets ({self.position_buckets}): "
                "nearer distances have a bucket each"
            )
        return self


class TrainingConfig(Section):
    steps: Positive
    batch_size: Positive
    optimizer: Literal["muon", "adamw"]
    muon_learning_rate: AboveZero
    muon_momentum: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: AboveZero
    weight_decay: NonNegative
    warmup_fraction: Fraction
    decay_fraction: Fraction
    gradient_clip: AboveZero
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    evaluate_every: Positive
    evaluation_examples: Positive
    checkpoint_every: Positive
    tensorboard: bool
    allow_inexact_resume: bool

    @model_validator(mode="after")
    def _check(self):
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction + decay_fraction must not exceed 1")
        return self


class RandomMasking(Section):
    type: Literal["random"]


class StickyMasking(Section):
    """p1: chance that a token far from any mask is masked in a round; p2: next to a mask.

    Runs are long where p1 is small and p2 large. A p1 above the wanted ratio masks it all in the first round,
    almost independently.
    """

    type: Literal["sticky"]
    p1: Fraction
    p2: Fraction

    @model_validator(mode="after")
    def _check(self):
        if max(self.p1, self.p2) < 1e-6:
            raise ValueError(
                "p1 and p2 are both 0 or nearly so, no token would ever be masked: raise one of them"
            )
        return self


class SpanMasking(Section):
    """num_spans: runs per row, of random lengths at random places, that do not touch where there is room."""

    type: Literal["span"]
    num_spans: Positive


class LineMasking(Section):
    """Whole lines; min_ratio, max_ratio: the shares of masked tokens between which a row must end up."""

    type: Literal["line"]
    min_ratio: Fraction
    max_ratio: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def _check(self):
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio ({self.min_ratio}) must not exceed max_ratio ({self.max_ratio})")
        return self


MASKINGS = {"random": RandomMasking, "sticky": StickyMasking, "span": SpanMasking, "line": LineMasking}
Masking = Annotated[RandomMasking | StickyMasking | SpanMasking | LineMasking, Field(discriminator="type")]


class DiffusionConfig(Section):
    weight: Literal["exact_count", "inverse_t"]
    min_masked_ratio: Annotated[float, Field(ge=0, lt=1)]
    masking: Masking


class GeneratorConfig(Section):
    checkpoint: str | None
    architecture: ArchitectureConfig
    training: TrainingConfig


class CandidatesConfig(Section):
    source: Literal["masked_lm", "random_tokens", "original_only"]
    per_example: Annotated[int, Field(ge=1, le=64)]
    mask_ratio: tuple[Fraction, Fraction]
    masking: Masking
    temperature: AboveZero
    top_k: Count
    top_p: Annotated[float, Field(gt=0, le=1)]
    fill_passes: Positive
    cross_fit_folds: Positive
    batch_size: Positive
    rows_per_group: Positive

    @model_validator(mode="after")
    def _check(self):
        low, high = self.mask_ratio
        if low > high:
            raise ValueError(f"mask_ratio {list(self.mask_ratio)} must be [low, high] with low <= high")
        if self.source == "original_only" and self.per_example != 1:
            raise ValueError("source original_only has one candidate: set candidates.per_example to 1")
        return self


class RewardsConfig(Section):
    curve: tuple[tuple[Fraction, Fraction], ...]

    @field_validator("curve")
    @classmethod
    def _monotone(cls, points):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        if len(points) < 2 or xs[0] != 0 or xs[-1] != 1:
            raise ValueError("curve needs points from x = 0 to x = 1, such as [[0, 1], [1, 0]]")
        if any(b <= a for a, b in itertools.pairwise(xs)):
            raise ValueError("the x of curve must rise from point to point")
        if any(b > a for a, b in itertools.pairwise(ys)):
            raise ValueError("curve must not rise: more synthetic text is never worth more")
        return points


class ModelSpec(Section):
    """One named model of stage 04. `architecture` and `training` in YAML state only what differs."""

    mode: Literal["language_model", "token_classifier", "sequence_scorer", "ranker"]
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    split: Literal["train", "held_out", "reference"] = "train"
    start: str = "scratch"
    num_classes: Annotated[int, Field(ge=2)] = 3
    class_weighting: Literal["none", "inverse_frequency", "dynamic"] = "none"
    target_type: Literal["score", "classification"] = "score"
    architecture: ArchitectureConfig
    training: TrainingConfig

    @field_validator("mode", mode="before")
    @classmethod
    def _alias(cls, mode):
        return MODE_ALIASES.get(mode, mode)

    @property
    def effective_attention(self) -> str:
        """Token classifiers and sequence scorers always read both ways."""
        return "bidirectional" if self.mode in ("token_classifier", "sequence_scorer") else self.attention


class CriticConfig(Section):
    method: Literal["token_critic"]
    generator: str
    coupling: Literal["decoupled", "joint"]
    layers: Count
    alpha: NonNegative
    ramp: tuple[Fraction, Fraction]
    temperature: tuple[AboveZero, AboveZero]
    rollout_fraction: Fraction
    clean_fraction: Fraction
    partial_fraction: Fraction
    training: TrainingConfig

    @model_validator(mode="after")
    def _check(self):
        if self.ramp[0] > self.ramp[1]:
            raise ValueError(f"ramp {list(self.ramp)} must be [start, end] with start <= end")
        if self.temperature[0] > self.temperature[1]:
            raise ValueError(f"temperature {list(self.temperature)} must be [low, high] with low <= high")
        return self


POLICIES = (
    "none", "confidence_first", "margin_first", "random", "confidence", "confidence_fresh", "remdm_cap",
    "remdm_rescale", "remdm_conf", "critic", "critic_blend", "critic_partial",
)  # fmt: skip


class SamplerConfig(Section):
    policies: tuple[str, ...]
    num_samples: Positive
    length: Positive | None
    nfe: tuple[Annotated[int, Field(ge=2)], ...]
    schedule: Literal["linear", "cosine", "custom"]
    start_ratio: Fraction
    end_ratio: Fraction
    masking_ratios: tuple[Fraction, ...]
    temperature: AboveZero
    top_p: Annotated[float, Field(gt=0, le=1)]
    randomness_strength: Fraction
    selection_temperature: AboveZero | None
    back_share: Fraction
    best_of: Positive
    best_of_policy: str
    prompt: str
    infill: str
    batch_size: Positive

    @field_validator("policies", "best_of_policy")
    @classmethod
    def _known(cls, names):
        for name in (names,) if isinstance(names, str) else names:
            if name not in POLICIES:
                raise ValueError(f"no policy '{name}'{did_you_mean(name, POLICIES)}")
        return names

    @model_validator(mode="after")
    def _check(self):
        if self.schedule == "custom" and not self.masking_ratios:
            raise ValueError("schedule custom needs masking_ratios, one for each round after the first")
        if self.schedule != "custom" and self.masking_ratios:
            raise ValueError(f"masking_ratios is for schedule custom; the schedule here is {self.schedule}")
        if self.prompt and self.infill:
            raise ValueError("give prompt (continue it) or infill (fill its [MASK]s), not both")
        return self


class Config(Section):
    seed: Annotated[int, Field(ge=0)]
    task: str
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    data: DataConfig
    tokenizer: TokenizerConfig
    architecture: ArchitectureConfig
    training: TrainingConfig
    diffusion: DiffusionConfig
    generator: GeneratorConfig
    candidates: CandidatesConfig
    rewards: RewardsConfig
    models: dict[str, ModelSpec]
    critic: CriticConfig
    sampler: SamplerConfig

    @model_validator(mode="after")
    def _check(self):
        names = list(self.models)
        for position, (name, spec) in enumerate(self.models.items()):
            if not name.isidentifier():
                raise ValueError(f"model name '{name}' must be a plain word: it becomes a folder")
            if spec.start in names and spec.start not in names[:position]:
                raise ValueError(f"models.{name} starts from '{spec.start}', which must come before it")
            if self.data.fractions.get(spec.split, 0) <= 0:
                raise ValueError(
                    f"models.{name} trains on split '{spec.split}', whose share in data.fractions is 0"
                )
        return self

    def slice(self, uses: Iterable[str]) -> dict[str, Any]:
        """The named top-level sections as plain data: what a stage depends on, for its manifest."""
        dump = self.model_dump(mode="json")
        return {name: dump[name] for name in uses}


def load_config(
    paths: Sequence[str | Path] = (), *, quick_test: bool = False, overrides: Sequence[str] = ()
) -> Config:
    """Merge the files and overrides as the module says and validate the result.

    Raises MissingInput for a file that is not there, BadConfig for anything wrong inside, with all problems
    at once, and UsageError for an override that is not KEY=VALUE.
    """
    files = [DEFAULTS, *(Path(p) for p in paths)]
    merged: dict[str, Any] = {}
    where: dict[tuple, Location] = {}
    quick_blocks = []
    for file in files:
        tree, locations = _read(file)
        block = tree.pop("quick_test", None)
        if isinstance(block, dict):
            quick_blocks.append((block, {k[1:]: v for k, v in locations.items() if k[:1] == ("quick_test",)}))
        _merge(merged, tree)
        where.update(locations)
    for block, locations in quick_blocks if quick_test else []:
        _merge(merged, _without_dropped_models(block, merged))
        where.update(locations)
    for text in overrides:
        _apply_override(merged, where, text)
    return _validate(_expand(merged), where)


def _read(file: Path) -> tuple[dict, dict]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")))
        raise MissingInput(f"config file {file} does not exist; shipped ones: {near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"config file {file} cannot be read: {error}") from None
    return parse_yaml(text, str(file))


def _merge(into: dict, other: dict) -> None:
    """Deep merge; `data.fractions`, and a masking block of another type, replace the old one as a whole."""
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
    """A quick_test block without what it says of models that a config has set to null."""
    models = block.get("models")
    if not isinstance(models, dict):
        return block
    gone = {name for name, spec in merged.get("models", {}).items() if spec is None}
    return block | {"models": {name: spec for name, spec in models.items() if name not in gone}}


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _apply_override(merged: dict, where: dict, text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UsageError(f"--set {text}: expected KEY=VALUE, such as --set training.steps=100")
    keys = tuple(path.strip().split("."))
    node = merged
    for k in keys[:-1]:
        node = node.setdefault(k, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise BadConfig(f"--set {text}: '{k}' is not a section")
    leaf = parse_scalar(value, f"--set {text}")
    if isinstance(node.get(keys[-1]), str) and not isinstance(leaf, str | None):
        leaf = value  # what is text stays text: 12 and [MASK] look like a number and a list
    node[keys[-1]] = leaf
    for depth in range(1, len(keys) + 1):
        where[keys[:depth]] = Location("--set " + text, 0)


def _expand(merged: dict) -> dict:
    """Fill the partial `architecture` and `training` of each model from the top-level sections.

    A model set to null is dropped. Keys that the sections do not know stay where they are: the validation
    reports them once, at their own place.
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
            base, own = merged.get(section), owner.get(section, {})
            if isinstance(base, dict) and isinstance(own, dict):
                owner[section] = {k: v for k, v in base.items() if k in kind.model_fields} | own
    return merged


def _validate(merged: dict, where: dict) -> Config:
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        lines = sorted({_explain(problem, where) for problem in error.errors()})
        raise BadConfig("the config is wrong:\n  " + "\n  ".join(lines)) from None


def _explain(problem: Any, where: dict) -> str:
    """One line: where, which key, what is wrong, what would be right."""
    # pydantic puts the tag of a union into the path; it is no key of the user's
    loc = problem["loc"]
    path = tuple(p for i, p in enumerate(loc) if not (i and loc[i - 1] == "masking" and p in MASKINGS))
    keys = tuple(p for p in path if isinstance(p, str))
    location = next((where[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in where), None)
    prefix = f"{location}: " if location else ""
    name = ".".join(str(p) for p in path)
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{prefix}{name}: unknown key{did_you_mean(str(path[-1]), _known_keys(path[:-1]))}"
    if kind == "missing":
        return f"{prefix}{name}: missing; configs/default.yaml has it, so some file replaced its section"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{prefix}{name}: {message}" if name else f"{prefix}{message}"
    return f"{prefix}{name} is {given!r}: {message[0].lower()}{message[1:]}"


def _known_keys(path: tuple) -> list[str]:
    """Field names of the section at `path` in the config."""
    fields: Any = Config
    for part in path:
        if isinstance(part, int) or fields is None:
            continue
        if fields is Config and part == "models":
            return list(ModelSpec.model_fields) if len(path) == 2 else _known_keys((path[2],))
        field = fields.model_fields.get(part)
        annotation = field.annotation if field else None
        fields = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    if fields is None:
        kinds = MASKINGS.values() if path and path[-1] == "masking" else ()
        return list(dict.fromkeys(field for kind in kinds for field in kind.model_fields))
    return list(fields.model_fields)
