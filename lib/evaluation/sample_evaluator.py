"""The models of a run that make and measure samples, loaded once."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.diffusion.calibration import Calibration
from lib.diffusion.sampler import Sampler
from lib.evaluation.quality import lexicon
from lib.evaluation.starts import generator_context
from lib.models.build import load_model
from lib.models.compiling import CompiledLayers
from lib.randomness import Permutation
from lib.runtime import Runtime
from lib.sections.models import ModelSpec
from lib.synthetic import MaskedLMEngine
from lib.tokenization import decode_batch, forbidden_ids, load_tokenizer
from lib.training.data import Windows
from lib.training.model_plans import trained_models, unit_of
from lib.training.objectives.base import chunks
from lib.training.stage_inputs import open_text
from lib.units_summary import stats_of


class SampleEvaluator:
    """The models of a run that make and measure samples.

    Attributes:
        sampler: the generator with its calibrated critic.
        reference, autoregressive, inspector, judge, ranker: models of stage 04, None where the config has none; see
            `roles`.
        context: tokens that the generator reads, without [CLS].
        min_context: the same of the model that reads fewest.
        held_out: windows of held-out text, as long as the samples.
        words: lower-case words of all other splits.
        models: figures of all trained models, and their rows of the results table.
        results: rows of the results table of stages 04 and 05.
    """

    def __init__(self, stage: Stage, config: Config, runtime: Runtime):
        self.stage, self.config, self.runtime = stage, config, runtime
        self.tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        model = load_model(stage.folder_of("05_train_critic", "best_model")).to(runtime.device)
        CompiledLayers(model, config.sampler.compile, 0, learns=False, label="sampler")
        self.context = generator_context(stage)
        self.sampler = Sampler(
            model,
            self.tokenizer.mask_token_id,
            forbidden_ids(self.tokenizer),
            runtime,
            config.sampler,
            config.seed,
            Calibration.load(stage.folder_of("05_train_critic", "calibration.json")),
            self.context,
        )
        self.reference, self.autoregressive, self.inspector, self.judge, self.ranker = (
            None if name is None else self._load(name) for name in roles_of(config).values()
        )
        self.held_out, self.words = self._real_text()
        readers = (model, self.reference, self.inspector, self.judge)
        self.min_context = min(m.config.max_position_embeddings for m in readers if m is not None) - 1
        self.models = stats_of(trained_models(stage, config))
        self.results = self.models["table"] + stage.upstream_stats("05_train_critic")["table"]

    @property
    def judge_figures(self) -> dict[str, Any]:
        """The held-out figures of the judge: how windows are joined, and its thresholds; empty without a judge."""
        name = roles_of(self.config)["judge"]
        return {} if name is None else self.models.get(name, {}).get("held_out", {})

    @property
    def ranker_choices(self) -> dict[str, dict]:
        """Ranker -> reward term -> its mean over the candidates that the ranker chooses on held-out examples."""
        rankers = [name for name, spec in self.config.models.items() if spec.mode == "ranker"]
        trained = {name: self.models[name] for name in rankers if name in self.models}
        return {name: terms for name, m in trained.items() if (terms := m["held_out"].get("terms"))}

    def token_text(self, token_id: int) -> str:
        """The characters of a token; the name of a special token."""
        if token_id in set(self.tokenizer.all_special_ids):
            return self.tokenizer.convert_ids_to_tokens(token_id)
        return decode_batch(self.tokenizer, [[token_id]])[0]

    def pseudo_likelihood(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(B, T) log-probability of every token of `ids` (B, T) under the generator.

        Each token is masked once, in four forward passes. `rows` (B,) are the keys of the random masks.
        """
        engine = MaskedLMEngine(self.sampler.model, self.tokenizer, self.runtime, self.context)
        everything = np.ones(ids.shape, bool)
        return engine.confidence(ids, everything, self.config.seed, rows, self.config.sampler.batch_size)

    def real_text(self, count: int) -> np.ndarray:
        """(up to `count`, T) full windows of held-out text; every call returns the same windows."""
        order, found = Permutation(self.config.seed, "real text", 0, self.held_out.count), []
        for part in chunks(self.held_out.count, max(count, 64)):
            ids, valid = self.held_out.batch(order[part], np.zeros(len(part)))
            found.append(ids[valid.all(1)])
            if sum(map(len, found)) >= count:
                break
        return np.concatenate(found)[:count]

    def _load(self, name: str) -> Any:
        return load_model(self.stage.folder_of(unit_of(name), "best_model")).to(self.runtime.device)

    def _real_text(self) -> tuple[Windows, set[str]]:
        """(windows of held-out text, words of all other splits)."""
        held_out = open_text(self.stage, "held_out")
        words: set[str] = set()
        for batch in self.stage.tables(
            "01_prepare_dataset", "examples", schema.EXAMPLES, ["target", "split"]
        ):
            rows = zip(batch["target"].to_pylist(), batch["split"].to_pylist(), strict=True)
            words |= lexicon(text for text, split in rows if split != "held_out")
        length = max(self.context, self.config.sampler.length or 0)  # of a sample
        return Windows(held_out, length, self.tokenizer.pad_token_id).tiled(), words


def units_of_roles(config: Config) -> list[str]:
    """The models of stage 04 that have a role in stage 06, for what the stage reads."""
    return [unit_of(name) for name in dict.fromkeys(roles_of(config).values()) if name is not None]


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
