"""The models of a run that read text, loaded once: judge, inspector and language models."""

from collections.abc import Callable, Mapping
from typing import Any

from lib.artifacts import Stage
from lib.config import Config
from lib.diffusion.sampler import Sampler
from lib.models.build import load_model
from lib.runtime import Runtime
from lib.sections.models import ModelSpec
from lib.tokenization import decode_batch, load_tokenizer
from lib.training.model_plans import trained_models, unit_of
from lib.units_summary import stats_of


class RunModels:
    """The models of a run that read text. A run needs no generator for them.

    Attributes:
        reference, autoregressive, inspector, judge, ranker: models of stage 04, None where the config has none; see
            `roles`.
        min_context: tokens that the model reads which reads fewest, without [CLS].
        models: figures of all trained models, and their rows of the results table.
        results: rows of the results table.
        sampler: the generator with its calibrated critic; None without them.
    """

    sampler: Sampler | None = None

    def __init__(self, stage: Stage, config: Config, runtime: Runtime):
        self.stage, self.config, self.runtime = stage, config, runtime
        self.tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        self.reference, self.autoregressive, self.inspector, self.judge, self.ranker = (
            None if name is None else self._load(name) for name in roles_of(config).values()
        )
        readers = [m for m in (self.reference, self.inspector, self.judge) if m is not None]
        self.min_context = self._shortest(readers)
        self.models = stats_of(trained_models(stage, config))
        self.results = self.models["table"]

    @property
    def judge_figures(self) -> dict[str, Any]:
        """The held-out figures of the judge: how windows are joined, and its thresholds; empty without a judge."""
        name = roles_of(self.config)["judge"]
        return {} if name is None else self.models.get(name, {}).get("held_out", {})

    def token_text(self, token_id: int) -> str:
        """The characters of a token; the name of a special token."""
        if token_id in set(self.tokenizer.all_special_ids):
            return self.tokenizer.convert_ids_to_tokens(token_id)
        return decode_batch(self.tokenizer, [[token_id]])[0]

    def _load(self, name: str) -> Any:
        return load_model(self.stage.folder_of(unit_of(name), "best_model")).to(self.runtime.device)

    @staticmethod
    def _shortest(readers: list[Any]) -> int:
        """Tokens that the model reads which reads fewest, without [CLS]. Without a model: 1."""
        return min((m.config.max_position_embeddings for m in readers), default=2) - 1


def units_of_roles(config: Config) -> list[str]:
    """What stage 06 reads of the models that have a role: units of stage 04, and stage 05 if it trains a token critic."""
    units = [unit_of(name) for name in dict.fromkeys(roles_of(config).values()) if name is not None]
    return units if config.only_detects else [*units, "05_train_critic"]


def roles_of(config: Config) -> dict[str, str | None]:
    """As `roles`, for the models of a config."""
    return roles(config.models, config.data.label_classes is not None)


def roles(models: Mapping[str, ModelSpec], named_classes: bool = False) -> dict[str, str | None]:
    """Role in stage 06 -> the name of the first model of the config that is suitable; None if there is none.

    The reference model must be causal: a bidirectional model sees the token that it scores. A judge gives scores; one of classes
    is suitable if they have names (`named_classes`), which have rewards.
    """

    def first(suits: Callable[[ModelSpec], bool]) -> str | None:
        return next((name for name, spec in models.items() if suits(spec)), None)

    def causal(spec: ModelSpec) -> bool:
        return spec.mode == "language_model" and spec.attention == "causal"

    return {
        "reference": first(lambda s: causal(s) and s.split == "reference"),
        "autoregressive": first(lambda s: causal(s) and s.split != "reference"),
        "inspector": first(lambda s: s.mode == "token_classifier"),
        "judge": first(lambda s: s.mode == "sequence_scorer" and (s.target_type == "score" or named_classes)),
        "ranker": first(lambda s: s.mode == "ranker"),
    }
