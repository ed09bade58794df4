"""The sections of the config: every knob's name, type and limits. How files are merged into one is `lib.config`'s."""

import itertools
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lib.errors import did_you_mean

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
    head_learning_rate: AboveZero | None
    freeze_backbone: bool
    unfreeze_at_step: Count | None
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
        if self.unfreeze_at_step is not None and not self.freeze_backbone:
            raise ValueError(
                "unfreeze_at_step without freeze_backbone: true has no effect; set both or neither"
            )
        if self.unfreeze_at_step is not None and not 0 < self.unfreeze_at_step < self.steps:
            raise ValueError(
                "unfreeze_at_step must lie between 0 and steps; leave it out to keep the trunk frozen"
            )
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


Share = Annotated[float, Field(gt=0, le=1)]


class _Stage(Section):
    """A stage of unmasking ends when its validation loss has not improved so many times."""

    val_loss_stale_count: Positive


class RandomStage(_Stage):
    """Every row masks a share of its own, uniform up to max_masked_ratio."""

    type: Literal["random"]
    max_masked_ratio: Share

    @property
    def ratios(self) -> tuple[float, float]:
        return 0.0, self.max_masked_ratio

    @property
    def masking(self) -> Masking:
        return RandomMasking(type="random")


class StickyStage(_Stage):
    """Every row masks the same share, in runs."""

    type: Literal["sticky"]
    target_masked_ratio: Share
    p1: Fraction
    p2: Fraction

    @model_validator(mode="after")
    def _check(self):
        _ = self.masking
        return self

    @property
    def ratios(self) -> tuple[float, float]:
        return self.target_masked_ratio, self.target_masked_ratio

    @property
    def masking(self) -> Masking:
        return StickyMasking(type="sticky", p1=self.p1, p2=self.p2)


class SpanStage(_Stage):
    """Every row masks a share of its own, uniform up to max_masked_ratio, in num_spans runs."""

    type: Literal["span"]
    num_spans: Positive
    max_masked_ratio: Share = 1.0

    @property
    def ratios(self) -> tuple[float, float]:
        return 0.0, self.max_masked_ratio

    @property
    def masking(self) -> Masking:
        return SpanMasking(type="span", num_spans=self.num_spans)


class LineStage(_Stage):
    """Every row masks whole lines, together a share of its own between the two."""

    type: Literal["line"]
    min_ratio: Fraction
    max_ratio: Share

    @model_validator(mode="after")
    def _check(self):
        _ = self.masking
        return self

    @property
    def ratios(self) -> tuple[float, float]:
        return self.min_ratio, self.max_ratio

    @property
    def masking(self) -> Masking:
        return LineMasking(type="line", min_ratio=self.min_ratio, max_ratio=self.max_ratio)


STAGES_OF = {"random": RandomStage, "sticky": StickyStage, "span": SpanStage, "line": LineStage}
UnmaskingStage = Annotated[RandomStage | StickyStage | SpanStage | LineStage, Field(discriminator="type")]


class DiffusionConfig(Section):
    weight: Literal["exact_count", "inverse_t"]
    min_masked_ratio: Annotated[float, Field(ge=0, lt=1)]
    masking: Masking
    corruption: Literal["mask", "bert"]
    stages: tuple[UnmaskingStage, ...]
    use_all_stages: bool


class GeneratorConfig(Section):
    checkpoint: str | None
    architecture: ArchitectureConfig
    training: TrainingConfig


class CandidatesConfig(Section):
    source: Literal["masked_lm", "random_tokens", "original_only", "programs"]
    per_example: Annotated[int, Field(ge=1, le=64)]
    mask_ratio: tuple[Fraction, Fraction]
    masking: Masking
    label_rule: Literal["origin", "changed"]
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


class LabelsConfig(Section):
    path: str | None


class RewardWeights(Section):
    execution: NonNegative
    program: NonNegative
    closeness: NonNegative
    format: NonNegative

    @model_validator(mode="after")
    def _check(self):
        if sum(self.model_dump().values()) <= 0:
            raise ValueError("one of the weights must be above 0")
        return self


class RewardsConfig(Section):
    curve: tuple[tuple[Fraction, Fraction], ...]
    weights: RewardWeights

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


class ChangesConfig(Section):
    """Weights of the ways to change a gold program."""

    chain: NonNegative
    masked_lm: NonNegative


class PoolsConfig(Section):
    page_golds: Count
    same_operators: Fraction
    corruption_rate: Fraction
    changes: ChangesConfig
    bank: Annotated[int, Field(ge=8)]
    rounds: Positive
    train_draws: Positive
    folds: Annotated[int, Field(ge=2)]
    least_difference: NonNegative
    leak_limit: Fraction


class FinqaConfig(Section):
    drop: tuple[str, ...]
    group: Literal["page", "report"]
    selection_share: Annotated[float, Field(ge=0, le=0.5)]
    pools: PoolsConfig


class LoraConfig(Section):
    rank: Positive
    alpha: AboveZero
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: str


class RankerConfig(Section):
    encoder: str | None
    prompt: Literal["question", "question_page"]
    prompt_tokens: Positive
    candidate_tokens: Positive
    attention: Literal["prefix", "full"]
    pooling: Literal["last", "cls", "mean"]
    head: Literal["mlp", "linear"]
    head_dropout: Annotated[float, Field(ge=0, lt=1)]
    word_dropout: Annotated[float, Field(ge=0, lt=1)]
    adapter: Literal["lora", "none"]
    embeddings: Literal["learn", "frozen"]
    lora: LoraConfig
    loss: Literal["cross_entropy", "listwise", "list_mle", "pairwise", "regression"]
    temperature: AboveZero
    margin: NonNegative


class EntropyModifier(Section):
    weight: AboveZero = 1.0
    threshold: AboveZero = 0.1


class _Limited(Section):
    """Weights are kept between least and most."""

    least: AboveZero
    most: AboveZero

    @model_validator(mode="after")
    def _check(self):
        if self.least >= self.most:
            raise ValueError(f"least ({self.least}) must be below most ({self.most})")
        return self


class MaskRatioModifier(_Limited):
    power: AboveZero = 0.5
    least: AboveZero = 0.1
    most: AboveZero = 10.0


class JudgeModifier(_Limited):
    """`model`: folder of a trained sequence scorer. Its weights count from start_step until before stop_step."""

    model: str
    exponent: AboveZero = 1.0
    least: AboveZero = 0.5
    most: AboveZero = 2.0
    start_step: Count = 0
    stop_step: Positive

    @model_validator(mode="after")
    def _check_steps(self):
        if self.start_step >= self.stop_step:
            raise ValueError(f"stop_step ({self.stop_step}) must be above start_step ({self.start_step})")
        return self


class ModifiersConfig(Section):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    entropy: EntropyModifier | None = None
    mask_ratio: MaskRatioModifier | None = None
    judge: JudgeModifier | None = None

    @property
    def any(self) -> bool:
        return bool(self.label_smoothing or self.entropy or self.mask_ratio or self.judge)


class ModelSpec(Section):
    """One named model of stage 04. `architecture` and `training` in YAML state only what differs."""

    mode: Literal["language_model", "token_classifier", "sequence_scorer", "ranker"]
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    split: Literal["train", "held_out", "reference"] = "train"
    start: str = "scratch"
    num_classes: Annotated[int, Field(ge=2)] = 3
    class_weighting: Literal["none", "inverse_frequency", "dynamic"] = "none"
    target_type: Literal["score", "classification"] = "score"
    blind: bool = False
    modifiers: ModifiersConfig = ModifiersConfig()
    architecture: ArchitectureConfig
    training: TrainingConfig

    @field_validator("mode", mode="before")
    @classmethod
    def _alias(cls, mode):
        return MODE_ALIASES.get(mode, mode)

    @model_validator(mode="after")
    def _check(self):
        if self.modifiers.any and (self.mode != "language_model" or self.attention == "causal"):
            what = "a causal one" if self.mode == "language_model" else self.mode
            raise ValueError(
                f"modifiers are for the losses of masked language models, and this is {what}: leave them out"
            )
        if self.training.freeze_backbone and self.start == "scratch":
            raise ValueError(
                "training.freeze_backbone with start: scratch would keep random weights; give the model a start"
            )
        return self

    @property
    def effective_attention(self) -> str:
        """Token classifiers and sequence scorers always read both ways."""
        return "bidirectional" if self.mode in ("token_classifier", "sequence_scorer") else self.attention


class PpoConfig(Section):
    ranker: str
    rollout_pools: Positive
    epochs: Positive
    samples_per_pool: Positive
    clip: AboveZero
    value_weight: NonNegative
    entropy_weight: NonNegative
    kl_weight: NonNegative
    normalise_advantages: bool


class CriticConfig(Section):
    method: Literal["token_critic", "ppo"]
    ppo: PpoConfig
    generator: str
    coupling: Literal["decoupled", "joint", "stop_gradient"]
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
    "remdm_rescale", "remdm_conf", "critic", "critic_blend", "critic_partial", "oracle",
)  # fmt: skip
WITH_ERROR_VIEW = ("confidence_first", "confidence", "confidence_fresh", "critic", "critic_blend", "oracle")


class SamplerConfig(Section):
    policies: tuple[str, ...]
    num_samples: Positive
    length: Positive | None
    nfe: tuple[Annotated[int, Field(ge=2)], ...]
    block_tokens: Positive | None
    schedule: Literal["linear", "cosine", "custom", "threshold"]
    start_ratio: Fraction
    end_ratio: Fraction
    masking_ratios: tuple[Fraction, ...]
    threshold: Probability
    temperature: AboveZero
    top_p: Annotated[float, Field(gt=0, le=1)]
    randomness_strength: Fraction
    selection_temperature: AboveZero | None
    back_share: Fraction
    best_of: Positive
    best_of_policy: str
    prompt: str
    infill: str
    infill_file: str | None
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
        if bool(self.prompt) + bool(self.infill) + bool(self.infill_file) > 1:
            raise ValueError(
                "give one of prompt (continue it), infill (fill its [MASK]s) and infill_file, not several"
            )
        self._check_policies()
        return self

    def _check_policies(self) -> None:
        used = [*self.policies, *([self.best_of_policy] if self.best_of > 1 else [])]
        if self.schedule == "threshold" and (others := [n for n in used if n not in WITH_ERROR_VIEW]):
            raise ValueError(
                f"schedule threshold asks the policy how likely each token is an error; {', '.join(others)} cannot "
                f"say; policies that can: {', '.join(WITH_ERROR_VIEW)}"
            )
        if "oracle" in used and not self.infill_file:
            raise ValueError(
                "the policy oracle must know the right text: give infill_file with a column target"
            )
        if self.infill_file and self.best_of > 1:
            raise ValueError("best_of chooses among samples of one length: set it to 1 with infill_file")
