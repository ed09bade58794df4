"""
06: sample text under every re-masking policy at equal cost, measure it, and write the report of the run.

Every policy starts from the same masked texts and gets the same budget of forward passes (NFE); those of the critic
count too. The default is unconditional text. sampler.prompt continues a text, sampler.infill fills its [MASK] tokens,
sampler.infill_file fills a table of texts. An independent causal model measures the samples.

With critic.method ppo or none, the stage ranks the candidates of held_out and test instead, by every ranker, policy and
baseline, and answers with the best ones. With labels beside the text, it compares detectors; none then means: only that.

With --rank FILE it ranks the candidates of a file of yours, in any layout of task pools; rewards are not needed.

With --score FILE it scores a text of yours: per token by the critic, the inspector and the reference model, as a whole
by the judge. Its verdict uses thresholds that the selection split chose.

reads   01_prepare_dataset: examples, tokenizer; 04_train: judges and baselines; 05_train_critic: generator and critic
writes  samples/ and trace/, tables in parts; metrics.json, report.html
        of rankers: answers.parquet, ranked.parquet, metrics.json, report.html
        with --score, --rank: a table and a page in a folder of its own

python 06_sample.py --quick_test --run_dir outputs/demo
python 06_sample.py --quick_test --run_dir outputs/demo --set sampler.prompt="The value of " --overwrite
python 06_sample.py --quick_test --run_dir outputs/demo --score my_text.txt
python 06_sample.py --quick_test --run_dir outputs/demo --rank my_candidates.jsonl
"""

from pathlib import Path

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.log import Progress, say
from lib.runs import RunArgs, printable, score_stage

READS = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards")


def main(config: Config, args: RunArgs) -> None:
    if args.score is not None:
        score_text(config, args, args.score)
    elif args.rank is not None:
        rank_file(config, args, args.rank)
    elif config.only_detects:
        detect(config, args)
    elif config.critic.method == "token_critic":
        sample(config, args)
    else:
        rank(config, args)


def sample(config: Config, args: RunArgs) -> None:
    """Sample by every policy, measure the samples, and write the report."""
    from lib import outside
    from lib.evaluation.collect import collect_samples
    from lib.evaluation.detection_results import detection_results
    from lib.evaluation.run_models import units_of_roles
    from lib.evaluation.sample_evaluator import SampleEvaluator
    from lib.evaluation.sample_parts import TABLES, SampleWork, results_of
    from lib.evaluation.starts import check_starts_of, sampling_starts
    from lib.report.detection import detection_tables
    from lib.report.html import build_report
    from lib.report.table import samples_summary
    from lib.runtime import Runtime

    reads = (*READS, *units_of_roles(config))
    uses = ("seed", "device", "precision", "sampler", "data.label_key", "data.spans_key")
    files, check = outside.of_samples(config), check_starts_of
    with Stage(
        __file__, config, args, uses=uses, reads=reads, files=files, restarts=True, check=check
    ) as stage:
        if stage.finished:
            return

        # 1. Load the models, and make the masked texts that all policies start from
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        evaluator = SampleEvaluator(stage, config, runtime)
        starts = sampling_starts(config.sampler, evaluator.tokenizer, evaluator.context)

        # 2. Sample by every policy at every budget of forward passes: a part of the tables for each. One more part compares
        #    with the causal model, with real text, and with the best of N samples
        plan = [(policy, nfe) for nfe in config.sampler.nfe for policy in config.sampler.policies]
        parts = stage.parts(TABLES)
        work = SampleWork(evaluator, starts, plan, parts)
        made = stage.make_parts(parts, work, len(work), "policies", work.num_bytes)
        if made is None:
            return
        stage.add_parts(made)

        # 3. With labels of the user: compare the judge with other detectors of synthetic documents
        detection = detection_results(evaluator) if config.data.has_labels else None

        # 4. Write the metrics and the report
        results = results_of(made)
        stage.stats["policies"] = results.policies
        metrics = {
            "policies": results.policies,
            "results": evaluator.results,
            "winners": evaluator.ranker_choices,
            "best_of": results.best_of,
            "detection": detection,
        }
        stage.write_json("metrics", metrics)
        data = collect_samples(stage, config, evaluator, results, detection)
        stage.write_page("report", "report.html", build_report(data))
        say(samples_summary(metrics))
        if detection is not None:
            say(f"{detection_tables(detection)}\n")
        say(f"report: {stage.display_path(stage.folder / 'report.html')}")


def detect(config: Config, args: RunArgs) -> None:
    """Compare the judge with other detectors of synthetic documents, and write the report. Nothing is sampled."""
    from lib.evaluation.collect import collect_samples
    from lib.evaluation.detection_results import detection_results
    from lib.evaluation.run_models import RunModels, units_of_roles
    from lib.report.detection import detection_tables
    from lib.report.html import build_report
    from lib.runtime import Runtime

    uses = ("seed", "device", "precision", "data.label_key", "data.spans_key")
    reads = (*READS, *units_of_roles(config))
    with Stage(__file__, config, args, uses=uses, reads=reads, restarts=True) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        models = RunModels(stage, config, runtime)
        detection = detection_results(models)
        stage.write_json("metrics", {"results": models.results, "detection": detection})
        data = collect_samples(stage, config, models, None, detection)
        stage.write_page("report", "report.html", build_report(data))
        if detection is not None:
            say(f"\n{detection_tables(detection)}\n")
        say(f"report: {stage.display_path(stage.folder / 'report.html')}")


def rank(config: Config, args: RunArgs) -> None:
    """Rank the pools by every ranker, policy and baseline, and write the report."""
    from lib import outside, schema
    from lib.evaluation.collect import collect_ranking
    from lib.evaluation.ranking_evaluator import RankingEvaluator, units_of_rankers
    from lib.report.ranking import ranking_page, ranking_table
    from lib.runtime import Runtime

    reads = (*READS, *units_of_rankers(config), "05_train_critic")
    uses, files = ("seed", "device", "precision", "ranker", "critic"), outside.of_policies(config)
    with Stage(__file__, config, args, uses=uses, reads=reads, files=files) as stage:
        if stage.finished:
            return

        # 1. Read the pools of the splits held_out and test
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        evaluator = RankingEvaluator(stage, config, runtime)

        # 2. Score the same pools by every model, then by the baselines
        rankers = list(evaluator.rankers())
        with Progress("rankers", len(rankers)) as progress:
            for done, ranker in enumerate(rankers, start=1):
                evaluator.score(ranker)
                progress.update(done)
        evaluator.score_baselines()

        # 3. Write the tables, the metrics and the report
        stage.write("ranked", evaluator.ranked(), schema.RANKED)
        stage.write("answers", evaluator.answers(), schema.ANSWERS)
        metrics = {split: evaluator.measured(split) for split in evaluator.tables}
        stage.write_json("metrics", metrics)
        stage.stats |= metrics | {"shortened": evaluator.shortened}
        page = ranking_page(collect_ranking(stage, config, evaluator))
        stage.write_page("report", "report.html", page)
        for split, pools in evaluator.tables.items():
            say(f"\n{split}: {len(pools):,} pools\n{ranking_table(evaluator.summary(split))}")
        say(f"\nreport: {stage.display_path(stage.folder / 'report.html')}")


def rank_file(config: Config, args: RunArgs, file: Path) -> None:
    """Rank a user's candidates by a model of a finished run."""
    from lib import schema
    from lib.errors import BadData
    from lib.evaluation.ranked_file import open_scorer, read_user_pools, reads_of, score_pools
    from lib.report.user_pools import ranking_file_page, ranking_summary
    from lib.runs import RANK
    from lib.runtime import Runtime

    # 1. Read the pools, and report what cannot be read
    with read_user_pools(config, file) as user:
        for line in user.problem_lines():
            say(line)
        if not user.num_pools:
            raise BadData(f"--rank {file}: there is no pool to rank")
        uses, script = ("seed", "device", "precision", "ranker", "pools"), f"{score_stage(file, RANK)}.py"
        reads, files, ignores = reads_of(config), user.files, ("pools",)
        with Stage(
            script, config, args, uses=uses, reads=reads, files=files, restarts=True, ignores=ignores
        ) as stage:
            if stage.finished:
                return

            # 2. Score the pools, block by block
            runtime = Runtime.detect(config, stage.code)
            stage.environment |= runtime.fingerprint()
            scorer = open_scorer(stage, config, runtime)
            ranking = stage.writer("ranking", schema.RANKING)
            with ranking as writer, Progress("pools", user.num_pools) as progress:
                for table in score_pools(user, scorer):
                    writer.write(table)
                    progress.update(user.done)

            # 3. Write the page, and the metrics if the file has rewards
            stage.stats |= {"ranked": printable(file), "scorer": scorer.name, "pools": user.num_pools}
            if metrics := user.metrics(config.seed):
                stage.write_json("metrics", metrics)
                stage.stats["metrics"] = metrics
            if not_measured := user.not_measured():
                stage.stats["not_measured"] = not_measured
                say(f"not measured: {not_measured}")
            page = ranking_file_page(user.displayed, metrics, printable(file.name), scorer.name)
            stage.write_page("page", "ranking.html", page)
            say(f"\n{ranking_summary(user.displayed, metrics)}\n")
            say(f"all scores:         {stage.display_path(stage.folder / 'ranking.parquet')}")
            say(f"pools as a page:    {stage.display_path(stage.folder / 'ranking.html')}")


def score_text(config: Config, args: RunArgs, file: Path) -> None:
    """Score a user's text by the models of a finished run."""
    import pyarrow as pa

    from lib import schema
    from lib.evaluation import text_scores, user_texts
    from lib.evaluation.run_models import units_of_roles
    from lib.evaluation.sample_evaluator import open_models
    from lib.report.detection import rates_in_words, thresholds_in_words
    from lib.report.text_scores import MAX_LINES, scores_page, scores_table
    from lib.runtime import Runtime

    # 1. Read the text, and report what cannot be read
    user = user_texts.read_user_texts(config, file)
    for problem in user.problems:
        say(f"{problem.source} {problem.location}: {problem.kind}: {problem.found}; {problem.advice}")
    uses, script = ("seed", "device", "precision", "sampler", "data"), f"{score_stage(file)}.py"
    reads, ignores = (*READS, *units_of_roles(config)), user_texts.IGNORED
    with Stage(
        script, config, args, uses=uses, reads=reads, files=user.files, restarts=True, ignores=ignores
    ) as stage:
        if stage.finished:
            return

        # 2. Load the models, and cut the text into windows that all of them can read
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        evaluator = open_models(stage, config, runtime)
        judge, parts = evaluator.judge_figures, text_scores.cut(user, evaluator)

        # 3. Score the text, and two known texts to compare with
        rows = text_scores.score(parts, evaluator)
        known_rows = text_scores.score(text_scores.known_texts(evaluator), evaluator)
        documents, known = text_scores.documents_of(rows, judge), text_scores.documents_of(known_rows)
        words = thresholds_in_words(judge["detection"]) if "detection" in judge else []

        # 4. Write the table and the page
        stage.write("scores", pa.Table.from_pylist(rows, schema.SCORES.arrow), schema.SCORES)
        page = scores_page(rows, documents, known, evaluator.token_text, printable(file.name), words)
        stage.write_page("page", "scores.html", page)
        stage.stats |= {"scored": printable(file), "documents": documents[:1000], "known": known}
        say("\n".join(["", scores_table(documents[:MAX_LINES] + known), "", *words]))
        if words:
            flagged = sum(document["alarm_at"] is not None for document in documents)
            say(f"documents above a threshold: {flagged:,} of {len(documents):,}")
        if words and user.synthetic:
            rates = text_scores.measured_rates(documents, user.synthetic, judge["detection"], user.groups)
            stage.stats["by_labels"] = rates
            say("\n".join(rates_in_words(rates)))
        say(f"\nscores of every token: {stage.display_path(stage.folder / 'scores.parquet')}")
        say(f"the same as a page:    {stage.display_path(stage.folder / 'scores.html')}")


if __name__ == "__main__":
    run_stage(main, __doc__, with_score=True)
