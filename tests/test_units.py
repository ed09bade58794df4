"""Each model of stage 04 is a unit of its own: what a change, a kill or a second process costs, and whom.

The training is replaced by a file whose content is a function of what a model depends on. All else is the stage's code.
"""

import importlib
import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import durable
from lib.artifacts import Stage
from lib.config import Config, load_config
from lib.doctor import examine_run, next_command
from lib.errors import BadConfig, BadData, Busy, MissingInput, UsageError
from lib.runs import RunArgs, inspect, load_manifest, validate_manifest
from lib.stage.unfinished import Attempt, Dependencies
from lib.training.model_plans import choose_models, plan_models, unit_of
from lib.units import StageOfUnits, Unit
from tests.trainings import Killed

# reference_lm and ar_baseline from scratch; inspector from generator; judge and ranker from inspector
CONFIG = load_config(quick_test=True, overrides=["models.generator.start=scratch"])
NAMES = list(CONFIG.models)
BEFORE = ("01_prepare_dataset", "02_generate_candidates", "03_build_rewards")


def config_of(*overrides: str) -> Config:
    return load_config(quick_test=True, overrides=["models.generator.start=scratch", *overrides])


@pytest.fixture(autouse=True)
def trainings(monkeypatch) -> SimpleNamespace:
    """`made`: the models that were trained. `fail`: {name: error} raised in the middle of its training."""
    found = SimpleNamespace(made=[], fail={})

    def train(unit: Unit, config: Config, tables: dict) -> None:
        spec = config.models[unit.unit]
        start = (
            unit.folder_of(unit_of(spec.start), "best_model") / "weights"
            if spec.start in config.models
            else None
        )
        folder = unit.folder / "best_model"
        folder.mkdir(exist_ok=True)
        text = f"{unit.unit} {spec.training.steps} ({start.read_text() if start else 'scratch'})"
        (folder / "weights").write_text(text)
        if error := found.fail.get(unit.unit):
            raise error
        found.made.append(unit.unit)
        unit.add_folder("best_model", folder)
        unit.stats |= {"mode": spec.mode, "held_out": {}, "table": []}

    monkeypatch.setattr(importlib.import_module("04_train"), "train", train)
    monkeypatch.setattr("lib.training.stage_inputs.read_stage_inputs", lambda *_: None)
    monkeypatch.setattr("lib.training.stage_inputs.refuse_longer_candidates", lambda *_: None)
    monkeypatch.setattr("lib.code_version.commit", lambda: {"commit": None, "dirty": None})
    return found


def make_earlier(run: Path, names=BEFORE, config: Config = CONFIG, **flags) -> None:
    """Stages that write one file; its content is the section `candidates`."""
    for name in names:
        args = RunArgs(run_dir=run, **flags)
        with Stage(f"{name}.py", config, args, uses=("seed", "candidates")) as stage:
            if not stage.finished:
                stage.write_json("facts", config.candidates.model_dump(mode="json"))


@pytest.fixture
def run(tmp_path) -> Path:
    make_earlier(tmp_path / "run")
    return tmp_path / "run"


def make(run: Path, *overrides: str, only: tuple[str, ...] = (), **flags) -> None:
    importlib.import_module("04_train").main(config_of(*overrides), RunArgs(run_dir=run, only=only, **flags))


def summary(run: Path) -> dict | None:
    return load_manifest(run / "04_train")


def weights(run: Path, name: str) -> str:
    return (run / "04_train" / name / "best_model" / "weights").read_text()


def state(run: Path, *without: str) -> dict[str, tuple[int, bytes]]:
    """Time and content of all files of stage 04 but those of some models and the stage's own."""
    folder = run / "04_train"
    files = (p for p in sorted(folder.glob("*/**/*")) if p.is_file())
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in files
        if p.relative_to(folder).parts[0] not in without
    }


# ------------------------------------------------------------------------------------------------- what a unit is


def test_every_model_has_a_manifest_and_the_stage_lists_their_hashes(run, trainings, capsys):
    make(run)
    assert trainings.made == NAMES
    manifest = summary(run)
    assert manifest is not None and manifest["stage"] == "04_train"
    validate_manifest(manifest)
    for name in NAMES:
        unit = load_manifest(run / "04_train" / name)
        assert unit is not None and unit["stage"] == f"04_train/{name}"
        validate_manifest(unit)
        assert manifest["units"][name] == durable.sha256_file(run / "04_train" / name / "manifest.json")
        output = manifest["outputs"][f"{name}/best_model"]
        assert output["sha256"] == unit["outputs"]["best_model"]["sha256"]
        assert (run / "04_train" / output["path"] / "weights").exists()
        assert manifest["config"]["models"][name] == unit["config"][f"models.{name}"]
        assert (run / "04_train" / name / "log.txt").exists()
        assert not (run / "04_train" / name / "unfinished.json").exists()
    assert list(manifest["units"]) == NAMES and (run / "04_train" / "log.txt").exists()
    assert {entry["stage"] for entry in manifest["inputs"].values()} == set(BEFORE)
    assert "next: python 05_train_critic.py" in capsys.readouterr().err


def test_a_model_uses_and_reads_what_its_mode_and_start_need():
    plans = plan_models(load_config(quick_test=True))  # there, the generator starts from stage 02
    common = {"seed", "device", "precision"}
    labels = {f"data.{key}" for key in ("label_key", "label_classes", "spans_key", "span_classes")}
    own = {name: set(plan.uses) - common - {f"models.{name}"} for name, plan in plans.items()}
    assert own == {
        "generator": {"diffusion"}, "reference_lm": set(), "ar_baseline": set(), "inspector": {"stream.enabled", *labels},
        "judge": {"stream.enabled", *labels}, "ranker": {"ranker"},
    }  # fmt: skip
    assert plans["reference_lm"].reads == BEFORE[:1] and plans["generator"].reads == BEFORE[:2]
    assert plans["inspector"].reads == (*BEFORE, "04_train/generator")
    assert plans["judge"].reads == (*BEFORE, "04_train/inspector")
    streamed = plan_models(load_config(quick_test=True, overrides=["stream.enabled=true"]))
    assert "stream" in streamed["judge"].uses and "stream" not in streamed["ranker"].uses


def test_a_folder_from_outside_concerns_the_models_that_use_it_alone(tmp_path):
    for name in ("encoder", "start", "judge"):
        (tmp_path / name).mkdir()
    config = load_config(
        quick_test=True,
        overrides=[
            f"ranker.encoder={tmp_path / 'encoder'}", f"models.inspector.start={tmp_path / 'start'}",
            f'models.generator.modifiers={{judge: {{model: "{tmp_path / "judge"}", stop_step: 9}}}}',
        ],
    )  # fmt: skip
    files = {name: list(plan.files()) for name, plan in plan_models(config).items()}
    assert files == {
        "generator": [tmp_path / "judge"], "reference_lm": [], "ar_baseline": [], "inspector": [tmp_path / "start"],
        "judge": [], "ranker": [tmp_path / "encoder"],
    }  # fmt: skip


def test_a_language_model_needs_stage_01_alone(tmp_path, trainings, capsys):
    run = tmp_path / "run"
    make_earlier(run, BEFORE[:1])
    make(run, only=("reference_lm", "generator"))
    assert trainings.made == ["generator", "reference_lm"] and summary(run) is None
    assert "not trained yet: ar_baseline, inspector, judge, ranker;" in capsys.readouterr().err
    with pytest.raises(MissingInput, match=r"02_generate_candidates has not finished"):
        make(run, only=("inspector",))
    with pytest.raises(MissingInput, match=r"02_generate_candidates has not finished"):
        make(run)  # before any model is trained
    assert trainings.made == ["generator", "reference_lm"]
    assert "unfinished (complete: generator, reference_lm)" in inspect(run)


def test_a_start_that_is_not_trained_is_named_with_its_command(run):
    with pytest.raises(
        MissingInput, match=r"04_train/generator has not finished.*04_train\.py --run_dir .* --only generator"
    ):
        make(run, only=("inspector",))


# ------------------------------------------------------------------------------------------------- order


def test_models_are_trained_after_their_start_in_whatever_order_the_config_lists_them(run, trainings):
    given = [
        "models.generator.start=ranker",
        "models.inspector.start=scratch",
        "models.ar_baseline.start=judge",
    ]
    make(run, *given)
    assert trainings.made == ["inspector", "ranker", "generator", "reference_lm", "judge", "ar_baseline"]
    manifest = summary(run)
    assert (
        manifest is not None and list(manifest["units"]) == NAMES
    )  # the table keeps the order of the config
    assert weights(run, "generator").endswith("(ranker 20 (inspector 20 (scratch)))")


def test_models_that_start_from_each_other_are_refused():
    with pytest.raises(
        BadConfig, match=r"start from each other: inspector -> judge -> inspector; set models\.inspector"
    ):
        config_of("models.inspector.start=judge")


def test_an_unknown_start_is_refused_with_the_nearest_name(run):
    with pytest.raises(BadConfig, match=r"models\.judge\.start is 'inspectr'.*did you mean 'inspector'"):
        make(run, "models.judge.start=inspectr")
    with pytest.raises(UsageError, match="--only jugde: the config has no such model; did you mean 'judge'"):
        make(run, only=("jugde",))


def test_only_and_mode_select_in_the_order_of_training():
    assert choose_models(CONFIG, RunArgs(only=("judge", "generator"))) == ("generator", "judge")
    assert choose_models(CONFIG, RunArgs(only_mode="ranker")) == ("ranker",)
    assert choose_models(CONFIG, RunArgs()) == tuple(NAMES)


# ------------------------------------------------------------------------------------------------- changes


def test_a_changed_model_alone_is_refused_and_made_again_alone(run, trainings, capsys):
    make(run)
    before, units = state(run, "judge"), dict((summary(run) or {})["units"])
    trainings.made.clear()
    capsys.readouterr()
    changed = "models.judge.training.steps=7"
    with pytest.raises(BadConfig) as caught:
        make(run, changed)
    message = str(caught.value)
    assert "04_train/judge: models.judge.training.steps: 20 -> 7\n" in message
    assert "pass --overwrite --only judge to make" in message and message.count("04_train/") == 1
    said = capsys.readouterr().err
    assert [n for n in NAMES if f"04_train/{n} in {run} is up to date" in said] == [
        n for n in NAMES if n != "judge"
    ]

    make(run, changed, only=("judge",), overwrite=True)
    assert trainings.made == ["judge"] and weights(run, "judge").startswith("judge 7")
    assert state(run, "judge") == before
    after = summary(run)
    assert after is not None and {n for n in NAMES if after["units"][n] != units[n]} == {"judge"}
    assert after["config"]["models"]["judge"]["training"]["steps"] == 7
    make(run, changed)
    assert trainings.made == ["judge"]


def test_a_changed_start_asks_for_the_models_that_start_from_it(run, trainings, capsys):
    make(run)
    changed = "models.inspector.training.steps=7"
    with pytest.raises(BadConfig, match="--overwrite --only inspector --only judge --only ranker to make"):
        make(run, changed)
    trainings.made.clear()
    make(run, changed, only=("inspector",), overwrite=True)
    assert trainings.made == ["inspector"]
    assert summary(run) is None, "it would list a judge that another inspector made"
    assert "--overwrite --only judge --only ranker" in capsys.readouterr().err
    with pytest.raises(BadConfig, match=r"04_train/judge: input 04_train/inspector/best_model: .* -> "):
        make(run, changed)
    make(run, changed, only=("ranker", "judge"), overwrite=True)
    assert trainings.made == ["inspector", "judge", "ranker"] and summary(run) is not None
    assert "inspector 7" in weights(run, "judge")


def test_a_start_made_again_with_the_same_result_asks_for_nothing(run, trainings):
    make(run)
    trainings.made.clear()
    make(run, only=("generator",), overwrite=True)
    make(run)
    assert trainings.made == ["generator"] and summary(run) is not None


def test_other_candidates_concern_the_models_that_read_them_alone(run, trainings):
    make(run)
    other = "candidates.temperature=0.5"
    make_earlier(run, BEFORE[1:], config_of(other), overwrite=True)
    make_earlier(run, BEFORE[:1], config_of(other), overwrite=True)  # the same content but for its candidates
    with pytest.raises(BadConfig, match="input 01_prepare_dataset/facts"):
        make(run, other, only=("reference_lm",))
    make_earlier(run, BEFORE[:1], overwrite=True)
    trainings.made.clear()
    make(run, only=("generator", "reference_lm", "ar_baseline"))
    assert not trainings.made
    with pytest.raises(BadConfig, match=r"02_generate_candidates in .* was made with another config"):
        make(run)


def test_models_added_to_the_config_or_removed_from_it_cost_nothing(run, trainings, capsys):
    make(run)
    trainings.made.clear()
    before = state(run)
    second = "models.second={mode: language_model, attention: causal}"
    make(run, second)
    assert trainings.made == ["second"] and state(run, "second") == before
    assert list((summary(run) or {})["units"]) == [*NAMES, "second"]
    capsys.readouterr()
    make(run, "models.judge=null")
    assert trainings.made == ["second"] and state(run, "second") == before
    lines = [x for x in capsys.readouterr().err.splitlines() if "does not have" in x]
    assert lines == ["04_train keeps models that the config does not have: judge, second"]
    found = summary(run)
    assert found is not None and list(found["units"]) == [n for n in NAMES if n != "judge"]
    assert not any(key.startswith("judge/") for key in found["outputs"])


def test_a_second_run_does_nothing(run, trainings):
    make(run)
    files = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and ".locks" not in p.parts}
    make(run)
    assert files == {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and ".locks" not in p.parts
    }
    assert trainings.made == NAMES


def test_a_changed_file_of_a_start_is_noticed(run):
    make(run, only=("generator", "inspector"))
    (run / "04_train" / "inspector" / "best_model" / "weights").write_text("another")
    with pytest.raises(BadData, match=r"inspector/best_model is damaged.*--overwrite --only inspector"):
        make(run, only=("judge",))


# ------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("error", [Killed(), BadData("no"), KeyboardInterrupt()])
def test_an_interrupted_stage_goes_on_at_the_model_that_was_interrupted(run, trainings, error):
    trainings.fail = {"inspector": error}
    with pytest.raises(type(error)):
        make(run)
    assert trainings.made == ["generator", "reference_lm", "ar_baseline"] and summary(run) is None
    assert (run / "04_train" / "inspector" / "unfinished.json").exists()
    trainings.fail = {}
    make(run, resume=True)
    assert trainings.made == NAMES and summary(run) is not None
    with pytest.raises(UsageError, match="nothing to resume"):
        make(run, resume=True)


def test_resume_insists_on_unfinished_work(run, trainings):
    with pytest.raises(UsageError, match="nothing unfinished"):
        make(run, resume=True)
    make(run, only=("generator",))
    with pytest.raises(UsageError, match="nothing unfinished"):
        make(run, resume=True, only=("reference_lm",))
    make(run, resume=True)
    assert trainings.made == NAMES


def test_unfinished_work_of_other_settings_is_refused_before_any_other_model_is_trained(run, trainings):
    trainings.fail = {"ar_baseline": Killed()}
    with pytest.raises(Killed):
        make(run, only=("ar_baseline",))
    trainings.fail = {}
    with pytest.raises(
        BadConfig, match=r"04_train/ar_baseline: models\.ar_baseline\.training\.steps: 20 -> 5"
    ):
        make(run, "models.ar_baseline.training.steps=5")
    assert not trainings.made


@pytest.mark.slow
@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_killed_at_any_step_a_model_is_made_again_whole_and_the_summary_heals(
    run, tmp_path, monkeypatch, call
):
    """The n-th call ends the process, for every n. The judge is the old or the new one; others do not change."""
    make(run)
    before, changed, seen, done = state(run, "judge"), "models.judge.training.steps=7", set(), False
    for number in range(1, 60):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        with monkeypatch.context() as patch:
            count, real = iter(range(number - 1, -1, -1)), getattr(os, call)

            def killed(*args, real=real, count=count, **kwargs):
                if next(count, 1) == 0:
                    raise Killed
                return real(*args, **kwargs)

            patch.setattr(os, call, killed)
            try:
                make(copy, changed, only=("judge",), overwrite=True)
                done = next(count, None) is not None  # fewer calls than that: every call has failed once
            except Killed:
                done = False
        with reading(copy, "generator"):  # a reader repairs what the kill left
            pass
        found = weights(copy, "judge") if (copy / "04_train" / "judge").exists() else "none"
        make(copy, changed, only=("judge",), overwrite=True)
        make(copy, changed)
        after = summary(copy)
        assert after is not None and weights(copy, "judge").startswith("judge 7")
        assert after["units"]["judge"] == durable.sha256_file(copy / "04_train" / "judge" / "manifest.json")
        assert {k: v[1] for k, v in state(copy, "judge").items()} == {k: v[1] for k, v in before.items()}
        assert not list((copy / "04_train").glob("*.new")) and not list((copy / "04_train").glob("*.old"))
        seen.add(found.split(" ")[1] if found != "none" else found)
        shutil.rmtree(copy)
        if done:
            break
    assert done and "7" in seen


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_between_the_last_model_and_the_summary_the_next_command_writes_it(
    run, trainings, monkeypatch, overwrite
):
    make(run)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("lib.units.make_manifest", lambda *_: (_ for _ in ()).throw(Killed()))
        make(run, "models.judge.training.steps=7", only=() if overwrite else ("judge",), overwrite=True)
    trainings.made.clear()
    make(run, "models.judge.training.steps=7", overwrite=overwrite)
    found = summary(run)
    assert not trainings.made and found is not None and weights(run, "judge").startswith("judge 7")
    assert found["units"]["judge"] == durable.sha256_file(run / "04_train" / "judge" / "manifest.json")
    assert not (run / "04_train.new").exists()


# ------------------------------------------------------------------------------------------------- all models again


def test_all_models_made_again_replace_the_old_ones_when_all_are_complete(run, trainings, capsys):
    make(run)
    before, changed = state(run), ["models.generator.training.steps=7", "models.judge.training.steps=8"]
    trainings.made.clear()
    trainings.fail = {"judge": Killed()}
    with pytest.raises(Killed):
        make(run, *changed, overwrite=True)
    assert state(run) == before and trainings.made == NAMES[:4]
    assert "(--overwrite is unfinished: 04_train.new)" in inspect(run)
    make(run)  # the old ones are up to date
    assert trainings.made == NAMES[:4]
    trainings.fail = {}
    make(run, *changed, overwrite=True)
    assert trainings.made == NAMES, "a model of the first attempt was made twice"
    assert weights(run, "judge") == "judge 8 (inspector 20 (generator 7 (scratch)))"
    assert not (run / "04_train.new").exists() and not (run / "04_train" / "unfinished.json").exists()
    texts = [p for p in (run / "04_train").rglob("*.json*") if durable.NEW.encode() in p.read_bytes()]
    assert summary(run) is not None and not texts
    make(run, *changed)
    assert trainings.made == NAMES


def test_some_models_made_again_go_on_where_the_same_command_was_interrupted(run, trainings):
    make(run)
    trainings.made.clear()
    only = ("inspector", "judge", "ranker")
    trainings.fail = {"judge": Killed()}
    for _ in range(2):
        with pytest.raises(Killed):
            make(run, "models.ranker.training.steps=7", only=only, overwrite=True)
    assert trainings.made == ["inspector"], "a model of the first attempt was made twice"
    with pytest.raises(Killed):  # another command begins at its first model
        make(run, "models.ranker.training.steps=8", only=only, overwrite=True)
    assert trainings.made == ["inspector"] * 2
    trainings.fail = {}
    make(run, "models.ranker.training.steps=7", only=only, overwrite=True)
    assert trainings.made == ["inspector", "inspector", "judge", "ranker"] and summary(run) is not None
    make(run, "models.ranker.training.steps=7", only=only, overwrite=True)  # nothing of it is left
    assert trainings.made[4:] == list(only)


def test_an_attempt_with_other_settings_begins_again(run, trainings):
    make(run)
    trainings.fail = {"ar_baseline": Killed()}
    for steps in (7, 8):
        with pytest.raises(Killed):
            make(run, f"models.ranker.training.steps={steps}", overwrite=True)
    assert trainings.made == [*NAMES, *NAMES[:2], *NAMES[:2]]


def test_models_that_the_config_no_longer_has_survive_that_all_are_made_again(run, trainings):
    make(run)
    judge = state(run, *[n for n in NAMES if n != "judge"])
    make(run, "models.judge=null", overwrite=True)
    assert state(run, *[n for n in NAMES if n != "judge"]) == judge
    trainings.made.clear()
    make(run)
    assert not trainings.made and list((summary(run) or {})["units"]) == NAMES


def test_a_first_command_with_overwrite_works_in_place_and_goes_on(run, trainings):
    trainings.fail = {"judge": Killed()}
    with pytest.raises(Killed):
        make(run, overwrite=True)
    trainings.fail = {}
    make(run, overwrite=True)
    assert trainings.made == NAMES and not (run / "04_train.new").exists()


def test_models_made_in_a_run_that_links_to_another_leave_the_other_as_it_is(run, tmp_path, trainings):
    make(run, only=tuple(NAMES[:5]))
    before, second = state(run), tmp_path / "second"
    second.mkdir()
    for name in (*BEFORE, "04_train"):
        (second / name).symlink_to(run / name)
    make(second, only=tuple(NAMES[:5]))  # nothing to make: the link stays
    assert (second / "04_train").is_symlink() and trainings.made == NAMES[:5]
    make(second)
    assert trainings.made == NAMES and summary(second) is not None and summary(run) is None
    make(second, "models.judge.training.steps=7", only=("judge",), overwrite=True)
    assert weights(second, "judge").startswith("judge 7") and state(run) == before


def test_a_config_without_models_trains_nothing(run, capsys):
    for overwrite in (False, True):
        make(run, *[f"models.{name}=null" for name in NAMES], overwrite=overwrite)
        assert "the config has no models" in capsys.readouterr().err and summary(run) is None


# ------------------------------------------------------------------------------------------------- several processes


@contextmanager
def stage_of(run: Path, *names: str, config: Config = CONFIG, **flags):
    """Stage 04 as another process enters it. Locks of two entries in one process exclude each other, too."""
    args = RunArgs(run_dir=run, only=names, **flags)
    chosen = choose_models(config, args)
    with StageOfUnits("04_train.py", config, args, plans=plan_models(config), chosen=chosen) as stage:
        yield stage


@contextmanager
def reading(run: Path, *names: str):
    """A later stage that reads some models."""
    with Stage(
        "05_train_critic.py",
        CONFIG,
        RunArgs(run_dir=run),
        uses=("seed",),
        reads=[unit_of(n) for n in names],
        restarts=True,
    ) as stage:
        yield stage
        stage.leave_incomplete("only looked")


def test_two_processes_train_different_models_but_not_the_same(run, trainings):
    with stage_of(run, "reference_lm") as first, first.unit("reference_lm"):
        make(run, only=("generator", "inspector"))
        with pytest.raises(Busy, match="at work on 04_train/reference_lm"):
            make(run, only=("reference_lm",))
        with pytest.raises(Busy, match="at work on 04_train in"):
            make(run, overwrite=True)
        with reading(run, "generator"), pytest.raises(Busy, match="at work on 04_train/generator"):
            make(run, only=("generator",), overwrite=True)
        with pytest.raises(Busy, match="at work on 04_train/reference_lm"), reading(run, "reference_lm"):
            pass
        with pytest.raises(Busy, match="at work on 01_prepare_dataset"):
            make_earlier(run, BEFORE[:1], overwrite=True)
    assert trainings.made == ["generator", "inspector"]


def test_a_start_is_not_made_again_while_a_model_learns_from_it(run):
    make(run, only=("generator",))
    with (
        stage_of(run, "inspector") as first,
        first.unit("inspector") as unit,
        pytest.raises(Busy, match="at work on 04_train/generator"),
    ):
        make(run, only=("generator",), overwrite=True)
    unit.leave_incomplete("only looked")


def test_one_model_at_a_time_learns_from_shards(run):
    from lib.training.stage_inputs import streaming

    config = config_of("stream.enabled=true", "models.judge.start=scratch", "models.inspector.start=scratch")
    with stage_of(run, "judge", config=config) as first, stage_of(run, "inspector", config=config) as second:
        judge, inspector = (s.__enter__() for s in (first.unit("judge"), second.unit("inspector")))
        judge.lock_alone("02_stream.trainer", "the shards of 02_stream")
        with (
            pytest.raises(Busy, match="the shards of 02_stream"),
            streaming(inspector, config, SimpleNamespace()),  # pyright: ignore[reportArgumentType]
        ):
            pass
        for unit in (judge, inspector):
            unit.leave_incomplete("only looked")
            unit.__exit__(None, None, None)


def test_two_processes_that_finish_at_the_same_time_leave_a_summary_of_both(run, trainings):
    make(run, only=tuple(NAMES[:4]))
    with stage_of(run, "judge") as stage:
        with stage.unit("judge") as unit:
            unit.write_json("facts", {})
        make(run, only=("ranker",))  # the other process ends between the unit and the summary of this one
        assert set((summary(run) or {})["units"]) == set(NAMES)
        assert stage.summarise() is None  # there is nothing to add


# ------------------------------------------------------------------------------------------------- later stages


def test_a_later_stage_depends_on_the_models_that_it_reads_alone(run):
    make(run)

    def critic(*overrides: str) -> bool:
        args = RunArgs(run_dir=run)
        with Stage(
            "05_train_critic.py", config_of(*overrides), args, uses=("seed",), reads=(unit_of("generator"),)
        ) as stage:
            return stage.finished

    assert not critic() and critic()
    changed = "models.judge.training.steps=7"
    make(run, changed, only=("judge",), overwrite=True)
    assert critic(changed) and critic()
    make(run, changed, "models.generator.training.steps=7", only=("generator",), overwrite=True)
    with pytest.raises(BadConfig, match=r"04_train/generator in .* was made with another config"):
        critic()
    with pytest.raises(BadConfig, match=r"input 04_train/generator/best_model"):
        critic("models.generator.training.steps=7")


def test_results_show_the_models_that_were_made_with_these_settings(run):
    from lib.training.model_plans import trained_models

    make(run)
    with reading(run, "generator") as stage:
        assert list(trained_models(stage, CONFIG)) == NAMES
        assert list(trained_models(stage, config_of("models.judge.training.steps=7"))) == [
            n for n in NAMES if n != "judge"
        ]


# ------------------------------------------------------------------------------------------------- earlier versions


def without_units(run: Path) -> None:
    """Stage 04 as earlier versions left it: one manifest, none for the models."""
    make(run)
    file = run / "04_train" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["units"]
    file.write_text(json.dumps(manifest))
    for name in NAMES:
        (run / "04_train" / name / "manifest.json").unlink()


def test_a_kill_while_the_first_file_of_a_unit_is_written_does_no_harm(run, trainings):
    unit = run / "04_train" / "generator"
    unit.mkdir(parents=True)
    (unit / "unfinished.json.123.tmp").write_bytes(b"{")
    make(run)
    assert trainings.made == NAMES and summary(run) is not None and not list(unit.glob("*.tmp"))


def test_the_summary_removes_its_own_temporaries_and_nobody_else_s(run, trainings):
    folder = run / "04_train"
    folder.mkdir()
    other = folder / "overwrite_0123456789abcdef.json.9.tmp"  # another command with --overwrite writes it now
    for file in (other, folder / "manifest.json.9.tmp"):
        file.touch()
    make(run)
    assert summary(run) is not None and [path.name for path in folder.glob("*.tmp")] == [other.name]


def test_an_attempt_removes_what_its_killed_processes_left(tmp_path):
    attempt = Attempt(tmp_path, ("judge",), Dependencies({}, {}, {}))
    attempt.add("judge")
    attempt.path.with_name(f"{attempt.path.name}.9.tmp").touch()
    attempt.finish()
    assert not list(tmp_path.iterdir())


def test_a_run_of_an_earlier_version_is_refused_with_what_to_do(run, trainings):
    without_units(run)
    trainings.made.clear()
    what = r"04_train in .* was made by an earlier version.*python 04_train\.py --overwrite"
    for flags in ({}, {"only": ("judge",)}, {"only": ("judge",), "overwrite": True}):
        with pytest.raises(BadData, match=what):
            make(run, **flags)
    with pytest.raises(BadData, match=what), reading(run, "generator"):
        pass
    (run / "04_train" / "manifest.json").unlink()  # it was interrupted before its end
    with pytest.raises(
        BadData, match=r"generator has files, but neither manifest\.json nor unfinished\.json"
    ):
        make(run)
    assert not trainings.made
    make(run, overwrite=True)
    assert trainings.made == NAMES and summary(run) is not None


def test_the_flag_is_read(monkeypatch):
    from lib.cli import run_stage

    seen: list = []
    for words, expected in ((["--only", "a", "--only", "b", "--only", "a"], ("a", "b")), ([], ())):
        monkeypatch.setattr("sys.argv", ["04_train.py", *words])
        run_stage(lambda config, args: seen.append(args.only), "test", with_mode=True)
        assert seen.pop() == expected
    monkeypatch.setattr("sys.argv", ["04_train.py", "--only", "a", "--mode", "ranker"])
    with pytest.raises(SystemExit, match=re.escape("2")):
        run_stage(lambda *_: None, "test", with_mode=True)


def diagnosis(run: Path) -> tuple[dict[str, str], str]:
    """The words of the doctor for each stage and model, and its command."""
    states = examine_run(run)
    return {state.name: state.word for state in states}, next_command(run, states)


@pytest.mark.parametrize("complete", [True, False])
def test_the_doctor_calls_the_stage_busy_while_a_model_is_trained(run, monkeypatch, complete):
    make_earlier(run, names=("00_check_data",))
    make(run, only=() if complete else (NAMES[0],))
    script, seen = importlib.import_module("04_train"), []
    train = script.train

    def look(*inputs) -> None:
        seen.append(diagnosis(run))
        train(*inputs)

    monkeypatch.setattr(script, "train", look)
    make(run, only=("reference_lm",), overwrite=True)
    ((words, command),) = seen
    assert words["04_train/reference_lm"] == words["04_train"] == "busy" and command == ""


def test_the_doctor_updates_the_summary_after_a_kill_between_a_model_and_the_summary(run):
    make_earlier(run, names=("00_check_data",))
    make(run)
    before = (run / "04_train" / "manifest.json").read_bytes()
    time.sleep(1.1)  # manifests hold whole seconds, and the rest of the new judge is the same
    make(run, only=("judge",), overwrite=True)
    (run / "04_train" / "manifest.json").write_bytes(before)
    words, command = diagnosis(run)
    assert words["04_train"] == "unfinished" and words["04_train/judge"] == "complete"
    assert command == f"python 04_train.py --run_dir {run}", "it trains nothing again"
    make(run)
    assert diagnosis(run)[0]["04_train"] == "complete"
