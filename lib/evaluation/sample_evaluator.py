"""The models of a run that make and measure samples, loaded once."""

import numpy as np

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.diffusion.calibration import Calibration
from lib.diffusion.sampler import Sampler
from lib.evaluation.quality import lexicon
from lib.evaluation.run_models import RunModels
from lib.evaluation.starts import generator_context
from lib.models.build import load_model
from lib.models.compiling import CompiledLayers
from lib.randomness import Permutation
from lib.runtime import Runtime
from lib.synthetic import MaskedLMEngine
from lib.tokenization import forbidden_ids
from lib.training.data import Windows
from lib.training.objectives.base import chunks
from lib.training.stage_inputs import open_text


class SampleEvaluator(RunModels):
    """The models of a run that make and measure samples.

    Attributes:
        sampler: the generator with its calibrated critic.
        layers: those of the sampler's model, which may be compiled.
        context: tokens that the generator reads, without [CLS].
        min_context: the same of the model that reads fewest.
        held_out: windows of held-out text, as long as the samples.
        words: lower-case words of all other splits.
        results: rows of the results table of stages 04 and 05.
    """

    sampler: Sampler
    layers: CompiledLayers

    def __init__(self, stage: Stage, config: Config, runtime: Runtime):
        super().__init__(stage, config, runtime)
        model = load_model(stage.folder_of("05_train_critic", "best_model")).to(runtime.device)
        self.layers = CompiledLayers(model, config.sampler.compile, 0, learns=False, label="sampler")
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
        readers = [m for m in (model, self.reference, self.inspector, self.judge) if m is not None]
        self.min_context = self._shortest(readers)
        length = max(self.context, config.sampler.length or 0)  # of a sample
        self.held_out = Windows(open_text(stage, "held_out"), length, self.tokenizer.pad_token_id).tiled()
        self.words = self._words()
        self.results = self.models["table"] + stage.upstream_stats("05_train_critic")["table"]

    @property
    def ranker_choices(self) -> dict[str, dict]:
        """Ranker -> reward term -> its mean over the candidates that the ranker chooses on held-out examples."""
        rankers = [name for name, spec in self.config.models.items() if spec.mode == "ranker"]
        trained = {name: self.models[name] for name in rankers if name in self.models}
        return {name: terms for name, m in trained.items() if (terms := m["held_out"].get("terms"))}

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

    def _words(self) -> set[str]:
        """The words of all splits but held-out."""
        words: set[str] = set()
        for batch in self.stage.tables(
            "01_prepare_dataset", "examples", schema.EXAMPLES, ["target", "split"]
        ):
            rows = zip(batch["target"].to_pylist(), batch["split"].to_pylist(), strict=True)
            words |= lexicon(text for text, split in rows if split != "held_out")
        return words


def open_models(stage: Stage, config: Config, runtime: Runtime) -> RunModels:
    """The models of a run: a `SampleEvaluator`, or those that read text alone if the run has no generator."""
    return (
        RunModels(stage, config, runtime) if config.only_detects else SampleEvaluator(stage, config, runtime)
    )
