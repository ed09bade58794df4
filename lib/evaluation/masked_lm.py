"""A masked LM, a critic on it and a sampler from Python, without a run folder. The stages use the same parts.

    lm = MaskedLM.open("path/to/masked-lm")
    print(lm.train_critic(texts))
    for filled in lm.fill(["The [MASK] of an [MASK]"], policy="critic_origin"):
        print(filled.text, filled.remasked)

The masked LM itself does not change: the critic learns on its frozen backbone.

Legend: B texts, T tokens.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lib import randomness
from lib.config import Config, load_config
from lib.diffusion.calibration import Calibration
from lib.diffusion.policies import POLICIES
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import REMASKED, MaskedTexts, Samples
from lib.errors import BadConfig, BadData, did_you_mean
from lib.models.build import PretrainedStart, load_model, save_model, start_model
from lib.models.pretrained import Pretrained, open_pretrained
from lib.runtime import Runtime
from lib.token_store import of_table
from lib.tokenization import decode_batch, encode_batch, encode_with_masks, forbidden_ids, num_ids
from lib.training.critic_setup import critic_heads
from lib.training.data import Splits
from lib.training.loop import train
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.objectives.token_critic import TokenCritic

SHARES = {"held_out": 0.1, "selection": 0.1}  # of the texts; the others are learned from
MIN_TEXTS = 30


@dataclass(frozen=True)
class Remasked:
    """A token that the policy masked again: in which round, at which position, and the tokens before and in the end."""

    round: int
    position: int
    before: str
    after: str


@dataclass(frozen=True)
class FilledText:
    """A filled text, what was re-masked on the way, and the forward passes that it took."""

    text: str
    remasked: list[Remasked]
    passes: int


@dataclass
class MaskedLM:
    """A masked LM with its tokenizer and, once trained, its critic.

    Attributes:
        model: the masked LM behind the interface of this project.
        context: tokens of a text that it reads, without its special tokens.
        config: the settings of critic, diffusion and sampler.
        calibration: from the critic's raw probabilities to frequencies of errors.
    """

    opened: Pretrained
    model: Any
    context: int
    config: Config
    runtime: Runtime
    calibration: Calibration

    @classmethod
    def open(cls, name_or_folder: str | Path, context: int = 64, settings: Sequence[str] = ()) -> "MaskedLM":
        """Open the masked LM of a folder, or of a name on the hub.

        Args:
            settings: `KEY=VALUE` as for --set, such as `critic.num_layers=2` or `pretrained.mask_token=<mask>`.

        Raises:
            MissingInput, BadData, BadConfig: it cannot be used, see `lib.models.pretrained`.
        """
        critic = ("critic.coupling=decoupled", "critic.num_layers=1", "critic.look_back=0.25")
        training = ("optimizer=adamw", "learning_rate=0.002", "steps=60", "batch_size=16", "evaluate_every=30",
                    "checkpoint_every=1000", "compile=off")  # fmt: skip
        given = [
            f"pretrained.model={name_or_folder}",
            *critic,
            *(f"critic.training.{t}" for t in training),
            *settings,
        ]
        config = load_config(overrides=given)
        opened, runtime = open_pretrained(config.pretrained), Runtime.detect(config)
        context = min(context, opened.longest)
        start = PretrainedStart(opened, context, dropout=0.0)
        model, _ = start_model(
            "language_model", start, "bidirectional", num_ids(opened.tokenizer), config.seed, "lm"
        )
        return cls(opened, model.to(runtime.device).eval(), context, config, runtime, Calibration())

    @property
    def tokenizer(self) -> Any:
        return self.opened.tokenizer

    def train_critic(self, texts: Iterable[str]) -> dict[str, float]:
        """Train a critic on texts that the model fills itself, calibrate it, and measure it on texts kept apart.

        Returns:
            AUROC of wrong tokens on held-out texts: `critic`, and `confidence`, the probability of each token when it was
            sampled; `error_rate`, the share of wrong tokens.

        Raises:
            BadData: there are too few texts.
        """
        splits = self._splits(list(texts))
        context = TrainingContext("critic", self.config.seed, self.config.critic.training, self.runtime)
        diffusion = MaskedDiffusion(context, splits, self.config.diffusion, MaskingTokens.of(self.tokenizer))
        objective = TokenCritic(self.config.critic, diffusion, forbidden_ids(self.tokenizer))
        start = PretrainedStart(self.opened, self.context, dropout=0.0)
        spec = self.config.models["generator"]
        spec = spec.model_copy(
            update={"architecture": spec.architecture.model_copy(update={"family": "pretrained"})}
        )
        model, _ = start_model(
            "language_model", start, "bidirectional", num_ids(self.tokenizer), self.config.seed, "critic",
            **critic_heads(self.config.critic, spec),
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("critic."))
        with tempfile.TemporaryDirectory() as folder:
            train(
                model, objective, context, Path(folder), lambda m, path: save_model(m, path, self.tokenizer)
            )
            self.model = load_model(Path(folder) / "best_model").to(self.runtime.device)
        with torch.no_grad():
            values, _, self.calibration = objective.report(self.model)
        names = {"auroc": "critic", "auroc_confidence": "confidence", "error_rate": "error_rate"}
        return {name: float(values[key]) for key, name in names.items()}

    def fill(self, texts: Sequence[str], policy: str = "critic_origin", nfe: int = 16) -> list[FilledText]:
        """Fill every [MASK] of some texts, of any lengths up to the context, by a re-masking policy.

        Args:
            nfe: forward passes for each text.

        Raises:
            BadConfig: there is no such policy, or it needs a critic and none is trained.
            BadData: a text has no [MASK], or is too long.
        """
        if policy not in POLICIES:
            raise BadConfig(f"there is no policy '{policy}'{did_you_mean(policy, POLICIES)}")
        needs_critic = POLICIES[policy].partial_critic or policy in ("critic", "critic_blend")
        if needs_critic and self.model.critic is None:
            raise BadConfig(f"policy {policy} needs a critic: call train_critic first")
        rows = [row.astype(np.int64) for row in encode_with_masks(self.tokenizer, texts, "unk")]
        mask_id = self.tokenizer.mask_token_id
        for text, row in zip(texts, rows, strict=True):
            if not (row == mask_id).any() or len(row) > self.context:
                raise BadData(
                    f"{text[:60]!r} has {len(row)} tokens and {int((row == mask_id).sum())} masks; a text needs at least one "
                    f"[MASK] and at most {self.context} tokens"
                )
        sampler = Sampler(
            self.model, mask_id, forbidden_ids(self.tokenizer), self.runtime, self.config.sampler, self.config.seed,
            self.calibration, self.context,
        )  # fmt: skip
        found: list[FilledText | None] = [None] * len(rows)
        for length in {len(row) for row in rows}:  # no padding
            index = [n for n, row in enumerate(rows) if len(row) == length]
            ids = np.stack([rows[n] for n in index])
            masked = MaskedTexts(ids, ids == mask_id, np.array(index))
            made = sampler.sample(masked, POLICIES[policy], nfe, trace=True)
            for b, n in enumerate(index):
                found[n] = self._filled(made, ids[b] == mask_id, b)
        return [text for text in found if text is not None]

    def _filled(self, made: Samples, free: np.ndarray, row: int) -> FilledText:
        """The text of a row of samples, with what the trace says of its free positions."""
        remasked, latest = [], np.full(len(free), -1)
        for number, step in enumerate(made.rounds):
            for position in np.flatnonzero((step.events[row] == REMASKED) & free & (latest >= 0)):
                before, after = self._name(latest[position]), self._name(made.ids[row, position])
                remasked.append(Remasked(number, int(position), before, after))
            latest = np.where(step.ids[row] == self.tokenizer.mask_token_id, -1, step.ids[row])
        (text,) = decode_batch(self.tokenizer, [made.ids[row]])
        return FilledText(text, remasked, int(made.passes[row]))

    def _name(self, token_id: int) -> str:
        return decode_batch(self.tokenizer, [[token_id]])[0]

    def _splits(self, texts: list[str]) -> WindowSplits:
        """Token stores of the texts; a hash of its number decides which split a text is in."""
        coded = [ids for text in texts if len(ids := encode_batch(self.tokenizer, [text], "unk")[0])]
        if len(coded) < MIN_TEXTS:
            raise BadData(
                f"a critic learns from at least {MIN_TEXTS} texts with tokens, and {len(coded)} are given"
            )
        order = randomness.permutation(self.config.seed, "texts of the critic", 0, len(coded))
        sizes = {name: max(1, int(share * len(coded))) for name, share in SHARES.items()}
        held_out, selection, learned = np.split(order, [sizes["held_out"], sum(sizes.values())])
        stores = (self._store([coded[n] for n in part]) for part in (learned, selection, held_out))
        return WindowSplits.of(Splits(*stores), self.context, self.tokenizer.pad_token_id)

    def _store(self, rows: list[np.ndarray]) -> Any:
        columns = {
            "token_ids": pa.array(rows, pa.list_(pa.int32())),
            "continues": [False] * len(rows),
            "target": decode_batch(self.tokenizer, rows),
            "group": [str(n) for n in range(len(rows))],
        }
        return of_table(pa.table(columns))
