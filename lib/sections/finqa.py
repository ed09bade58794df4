"""FinQA: pools of candidate programs, and the ranker that chooses from them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.sections.base import AboveZero, BelowOne, Count, Fraction, NonNegative, Positive, Section, UserPath
from lib.sections.models import DTYPES


class ChangesConfig(Section):
    """Relative weights of the methods that change a gold program."""

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
    near_misses: Fraction
    folds: Annotated[int, Field(ge=2)]
    min_difference: NonNegative
    leak_limit: Fraction


class FinqaConfig(Section):
    drop: tuple[str, ...]
    group: Literal["page", "report"]
    selection_share: Annotated[float, Field(gt=0, le=0.5)]
    pools: PoolsConfig


class LoraConfig(Section):
    rank: Positive
    alpha: AboveZero
    dropout: BelowOne
    targets: str


class YesNoConfig(Section):
    question: str
    yes: str
    no: str


class RankerConfig(Section):
    encoder: UserPath | None
    dtype: DTYPES
    prompt: Literal["question", "question_page"]
    prompt_tokens: Positive
    candidate_tokens: Positive
    attention: Literal["prefix", "full"]
    mask: Literal["dense", "blocks"]
    shard: bool
    pooling: Literal["last", "cls", "mean"]
    head: Literal["mlp", "linear", "yes_no"]
    yes_no: YesNoConfig
    head_dropout: BelowOne
    word_dropout: BelowOne
    adapter: Literal["lora", "none"]
    embeddings: Literal["learn", "frozen"]
    lora: LoraConfig
    loss: Literal[
        "cross_entropy", "listwise", "list_mle", "p_list_mle", "lambda_loss", "pairwise", "bradley_terry",
        "binary_cross_entropy", "regression", "mse", "margin_mse",
    ]  # fmt: skip
    temperature: AboveZero
    margin: NonNegative
    sampled_candidates: Annotated[int, Field(ge=2)] | None
    hard_negatives: NonNegative
    best_by: Literal["reward", "map"]

    @property
    def suffix(self) -> str:
        """The text behind every candidate."""
        return self.yes_no.question if self.head == "yes_no" else ""

    @model_validator(mode="after")
    def _check(self):
        if self.head == "yes_no" and self.pooling != "last":
            raise ValueError("head yes_no reads the last token of a candidate; set pooling to last")
        if self.hard_negatives > 0 and self.sampled_candidates is None:
            raise ValueError(
                "hard_negatives says which candidates of large pools are read, but sampled_candidates is null, so all are read; "
                "set sampled_candidates, or hard_negatives to 0"
            )
        if self.dtype == "bfloat16" and self.adapter == "none":
            raise ValueError(
                "dtype bfloat16 is for an encoder that does not learn, because most updates of bfloat16 weights are lost in "
                "rounding; set adapter to lora, or dtype to float32"
            )
        if self.shard and self.adapter == "none":
            raise ValueError(
                "shard divides the weights of an encoder that does not learn among the processes; set adapter to lora, or shard to "
                "false"
            )
        return self
