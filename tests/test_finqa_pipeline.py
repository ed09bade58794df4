"""FinQA through all seven stages on synthetic pages: pools, rewards, rankers, policies, answers.

Known here: the files of the stages. How pools, losses and rankers work inside is tested beside them.
"""

import importlib
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.run_figures import figures_of
from lib import schema
from lib.config import ROOT, load_config
from lib.errors import BadConfig, Interrupted, MissingInput
from lib.evaluation import finqa_programs
from lib.runs import STAGES, RunArgs, load_manifest, validate_manifest
from lib.tasks.finqa.program import execute, parse
from lib.tasks.finqa.record import Record
from tests.conftest import run_stages_recorded, table_of, undeclared

pytestmark = pytest.mark.slow  # all tests read one run of all seven stages
FINQA = ROOT / "configs" / "finqa.yaml"


def config_of(*overrides: str):
    return load_config([FINQA], quick_test=True, overrides=overrides)


@pytest.fixture(scope="module")
def reads() -> dict[str, set[str]]:
    """The settings that each stage of `run` read."""
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory, reads):
    """The folder of a finished quick run."""
    folder = tmp_path_factory.mktemp("finqa") / "run_001"
    reads.update(run_stages_recorded(folder, config_of()))
    return folder


def stats_of(run, stage: str) -> dict:
    manifest = load_manifest(run / stage)
    assert manifest is not None
    return manifest["stats"]


def rows(run, path: str) -> list[dict]:
    return pq.read_table(table_of(run, path)).to_pylist()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_stage_is_complete_and_its_tables_keep_to_their_schemas(run):
    for name in STAGES:
        manifest = load_manifest(run / name)
        assert manifest is not None, name
        validate_manifest(manifest)
    for path, table_schema in {
        "01_prepare_dataset/examples": schema.EXAMPLES,
        "02_generate_candidates/candidates": schema.CANDIDATES,
        "02_generate_candidates/dropped": schema.DROPPED,
        "02_generate_candidates/baselines": schema.BASELINES,
        "03_build_rewards/rewards": schema.REWARDS,
        "06_sample/ranked": schema.RANKED,
        "06_sample/answers": schema.ANSWERS,
    }.items():
        schema.conform(pq.read_table(table_of(run, path)), table_schema)


def test_no_stage_reads_a_setting_that_its_manifest_does_not_have(run, reads):
    assert reads["02_generate_candidates"] >= {"finqa.pools", "candidates"} and not undeclared(reads, run)


def test_no_page_is_in_two_splits(run):
    splits: dict[str, set] = {}
    for row in rows(run, "01_prepare_dataset/examples"):
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(s) == 1 for s in splits.values())
    assert {s for found in splits.values() for s in found} == {"train", "selection", "held_out", "test"}


def test_every_question_has_a_full_pool_or_a_reason(run):
    examples = {r["example_id"]: r for r in rows(run, "01_prepare_dataset/examples")}
    pools = Counter(r["example_id"] for r in rows(run, "02_generate_candidates/candidates"))
    dropped = {r["example_id"]: r["reason"] for r in rows(run, "02_generate_candidates/dropped")}
    sizes = {"train": 32}
    assert all(count == sizes.get(examples[name]["split"], 8) for name, count in pools.items())
    assert not pools.keys() & dropped.keys() and pools.keys() | dropped.keys() == examples.keys()
    assert all(dropped.values())
    answered_by_number = [name for name, r in examples.items() if not r["target"].endswith(("= yes", "= no"))]
    assert sum(name in pools for name in answered_by_number) >= 0.97 * len(answered_by_number)


def test_candidates_run_on_their_page_and_differ_in_value(run):
    records = {
        r["example_id"]: Record.from_json(r["record"]) for r in rows(run, "01_prepare_dataset/examples")
    }
    splits = {r["example_id"]: r["split"] for r in rows(run, "01_prepare_dataset/examples")}
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows(run, "02_generate_candidates/candidates"):
        found.setdefault((row["example_id"], row["candidate_id"] // 8), []).append(row)
    draws = Counter(name for name, _ in found)
    assert all(count == (4 if splits[name] == "train" else 1) for name, count in draws.items())
    for (name, _), pool in found.items():
        values = [execute(r["program"], records[name].table) for r in pool]
        assert len(set(values)) == len(values)
        for row, value in zip(pool, values, strict=True):
            assert parse(row["program"])
            assert float(row["value"]) == pytest.approx(float(value), abs=1e-9)
            assert row["text"].endswith(f"= {row['value']}") and row["control"].endswith(f"= {row['value']}")
        gold = [r for r in pool if r["kind"] == "gold"]
        assert [r["program"] for r in gold] == [records[name].program]


def test_the_gold_program_stands_anywhere(run):
    places = Counter(
        r["candidate_id"] % 8 for r in rows(run, "02_generate_candidates/candidates") if r["kind"] == "gold"
    )
    counts = np.array([places[i] for i in range(8)])
    expected = counts.sum() / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_the_gold_program_is_worth_most(run):
    kinds = {
        (r["example_id"], r["candidate_id"]): r["kind"]
        for r in rows(run, "02_generate_candidates/candidates")
    }
    for row in rows(run, "03_build_rewards/rewards"):
        is_gold = kinds[row["example_id"], row["candidate_id"]] == "gold"
        assert row["best"] == is_gold
        assert (row["reward"] == 1) == is_gold and row["term_execution"] == is_gold
        assert row["term_format"] == 1


def test_the_leak_is_in_the_manifest(run):
    leak = stats_of(run, "02_generate_candidates")["leak"]
    seen = {(row["scorer"], row["sees"]) for row in leak["rows"]}
    assert len(seen) >= 4 and {sees for _, sees in seen} == {"one candidate", "whole pool"}
    assert leak["worst_upper_bound"] == pytest.approx(max(row["high"] for row in leak["rows"]))


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_ranker_is_reported_beside_baselines_and_controls(run):
    stats = stats_of(run, "04_train")
    others = stats["ranker"]["held_out"]["others"]
    assert {"random choice", "first candidate", "trees", "overlap", "question removed",
            "mismatched prompt", "off-page candidates"} == set(others)  # fmt: skip
    assert others["random choice"]["accuracy"]["value"] == pytest.approx(1 / 8)
    assert {"1 step", "2 steps"} <= set(stats["ranker"]["held_out"]["tags"])
    assert stats["ranker"]["packs"] is True and set(stats["ranker"]["skipped_pools"].values()) == {0}
    for split, count in stats["ranker"]["shortened"].items():
        draws = 4 if split == "train" else 1
        assert 0 <= count["prompts"] < count["of_prompts"], split
        assert count["of_candidates"] == 8 * draws * count["of_prompts"], split
    assert stats["ranker_blind"]["shortened"]["held_out"]["of_prompts"] == 0


@pytest.mark.parametrize(("name", "blind"), [("ranker", False), ("ranker_blind", True)])
def test_a_blind_ranker_is_given_an_empty_question_and_another_one_its_own(run, name, blind):
    """The scores of stage 06 equal those of the saved model on the prompts that it should have read."""
    from lib.models.collation import collate
    from lib.models.ranker_files import load_ranker
    from lib.runtime import Runtime

    assert config_of().models[name].blind == blind
    prompts = {r["example_id"]: r["prompt"] for r in rows(run, "01_prepare_dataset/examples")}
    format_value: dict[str, list[dict]] = {}
    for row in rows(run, "06_sample/ranked"):
        if row["model"] == name:
            format_value.setdefault(row["example_id"], []).append(row)
    some = sorted(format_value)[:6]
    model, tokenizer = load_ranker(run / "04_train" / name / "best_model")
    settings = config_of().ranker
    scores = {}
    for asked, questions in (("own", [prompts[n] for n in some]), ("none", [""] * len(some))):
        pools = collate(
            tokenizer, questions, [[r["text"] for r in format_value[n]] for n in some], settings.prompt_tokens,
            settings.candidate_tokens,
        )  # fmt: skip
        with torch.no_grad(), Runtime.detect(config_of()).autocast():
            scores[asked] = model.eval()(pools.tensors()).float().numpy()
    found = np.array([[r["score"] for r in format_value[n]] for n in some])
    right, wrong = ("none", "own") if blind else ("own", "none")
    # After short training the question changes scores little, but ten times more than rounding
    assert np.abs(found - scores[right]).max() < 0.1 * np.abs(found - scores[wrong]).max()


def test_a_policy_killed_in_the_middle_of_a_rollout_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    """The checkpoint contains the rollout."""
    from lib.training import loop

    monkeypatch.setattr("lib.training.policy.METHODS", ("ppo",))
    settings = ("critic.training.checkpoint_every=3", "critic.ppo.samples_per_pool=2")
    folders = []
    for kind in ("whole", "killed"):
        folder = tmp_path / kind / "run_001"
        folder.parent.mkdir()
        link_stages(run, folder)
        folders.append(folder)
    stage = importlib.import_module("05_train_critic")
    config = config_of(*settings)
    stage.main(config, RunArgs(run_dir=folders[0], quick_test=True, command=("05",)))

    due = loop._Run.due

    def stop_once(self, every):
        if self.label == "ppo" and self.state.step == 3 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            self.save_checkpoint()
            raise Interrupted("stopped", 130)
        return due(self, every)

    monkeypatch.setattr(loop._Run, "due", stop_once)
    with pytest.raises(Interrupted):
        stage.main(config, RunArgs(run_dir=folders[1], quick_test=True, command=("05",)))
    stage.main(config, RunArgs(run_dir=folders[1], quick_test=True, command=("05",)))
    for part in ("ppo/final_model/model.safetensors", "ppo/final_model/value_head.safetensors",
                 "ppo/final_model/score_head.safetensors", "ppo/metrics.jsonl"):  # fmt: skip
        whole, killed = ((f / "05_train_critic" / part).read_bytes() for f in folders)
        assert whole == killed, part


def link_stages(run, folder) -> None:
    """A run that shares the stages before 05."""
    folder.mkdir()
    for name in (
        "00_check_data",
        "01_prepare_dataset",
        "02_generate_candidates",
        "03_build_rewards",
        "04_train",
    ):
        (folder / name).symlink_to(run / name)
    (folder / "config.json").write_bytes((run / "config.json").read_bytes())


def test_the_policies_are_compared_with_their_start(run):
    stats = stats_of(run, "05_train_critic")
    assert set(stats["gain_over_start"]) == {"ppo", "exact", "cross_entropy"}
    assert set(stats["held_out"]) == {"ppo", "exact", "cross_entropy", "ranker before"}
    lines = [json.loads(x) for x in (run / "05_train_critic/ppo/metrics.jsonl").read_text().splitlines()]
    assert {"ratio_mean", "clip_fraction", "kl_to_start", "entropy", "value_loss"} <= set(lines[-1]["train"])


def test_every_way_decays_the_same_weights(run):
    """The decayed weights are those of the encoder's linear layers, without the score head and the value head."""
    decayed = {}
    for way in ("ppo", "exact", "cross_entropy"):
        record = json.loads((run / "05_train_critic" / way / "training_manifest.json").read_text())
        groups = {group["group"]: group["names"] for group in record["optimizer"]["groups"]}
        decayed[way] = {name.removeprefix("policy.") for name in groups["hidden matrices"]}
        assert all(name.startswith("backbone.") for name in decayed[way])
    assert decayed["ppo"] == decayed["exact"] == decayed["cross_entropy"] != set()


def test_answers_are_those_of_the_highest_score(run):
    ranked: dict[tuple, list] = {}
    for row in rows(run, "06_sample/ranked"):
        ranked.setdefault((row["model"], row["example_id"]), []).append(row)
    answers = rows(run, "06_sample/answers")
    assert {a["split"] for a in answers} == {"held_out", "test"}
    assert len(answers) == len(ranked)
    for answer in answers:
        pool = ranked[answer["model"], answer["example_id"]]
        top = max(pool, key=lambda r: r["score"])
        assert (answer["chosen"], answer["reward"]) == (top["text"], top["reward"])
        assert answer["best_reward"] == 1 and answer["note"]
        assert answer["lead"] >= 0 and 1 / 8 <= answer["probability"] <= 1


def test_the_report_shows_questions_and_names(run):
    page = (run / "06_sample" / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((run / "06_sample" / "metrics.json").read_text())
    for name in ("ranker", "ranker_blind", "ppo", "exact", "cross_entropy", "trees", "random choice"):
        assert name in page
        assert any(row["name"] == name for row in metrics["held_out"])
    assert "<script src" not in page and "<link" not in page, "one file that needs no other"


# --- what users get wrong --------------------------------------------------------------------------------------------


def test_a_missing_folder_says_where_the_data_is_published(tmp_path):
    config = config_of(f"data.path={tmp_path / 'nowhere'}")
    with pytest.raises(MissingInput, match=r"github\.com/czyssrs/FinQA"):
        importlib.import_module("00_check_data").main(
            config, RunArgs(run_dir=tmp_path / "run", command=("00",))
        )


def test_another_k_than_the_data_s_is_refused(run, tmp_path):
    from lib.artifacts import Stage
    from lib.runtime import Runtime
    from lib.training.stage_inputs import read_stage_inputs
    from lib.training.train_model import context_of, set_up_prompt_ranker

    config = config_of()
    folder = tmp_path / "run_001"
    link_stages(run, folder)
    args = RunArgs(run_dir=folder, quick_test=True, command=("x",))
    with Stage("05_train_critic.py", config, args, uses=("seed",), reads=STAGES[:5]) as stage:
        other = config_of("candidates.per_example=6")
        stage_inputs = read_stage_inputs(stage, other, Runtime.detect(other))
        spec = other.models["ranker"]
        context = context_of("ranker", spec, stage_inputs)
        with pytest.raises(BadConfig, match="made pools of 8"):
            set_up_prompt_ranker(context, spec, stage_inputs, tmp_path, None)
        stage.leave_incomplete("only looked")


def test_a_text_task_has_no_policy(quick_run, tmp_path):
    folder = tmp_path / "run_001"
    link_stages(quick_run, folder)
    config = load_config(quick_test=True, overrides=["critic.method=ppo"])
    with pytest.raises(BadConfig, match="prompts"):
        importlib.import_module("05_train_critic").main(
            config, RunArgs(run_dir=folder, quick_test=True, command=("05",))
        )


def test_figures_of_a_run_are_stored_as_they_were_measured(run):
    figures, _ = figures_of(run, "finqa")
    answers = {
        row["name"]: row for row in json.loads((run / "06_sample/metrics.json").read_text())["held_out"]
    }
    for name in ("ranker", "ranker_blind", "trees", "overlap"):
        assert figures["rows"][name]["accuracy"] == answers[name]["accuracy"]
        assert figures["rows"][name]["reward"] == answers[name]["normalised_reward_ratio"]
    assert figures["pools"] == answers["ranker"]["pools"]
    scorers = stats_of(run, "02_generate_candidates")["leak"]["rows"]
    assert figures["without_question"]["value"] == max(row["accuracy"] for row in scorers)
    for name in ("ppo", "exact", "cross_entropy"):
        assert figures["further_training"][name]["accuracy"] == answers[name]["accuracy"]


# --- programs of other systems ---------------------------------------------------------------------------------------


def test_programs_of_other_systems_are_chosen_by_score_and_votes(run, tmp_path, capsys):
    examples = [r for r in rows(run, "01_prepare_dataset/examples") if r["split"] == "held_out"]
    gold = {r["example_id"]: Record.from_json(r["record"]).program or "" for r in examples}
    lines = [
        {"id": name, "programs": {"A": program, "B": program if i % 2 else "add(1, 2)", "C": "divide(7, 2)"}}
        for i, (name, program) in enumerate(gold.items())
    ]
    learned = next(r for r in rows(run, "01_prepare_dataset/examples") if r["split"] == "train")
    lines.append({"id": learned["example_id"], "programs": ["add(1, 2)"]})
    file, out = tmp_path / "programs.jsonl", tmp_path / "chosen.json"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert finqa_programs.main([str(run), str(file), "--out", str(out)]) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    of = {row["method"]: row for row in figures["rows"]}
    assert figures["questions"] == figures["differ"] == len(gold) == len(figures["choices"])
    assert figures["problems"] == {"unknown question": 1}  # the ranker learned from it
    assert of["oracle"]["all"]["value"] == of["system A"]["all"]["value"] == 1
    assert of["majority vote"]["all"]["value"] == pytest.approx(0.5 + 0.5 / 3, abs=0.02)
    chosen = [
        execute(c["program"], Record.from_json(r["record"]).table)
        for c, r in zip(figures["choices"], examples, strict=True)
    ]
    assert chosen == [c["value"] for c in figures["choices"]]
    assert of["ranker with votes"]["all"]["value"] == pytest.approx(
        np.mean([c["right"] for c in figures["choices"]]), abs=1e-9
    )
    assert all(
        name in printed
        for name in ("ranker with votes", "system C", "random answer", "Of the wrong programs: ")
    )


def test_another_folder_or_an_unusable_file_is_one_clear_error(run, tmp_path, capsys):
    file = tmp_path / "programs.jsonl"
    file.write_text('{"id": "elsewhere", "programs": ["add(1, 2)"]}', encoding="utf-8")
    assert finqa_programs.main([str(run), str(file)]) == 65
    assert finqa_programs.main([str(tmp_path), str(file)]) == 65
    assert finqa_programs.main([str(run), str(tmp_path / "none.jsonl")]) == 66
    errors = capsys.readouterr().err
    assert "no program to choose from" in errors and "not complete" in errors and "not a file" in errors
