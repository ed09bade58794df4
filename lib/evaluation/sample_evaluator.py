"""The models that write and judge samples, loaded once for stage 06 and the benchmarks, and the rows they leave."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.diffusion.autoregressive import AutoregressiveSampler
from lib.diffusion.calibration import Calibration
from lib.diffusion.policies import POLICIES
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import MaskedTexts, Samples
from lib.errors import BadData
from lib.evaluation.best_of import best_of
from lib.evaluation.collect import Measured, starting_ids
from lib.evaluation.infilling import UNKNOWN, Start, read_infill_file
from lib.evaluation.quality import describe, from_first_gap, lexicon
from lib.log import say
from lib.models.build import load_model
from lib.randomness import permutation
from lib.report.table import best_of_table, infilling_table, results_table, sampling_table, winners_table
from lib.sections.models import ModelSpec
from lib.sections.sampler import SamplerConfig
from lib.synthetic import MaskedLMEngine
from lib.tokenization import decode_batch, load_tokenizer
from lib.training.data import Windows, select_split

TRACED_SAMPLES = 2


class SampleEvaluator:
    """The models that write and judge samples, loaded once."""

    def __init__(self, stage: Stage, config: Config, runtime):
        self.stage, self.config, self.runtime = stage, config, runtime
        self.tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        model = load_model(stage.folder_of("05_train_critic", "best_model")).to(runtime.device)
        self.context = context_of(stage)
        self.sampler = Sampler(
            model,
            self.tokenizer.mask_token_id,
            sorted(set(self.tokenizer.all_special_ids)),
            runtime,
            config.sampler,
            config.seed,
            Calibration.load(stage.folder_of("05_train_critic", "calibration.json")),
            self.context,
        )
        self.reference, self.autoregressive, self.inspector, self.judge, self.ranker = (
            None if name is None else self._load(name) for name in roles(config.models).values()
        )
        self.real, self.words = self._real_text()
        judges = (model, self.reference, self.inspector, self.judge)
        self.narrowest = min(m.config.max_position_embeddings for m in judges if m is not None) - 1
        self.results = (
            stage.upstream_stats("04_train")["table"] + stage.upstream_stats("05_train_critic")["table"]
        )

    @property
    def winners(self) -> dict[str, dict]:
        """Ranker -> reward term -> its mean over the candidates that it chooses on held-out examples."""
        stats = self.stage.upstream_stats("04_train")
        rankers = [name for name, spec in self.config.models.items() if spec.mode == "ranker"]
        return {name: terms for name in rankers if (terms := stats[name]["held_out"].get("terms"))}

    def _load(self, name: str) -> Any:
        return load_model(self.stage.folder_of("04_train", f"{name}/best_model")).to(self.runtime.device)

    def token_text(self, i: int) -> str:
        """A token id as its characters, special ones by name."""
        special = i in set(self.tokenizer.all_special_ids)
        return self.tokenizer.convert_ids_to_tokens(i) if special else decode_batch(self.tokenizer, [[i]])[0]

    def _real_text(self):
        """Held-out windows to compare with, and the words of all other splits."""
        held_out = select_split(
            self.stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), "held_out"
        )
        words: set[str] = set()
        for batch in self.stage.tables(
            "01_prepare_dataset", "examples", schema.EXAMPLES, ["target", "split"]
        ):
            rows = zip(batch["target"].to_pylist(), batch["split"].to_pylist(), strict=True)
            words |= lexicon(text for text, split in rows if split != "held_out")
        width = max(self.context, self.config.sampler.length or 0)  # as long as the samples
        return Windows(held_out, width, self.tokenizer.pad_token_id).tiled(), words

    def pseudo_likelihood(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(B, T) log-probability of every token under the generator, each hidden once, in four passes. `rows`: (B,) keys of
        what is hidden together."""
        engine = MaskedLMEngine(self.sampler.model, self.tokenizer, self.runtime, self.context)
        everything = np.ones(ids.shape, bool)
        return engine.confidence(ids, everything, self.config.seed, rows, self.config.sampler.batch_size)

    def write(self, starts: list[Start], policy: str, nfe: int, table: "Collected") -> None:
        """The samples of one policy at one budget of passes, measured, into the table."""
        begin = time.perf_counter()
        made = [
            self.sampler.sample(MaskedTexts(s.ids, s.free, s.number, s.truth), POLICIES[policy], nfe)
            for s in starts
        ]
        seconds = time.perf_counter() - begin
        passes = float(np.concatenate([m.passes for m in made]).mean())
        row, measured = self._row(policy, nfe, passes, seconds, starts, [m.ids for m in made])
        table.policies.append(row)
        for start, samples, seen in zip(starts, made, measured, strict=True):
            table.add_samples(policy, nfe, start, samples.ids, seen)
        some = starts[0].first(TRACED_SAMPLES)
        traced = self.sampler.sample(
            MaskedTexts(some.ids, some.free, some.number, some.truth), POLICIES[policy], nfe, trace=True
        )
        table.add_trace(policy, nfe, some.number, traced)

    def _row(self, name: str, nfe: int, passes: float, seconds: float, starts: list[Start], texts: list):
        """(the line of the sampling table, what was measured of each start's samples)."""
        parts = [Measured.of(ids, s.free, self, s.truth) for ids, s in zip(texts, starts, strict=True)]
        all_of = Measured.joined(parts)
        row = describe(name, nfe, passes, seconds, all_of.written, self.words, all_of.nll)
        return row | all_of.means(), parts

    def best_of(self, starts: list[Start], table: "Collected") -> list[dict]:
        """What choosing the best of N samples gains, by each scorer, whose choices go into the table; nothing for N = 1."""
        settings = self.config.sampler
        if settings.best_of == 1:
            return []
        policy, nfe, n = settings.best_of_policy, max(settings.nfe), settings.best_of
        rows, texts = best_of(self, starts, policy, nfe, n)
        for start, chosen in zip(starts, texts, strict=True):
            for scorer, ids in chosen.items():
                name = f"{policy}, best of {n} by {scorer}"
                table.add_samples(name, nfe, start, ids, Measured.of(ids, start.free, self))
        return rows

    def baselines(self, starts: list[Start]) -> list[dict]:
        """The causal model's own samples, and real text: of the same length, or what should have been filled in."""
        rows = []
        if self.autoregressive is not None:
            begin = time.perf_counter()
            made = [self._autoregressive_samples(s) for s in starts]
            seconds = time.perf_counter() - begin
            passes = float(np.concatenate([m.passes for m in made]).mean())
            rows.append(
                self._row("autoregressive", round(passes), passes, seconds, starts, [m.ids for m in made])[0]
            )
        real = self._real_starts(starts)
        if real:
            rows.append(self._row("real text", 0, 0, 0.0, real, [s.ids for s in real])[0])
        return rows

    def _autoregressive_samples(self, start: Start) -> Samples:
        special = sorted(set(self.tokenizer.all_special_ids))
        model: Any = self.autoregressive
        sampler = AutoregressiveSampler(
            model, self.tokenizer.cls_token_id, special, self.runtime, self.config.sampler, self.config.seed,
            model.config.max_position_embeddings - 1,
        )  # fmt: skip
        return sampler.sample(MaskedTexts(start.ids, start.free, start.number))

    def _real_starts(self, starts: list[Start]) -> list[Start]:
        if starts[0].names is not None:
            known = [s for s in starts if s.truth is not None and (s.truth != UNKNOWN).all()]
            whole = len(known) == len(starts)
            return [replace(s, ids=s.truth) for s in known if s.truth is not None] if whole else []
        # As many texts as samples: the entropy of n-grams grows with their number
        real = self.real_text(len(starts[0].ids))[:, : starts[0].ids.shape[1]]
        # and measured from the same place on
        return [Start(real, starts[0].free[: len(real)], np.arange(len(real)))] if len(real) else []

    def real_text(self, count: int) -> np.ndarray:
        """(up to count, T) whole held-out windows, the same ones at every call."""
        some = permutation(self.config.seed, "real text", 0, self.real.count)
        ids, valid = self.real.batch(some, np.zeros(len(some)))
        return ids[valid.all(1)][:count]

    def say_results(self, policies, chosen) -> None:
        say("\n" + results_table(self.results))
        for name, terms in self.winners.items():
            say("\n" + winners_table(name, terms))
        say("\n" + sampling_table(policies) + "\n")
        if any(row["infill_accuracy"] for row in policies):
            say(infilling_table(policies) + "\n")
        if chosen:
            say(best_of_table(chosen) + "\n")


class Collected:
    """Rows of samples and traces, policy by policy."""

    def __init__(self) -> None:
        self.policies: list[dict] = []
        self._samples: list = []
        self._trace: list = []

    def add_samples(self, policy: str, nfe: int, start: Start, ids: np.ndarray, measured: Measured) -> None:
        free, counted = start.free, from_first_gap(start.free)
        for i, row in enumerate(ids):
            self._samples.append(
                {
                    "policy": policy,
                    "nfe": nfe,
                    "sample_id": int(start.number[i]),
                    "infill_id": None if start.names is None else start.names[i],
                    "text": measured.texts[i],
                    "token_ids": row.tolist(),
                    "given": (~free[i]).tolist(),
                    "reference_nll": None
                    if measured.nll is None
                    else float(measured.nll[i] / max(counted[i].sum(), 1)),
                    "critic_error": float(measured.errors[i][free[i]].mean()),
                    "token_error": measured.errors[i].tolist(),
                    "judge_score": None if measured.judged is None else float(measured.judged[i]),
                }
            )

    def add_trace(self, policy: str, nfe: int, numbers: np.ndarray, samples: Samples) -> None:
        for number, round_ in enumerate(samples.rounds):
            for i, sample in enumerate(numbers):
                tokens, events = round_.ids[i].tolist(), round_.events[i].tolist()
                key = {"policy": policy, "nfe": nfe, "sample_id": int(sample), "iteration": number}
                self._trace.append(key | {"token_ids": tokens, "events": events})

    def samples(self):
        return as_table(self._samples, schema.SAMPLES)

    def trace(self):
        return as_table(self._trace, schema.TRACE)


def as_table(rows: list[dict], table_schema: schema.TableSchema) -> pa.Table:
    return pa.Table.from_pylist(rows, table_schema.arrow)


def context_of(stage: Stage) -> int:
    """Tokens that the generator reads beside its [CLS]."""
    file = stage.folder_of("05_train_critic", "best_model") / "config.json"
    return json.loads(file.read_text(encoding="utf-8"))["max_position_embeddings"] - 1


def starts_of(settings: SamplerConfig, tokenizer: Any, context: int) -> list[Start]:
    """What samples are written from: masks everywhere, the config's prompt or text with [MASK]s, or its file.

    Raises BadConfig or BadData saying what cannot be written from."""
    if settings.infill_file:
        starts = read_infill_file(Path(settings.infill_file), tokenizer, context)
        if "oracle" in settings.policies:
            _require_targets(starts)
        return starts
    row = starting_ids(settings, tokenizer, context)
    ids = np.tile(row, (settings.num_samples, 1))
    return [Start(ids, ids == tokenizer.mask_token_id, np.arange(len(ids)))]


def roles(models: Mapping[str, ModelSpec]) -> dict[str, str | None]:
    """Role in stage 06 -> the first of the config's models that fits it; None if none does.

    The reference model must be causal: one that sees what it judges would find everything likely.
    """

    def first(fits: Callable[[ModelSpec], bool]) -> str | None:
        return next((name for name, spec in models.items() if fits(spec)), None)

    def causal(spec: ModelSpec) -> bool:
        return spec.mode == "language_model" and spec.attention == "causal"

    return {
        "reference": first(lambda s: causal(s) and s.split == "reference"),
        "autoregressive": first(lambda s: causal(s) and s.split != "reference"),
        "inspector": first(lambda s: s.mode == "token_classifier"),
        "judge": first(lambda s: s.mode == "sequence_scorer" and s.target_type == "score"),
        "ranker": first(lambda s: s.mode == "ranker"),
    }


def _require_targets(starts: list[Start]) -> None:
    without = [
        name
        for s in starts
        for name, row in zip(s.names or [], s.truth if s.truth is not None else [], strict=True)
        if (row == UNKNOWN).all()
    ]
    if without:
        shown = ", ".join(without[:10])
        raise BadData(
            f"the policy oracle must know the right text, but {len(without)} rows of sampler.infill_file have no "
            f"target: {shown}; give them one, or leave oracle out of sampler.policies"
        )
