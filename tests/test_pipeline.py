"""All seven stages together: manifests, the chain of hashes, no-op reruns, refusals, equal bits on equal input."""

import importlib
import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib import durable, schema
from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.runs import STAGES, RunArgs, inspect, load_manifest, validate_manifest
from tests.conftest import run_stages, table_of
from tests.process_runs import run_jobs


@pytest.fixture(scope="module")
def manifests(quick_run) -> dict[str, dict]:
    found = {name: load_manifest(quick_run / name) for name in STAGES}
    assert all(found.values())
    return {name: m for name, m in found.items() if m is not None}


@pytest.fixture(scope="module")
def with_models(quick_run, quick_config, manifests) -> dict[str, dict]:
    """The manifests of all stages, and those of the models of stage 04."""
    units = {f"04_train/{name}": load_manifest(quick_run / "04_train" / name) for name in quick_config.models}
    assert all(units.values())
    return manifests | {name: m for name, m in units.items() if m is not None}


def test_every_stage_has_a_manifest_that_keeps_to_the_schema(with_models):
    for name, manifest in with_models.items():
        validate_manifest(manifest)
        assert manifest["stage"] == name and manifest["quick_test"] is True


def test_the_hashes_of_outputs_and_inputs_form_a_chain(quick_run, with_models):
    for name, manifest in with_models.items():
        for output in manifest["outputs"].values():
            path = quick_run / name / output["path"]
            actual = durable.sha256_folder(path) if path.is_dir() else durable.sha256_file(path)
            assert actual == output["sha256"], path
        for key, record in manifest["inputs"].items():
            if "stage" in record:
                source = with_models[record["stage"]]["outputs"][key.removeprefix(f"{record['stage']}/")]
                assert record["sha256"] == source["sha256"]


def test_tables_keep_to_their_schemas(quick_run):
    tables = {
        "00_check_data/documents": schema.DOCUMENTS,
        "00_check_data/problems": schema.PROBLEMS,
        "01_prepare_dataset/examples": schema.EXAMPLES,
        "01_prepare_dataset/dropped": schema.DROPPED,
        "02_generate_candidates/candidates": schema.CANDIDATES,
        "03_build_rewards/rewards": schema.REWARDS,
        "06_sample/samples": schema.SAMPLES,
        "06_sample/trace": schema.TRACE,
    }
    for path, table_schema in tables.items():
        schema.conform(pq.read_table(table_of(quick_run, path)), table_schema)


def test_a_second_run_does_nothing(quick_run, quick_config):
    before = {
        p: p.stat().st_mtime_ns for p in quick_run.rglob("*") if p.is_file() and ".locks" not in p.parts
    }
    run_stages(quick_run, quick_config)
    after = {p: p.stat().st_mtime_ns for p in quick_run.rglob("*") if p.is_file() and ".locks" not in p.parts}
    assert before == after


@pytest.fixture(scope="module")
def copied(quick_run, tmp_path_factory):
    """A copy of the run that a test may spoil."""

    def make():
        target = tmp_path_factory.mktemp("copy") / "run_001"
        shutil.copytree(quick_run, target)
        return target

    return make


def test_another_setting_is_refused_and_named(copied, quick_config):
    run_dir = copied()
    changed = load_config(quick_test=True, overrides=["rewards.curve=[[0, 1], [1, 0.5]]"])
    with pytest.raises(BadConfig, match=r"rewards\.curve"):
        run_stages(run_dir, changed, ["03_build_rewards"])
    with pytest.raises(BadConfig, match=r"03_build_rewards in .* was made with another config"):
        run_stages(run_dir, changed, ["04_train"])


def test_what_was_changed_upstream_is_noticed_downstream(copied, quick_config):
    run_dir = copied()
    other = load_config(quick_test=True, overrides=["seed=7"])
    run_stages(run_dir, other, STAGES[:2], overwrite=True)
    with pytest.raises(BadConfig, match=r"02_generate_candidates in .* was made with"):
        run_stages(run_dir, other, STAGES[2:3])


def test_a_damaged_table_is_named(copied, quick_config):
    run_dir = copied()
    file = run_dir / "02_generate_candidates" / "candidates" / "part_00000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadData, match=r"part_00000\.parquet is damaged"):
        run_stages(run_dir, quick_config, ["03_build_rewards"], overwrite=True)


def test_a_missing_stage_is_named_with_its_command(tmp_path, quick_config):
    with pytest.raises(MissingInput, match=r"python 01_prepare_dataset\.py"):
        run_stages(tmp_path / "run_001", quick_config, ["02_generate_candidates"])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_one_others(
    quick_run, tmp_path, quick_config, manifests
):
    """Every output of stages 00 to 05 again, and the samples."""
    run_stages(tmp_path / "run_001", quick_config)
    for name in STAGES:
        again = load_manifest(tmp_path / "run_001" / name)
        assert again is not None
        for output, record in manifests[name]["outputs"].items():
            if output in ("report", "metrics"):
                continue  # they show seconds
            assert again["outputs"][output]["sha256"] == record["sha256"], f"{name}/{output}"


def test_killed_between_models_stage_04_goes_on_and_ends_with_the_same_bits(
    copied, quick_config, manifests, monkeypatch
):
    run_dir = copied()
    shutil.rmtree(run_dir / "04_train")
    from lib.training import train_model

    real, calls = train_model.train, []

    class Killed(BaseException):
        pass

    def train(model, objective, context, *args, **kwargs):
        calls.append(context.label)
        if len(calls) == 3:
            raise Killed
        return real(model, objective, context, *args, **kwargs)

    monkeypatch.setattr(train_model, "train", train)
    with pytest.raises(Killed):
        run_stages(run_dir, quick_config, ["04_train"])
    assert load_manifest(run_dir / "04_train") is None
    run_stages(run_dir, quick_config, ["04_train"])
    assert calls[:3] == calls[0:2] + calls[3:4]  # two models were kept, the third trained again
    again = load_manifest(run_dir / "04_train")
    assert again is not None
    assert again["outputs"] == manifests["04_train"]["outputs"]


def test_mode_trains_only_its_models(copied, quick_config):
    run_dir = copied()
    shutil.rmtree(run_dir / "04_train")
    stage = importlib.import_module("04_train")
    stage.main(quick_config, RunArgs(run_dir=run_dir, only_mode="language_model"))
    trained = {p.name for p in (run_dir / "04_train").iterdir() if p.is_dir()}
    assert trained == {"generator", "reference_lm", "ar_baseline"}
    assert load_manifest(run_dir / "04_train") is None


@pytest.mark.slow
def test_two_processes_train_two_models_at_once_and_a_third_ends_the_stage_with_the_same_bits(
    copied, manifests
):
    run_dir = copied()
    for folder in ("04_train", "05_train_critic", "06_sample"):
        shutil.rmtree(run_dir / folder)
    command, names = (
        ["04_train.py", "--quick_test", "--run_dir", str(run_dir)],
        ("reference_lm", "ar_baseline"),
    )
    jobs = [{"size": 1, "argv": [*command, "--only", name], "beside": name} for name in names]
    *_, one, other = run_jobs([*jobs, *({"wait": name} for name in names)])
    assert [one["codes"], other["codes"]] == [[0], [0]], (one, other)
    [last] = run_jobs([{"size": 1, "argv": command}])
    assert last["codes"] == [0] and last["errors"].count("is up to date") == 2, last["errors"]
    found = load_manifest(run_dir / "04_train")
    assert found is not None and found["outputs"] == manifests["04_train"]["outputs"]


def test_no_text_is_in_two_splits(quick_run):
    rows = pq.read_table(quick_run / "01_prepare_dataset" / "examples").to_pylist()
    splits: dict[str, set] = {}
    for r in rows:
        splits.setdefault(r["group"], set()).add(r["split"])
        if len(r["target"]) >= 40:
            splits.setdefault("text " + r["target"], set()).add(r["split"])
    assert all(len(s) == 1 for s in splits.values())
    assert {r["split"] for r in rows} == {"train", "selection", "held_out", "reference"}


def test_generator_accuracy_is_counted_from_the_candidates(quick_run, manifests):
    rows = pq.read_table(quick_run / "02_generate_candidates" / "candidates").to_pylist()
    truth = {r["example_id"]: np.array(r["token_ids"]) for r in rows if r["kind"] == "original"}
    right = total = 0
    for r in rows:
        if r["split"] == "train":
            predicted = np.array(r["token_labels"]) == 2
            right += (np.array(r["token_ids"])[predicted] == truth[r["example_id"]][predicted]).sum()
            total += predicted.sum()
    stats = manifests["02_generate_candidates"]["stats"]
    assert stats["generator_accuracy"]["train"] == pytest.approx(right / total)
    assert sum(stats["synthetic_fraction_histogram"]) == stats["rewritten"]


def test_samples_are_whole_and_counted(quick_run, quick_config):
    rows = pq.read_table(quick_run / "06_sample" / "samples").to_pylist()
    assert len(rows) == len(quick_config.sampler.policies) * quick_config.sampler.num_samples
    assert all(min(r["token_ids"]) > 3 for r in rows)
    policies = json.loads((quick_run / "06_sample" / "metrics.json").read_text())["policies"]
    for row in policies:
        if row["nfe"]:
            assert row["passes"] <= row["nfe"]
    assert {r["policy"] for r in policies} >= {*quick_config.sampler.policies, "autoregressive", "real text"}


@pytest.mark.parametrize("given", ["prompt", "infill"])
def test_given_text_comes_back_unchanged(copied, given):
    run_dir = copied()
    text = "The value of the " + ("[MASK]" * 9 if given == "infill" else "")
    config = load_config(
        quick_test=True, overrides=[f"sampler.{given}={json.dumps(text)}", "sampler.num_samples=2"]
    )
    run_stages(run_dir, config, ["06_sample"], overwrite=True)
    rows = pq.read_table(run_dir / "06_sample" / "samples").to_pylist()
    assert rows
    for r in rows:
        assert r["text"].startswith("The value of the ")
        assert r["given"][:17] == [True] * 17 and not any(r["given"][17:])


def test_inspect_prints_a_line_per_stage(quick_run):
    lines = inspect(quick_run).splitlines()
    assert [line.split()[0] for line in lines] == list(STAGES)
    assert all(" s " in line for line in lines)


# ------------------------------------------------------------------------- other ways through the stages


@pytest.mark.slow
def test_byte_pairs_go_end_to_end(tmp_path):
    config = load_config(
        quick_test=True, overrides=["tokenizer.kind=bpe", "tokenizer.vocab_size=320", *FEW_STEPS]
    )
    run_stages(tmp_path / "run_001", config)
    manifest = load_manifest(tmp_path / "run_001" / "01_prepare_dataset")
    assert manifest is not None and manifest["stats"]["characters_per_token"] > 1.1
    trained = load_manifest(tmp_path / "run_001" / "04_train")
    examples = pq.read_table(tmp_path / "run_001" / "01_prepare_dataset" / "examples").to_pylist()
    held_out = [r for r in examples if r["split"] == "held_out"]
    characters, tokens = (sum(len(r[name]) for r in held_out) for name in ("target", "token_ids"))
    assert trained is not None and characters > tokens
    for name, metric in (("generator", "nelbo"), ("reference_lm", "nll")):
        values = trained["stats"][name]["held_out"]
        nats_per_character = values[metric] * tokens / characters
        assert values["bits_per_character"] == pytest.approx(nats_per_character / np.log(2))
    assert any(row["metric"] == "NELBO, bits/character" for row in trained["stats"]["table"])
    rows = pq.read_table(tmp_path / "run_001" / "06_sample" / "samples").to_pylist()
    assert all(len(r["text"]) >= len(r["token_ids"]) / 4 for r in rows)


FEW_STEPS = ["training.steps=4", "generator.training.steps=4", "critic.training.steps=6", "training.evaluate_every=3",
             *(f"models.{m}.training.steps=4" for m in ("generator", "reference_lm", "ar_baseline", "inspector", "judge", "ranker"))]  # fmt: skip


@pytest.mark.slow
def test_cross_fitting_trains_a_generator_per_fold_that_never_saw_the_fold(tmp_path, monkeypatch):
    from lib.candidates import generators
    from lib.tasks import cross_fit_fold

    learned: dict[str, set] = {}
    real = generators.train_model

    def spy(name, spec, stage_inputs, folder, start):
        text = stage_inputs.text("train")
        spans = zip(text.document_starts, text.document_ends, strict=True)
        tokens = np.concatenate([np.arange(start, end) for start, end in spans])
        runs = np.searchsorted(text.group_starts, tokens, side="right") - 1
        names = list(text.group_names())
        learned[name] = {names[run] for run in np.unique(runs)}
        return real(name, spec, stage_inputs, folder, start)

    monkeypatch.setattr(generators, "train_model", spy)
    config = load_config(quick_test=True, overrides=["candidates.cross_fit_folds=2", *FEW_STEPS])
    run_stages(tmp_path / "run_001", config, STAGES[:5])
    for fold in (0, 1):
        groups = learned[f"generator_fold_{fold}"]
        assert groups and all(cross_fit_fold(config.seed, g, 2) != fold for g in groups)
    assert (tmp_path / "run_001" / "04_train" / "manifest.json").exists()


@pytest.mark.parametrize("coupling", ["joint", "decoupled"])
def test_the_critic_killed_and_continued_gives_the_same_bits(copied, coupling, monkeypatch):
    from lib.training.objectives.token_critic import TokenCritic

    config = load_config(
        quick_test=True, overrides=[f"critic.coupling={coupling}", "critic.training.checkpoint_every=4"]
    )
    hashes = []
    for kill in (False, True):
        run_dir = copied()
        shutil.rmtree(run_dir / "05_train_critic")
        shutil.rmtree(run_dir / "06_sample")
        if kill:
            kill_once(monkeypatch, TokenCritic, at=10)
            with pytest.raises(RuntimeError, match="killed"):
                run_stages(run_dir, config, ["05_train_critic"])
            monkeypatch.undo()
        run_stages(run_dir, config, ["05_train_critic"])
        manifest = load_manifest(run_dir / "05_train_critic")
        assert manifest is not None
        hashes.append(manifest["outputs"])
    assert hashes[0] == hashes[1]


def test_the_critic_is_chosen_and_calibrated_on_the_selection_split(quick_run, quick_config):
    from lib.tokenization import load_tokenizer
    from lib.training.critic_setup import critic_objective
    from tests.trainings import context

    table = pq.read_table(quick_run / "01_prepare_dataset" / "examples")
    tokenizer = load_tokenizer(quick_run / "01_prepare_dataset" / "tokenizer")
    stage: Any = SimpleNamespace(
        has_output=lambda stage, name: True,
        folder_of=lambda stage, name: quick_run / stage / name,
    )
    made = critic_objective(stage, quick_config, context("critic"), tokenizer, 64).diffusion.splits
    rows = table.to_pylist()
    for split, windows in (
        ("train", made.train),
        ("selection", made.selection),
        ("held_out", made.held_out),
    ):
        assert windows.text.tokens.tolist() == [
            i for r in rows if r["split"] == split for i in r["token_ids"]
        ]
    of_example = [r["group"] for r in rows if r["split"] == "held_out"]
    every = np.arange(made.held_out.count)
    first, _ = made.held_out.spans(every, np.zeros(len(every)))
    owner = np.searchsorted(made.held_out.text.examples, first, side="right") - 1
    names = [of_example[i] for i in owner]
    pairs = set(zip(made.groups[every].tolist(), names, strict=True))
    assert len(pairs) == len(set(names)) == len({label for label, _ in pairs}) > 1


def kill_once(monkeypatch, objective, at: int) -> None:
    real = objective.part

    def part(self, model, step, rows):
        if step == at:
            raise RuntimeError("killed")
        return real(self, model, step, rows)

    monkeypatch.setattr(objective, "part", part)


def test_no_stage_of_a_run_leaves_an_empty_row_group(quick_run):
    for path in quick_run.rglob("*.parquet"):
        metadata = pq.read_metadata(path)
        assert all(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)), path
    assert (
        pq.read_metadata(
            quick_run / "02_generate_candidates" / "dropped" / "part_00000.parquet"
        ).num_row_groups
        == 0
    )
