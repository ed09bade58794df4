"""The models of the re-masking benchmark: trained by the project's own stages, loaded on first use.

For each seed and each language (text and sums) stages 00 to 04 run once. Each variant of the critic has its own stage 05 and
links to the other stages. Everything is in OUT/models; an interrupted benchmark continues there.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from torch import nn

from benchmarks.languages import NgramJudge, Sums
from benchmarks.remasking_numbers import AUTOREGRESSIVE
from lib import randomness, schema
from lib.config import Config, load_config
from lib.diffusion.calibration import Calibration
from lib.diffusion.policies import POLICIES
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import MaskedTexts, Samples
from lib.evaluation.quality import lexicon, reference_nll
from lib.models.build import load_model
from lib.runs import RunArgs, load_manifest
from lib.runtime import Runtime
from lib.token_store import open_store
from lib.tokenization import decode_batch, forbidden_ids, load_tokenizer
from lib.training.data import Windows

BEFORE = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train")
CRITIC = "05_train_critic"
TEXT, SUMS = "text", "sums"
MAIN = "main"  # the critic of all experiments except the ablations
# Changes of each variant of the critic to the config. All except `main` train for the same smaller number of steps.
VARIANTS: dict[str, dict[str, Any]] = {
    "joint": {},
    "no critic": {"alpha": 0.0, "selection_weight": 0.0},
    "alpha 0.25": {"alpha": 0.25},
    "stop_gradient": {"coupling": "stop_gradient"},
    "decoupled": {"coupling": "decoupled", "num_layers": 1},
    "sampled labels": {"labels": "sampled"},
    "filled only": {"partial_fraction": 0.0},
    "partial only": {"partial_fraction": 1.0},
}


@dataclass(frozen=True)
class Size:
    """Size and training length of the models of one language.

    Attributes:
        steps: of the generator, the reference model, the critic, and the critics of the ablations.
        rates: learning rates of the generator, which starts from scratch.
        sentences: number of sentences of the language of sums; digits: of its numbers.
    """

    layers: int
    width: int
    context: int
    steps: tuple[int, int, int, int]
    batch_size: int = 32
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"muon_learning_rate": 0.02, "learning_rate": 0.004}
    )
    sentences: int = 0
    digits: int = 2
    evaluated: int = 256

    def config(self, data: str) -> dict[str, Any]:
        """A config file: the defaults with these sizes, and only the generator and the reference model."""
        generator, reference, critic, _ = (_training(steps) for steps in self.steps)
        others = {name: None for name in load_config().models if name not in ("generator", "reference_lm")}
        models: dict[str, Any] = {
            "generator": {"start": "scratch", "training": generator | dict(self.rates)},
            "reference_lm": {"training": reference},
        }
        return {
            "data": {"path": data, "passage_characters": self.context, "block_characters": max(1024, self.context)}
            | ({} if data == "builtin" else {"whitespace": "keep", "deduplicate": "none"}),
            "architecture": {"num_hidden_layers": self.layers, "hidden_size": self.width, "num_attention_heads": 4, "context": self.context},
            "training": {"batch_size": self.batch_size, "evaluation_examples": self.evaluated},
            "candidates": {"source": "original_only", "per_example": 1},
            "models": models | others,
            "critic": {"training": critic | {"muon_learning_rate": 0.01, "learning_rate": 0.002}},
        }  # fmt: skip


def _training(steps: int) -> dict[str, Any]:
    often = max(1, min(500, steps // 2))
    return {"steps": steps, "evaluate_every": often, "checkpoint_every": often}


@dataclass
class Trained:
    """The models of one seed and variant, and the text they are evaluated on."""

    config: Config
    folder: Path  # holds the finished stages
    runtime: Runtime
    seed: int
    _kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder / "01_prepare_dataset" / "tokenizer")

    @cached_property
    def model(self) -> nn.Module:
        return load_model(self.folder / CRITIC / "best_model").to(self.runtime.device)

    @cached_property
    def reference(self) -> nn.Module:
        return load_model(self.folder / "04_train" / "reference_lm" / "best_model").to(self.runtime.device)

    @cached_property
    def calibration(self) -> Calibration:
        return Calibration.load(self.folder / CRITIC / "calibration.json")

    @property
    def context(self) -> int:
        return self.config.architecture.context

    @property
    def mask_id(self) -> int:
        return self.tokenizer.mask_token_id

    @cached_property
    def forbidden(self) -> list[int]:
        return forbidden_ids(self.tokenizer)

    def stats(self, stage: str) -> dict:
        """The statistics in a stage's manifest."""
        manifest = load_manifest(self.folder / stage)
        assert manifest is not None
        return manifest["stats"]

    def windows(self, split: str) -> Windows:
        """Windows of a split, as long as the context."""
        text = open_store(self.folder / "01_prepare_dataset" / "tokens" / split)
        return Windows(text, self.context, self.tokenizer.pad_token_id)

    @cached_property
    def _table(self):
        file = self.folder / "01_prepare_dataset" / "examples"
        return pq.read_table(file, schema=schema.EXAMPLES.arrow)

    @cached_property
    def held_out(self) -> np.ndarray:
        """(N, T) full held-out windows in a keyed order. No model and no calibration has seen them."""
        tiles = self.windows("held_out").tiled()
        order = randomness.permutation(self.seed, "benchmark windows", 0, tiles.count)
        ids, valid = tiles.batch(order, np.zeros(len(order)))
        return ids[valid.all(1)]

    @cached_property
    def train_ids(self) -> np.ndarray:
        return np.asarray(self.windows("train").ids)

    @cached_property
    def ngram(self) -> NgramJudge:
        """An n-gram model of the split reference, which no network except the reference model sees."""
        size = len(self.tokenizer)
        order = 6 if size**6 < 2**63 else 4
        return NgramJudge(self.windows("reference").ids.astype(np.int64), size, order)

    @cached_property
    def words(self) -> set[str]:
        """Words of all text that is not held out."""
        rows = self._table.filter(pc.not_equal(self._table["split"], "held_out"))
        return lexicon(rows["target"].to_pylist())

    def sampler(self, **changes: Any) -> Sampler:
        """The sampler with changed settings; `calibrated=False` uses the critic's raw output."""
        calibration = self.calibration if changes.pop("calibrated", True) else Calibration()
        settings = self.config.sampler.model_copy(update=changes)
        return Sampler(
            self.model, self.mask_id, self.forbidden, self.runtime, settings, self.seed, calibration, self.context
        )  # fmt: skip

    def sample(
        self, policy: str, nfe: int, ids: np.ndarray, free: np.ndarray, truth: np.ndarray | None = None,
        **changes: Any,
    ) -> Samples:  # fmt: skip
        """Samples whose free positions are generated under a policy. ids, free, truth: (B, T)."""
        return self.sampler(**changes).sample(
            MaskedTexts(ids, free, np.arange(len(ids)), truth), POLICIES[policy], nfe
        )

    def blank(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """((B, T) masks, (B, T) all free)."""
        ids = np.full((count, self.context), self.mask_id, np.int64)
        return ids, np.ones(ids.shape, bool)

    @torch.no_grad()
    def reference_nll(self, ids: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """(B,) nats of the counted tokens under the reference model."""
        return reference_nll(self.reference, self.runtime, ids, counted, self.tokenizer.cls_token_id)

    def texts(self, ids: np.ndarray) -> list[str]:
        return decode_batch(self.tokenizer, ids)


@dataclass
class Lab:
    """Trains the models that an experiment needs.

    Attributes:
        out: the benchmark's folder; data: `builtin` or a text file.
        sizes: of the two languages.
    """

    out: Path
    data: str
    sizes: dict[str, Size]
    _trained: dict[tuple, Trained] = field(default_factory=dict)
    _autoregressive: dict[int, nn.Module] = field(default_factory=dict)

    def models(self, seed: int, language: str = TEXT, variant: str = MAIN) -> Trained:
        """The trained models. Models that do not exist yet are trained."""
        name = (seed, language, variant)
        if name not in self._trained:
            folder = self._beside_base(seed, language, variant.replace(" ", "_"), BEFORE)
            changes = {"critic": self._critic(language, variant)}
            self._run(seed, language, folder.name, (CRITIC,), changes)
            config = self._config(seed, language, folder.name, changes)
            self._trained[name] = Trained(config, folder, Runtime.detect(config), seed)
        return self._trained[name]

    def autoregressive(self, seed: int) -> nn.Module:
        """An autoregressive model of the same size, trained on the same text.

        It trains for as many steps as the generator before its critic: half of the generator's steps in the end.
        """
        if seed not in self._autoregressive:
            self._beside_base(seed, TEXT, AUTOREGRESSIVE, BEFORE[:-1])
            spec = load_config().models["ar_baseline"].model_dump(exclude={"architecture", "training"})
            spec["training"] = _training(self.sizes[TEXT].steps[0])
            models = {"generator": None, "reference_lm": None, "ar_baseline": spec}
            folder = self._run(seed, TEXT, AUTOREGRESSIVE, BEFORE[-1:], {"models": models})
            self._autoregressive[seed] = load_model(folder / BEFORE[-1] / "ar_baseline" / "best_model")
        return self._autoregressive[seed]

    def _beside_base(self, seed: int, language: str, name: str, stages: tuple[str, ...]) -> Path:
        """A run that shares `stages` with the base run, which is trained first."""
        folder = self._run(seed, language, "base", BEFORE, {}).parent / name
        folder.mkdir(exist_ok=True)
        for stage in stages:
            if not (folder / stage).exists():
                (folder / stage).symlink_to(Path("..") / "base" / stage)
        return folder

    def _critic(self, language: str, variant: str) -> dict[str, Any]:
        if variant == MAIN:
            return {}
        return VARIANTS[variant] | {"training": _training(self.sizes[language].steps[3])}

    def _run(self, seed: int, language: str, name: str, stages: tuple[str, ...], changes: dict) -> Path:
        folder = self.out / "models" / language / f"seed_{seed}" / name
        config = self._config(seed, language, name, changes)
        for stage in stages:
            importlib.import_module(stage).main(config, RunArgs(run_dir=folder))
        return folder

    def _config(self, seed: int, language: str, name: str, changes: dict) -> Config:
        folder = self.out / "models" / language / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        data = self._sums(folder, seed) if language == SUMS else self.data
        files = [self.sizes[language].config(data) | {"seed": seed}, changes]
        paths = [
            folder / f"{part}.yaml" for part in ("config", name)
        ]  # another process may train another variant
        for path, content in zip(paths, files, strict=True):
            path.write_text(yaml.safe_dump(json.loads(json.dumps(content))), encoding="utf-8")
        return load_config(paths)

    def _sums(self, folder: Path, seed: int) -> str:
        size, path = self.sizes[SUMS], folder / "sums.txt"
        if not path.exists():
            path.write_text(Sums(size.digits).text(size.sentences, seed), encoding="utf-8")
        return str(path)
