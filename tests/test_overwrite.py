"""--overwrite: the old outputs stay usable until the new ones are complete, whatever interrupts the stage."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from lib import durable, schema
from lib.artifacts import Stage
from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.runs import RunArgs, inspect, load_manifest
from tests.conftest import run_stages
from tests.trainings import Killed

CONFIG = load_config(quick_test=True)
OTHER = load_config(quick_test=True, overrides=["seed=5"])
NAME, READER = "02_generate_candidates", "03_build_rewards"


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Asking git for the commit takes longer than all the rest."""
    monkeypatch.setattr("lib.code_version.commit", lambda: {"commit": None, "dirty": None})


def table(count: int) -> pa.Table:
    return pa.table(
        {"example_id": [f"e{i}" for i in range(count)], "candidate_id": pa.array([0] * count, pa.int32()),
         "reward": [0.5] * count, "rank": pa.array([1] * count, pa.int32()), "best": [True] * count, "tied": [False] * count}
    )  # fmt: skip


def make(run: Path, rows: int, config=CONFIG, fail: BaseException | None = None, **flags) -> Stage:
    """One stage that writes a table and a folder, and may fail between the two."""
    with Stage(f"{NAME}.py", config, RunArgs(run_dir=run, **flags), uses=("seed",)) as stage:
        if stage.finished:
            return stage
        stage.write("rewards", table(rows), schema.REWARDS)
        if fail is not None:
            raise fail
        (stage.folder / "model").mkdir(exist_ok=True)
        (stage.folder / "model" / "weights").write_bytes(bytes(rows))
        stage.add_folder("model", stage.folder / "model")
    return stage


def read(run: Path, config=CONFIG) -> int:
    """Rows of the stage's table as a later stage finds them, with their hash compared."""
    args = RunArgs(run_dir=run)
    with Stage(f"{READER}.py", config, args, uses=("seed",), reads=(NAME,), restarts=True) as stage:
        rows = stage.read(NAME, "rewards", schema.REWARDS).num_rows
        assert len((stage.folder_of(NAME, "model") / "weights").read_bytes()) == rows
        stage.leave_incomplete("only looked")
    return rows


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_new_folder_replaces_the_old_one_when_it_is_complete(tmp_path):
    make(tmp_path, 3)
    stage = make(tmp_path, 4, overwrite=True)
    assert read(tmp_path) == 4 and stage.folder == tmp_path / NAME
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("02")) == [NAME]
    manifest = load_manifest(stage.folder)
    assert manifest is not None and durable.NEW not in json.dumps(manifest)


@pytest.mark.parametrize("error", [BadData("no"), RuntimeError("no"), Killed(), KeyboardInterrupt()])
def test_an_attempt_that_fails_leaves_the_old_as_it_was(tmp_path, error, capsys):
    make(tmp_path, 3)
    before = content(tmp_path / NAME)
    with pytest.raises(type(error)):
        make(tmp_path, 4, OTHER, error, overwrite=True)
    assert content(tmp_path / NAME) == before and read(tmp_path) == 3
    assert "(--overwrite is unfinished: 02_generate_candidates.new)" in inspect(tmp_path)
    capsys.readouterr()
    assert make(tmp_path, 5).finished
    assert "up to date (an attempt to make it again is unfinished" in capsys.readouterr().err
    with pytest.raises(BadConfig, match="was made with another config"):
        make(tmp_path, 5, OTHER)
    assert content(tmp_path / NAME) == before


def test_the_same_command_continues_and_another_starts_again(tmp_path):
    make(tmp_path, 3)
    with pytest.raises(Killed):
        make(tmp_path, 4, OTHER, Killed(), overwrite=True)
    note = tmp_path / f"{NAME}.new" / "kept"
    note.touch()
    with pytest.raises(Killed):
        make(tmp_path, 4, OTHER, Killed(), overwrite=True)
    assert note.exists()
    with pytest.raises(Killed):
        make(tmp_path, 4, CONFIG, Killed(), overwrite=True)
    assert not note.exists() and read(tmp_path) == 3
    stage = make(tmp_path, 4, overwrite=True)
    assert stage.resuming and read(tmp_path) == 4


def test_other_code_or_inputs_begin_the_attempt_again(tmp_path, monkeypatch):
    code = {"02_generate_candidates.py": "0" * 64}
    monkeypatch.setattr("lib.code_version.code_files", lambda *_: dict(code))
    allowed = load_config(quick_test=True, overrides=["training.allow_inexact_resume=true"])

    def attempt(config=CONFIG) -> bool:
        """Whether an attempt went on where the one before was cut off."""
        with (
            pytest.raises(Killed),
            Stage(f"{NAME}.py", config, RunArgs(run_dir=tmp_path, overwrite=True), uses=("models",)) as stage,
        ):
            raise Killed
        assert stage.folder.name == f"{NAME}.new"
        return stage.resuming

    with Stage(f"{NAME}.py", CONFIG, RunArgs(run_dir=tmp_path), uses=("models",)):
        pass
    assert not attempt() and attempt()
    code[f"{NAME}.py"] = "1" * 64
    assert not attempt() and attempt()
    code[f"{NAME}.py"] = "2" * 64
    assert attempt(allowed)


def test_unfinished_work_is_kept_too_and_the_first_attempt_is_made_in_place(tmp_path):
    with pytest.raises(Killed):
        make(tmp_path, 3, fail=Killed())
    before = content(tmp_path / NAME)
    with pytest.raises(Killed):
        make(tmp_path, 4, OTHER, Killed(), overwrite=True)
    assert content(tmp_path / NAME) == before
    assert make(tmp_path, 3).resuming and read(tmp_path) == 3

    fresh = tmp_path / "another"
    with pytest.raises(Killed):
        make(fresh, 3, fail=Killed(), overwrite=True)
    assert not (fresh / f"{NAME}.new").exists()
    assert make(fresh, 3, overwrite=True).resuming and read(fresh) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("call", "found"), [("replace", {3, 4}), ("unlink", {4})])
def test_killed_at_any_step_of_a_replacement_one_of_the_two_is_complete(tmp_path, monkeypatch, call, found):
    """The n-th call ends the process, for every n. Later stages then read the old or the new outputs, never a mixture."""
    make(tmp_path / "old", 3)
    seen, done = set(), False
    for number in range(1, 40):
        run = shutil.copytree(tmp_path / "old", tmp_path / str(number))
        real, count = getattr(os, call), iter(range(number - 1, -1, -1))

        def killed(*args, real=real, count=count, **kwargs):
            if next(count, 1) == 0:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            try:
                make(run, 4, overwrite=True)
                done = next(count, None) is not None  # fewer calls than that: every call has failed once
            except Killed:
                done = False
        rows = read(run)
        assert rows in (3, 4)
        if not done:
            seen.add(rows)
        assert make(run, 4, overwrite=True) and read(run) == 4
        assert sorted(p.name for p in run.iterdir() if p.name.startswith("02")) == [NAME]
        shutil.rmtree(run)
        if done:
            break
    assert done and seen == found


def test_a_linked_stage_is_replaced_and_what_it_links_to_stays(tmp_path):
    make(tmp_path / "one", 3)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / NAME).symlink_to(tmp_path / "one" / NAME)
    make(tmp_path / "two", 4, overwrite=True)
    assert read(tmp_path / "one") == 3 and read(tmp_path / "two") == 4
    assert not (tmp_path / "two" / f"{NAME}.old").is_symlink()


# ---------------------------------------------------------------------------------- faults that users met, on a complete run


FEW = ["models.reference_lm=null", "models.ar_baseline=null", "models.judge=null", "models.ranker=null",
       "models.generator.training.steps=4", "models.inspector.training.steps=4"]  # fmt: skip


@pytest.fixture
def run(quick_run, tmp_path) -> Path:
    """A finished run that a test may spoil."""
    return shutil.copytree(quick_run, tmp_path / "run_001")


def refused(run: Path, stage: str, error: type[Exception], match: str, *overrides: str) -> None:
    """--overwrite with these settings fails, and everything that the stage had made is there, of use to later stages."""
    before = content(run / stage)
    config = load_config(quick_test=True, overrides=[*overrides])
    with pytest.raises(error, match=match):
        importlib.import_module(stage).main(config, RunArgs(run_dir=run, quick_test=True, overwrite=True))
    assert content(run / stage) == before
    run_stages(run, load_config(quick_test=True), [stage, "05_train_critic"])  # both are up to date


def test_a_start_of_another_family_costs_no_model(run, tmp_path, capsys):
    bert = tmp_path / "my_bert"
    shutil.copytree(run / "04_train" / "generator" / "best_model", bert)
    (bert / "config.json").write_text('{"model_type": "bert", "vocab_size": 100}')
    refused(run, "04_train", BadData, "model_type bert", f"models.generator.start={bert}")
    assert "up to date" in capsys.readouterr().err


def test_too_few_classes_cost_no_model(run):
    refused(run, "04_train", BadConfig, "num_classes is 2", "models.inspector.num_classes=2", *FEW)


def test_a_checkpoint_without_config_costs_no_candidates(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors").touch()
    refused(
        run,
        "02_generate_candidates",
        MissingInput,
        "config.json",
        f"generator.checkpoint={tmp_path / 'empty'}",
    )


def test_models_made_again_are_those_that_a_first_run_makes(run, quick_run, tmp_path, monkeypatch):
    """Killed in the second model, continued by the same command; the same bits as without --overwrite."""
    from lib.training import train_model

    config = load_config(quick_test=True, overrides=[*FEW, "models.inspector.start=generator"])
    real, calls = train_model.train, []

    def train(model, objective, context, *args, **kwargs):
        calls.append(context.label)
        if len(calls) == 2:
            raise Killed
        return real(model, objective, context, *args, **kwargs)

    monkeypatch.setattr(train_model, "train", train)
    args = RunArgs(run_dir=run, quick_test=True, overwrite=True)
    before = content(run / "04_train")
    with pytest.raises(Killed):
        importlib.import_module("04_train").main(config, args)
    assert content(run / "04_train") == before
    importlib.import_module("04_train").main(config, args)
    assert calls == ["generator", "inspector", "inspector"]
    first = tmp_path / "first"
    first.mkdir()
    for name in ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards"):
        (first / name).symlink_to(quick_run / name)
    run_stages(first, config, ["04_train"])
    found = [load_manifest(folder / "04_train") for folder in (run, first)]
    assert found[0] is not None and found[1] is not None
    assert found[0]["outputs"] == found[1]["outputs"]
    texts = [p for p in (run / "04_train").rglob("*.json*") if durable.NEW.encode() in p.read_bytes()]
    assert not texts, "a temporary name is stored in an output"
