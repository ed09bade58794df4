"""
06: sample text under every re-masking policy at equal cost, measure it, and write the report.

Unconditional samples by default; sampler.prompt continues a text, sampler.infill fills its [MASK]s. Every forward
pass of the trunk is counted (NFE), also those of the critic. The quality is measured by a causal model that learned
from a split of its own.

reads   01_prepare_dataset: examples, tokenizer; 04_train: judges and baselines; 05_train_critic: generator and critic
writes  samples.parquet, trace.parquet, metrics.json, report.html

python 06_sample.py --quick_test --run_dir outputs/demo
python 06_sample.py --quick_test --run_dir outputs/demo --set sampler.prompt="The value of " --overwrite
"""

import time

from lib.artifacts import RunArgs, Stage
from lib.cli import run_stage
from lib.config import Config
from lib.log import Progress, say

TRACED_SAMPLES = 2


def main(config: Config, args: RunArgs) -> None:
    import numpy as np

    from lib import durable
    from lib.diffusion.policies import POLICIES
    from lib.report.gather import gather
    from lib.report.html import build_report
    from lib.report.quality import describe
    from lib.report.table import sampling_table
    from lib.runtime import Runtime

    reads = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train", "05_train_critic")  # fmt: skip
    uses = ("seed", "device", "precision", "sampler")
    with Stage(__file__, config, args, uses=uses, reads=reads) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config)
        stage.environment |= runtime.fence()
        bench = Bench(stage, config, runtime)

        # Every policy writes the same numbered samples from the same start, at every budget of passes
        ids, free = bench.start()
        number = np.arange(len(ids))
        table = Collected()
        plan = [(name, nfe) for nfe in config.sampler.nfe for name in config.sampler.policies]
        with Progress("samples", len(plan)) as progress:
            for done, (name, nfe) in enumerate(plan):
                begin = time.perf_counter()
                samples = bench.sampler.sample(ids, free, number, POLICIES[name], nfe)
                seconds = time.perf_counter() - begin
                traced = bench.sampler.sample(
                    ids[:TRACED_SAMPLES],
                    free[:TRACED_SAMPLES],
                    number[:TRACED_SAMPLES],
                    POLICIES[name],
                    nfe,
                    trace=True,
                )
                table.add_trace(name, nfe, traced)
                measured = bench.measure(samples.ids, free)
                table.add_samples(name, nfe, samples.ids, free, measured)
                row = describe(
                    name, nfe, samples.nfe, seconds, measured.texts, bench.words, measured.nll, measured.size
                )
                table.policies.append(row | measured.means())
                progress.update(done + 1)
        table.policies += bench.baselines(ids, free, number)

        # Write
        from lib import schema

        stage.write("samples", table.samples(), schema.SAMPLES)
        stage.write("trace", table.trace(), schema.TRACE)
        stage.stats["policies"] = table.policies
        metrics = {"policies": table.policies, "results": bench.results, "winners": bench.winners}
        stage.write_json("metrics", metrics)
        data = gather(
            stage, config, table.samples(), table.trace(), table.policies, bench.results, bench.tokenizer
        )
        durable.write_text(stage.folder / "report.html", build_report(data))
        stage.add_file("report", stage.folder / "report.html")
        bench.say_results(table.policies, sampling_table)
        say(f"report: {stage.shown(stage.folder / 'report.html')}")


class Bench:
    """The models that write and judge samples, loaded once."""

    def __init__(self, stage: Stage, config: Config, runtime):
        from lib.diffusion.calibration import Calibration
        from lib.diffusion.sampler import Sampler
        from lib.models.build import load_model
        from lib.tokenization import load_tokenizer

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
        self.judge = self._load(lambda s: s.mode == "sequence_scorer" and s.target_type == "score")
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
        from lib.models.build import load_model

        name = next((n for n, s in self.config.models.items() if fits(s)), None)
        if name is None:
            return None
        return load_model(self.stage.folder_of("04_train", f"{name}/best_model")).to(self.runtime.device)

    def _real_text(self):
        """Held-out windows to compare with, and the words of all other splits."""
        from lib import schema
        from lib.report.quality import lexicon
        from lib.training.data import Windows, select_split

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
        import numpy as np

        from lib.report.gather import starting_ids

        row = starting_ids(self.config.sampler, self.tokenizer, self.context)
        ids = np.tile(row, (self.config.sampler.num_samples, 1))
        return ids, ids == self.tokenizer.mask_token_id

    def measure(self, ids, free):
        from lib.report.gather import Measured

        return Measured.of(ids, free, self)

    def baselines(self, ids, free, number) -> list[dict]:
        """The causal model's own samples, and real text of the same length."""
        import numpy as np

        from lib.diffusion.autoregressive import sample_autoregressively
        from lib.randomness import permutation
        from lib.report.quality import describe

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
        some = permutation(self.config.seed, "real text", 0, self.real.count)
        real, valid = self.real.batch(some, np.zeros(len(some)))
        real = real[valid.all(1)][: len(ids), : ids.shape[1]]
        if len(real):
            measured = self.measure(real, np.ones_like(real, bool))
            row = describe("real text", 0, 0, 0.0, measured.texts, self.words, measured.nll, measured.size)
            rows.append(row | measured.means())
        return rows

    def say_results(self, policies, sampling_table) -> None:
        from lib.report.table import results_table, winners_table

        say("\n" + results_table(self.results))
        for name, terms in self.winners.items():
            say("\n" + winners_table(name, terms))
        say("\n" + sampling_table(policies) + "\n")


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
        return _table(self._samples, "SAMPLES")

    def trace(self):
        return _table(self._trace, "TRACE")


def _table(rows: list[dict], name: str):
    import pyarrow as pa

    from lib import schema

    return pa.Table.from_pylist(rows, getattr(schema, name).arrow)


if __name__ == "__main__":
    run_stage(main, __doc__)
