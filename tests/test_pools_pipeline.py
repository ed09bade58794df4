"""Task pools through all stages on pools that the project makes, --rank, the interface in Python, and sampled candidates."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib import schema
from lib.config import ROOT, load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.evaluation import ranked_file
from lib.evaluation.rank import Ranker, Ranking
from lib.evaluation.ranked_file import ranker_name, read_user_pools
from lib.ranking.metrics import ranking_metrics
from lib.report.user_pools import ranking_file_page
from lib.runs import STAGES, RunArgs, load_manifest, validate_manifest
from lib.training.pool_sampling import CandidateSampler
from lib.training.pool_table import PoolRows
from tests.conftest import run_stages, run_stages_recorded, table_of, undeclared
from tests.test_pool_choice import made_table

POOLS = ROOT / "configs" / "pools.yaml"


def config_of(*overrides: str):
    return load_config([POOLS], quick_test=True, overrides=overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a finished quick run, the settings that each stage read)."""
    folder = tmp_path_factory.mktemp("pools") / "run_001"
    return folder, run_stages_recorded(folder, config_of())


@pytest.fixture(scope="module")
def run(finished) -> Path:
    return finished[0]


def stats_of(run: Path, stage: str) -> dict:
    return (load_manifest(run / stage) or {})["stats"]


def test_every_stage_is_complete_and_reads_what_it_declares(finished):
    run, reads = finished
    for name in STAGES:
        manifest = load_manifest(run / name)
        assert manifest is not None, name
        validate_manifest(manifest)
    assert not undeclared(reads, run)
    for path, table_schema in {
        "01_prepare_dataset/examples": schema.EXAMPLES,
        "02_generate_candidates/candidates": schema.CANDIDATES,
        "02_generate_candidates/baselines": schema.BASELINES,
        "03_build_rewards/rewards": schema.REWARDS,
        "06_sample/ranked": schema.RANKED,
    }.items():
        schema.conform(pq.read_table(table_of(run, path)), table_schema)


def test_reports_have_every_baseline_and_metric_with_intervals(run):
    rows = {row["name"]: row for row in json.loads((run / "06_sample/metrics.json").read_text())["held_out"]}
    wanted = {
        "ranker",
        "random choice",
        "first candidate",
        "length",
        "candidate_linear",
        "candidate_trees",
        "overlap",
        "bm25",
    }
    assert rows.keys() == wanted
    for row in rows.values():
        for metric in ("accuracy", "map", "mrr_at_10", "ndcg_at_10", "pairwise_accuracy", "reward_ratio"):
            assert row[metric]["low"] <= row[metric]["value"] <= row[metric]["high"]
    shortcuts = {row["scorer"]: row for row in stats_of(run, "02_generate_candidates")["shortcuts"]}
    for name in ("length", "candidate_linear", "candidate_trees", "overlap", "bm25"):
        assert shortcuts[name]["accuracy"] == pytest.approx(rows[name]["accuracy"]["value"])
    assert shortcuts["first"]["accuracy"] == pytest.approx(rows["first candidate"]["accuracy"]["value"])


def test_the_scores_of_stage_06_are_those_of_the_interface_in_python(run):
    ranked = pq.read_table(run / "06_sample" / "ranked.parquet").to_pylist()
    prompts = {
        r["example_id"]: r["prompt"]
        for r in pq.read_table(table_of(run, "01_prepare_dataset/examples")).to_pylist()
    }
    ranker = Ranker.load(run)
    assert (ranker.prompt_tokens, ranker.candidate_tokens) == (96, 96)
    names = list(dict.fromkeys(r["example_id"] for r in ranked))[:12]
    pools = [[r for r in ranked if r["example_id"] == name] for name in names]
    found = ranker.rank_all([prompts[name] for name in names], [[r["text"] for r in pool] for pool in pools])
    for pool, result in zip(pools, found, strict=True):
        np.testing.assert_allclose(
            result.scores, [r["score"] for r in pool], atol=0.05
        )  # bf16 in other batches
        assert result.probabilities.sum() == pytest.approx(1) and result.best == pool[result.order[0]]["text"]
    with pytest.raises(BadData, match="has no token"):
        ranker.rank("a prompt", ["text", ""])
    with pytest.raises(MissingInput, match="neither the folder of a ranker nor a run"):
        Ranker.load(run.parent)


def rank(run: Path, file: Path, **flags) -> dict:
    importlib.import_module("06_sample").main(
        config_of(), RunArgs(run_dir=run, quick_test=True, command=("06",), rank=file, **flags)
    )
    (folder,) = [f for f in run.glob("06_rank_*") if f.name.startswith(f"06_rank_{file.stem}")]
    return {"rows": pq.read_table(folder / "ranking.parquet").to_pylist(), "folder": folder,
            "stats": stats_of(run, folder.name)}  # fmt: skip


def test_a_file_is_ranked_with_and_without_rewards(run, tmp_path, capsys):
    rows = [
        {"id": f"q{n}", "prompt": f"what is a module number {n}?", "candidates": [f"module {n}", "a <b>tag</b>", f"name {k}"]}
        for n, k in enumerate("abcdefghijkl")
    ]  # fmt: skip
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join([json.dumps(row) for row in rows] + ['{"id": "bad"}']))
    found = rank(run, plain)
    assert len(found["rows"]) == 36 and found["stats"]["pools"] == 12 and "metrics" not in found["stats"]
    assert "line 13: no candidates" in capsys.readouterr().err
    page = (found["folder"] / "ranking.html").read_text()
    assert "a &lt;b&gt;tag&lt;/b&gt;" in page and "<b>tag" not in page
    for start in range(0, 36, 3):
        pool = found["rows"][start : start + 3]
        assert [r["rank"] for r in pool] == [1, 2, 3] and pool[0]["reward"] is None
        assert sum(r["probability"] for r in pool) == pytest.approx(1)
        source = next(row for row in rows if row["id"] == pool[0]["pool_id"])
        assert all(source["candidates"][r["candidate_id"]] == r["text"] for r in pool)

    rewarded = tmp_path / "rewarded.jsonl"
    rewarded.write_text("\n".join(json.dumps(row | {"rewards": [1, 0, 0]}) for row in rows))
    found = rank(run, rewarded)
    scores, rewards = np.full((12, 3), 0.0), np.zeros((12, 3))
    for r in found["rows"]:
        scores[int(r["pool_id"][1:]), r["candidate_id"]] = r["score"]
        rewards[int(r["pool_id"][1:]), r["candidate_id"]] = r["reward"]
    expected = ranking_metrics(scores, rewards, np.ones((12, 3), bool))
    for name in ("accuracy", "map"):
        assert found["stats"]["metrics"]["ranker"][name]["value"] == pytest.approx(expected[name].mean())
    partly = tmp_path / "partly.jsonl"
    rewards = [[1, None, 0], None, *[[1, 0, 0]] * 10]
    lines = [json.dumps(row | {"rewards": r}) for row, r in zip(rows, rewards, strict=True)]
    partly.write_text(
        "\n".join(
            [
                *lines,
                json.dumps({"id": "x", "prompt": "p", "candidates": ["a", "b", "a"], "rewards": [0, 0.5, 1]}),
            ]
        )
    )
    found = rank(run, partly)
    assert found["stats"]["pools"] == 13, "rewards are not needed"
    assert (
        found["stats"]["metrics"]["ranker"]["pools"] == 10
        and "2 pools lack a reward" in found["stats"]["not_measured"]
    )
    with pytest.raises(MissingInput, match=r"--rank nowhere\.jsonl"):
        rank(run, Path("nowhere.jsonl"))


def test_a_run_of_task_text_ranks_by_its_judge(quick_run, tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = ["The value of the name is the object.", "zq xw vj qk zzx qqq wvx"]
    file.write_text(json.dumps({"id": "a", "candidates": texts}))
    config = load_config(quick_test=True)
    importlib.import_module("06_sample").main(
        config, RunArgs(run_dir=quick_run, quick_test=True, command=("06",), rank=file)
    )
    (folder,) = quick_run.glob("06_rank_texts_*")
    rows = pq.read_table(folder / "ranking.parquet").to_pylist()
    assert {r["text"] for r in rows} == set(texts) and stats_of(quick_run, folder.name)["scorer"] == "judge"
    assert all(0 <= r["score"] <= 1 for r in rows)


def test_a_ranker_that_reads_prompts_comes_before_a_blind_one():
    models = load_config([POOLS]).models
    both = {"no_prompt": models["ranker"].model_copy(update={"blind": True}), "reader": models["ranker"]}
    assert ranker_name(load_config([POOLS]).model_copy(update={"models": both})) == "reader"


@pytest.mark.slow
def test_distillation_and_pointwise_losses_train_on_what_they_can_use(tmp_path):
    """Pools with one candidate teach a pointwise loss; a teacher's scores take the place of rewards."""
    rows = []
    for n in range(60):
        size = 1 if n % 3 == 0 else 3
        rows.append({"id": f"{n}", "prompt": f"prompt {n} {n * 7}", "candidates": [f"text {n} {k}" for k in range(size)],
                     "rewards": [float(k == 0) for k in range(size)], "teacher": [3.5 - k for k in range(size)]})  # fmt: skip
    path = tmp_path / "taught.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = config_of(
        f"data.path={path}", "ranker.loss=mse", "pools.near_duplicates=null", "models.ranker.training.steps=4"
    )
    run_stages(tmp_path / "run", config, STAGES[:5])
    record = json.loads((tmp_path / "run/04_train/ranker/training_manifest.json").read_text())
    assert record["skipped_pools"]["train"] == 0 and record["skipped_pools"]["held_out"] > 0
    first = json.loads((tmp_path / "run/04_train/ranker/metrics.jsonl").read_text().splitlines()[0])
    assert (
        first["train"]["loss"] > 4
    )  # scores near 0 are far from the teacher's 1.5 to 3.5, and nearer to rewards of 0 and 1


# --- sampled candidates ----------------------------------------------------------------------------------------------------


def rows_for(count: int, width: int) -> PoolRows:
    rewards = np.zeros((count, width))
    rewards[:, 5] = 1
    texts = np.array([[f"{n}/{k}" for k in range(width)] for n in range(count)], object)
    return PoolRows(
        [f"prompt {n}" for n in range(count)], texts, np.ones((count, width), bool), rewards, rewards
    )


ONE_DRAW = np.zeros(40, int)


def test_large_pools_are_sampled_anew_in_every_epoch_and_keep_their_best():
    rows = rows_for(40, 30)
    sampler = CandidateSampler(8, None, 0, 40)
    index = np.arange(40)
    first, again, second = (sampler.sample(rows, np.full(40, e), ONE_DRAW[index], index) for e in (0, 0, 1))
    assert first.texts.shape == (40, 8) and (first.rewards.max(1) == 1).all()
    assert (first.texts == again.texts).all() and (first.texts != second.texts).any(1).all()
    some = np.array([7, 3])
    part = PoolRows(
        *([rows.prompts[i] for i in some], *(getattr(rows, name)[some] for name in rows.arrays()))
    )
    np.testing.assert_array_equal(
        sampler.sample(part, np.zeros(2, int), ONE_DRAW[some], some).texts, first.texts[some]
    )
    drawn = np.concatenate(
        [sampler.sample(rows, np.full(40, e), ONE_DRAW[index], index).texts.ravel() for e in range(60)]
    )
    counts = np.unique([int(t.split("/")[1]) for t in drawn], return_counts=True)[1]
    others = np.delete(counts, 5)
    assert counts[5] == 40 * 60 and others.min() > 0.8 * others.mean()  # each of the others is as likely


def test_hard_negatives_are_drawn_as_often_as_their_weight_says():
    rows = rows_for(200, 12)
    weight = np.zeros((2, 200, 12))
    weight[1, :, 2] = np.log(4)
    sampler = CandidateSampler(2, weight, 0, 200)  # the best one and one other
    for draw, share in enumerate((1 / 11, 4 / 14)):  # the weights of one draw say nothing about another
        of_draw = np.full(200, draw)
        drawn = [sampler.sample(rows, np.full(200, e), of_draw, np.arange(200)).texts for e in range(30)]
        others = np.array([t.split("/")[1] for t in np.concatenate(drawn).ravel() if not t.endswith("/5")])
        assert (others == "2").mean() == pytest.approx(share, abs=0.02)


def test_hard_negatives_without_sampled_candidates_are_refused():
    with pytest.raises(BadConfig, match=r"ranker.*set sampled_candidates, or hard_negatives to 0"):
        load_config(overrides=["ranker.hard_negatives=1.0"])
    load_config(overrides=["ranker.hard_negatives=1.0", "ranker.sampled_candidates=8"])


def test_a_pool_with_many_best_candidates_keeps_some_of_both():
    rows = rows_for(6, 20)
    rewards = (np.arange(20) < 15).astype(float) * np.ones((6, 1))
    rows = PoolRows(rows.prompts, rows.texts, rows.present, rewards, rewards)
    found = CandidateSampler(8, None, 0, 6).sample(rows, np.zeros(6, int), ONE_DRAW[:6], np.arange(6))
    assert (found.rewards.sum(1) == 4).all()


def test_further_best_candidates_take_only_the_places_that_others_leave():
    """And each of them is as likely. An absent candidate takes no place."""
    rows, epochs = rows_for(40, 20), 40
    place = np.arange(20) * np.ones((40, 1), int)
    rows = replace(rows, present=place > 0, rewards=(place > 2) * 1.0)
    sampler, index = CandidateSampler(8, None, 0, 40), np.arange(40)
    drawn = [sampler.sample(rows, np.full(40, e), ONE_DRAW, index) for e in range(epochs)]
    assert all(found.present.all() for found in drawn)
    of = [int(text.split("/")[1]) for found in drawn for text in found.texts.ravel()]
    counts = np.bincount(of, minlength=20)
    assert counts[:3].tolist() == [0, 40 * epochs, 40 * epochs]  # absent, and the two others
    assert counts[3:].min() > 0.85 * counts[3:].mean()


def test_weights_of_hard_negatives_are_the_scores_of_bm25_within_a_pool():
    """From 0 to `hard_negatives`. An absent candidate scores 0 in BM25, and is no lowest score."""
    texts = np.array(
        [["red apple", "red car", "red apple tart", ""], ["sky", "sea blue", "blue", "boat"]], object
    )
    table = replace(
        made_table(count=2), prompts=["red apple tart", "blue sea"], texts=texts, present=texts != ""
    )
    settings = load_config(quick_test=True).ranker
    made = {"sampled_candidates": 3, "hard_negatives": 2.5}
    sampler = CandidateSampler.of(settings.model_copy(update=made), [table], 0)
    assert sampler is not None and sampler.log_weight is not None
    (weights,) = sampler.log_weight
    assert weights[0, [2, 1]].tolist() == pytest.approx([2.5, 0]) and 0 < weights[0, 0] < 2.5
    assert weights[1, [1, 0, 3]].tolist() == pytest.approx([2.5, 0, 0]) and 0 < weights[1, 2] < 2.5
    for changes in ({"sampled_candidates": 4}, {"sampled_candidates": None}):
        assert CandidateSampler.of(settings.model_copy(update=made | changes), [table], 0) is None


def test_a_file_is_read_whatever_the_task(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("query,passage\nwho?,me\nwho?,you\n")
    with read_user_pools(load_config(quick_test=True), file) as user:
        assert user.num_pools == 1 and not user.problems


def test_a_file_to_rank_may_have_the_usual_names_in_place_of_the_runs_own(tmp_path):
    config = load_config(
        quick_test=True, overrides=["pools.keys={prompt: ask, candidates: answers, rewards: marks}"]
    )
    for names in (("ask", "answers"), ("prompt", "candidates")):
        file = tmp_path / f"{names[0]}.jsonl"
        file.write_text(json.dumps(dict(zip(names, ("which?", ["this", "that"]), strict=True))))
        with read_user_pools(config, file) as user:
            assert user.num_pools == 1 and not user.problems


def test_only_pools_with_different_rewards_in_range_are_measured(tmp_path):
    file = tmp_path / "rewards.jsonl"
    rewards = {"a": [1, 0], "b": [1, 1], "c": [12.3, 0], "d": [1, None], "e": [1], "f": [None, None]}
    rows = [{"prompt": f"which of {name}?", "candidate": f"{name}{k}", "reward": reward}
            for name, pool in rewards.items() for k, reward in enumerate(pool)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    with read_user_pools(load_config(quick_test=True), file) as user:
        assert user.num_pools == 6 and not user.problems
        for block in user.blocks():
            user.measure(block, [np.arange(len(entries), 0.0, -1) for _, entries in block], "mine")
        assert set(user.metrics(0)) == {"mine", "random choice", "bm25"}
        assert user.done == 6 and {m["pools"] for m in user.metrics(0).values()} == {1}
        assert (user.undecided, user.incomplete) == (2, 2)
        assert user.not_measured() == (
            "2 pools have equal rewards; 2 pools lack a reward, or have contradicting ones or one outside pools.reward_range (0 to 1)"
        )


def test_the_page_of_a_file_says_what_bm25_counts_over_and_has_no_interval_of_one_pool():
    row = {"accuracy": {"value": 0.5, "low": math.nan, "high": None}, "pools": 1}
    html = ranking_file_page([], {"bm25": row}, "file", "ranker")
    assert "bm25 counts its word frequencies over blocks of pools" in html and "0.500 (-)" in html


def test_the_best_candidate_has_the_highest_score_and_the_largest_share():
    ranking = Ranking(["a", "b", "c"], np.array([0.0, math.log(3), 0.0]))
    assert ranking.order == [1, 0, 2] and ranking.best == "b"  # ties stay in order
    np.testing.assert_allclose(ranking.probabilities, [0.2, 0.6, 0.2])


@pytest.mark.parametrize(("judge", "best"), [(None, 1), (object(), 0)])
def test_without_a_judge_the_candidate_with_fewest_likely_errors_is_best(monkeypatch, judge, best):
    value = {"0/0": 0.9, "0/1": 0.1}
    monkeypatch.setattr(ranked_file, "windows_for", lambda named, _: ([name for name, _ in named], 0))
    monkeypatch.setattr(ranked_file, "score", lambda parts, _: parts)
    rows = [{"document_id": n, "critic_error_mean": v, "judge_score": v} for n, v in value.items()]
    monkeypatch.setattr(ranked_file, "documents_of", lambda scored, _: rows)
    evaluator: Any = SimpleNamespace(judge=judge, judge_figures={})
    assert ranked_file.TextScorer(evaluator).scores([""], [["a", "b"]])[0].argmax() == best


@pytest.mark.parametrize(("relevant", "precision"), [(0.5, 1 / 3), (0.4, (1 + 2 / 3) / 2)])
def test_rewards_of_a_ranked_file_are_mapped_as_in_training(tmp_path, relevant, precision):
    """From the range 0 to 10; a reward at the limit is relevant."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "which?", "candidates": ["a", "b", "c"], "rewards": [10, 4, 0]}))
    changes = ["pools.reward_range=[0,10]", f"pools.relevant={relevant}"]
    config = load_config(quick_test=True, overrides=changes)
    with read_user_pools(config, file) as user:
        for block in user.blocks():
            user.measure(block, [np.array([0.0, 2.0, 1.0])], "mine")
        found = user.metrics(0)["mine"]
    assert found["map"]["value"] == pytest.approx(precision)
    assert found["average_reward"]["value"] == pytest.approx(0.4)
