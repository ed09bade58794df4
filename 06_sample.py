"""
06: sample text under every re-masking policy at equal cost, measure it, and write the report.

Unconditional samples by default; sampler.prompt continues a text, sampler.infill fills its [MASK]s. Every forward
pass of the trunk is counted (NFE), also those of the critic. The quality is measured by a causal model that learned
from a split of its own.

With --score FILE it scores a text of yours instead: a number per token and for the whole from critic, inspector,
reference model and judge.

reads   01_prepare_dataset: examples, tokenizer; 04_train: judges and baselines; 05_train_critic: generator and critic
writes  samples.parquet, trace.parquet, metrics.json, report.html; or scores.parquet, scores.html

python 06_sample.py --quick_test --run_dir outputs/demo
python 06_sample.py --quick_test --run_dir outputs/demo --set sampler.prompt="The value of " --overwrite
python 06_sample.py --quick_test --run_dir outputs/demo --score my_text.txt
"""

import time
from pathlib import Path

from lib.artifacts import RunArgs, Stage
from lib.cli import run_stage
from lib.config import Config
from lib.log import Progress, say

TRACED_SAMPLES = 2


READS = (
    "00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train", "05_train_critic",
)  # fmt: skip


def main(config: Config, args: RunArgs) -> None:
    if args.score is not None:
        score_text(config, args, args.score)
    else:
        sample(config, args)


def score_text(config: Config, args: RunArgs, file: Path) -> None:
    """Every token of a user's text, scored by the models of a finished run."""
    from lib import durable, schema
    from lib.errors import BadData
    from lib.report.scores import HEAD, cells, documents_of, score, scores_page, windows
    from lib.report.table import aligned
    from lib.runtime import Runtime
    from lib.tasks.text.check import Document, check

    data = config.data.model_copy(update={"path": str(file), "min_document_characters": 1})
    found = list(check(config.model_copy(update={"data": data})))
    texts = [(d.document_id, d.content) for d in found if isinstance(d, Document)]
    faults = [f for f in found if not isinstance(f, Document)]
    for fault in faults:
        say(f"{fault.source} {fault.location}: {fault.kind}: {fault.found}; {fault.advice}")
    if not texts:
        raise BadData(f"--score {file}: there is no text to score")
    name = "".join(c if c.isalnum() else "_" for c in file.stem)
    uses = ("seed", "device", "precision", "sampler")
    with Stage(
        f"06_score_{name}.py", config, args, uses=uses, reads=READS, files=[file], restarts=True
    ) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config)
        stage.environment |= runtime.fence()
        bench = Bench(stage, config, runtime)
        rows = score(list(windows(texts, bench.tokenizer, bench.context)), bench)
        stage.write("scores", pa_table(rows, schema.SCORES), schema.SCORES)
        page = scores_page(rows, bench.token_text, file.name)
        durable.write_text(stage.folder / "scores.html", page)
        stage.add_file("page", stage.folder / "scores.html")
        lines = documents_of(rows)
        stage.stats["documents"] = lines[:1000]
        say("\n" + aligned([HEAD, *(cells(line) for line in lines[:20])]))
        say(
            f"\nper token: {stage.shown(stage.folder / 'scores.parquet')}, as a picture: scores.html beside it"
        )


def sample(config: Config, args: RunArgs) -> None:
    import numpy as np

    from lib import durable
    from lib.diffusion.policies import POLICIES
    from lib.report.gather import gather
    from lib.report.html import build_report
    from lib.report.quality import describe
    from lib.report.table import best_of_table, sampling_table
    from lib.runtime import Runtime

    uses = ("seed", "device", "precision", "sampler")
    with Stage(__file__, config, args, uses=uses, reads=READS) as stage:
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
        chosen = bench.best_of(ids, free, number)

        # Write
        from lib import schema

        stage.write("samples", table.samples(), schema.SAMPLES)
        stage.write("trace", table.trace(), schema.TRACE)
        stage.stats["policies"] = table.policies
        metrics = {
            "policies": table.policies,
            "results": bench.results,
            "winners": bench.winners,
            "best_of": chosen,
        }
        stage.write_json("metrics", metrics)
        data = gather(
            stage, config, table.samples(), table.trace(), table.policies, bench.results, bench.tokenizer
        )
        durable.write_text(stage.folder / "report.html", build_report(data))
        stage.add_file("report", stage.folder / "report.html")
        bench.say_results(table.policies, sampling_table)
        if chosen:
            say(best_of_table(chosen) + "\n")
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
        from lib.models.build import load_model

        name = next((n for n, s in self.config.models.items() if fits(s)), None)
        if name is None:
            return None
        return load_model(self.stage.folder_of("04_train", f"{name}/best_model")).to(self.runtime.device)

    def token_text(self, i: int) -> str:
        """A token id as its characters, special ones by name."""
        from lib.tokenization import decode_batch

        special = i in set(self.tokenizer.all_special_ids)
        return self.tokenizer.convert_ids_to_tokens(i) if special else decode_batch(self.tokenizer, [[i]])[0]

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

    def best_of(self, ids, free, number) -> list[dict]:
        """What choosing the best of N samples gains, by each scorer; nothing without sampler.best_of or a measure."""
        from lib.report.best_of import best_of

        settings = self.config.sampler
        if settings.best_of == 1 or self.reference is None:
            return []
        policy, nfe = settings.best_of_policy, max(settings.nfe)
        return best_of(self, ids, free, number, policy, nfe, settings.best_of)

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
        from lib import schema

        return pa_table(self._samples, schema.SAMPLES)

    def trace(self):
        from lib import schema

        return pa_table(self._trace, schema.TRACE)


def pa_table(rows: list[dict], table_schema):
    import pyarrow as pa

    return pa.Table.from_pylist(rows, table_schema.arrow)


if __name__ == "__main__":
    run_stage(main, __doc__, with_score=True)
