"""
06: sample text under every re-masking policy at equal cost, or rank pools; measure it, and write the report.

Unconditional samples by default; sampler.prompt continues a text, sampler.infill fills its [MASK]s, sampler.infill_file
those of a table of texts. Every forward pass of the backbone is counted (NFE), also those of the critic. The quality is
measured by a causal model that learned from a split of its own.

With --score FILE it scores a text of yours instead: a number per token and for the whole from critic, inspector,
reference model and judge.

After critic.method ppo it ranks the pools of the held-out and the test split instead, by every ranker and policy beside
the baselines, and answers each question with the winner.

reads   01_prepare_dataset: examples, tokenizer; 04_train: judges and baselines; 05_train_critic: generator and critic
writes  samples.parquet, trace.parquet, metrics.json, report.html; or scores.parquet, scores.html; or answers.parquet,
        ranked.parquet, metrics.json, report.html

python 06_sample.py --quick_test --run_dir outputs/demo
python 06_sample.py --quick_test --run_dir outputs/demo --set sampler.prompt="The value of " --overwrite
python 06_sample.py --quick_test --run_dir outputs/demo --score my_text.txt
"""

import os
from pathlib import Path

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.log import Progress, say
from lib.runs import RunArgs, printable, score_stage

READS = (
    "00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train", "05_train_critic",
)  # fmt: skip


def main(config: Config, args: RunArgs) -> None:
    if args.score is not None:
        score_text(config, args, args.score)
    elif config.critic.method == "ppo":
        rank(config, args)
    else:
        sample(config, args)


def score_text(config: Config, args: RunArgs, file: Path) -> None:
    """Every token of a user's text, scored by the models of a finished run."""
    from lib import durable, schema
    from lib.errors import BadConfig, BadData, MissingInput, RemaskError
    from lib.evaluation.sample_evaluator import SampleEvaluator, as_table
    from lib.evaluation.text_scores import HEAD, cells, documents_of, known_texts, score, scores_page, windows
    from lib.report.table import aligned
    from lib.runtime import Runtime
    from lib.tasks import Document, get_task

    # Whatever the run's task, this is a text; and the least amounts that training needs do not count here
    small = {
        "min_document_characters": 1,
        "passage_characters": 1,
        "split": "contiguous",
        "fractions": {"train": 1.0},
        "deduplicate": "none",
    }
    if config.critic.method == "ppo":
        raise BadConfig(
            "--score reads a text token by token, and critic.method: ppo trains no model that does"
        )
    if not file.exists():
        raise MissingInput(f"--score {file}: there is no such file or folder")
    path = (
        os.path.join(".", file) if str(file).startswith("builtin") else str(file)
    )  # no name of shipped text
    reading = config.model_copy(update={"data": config.data.model_copy(update={"path": path, **small})})
    try:
        files = get_task("text").sources(reading)
        found = list(get_task("text").check(reading))
    except RemaskError as error:  # the task speaks of the setting, the user gave the flag
        raise type(error)(str(error).replace("data.path", "--score")) from None
    texts = [(d.document_id, d.content) for d in found if isinstance(d, Document)]
    faults = [f for f in found if not isinstance(f, Document) and f.kind != "too little text"]
    for fault in faults:
        say(f"{fault.source} {fault.location}: {fault.kind}: {fault.found}; {fault.advice}")
    if not texts:
        raise BadData(f"--score {file}: there is no text to score")
    uses = ("seed", "device", "precision", "sampler", "data")
    with Stage(
        f"{score_stage(file)}.py",
        config,
        args,
        uses=uses,
        reads=READS,
        files=files,
        restarts=True,
        ignores=("data.text_key", "data.id_key", "data.drop"),
    ) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        evaluator = SampleEvaluator(stage, config, runtime)
        parts = list(windows(texts, evaluator.tokenizer, evaluator.narrowest, config.tokenizer.unknown))
        strange = sum(int((part.ids == evaluator.tokenizer.unk_token_id).sum()) for part in parts)
        if strange:
            say(f"{strange:,} tokens of {file} are outside the run's vocabulary and stand as [UNK]")
        longer = sum(part.number == 1 for part in parts)
        if longer:
            say(
                f"{longer:,} of {len(texts):,} texts have more than {evaluator.narrowest} tokens: all models, the judge too, read "
                "them in consecutive windows of that length, and figures of a whole text are means over its tokens"
            )
        rows = score(parts, evaluator)
        stage.write("scores", as_table(rows, schema.SCORES), schema.SCORES)
        known = documents_of(score(known_texts(evaluator), evaluator))
        lines = documents_of(rows)
        page = scores_page(rows, lines, known, evaluator.token_text, printable(file.name))
        durable.write_text(stage.folder / "scores.html", page)
        stage.add_file("page", stage.folder / "scores.html")
        stage.stats |= {"scored": printable(file), "documents": lines[:1000], "known": known}
        say("\n" + aligned([HEAD, *(cells(line) for line in lines[:20] + known)]))
        say(
            f"\nper token: {stage.display_path(stage.folder / 'scores.parquet')}, as a picture: scores.html beside it"
        )


def sample(config: Config, args: RunArgs) -> None:
    from lib import durable, outside
    from lib.evaluation.collect import collect
    from lib.evaluation.sample_evaluator import Collected, SampleEvaluator, context_of, starts_of
    from lib.report.html import build_report
    from lib.runtime import Runtime
    from lib.tokenization import load_tokenizer

    def check(stage: Stage) -> None:
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        starts_of(config.sampler, tokenizer, context_of(stage))

    uses = ("seed", "device", "precision", "sampler")
    files = outside.of_samples(config)
    with Stage(
        __file__, config, args, uses=uses, reads=READS, files=files, restarts=True, check=check
    ) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        evaluator = SampleEvaluator(stage, config, runtime)

        # Every policy writes the same numbered samples from the same start, at every budget of passes
        starts = starts_of(config.sampler, evaluator.tokenizer, evaluator.context)
        table = Collected()
        plan = [(name, nfe) for nfe in config.sampler.nfe for name in config.sampler.policies]
        with Progress("samples", len(plan)) as progress:
            for done, (name, nfe) in enumerate(plan):
                evaluator.write(starts, name, nfe, table)
                progress.update(done + 1)
        table.policies += evaluator.baselines(starts)
        chosen = evaluator.best_of(starts, table)

        # Write
        from lib import schema

        stage.write("samples", table.samples(), schema.SAMPLES)
        stage.write("trace", table.trace(), schema.TRACE)
        stage.stats["policies"] = table.policies
        metrics = {
            "policies": table.policies,
            "results": evaluator.results,
            "winners": evaluator.winners,
            "best_of": chosen,
        }
        stage.write_json("metrics", metrics)
        data = collect(stage, config, table.samples(), table.trace(), table.policies, chosen, evaluator)
        durable.write_text(stage.folder / "report.html", build_report(data))
        stage.add_file("report", stage.folder / "report.html")
        evaluator.say_results(table.policies, chosen)
        say(f"report: {stage.display_path(stage.folder / 'report.html')}")


def rank(config: Config, args: RunArgs) -> None:
    from lib import durable, outside, schema
    from lib.evaluation.ranking_evaluator import RankingEvaluator
    from lib.report.ranking import ranking_table
    from lib.runtime import Runtime

    uses, files = ("seed", "device", "precision", "ranker"), outside.of_policies(config)
    with Stage(__file__, config, args, uses=uses, reads=READS, files=files) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        evaluator = RankingEvaluator(stage, config, runtime)

        # Everyone scores the same pools
        rankers = list(evaluator.models())
        with Progress("rankers", len(rankers)) as progress:
            for done, (name, where, blind) in enumerate(rankers):
                evaluator.score(name, where, blind)
                progress.update(done + 1)
        evaluator.score_simply()

        # Write
        stage.write("ranked", evaluator.ranked(), schema.RANKED)
        stage.write("answers", evaluator.answers(), schema.ANSWERS)
        metrics = {split: evaluator.measured(split) for split in evaluator.tables}
        stage.write_json("metrics", metrics)
        stage.stats |= metrics | {"shortened": evaluator.shortened}
        durable.write_text(stage.folder / "report.html", evaluator.page())
        stage.add_file("report", stage.folder / "report.html")
        for split in evaluator.tables:
            say(f"\n{split}: {len(evaluator.tables[split]):,} pools\n{ranking_table(evaluator.table(split))}")
        say(f"\nreport: {stage.display_path(stage.folder / 'report.html')}")


if __name__ == "__main__":
    run_stage(main, __doc__, with_score=True)
