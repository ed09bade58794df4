"""The models that write and judge samples, loaded once for stage 06 and the benchmarks, and the rows they leave."""

import time

import numpy as np
import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.diffusion.autoregressive import sample_autoregressively
from lib.diffusion.calibration import Calibration
from lib.diffusion.sampler import Sampler
from lib.log import say
from lib.models.build import load_model
from lib.randomness import permutation
from lib.report.best_of import best_of
from lib.report.gather import Measured, starting_ids
from lib.report.quality import describe, lexicon
from lib.report.table import best_of_table, results_table, sampling_table, winners_table
from lib.tokenization import decode_batch, load_tokenizer
from lib.training.data import Windows, select_split


class Bench:
    """The models that write and judge samples, loaded once."""

    def __init__(self, stage: Stage, config: Config, runtime):
        self.stage, self.config, self.runtime = stage, config, runtime
        self.tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        model = load_model(stage.folder_of("05_train_critic", "best_model")).to(runtime.device)
        self.sampler = Sampler(
            model,
            self.tokenizer.mask_token_id,
            sorted(set(self.tokenizer.all_special_ids)),
            runtime,
            config.sampler,
            config.seed,
            Calibration.load(stage.folder_of("05_train_critic", "calibration.json")),
        )
        self.context = model.config.max_position_embeddings - 1
        self.reference = self._load(lambda s: s.mode == "language_model" and s.split == "reference")
        self.autoregressive = self._load(
            lambda s: s.mode == "language_model" and s.attention == "causal" and s.split != "reference"
        )
        self.inspector = self._load(lambda s: s.mode == "token_classifier")
        self.judge = self._load(lambda s: s.mode == "sequence_scorer" and s.target_type == "score")
        self.ranker = self._load(lambda s: s.mode == "ranker")
        self.real, self.words = self._real_text()
        self.results = (
            stage.upstream_stats("04_train")["table"] + stage.upstream_stats("05_train_critic")["table"]
        )

    @property
    def winners(self) -> dict[str, dict]:
        """Ranker -> reward term -> its mean over the candidates that it chooses on held-out examples."""
        stats = self.stage.upstream_stats("04_train")
        rankers = [name for name, spec in self.config.models.items() if spec.mode == "ranker"]
        return {name: terms for name in rankers if (terms := stats[name]["held_out"].get("terms"))}

    def _load(self, fits):
        """The first model of the config that fits, None if there is none."""
        name = next((n for n, s in self.config.models.items() if fits(s)), None)
        if name is None:
            return None
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
        return Windows(held_out, self.context, self.tokenizer.pad_token_id).tiled(), words

    def start(self):
        """((B, T) ids, (B, T) free): masks everywhere, or the prompt or text of the config with its [MASK]s."""
        row = starting_ids(self.config.sampler, self.tokenizer, self.context)
        ids = np.tile(row, (self.config.sampler.num_samples, 1))
        return ids, ids == self.tokenizer.mask_token_id

    def measure(self, ids, free):
        return Measured.of(ids, free, self)

    def best_of(self, ids, free, number) -> list[dict]:
        """What choosing the best of N samples gains, by each scorer; nothing without sampler.best_of or a measure."""
        settings = self.config.sampler
        if settings.best_of == 1 or self.reference is None:
            return []
        policy, nfe = settings.best_of_policy, max(settings.nfe)
        return best_of(self, ids, free, number, policy, nfe, settings.best_of)

    def baselines(self, ids, free, number) -> list[dict]:
        """The causal model's own samples, and real text of the same length."""
        rows = []
        special = sorted(set(self.tokenizer.all_special_ids))
        if self.autoregressive is not None:
            begin = time.perf_counter()
            made = sample_autoregressively(
                self.autoregressive, ids, free, number, self.tokenizer.cls_token_id, special,
                self.config.sampler, self.runtime, self.config.seed,
            )  # fmt: skip
            seconds = time.perf_counter() - begin
            measured = self.measure(made.ids, free)
            row = describe(
                "autoregressive",
                made.nfe,
                made.nfe,
                seconds,
                measured.texts,
                self.words,
                measured.nll,
                measured.size,
            )
            rows.append(row | measured.means())
        # As many texts as samples: the entropy of n-grams grows with their number
        real = self.real_text(len(ids))[:, : ids.shape[1]]
        if len(real):
            measured = self.measure(real, np.ones_like(real, bool))
            row = describe("real text", 0, 0, 0.0, measured.texts, self.words, measured.nll, measured.size)
            rows.append(row | measured.means())
        return rows

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
        if chosen:
            say(best_of_table(chosen) + "\n")


class Collected:
    """Rows of samples and traces, policy by policy."""

    def __init__(self) -> None:
        self.policies: list[dict] = []
        self._samples: list = []
        self._trace: list = []

    def add_samples(self, policy: str, nfe: int, ids, free, measured) -> None:
        for i, row in enumerate(ids):
            self._samples.append(
                {
                    "policy": policy,
                    "nfe": nfe,
                    "sample_id": i,
                    "text": measured.texts[i],
                    "token_ids": row.tolist(),
                    "given": (~free[i]).tolist(),
                    "reference_nll": None
                    if measured.nll is None
                    else float(measured.nll[i] / max(free[i].sum(), 1)),
                    "critic_error": float(measured.errors[i][free[i]].mean()),
                    "token_error": measured.errors[i].tolist(),
                    "judge_score": None if measured.judged is None else float(measured.judged[i]),
                }
            )

    def add_trace(self, policy: str, nfe: int, samples) -> None:
        for number, round_ in enumerate(samples.rounds):
            for i in range(len(round_.ids)):
                tokens, events = round_.ids[i].tolist(), round_.events[i].tolist()
                key = {"policy": policy, "nfe": nfe, "sample_id": i, "iteration": number}
                self._trace.append(key | {"token_ids": tokens, "events": events})

    def samples(self):
        return as_table(self._samples, schema.SAMPLES)

    def trace(self):
        return as_table(self._trace, schema.TRACE)


def as_table(rows: list[dict], table_schema: schema.TableSchema) -> pa.Table:
    return pa.Table.from_pylist(rows, table_schema.arrow)
