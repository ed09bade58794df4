"""All that changes a result is an input: code, library versions, files and folders from outside, commits of the hub.

Every stage is entered here as its script enters it, with stages before it that have made nothing; what they do inside
is tested elsewhere.
"""

import fcntl
import importlib
import json
import shutil
from pathlib import Path

import pytest

from lib import outside
from lib.artifacts import Stage
from lib.config import Config, load_config
from lib.errors import BadConfig, BadData, Busy, MissingInput
from lib.runs import STAGES, RunArgs, existing_runs, find_run, load_manifest
from lib.stage.unfinished import Dependencies
from lib.training import checkpoint
from lib.training.model_plans import plan_models
from lib.units import Unit
from tests.conftest import undeclared
from tests.trainings import Killed

CONFIG = load_config(quick_test=True)
SCRIPTS = [*STAGES, "02_stream", "06_score_text"]


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Asking git for the commit takes longer than all the rest."""
    monkeypatch.setattr("lib.code_version.commit", lambda: {"commit": None, "dirty": None})


class Hollow(Stage):
    """A stage that is complete as soon as it is entered: its manifest has inputs and no outputs."""

    def __enter__(self):
        self.check = None
        super().__enter__()
        if not self.finished:
            self._complete()
            self.finished = True
        return self


class HollowUnit(Hollow, Unit):
    """The same for a model of stage 04."""


@pytest.fixture
def hollow(monkeypatch):
    """Makes a stage hollow: it is complete as soon as it is entered."""

    def make(stage: str):
        module = importlib.import_module(stage)
        if stage == "04_train":
            monkeypatch.setattr("lib.units.Unit", HollowUnit)
            monkeypatch.setattr("lib.training.stage_inputs.read_stage_inputs", lambda *_: None)
            monkeypatch.setattr("lib.training.stage_inputs.refuse_longer_candidates", lambda *_: None)
        else:
            monkeypatch.setattr(module, "Stage", Hollow)
        return module

    return make


# ------------------------------------------------------------------------------------------------- files from outside


@pytest.fixture
def outside_files(tmp_path) -> dict[str, Path]:
    """Folders as models have them, and files of texts and labels."""
    folder = tmp_path / "outside"
    for name in ("encoder", "start", "judge", "checkpoint", "adapter", "adapted"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(name.encode())
        (folder / name / "tokenizer.json").write_text(name)
    (folder / "adapter" / "ranker.json").write_text(
        json.dumps({"lora": True, "base": {"name": str(folder / "adapted")}})
    )
    for name in ("text.txt", "other.txt", "labels.json", "gaps.parquet"):
        (folder / name).write_text(
            "A text of some length. " * 40 if name.endswith("txt") else '{"text:0": 0.5}'
        )
    return {path.stem: path for path in folder.iterdir()}


def config_of(files: dict[str, Path], *overrides: str) -> Config:
    return load_config(
        quick_test=True,
        overrides=[
            f"data.path={files['text']}", "ranker.prompt=question_page",
            f"ranker.encoder={files['encoder']}", f"generator.checkpoint={files['checkpoint']}",
            f"models.judge.start={files['start']}", f"models.ranker.start={files['adapter']}",
            f"sampler.infill_file={files['gaps']}",
            f'models.generator.modifiers={{judge: {{model: "{files["judge"]}", stop_step: 9}}}}', *overrides,
        ],
    )  # fmt: skip


WAYS = {
    "": ["stream.enabled=true"],
    "ppo": ["critic.method=ppo"],
    "labels": ["candidates.source=original_only", "candidates.per_example=1"],
    "score": [],
}
# stage and way -> what it reads, and what it must not look at
WIRES = {
    "00_check_data": ({"text"}, {"labels", "encoder", "start", "judge"}),
    "00_check_data labels": ({"text", "labels"}, {"encoder"}),
    "01_prepare_dataset": ({"encoder/tokenizer.json", "encoder/config.json"}, {"encoder/model.safetensors", "start"}),
    "02_generate_candidates": ({"checkpoint"}, {"encoder", "start"}),
    "03_build_rewards": (set(), {"encoder", "checkpoint"}),
    "03_build_rewards labels": ({"labels"}, {"text"}),
    "04_train": ({"start", "encoder", "judge", "checkpoint", "adapter", "adapted"}, {"gaps"}),
    "05_train_critic": (set(), {"encoder", "start", "gaps"}),
    "05_train_critic ppo": ({"encoder", "adapted"}, {"start", "judge"}),
    "06_sample": ({"gaps"}, {"encoder", "start"}),
    "06_sample ppo": ({"encoder", "adapted"}, {"gaps", "start"}),
    "06_sample score": ({"other"}, {"gaps", "encoder"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", WIRES)
def test_one_byte_of_any_outside_file_refuses_the_finished_stage(case, outside_files, tmp_path, hollow):
    name, _, way = case.partition(" ")
    labels = [f"labels.path={outside_files['labels']}"] if way == "labels" else []
    config = config_of(outside_files, *WAYS[way], *labels)
    run = tmp_path / "run"

    def enter(stage: str) -> None:
        module = hollow(stage)
        score = outside_files["other"] if way == "score" and stage == name else None
        module.main(config, RunArgs(run_dir=run, quick_test=True, score=score))

    for stage in STAGES[: STAGES.index(name) + 1]:
        enter(stage)
    read, unread = WIRES[case]
    for path in sorted(read | unread):
        stem, _, file = path.partition("/")
        target = outside_files[stem] / file if file else outside_files[stem]
        changed = target / "tokenizer.json" if target.is_dir() else target
        before = changed.read_bytes()
        changed.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        if path in read:
            if way != "score":  # what is scored is read before the stage is entered
                with pytest.raises(BadConfig, match=r"input .* -> "):
                    enter(name)
            else:
                changed.write_bytes(before + b" more")
                with pytest.raises(BadConfig, match=r"input other\.txt: .* -> "):
                    enter(name)
        else:
            enter(name)
        changed.write_bytes(before)
    enter(name)  # as it was


def test_a_new_file_in_a_folder_and_a_folder_that_is_gone_are_noticed(outside_files, tmp_path, monkeypatch):
    config = config_of(outside_files)
    for stage in STAGES[:2]:
        monkeypatch.setattr(importlib.import_module(stage), "Stage", Hollow)
    enter = [
        lambda s=s: importlib.import_module(s).main(config, RunArgs(run_dir=tmp_path)) for s in STAGES[:2]
    ]
    for stage in enter:
        stage()
    (outside_files["encoder"] / "special_tokens_map.json").write_text("{}")
    with pytest.raises(BadConfig, match=r"input special_tokens_map\.json: \(none\) -> "):
        enter[1]()
    outside_files["text"].unlink()
    with pytest.raises(MissingInput, match=r"text\.txt"):
        enter[0]()


# ------------------------------------------------------------------------------------------------- models of the hub

COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub that holds two commits of a model, offline; returns the way to move `main`."""
    import huggingface_hub

    cache = tmp_path / "hub"
    model = cache / "models--someone--encoder"
    for commit in COMMITS:
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache), raising=False)

    def move(commit: str, ref: str = "main") -> None:
        (model / "refs" / ref).write_text(commit)
        outside._on_the_hub.cache_clear()

    move(COMMITS[0])
    yield move
    outside._on_the_hub.cache_clear()


def test_a_model_of_the_hub_is_pinned_and_another_commit_is_refused(hub, tmp_path):
    def enter(encoder: str, run: str) -> dict:
        config = load_config(quick_test=True, overrides=[f"ranker.encoder={encoder}"])
        files = outside.of_model(config.models["ranker"], config)
        with Hollow(
            "00_check_data.py", config, RunArgs(run_dir=tmp_path / run), uses=("ranker",), files=files
        ):
            pass
        manifest = load_manifest(tmp_path / run / "00_check_data")
        assert manifest is not None
        return manifest["inputs"]

    expected = {"path": "someone/encoder", "revision": COMMITS[0]}
    assert enter("someone/encoder", "one") == {"someone/encoder": expected}
    hub(COMMITS[1], "v2")
    assert enter("someone/encoder@v2", "two")["someone/encoder"]["revision"] == COMMITS[1]
    assert enter(f"someone/encoder@{COMMITS[1]}", "three")["someone/encoder"]["revision"] == COMMITS[1]
    hub(COMMITS[1])
    with pytest.raises(BadConfig, match=r"input someone/encoder: aaaa.* -> bbbb"):
        enter("someone/encoder", "one")
    enter("someone/encoder@v2", "two")
    with pytest.raises(MissingInput, match=r"encoder someone/encoder@v3 is not a folder"):
        enter("someone/encoder@v3", "four")


def test_what_is_read_from_the_hub_is_the_recorded_commit(hub, monkeypatch):
    """The name may move on while a stage runs."""
    from lib.models import encoders

    asked = []

    def noted(name, **kwargs):
        asked.append((name, kwargs["revision"]))
        raise OSError("seen")

    monkeypatch.setattr(encoders.AutoTokenizer, "from_pretrained", noted)
    for name in ("someone/encoder", f"someone/encoder@{COMMITS[1]}"):
        with pytest.raises(MissingInput):
            encoders.open_encoder(*encoders.configured(name)[:1], revision=encoders.configured(name)[1])
    assert asked == [("someone/encoder", COMMITS[0]), ("someone/encoder", COMMITS[1])]


# ------------------------------------------------------------------------------------------------- settings


def test_no_stage_reads_a_setting_that_its_manifest_does_not_have(quick_run, quick_reads):
    assert quick_reads["04_train"] >= {"models", "diffusion", "seed"}
    assert "diffusion" in quick_reads["04_train/generator"]
    assert not {"diffusion", "ranker", "candidates"} & quick_reads["04_train/reference_lm"]
    assert {"04_train/judge", "06_sample"} <= quick_reads.keys() and not undeclared(quick_reads, quick_run)


def test_a_setting_that_changes_no_result_refuses_nothing(tmp_path):
    allowed = load_config(quick_test=True, overrides=["training.allow_inexact_resume=true"])

    def enter(config: Config, stage: str, **flags) -> Stage:
        reads = () if stage == "00_check_data" else ("00_check_data",)
        with Stage(
            f"{stage}.py", config, RunArgs(run_dir=tmp_path, **flags), uses=("models",), reads=reads
        ) as s:
            if flags.get("resume"):
                raise Killed
        return s

    enter(CONFIG, "00_check_data")
    assert enter(allowed, "00_check_data").finished
    assert not enter(allowed, "01_prepare_dataset").finished


@pytest.mark.parametrize(
    ("setting", "changes_results"),
    [
        ("stream.timeout_seconds=3600", False), ("stream.max_backlog=9", False), ("training.tracker=wandb", False),
        ("training.allow_inexact_resume=true", False), ("stream.ramp_epochs=9", True),
        ("stream.shard_examples=9", True), ("models.judge.training.steps=9", True),
    ],
)  # fmt: skip
def test_only_settings_that_change_results_make_a_model_again(setting, changes_results):
    configs = [load_config(overrides=["stream.enabled=true", *more]) for more in ([], [setting])]
    before, after = (
        Dependencies(config.slice(plan_models(config)["judge"].uses), {}, {}) for config in configs
    )
    assert before.config != after.config
    assert bool(after.changes_since(before.config, {})) == changes_results
    assert (before.digest != after.digest) == changes_results  # by it, parts are kept


# ------------------------------------------------------------------------------------------------- code and versions


@pytest.fixture
def code(monkeypatch) -> dict[str, str]:
    """The code that every stage can import; a test changes it."""
    files = {f"lib/{name}.py": "0" * 64 for name in "abcdef"}
    monkeypatch.setattr("lib.code_version.code_files", lambda script, task: dict(files))
    return files


def enter(tmp_path, name: str, reads=(), fault: bool = False, **kwargs) -> Stage:
    flags = {key: kwargs.pop(key) for key in ("overwrite",) if key in kwargs}
    with Stage(
        f"{name}.py", CONFIG, RunArgs(run_dir=tmp_path, **flags), uses=("seed",), reads=reads, **kwargs
    ) as s:
        if not s.finished and fault:
            raise Killed
        if not s.finished:
            s.write_json("facts", {"of": name})
    return s


def code_of(tmp_path, name: str) -> dict:
    manifest = load_manifest(tmp_path / name)
    assert manifest is not None
    return manifest["code"]


def test_a_finished_stage_of_other_code_is_used_as_it_is_and_said_in_one_line(tmp_path, code, capsys):
    enter(tmp_path, "00_check_data")
    made = (tmp_path / "00_check_data" / "manifest.json").read_bytes()
    assert code_of(tmp_path, "00_check_data")["files"] == code
    capsys.readouterr()
    assert enter(tmp_path, "00_check_data").finished
    assert "different code" not in capsys.readouterr().err
    for name in "abcd":
        code[f"lib/{name}.py"] = "1" * 64
    assert enter(tmp_path, "00_check_data").finished
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "is up to date, but was made with different code" in said[0]
    assert "(lib/a.py, lib/b.py, lib/c.py and 1 more)" in said[0] and "--overwrite" in said[0]
    assert (tmp_path / "00_check_data" / "manifest.json").read_bytes() == made

    enter(tmp_path, "01_prepare_dataset", reads=("00_check_data",))
    said = [line for line in capsys.readouterr().err.splitlines() if "different code" in line]
    assert said == [
        "made with different code, and used as they are: 00_check_data (lib/a.py, lib/b.py, lib/c.py and 1 more)"
    ]
    record = code_of(tmp_path, "01_prepare_dataset")
    assert record["upstream_differs"] == {
        "00_check_data": {"files": ["lib/a.py", "lib/b.py", "lib/c.py", "lib/d.py"]}
    }
    assert record["files"] == code and record["mixed"] == []

    enter(tmp_path, "00_check_data", overwrite=True)
    assert code_of(tmp_path, "00_check_data")["files"] == code
    assert "different code" not in capsys.readouterr().err


def test_other_versions_of_libraries_are_said_and_recorded(tmp_path, code, capsys, monkeypatch):
    enter(tmp_path, "00_check_data")
    real = importlib.import_module("lib.runs").versions()
    assert {"torch", "transformers", "tokenizers", "numpy", "peft"} <= set(real)
    monkeypatch.setattr("lib.stage.manifest.versions", lambda: real | {"numpy": "9.9"})
    enter(tmp_path, "01_prepare_dataset", reads=("00_check_data",))
    change = f"numpy {real['numpy']} -> 9.9"
    assert f"00_check_data ({change})" in capsys.readouterr().err
    differs = code_of(tmp_path, "01_prepare_dataset")["upstream_differs"]
    assert differs == {"00_check_data": {"versions": {"numpy": change.removeprefix("numpy ")}}}


def test_a_stage_that_holds_nothing_yet_begins_again_under_other_code(tmp_path, code, capsys):
    with pytest.raises(Killed):
        enter(tmp_path, "00_check_data", fault=True)
    code["lib/a.py"] = "1" * 64
    enter(tmp_path, "00_check_data")
    record = code_of(tmp_path, "00_check_data")
    assert (
        record["files"] == code and record["mixed"] == [] and "different code" not in capsys.readouterr().err
    )


def test_work_that_was_begun_by_other_code_is_said_and_recorded_wherever_it_is_read(tmp_path, code, capsys):
    def begun(change: str) -> None:
        with (
            pytest.raises(Killed),
            Stage("00_check_data.py", CONFIG, RunArgs(run_dir=tmp_path), uses=("seed",)) as stage,
        ):
            (stage.folder / "model").mkdir(exist_ok=True)
            raise Killed
        code[change] = "1" * 64
        capsys.readouterr()

    begun("lib/a.py")
    begun("lib/b.py")
    enter(tmp_path, "00_check_data")
    said = [line for line in capsys.readouterr().err.splitlines() if "different code" in line]
    assert said == [
        f"00_check_data in {tmp_path} was begun with different code (lib/b.py); what is already complete is kept"
    ]
    assert code_of(tmp_path, "00_check_data")["mixed"] == ["lib/a.py", "lib/b.py"]
    enter(tmp_path, "01_prepare_dataset", reads=("00_check_data",))
    differs = code_of(tmp_path, "01_prepare_dataset")["upstream_differs"]
    assert differs == {"00_check_data": {"files": ["lib/a.py", "lib/b.py"]}}


@pytest.mark.parametrize(
    ("files", "outcome", "mixed"),
    [
        (["log_0_of_4.txt"], None, False),
        (["parts/part_00000.json", "facts/part_00000.parquet"], "parts that it made are made again", False),
        (["parts/tokenizer.json", "tokenizer/tokenizer.json"], "parts that it made are made again", False),
        (["parts/part_00000.json", "generator/metrics.jsonl"],
         "trained models are kept, and parts that it made are made again", True),
        (["generator/metrics.jsonl"], "what is already complete is kept", True),
    ],
)  # fmt: skip
def test_code_counts_as_mixed_only_where_its_work_is_kept(tmp_path, code, capsys, files, outcome, mixed):
    with (
        pytest.raises(Killed),
        Stage("00_check_data.py", CONFIG, RunArgs(run_dir=tmp_path), uses=("seed",)) as s,
    ):
        for file in files:
            (s.folder / file).parent.mkdir(exist_ok=True)
            (s.folder / file).touch()
        raise Killed
    code["lib/a.py"] = "1" * 64
    capsys.readouterr()
    enter(tmp_path, "00_check_data")
    said = [
        line.partition("; ")[2] for line in capsys.readouterr().err.splitlines() if "different code" in line
    ]
    assert said == ([] if outcome is None else [outcome])
    assert code_of(tmp_path, "00_check_data")["mixed"] == (["lib/a.py"] if mixed else [])


def test_a_manifest_that_does_not_say_its_code_counts_as_of_other_code(tmp_path, code, capsys):
    enter(tmp_path, "00_check_data")
    path = tmp_path / "00_check_data" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["code"]["files"], manifest["code"]["mixed"]
    path.write_text(json.dumps(manifest))
    assert enter(tmp_path, "00_check_data").finished
    assert "made with different code" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_stage_finds_its_code(script):
    from lib.code_version import code_files

    found = code_files(f"{script}.py", "text")
    assert sum(not path.startswith("lib/") for path in found) == 1 and "lib/artifacts.py" in found


# ------------------------------------------------------------------------------------------------- half-trained models


def test_a_half_trained_model_does_not_go_on_under_other_code_or_libraries(tmp_path, capsys):
    before = {"torch": "1", "transformers": "5", "code": {"lib/a.py": "0", "lib/b.py": "0"}}

    def check(now: dict, allow: bool = False) -> None:
        checkpoint.check_fingerprint(before, now, allow, "judge", tmp_path / "judge")

    check(dict(before))
    other = before | {"code": {"lib/a.py": "1", "lib/b.py": "0", "lib/c.py": "0"}}
    with pytest.raises(BadConfig) as caught:
        check(other)
    message = str(caught.value)
    assert "changed code: lib/a.py, lib/c.py)" in message and "lib/b.py" not in message
    assert "training.allow_inexact_resume=true" in message and f"remove {tmp_path / 'judge'}" in message
    with pytest.raises(BadConfig, match="transformers: 5 -> 6"):
        check(before | {"transformers": "6"})
    assert not capsys.readouterr().err
    check(other, allow=True)
    assert (
        "judge: continuing in another environment (changed code: lib/a.py, lib/c.py)"
        in capsys.readouterr().err
    )


def test_the_fingerprint_of_a_checkpoint_has_libraries_and_the_stage_s_code():
    from lib.runtime import Runtime

    runtime = Runtime.detect(CONFIG, {"lib/a.py": "0"})
    assert runtime.code == {"lib/a.py": "0"}
    expected = {"torch", "transformers", "tokenizers", "numpy", "peft", "device", "threads", "precision"}
    assert runtime.fingerprint().keys() >= expected


def test_frozen_weights_are_recognised_and_learning_ones_do_not_count():
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    learning = {"1.weight", "1.bias"}
    digest = checkpoint.frozen_digest(model, learning)
    with torch.no_grad():
        model.get_parameter("1.weight").add_(1)
    assert checkpoint.frozen_digest(model, learning) == digest
    for name in ("0.weight", "0.bias"):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.view(-1)[0].add_(1e-3)
        found = checkpoint.frozen_digest(model, learning)
        assert found != digest
        digest = found
    assert checkpoint.frozen_digest(model.to(torch.bfloat16), learning) != digest
    checkpoint.check_frozen(digest, digest, "ranker")
    checkpoint.check_frozen(None, digest, "ranker")  # of a version that did not keep it
    with pytest.raises(BadData, match="ranker: the frozen weights"):
        checkpoint.check_frozen("0" * 64, digest, "ranker")


@pytest.mark.slow
def test_another_code_stops_a_real_training(quick_run, tmp_path, monkeypatch):
    """Stage 04, killed in its second model: the first, complete, stays; the second refuses, by the names of the files."""
    from lib.training.loop import _Run

    few = [
        "models.reference_lm=null",
        "models.ar_baseline=null",
        "models.inspector=null",
        "models.ranker=null",
        "models.judge.start=generator",
    ]
    steps = [
        f"models.{m}.training.{k}" for m in ("generator", "judge") for k in ("steps=4", "checkpoint_every=1")
    ]
    config = load_config(quick_test=True, overrides=[*few, *steps])
    allowed = load_config(
        quick_test=True, overrides=[*few, *steps, "models.judge.training.allow_inexact_resume=true"]
    )
    for name in STAGES[:4]:
        (tmp_path / name).symlink_to(quick_run / name)
    files = {"04_train.py": "0" * 64, "lib/a.py": "0" * 64}
    monkeypatch.setattr("lib.code_version.code_files", lambda script, task: dict(files))
    args, real = RunArgs(run_dir=tmp_path, quick_test=True), _Run.step

    def step(self, data, progress, stop):
        if self.label == "judge" and self.state.step == 2:
            raise Killed
        return real(self, data, progress, stop)

    monkeypatch.setattr(_Run, "step", step)
    with pytest.raises(Killed):
        importlib.import_module("04_train").main(config, args)
    monkeypatch.setattr(_Run, "step", real)
    generator = (tmp_path / "04_train" / "generator" / "training_manifest.json").read_bytes()
    files["lib/a.py"] = "1" * 64
    with pytest.raises(
        BadConfig, match=r"judge was started in another environment \(changed code: lib/a\.py\)"
    ):
        importlib.import_module("04_train").main(config, args)
    importlib.import_module("04_train").main(allowed, args)
    assert (tmp_path / "04_train" / "generator" / "training_manifest.json").read_bytes() == generator
    assert code_of(tmp_path, "04_train")["mixed"] == ["lib/a.py"]


def test_shards_of_other_code_count_as_absent(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from lib import shards

    stage = SimpleNamespace(run_dir=tmp_path, sha256_of=lambda stage, output: "0" * 64)
    files = {"lib/candidates/producer.py": "0"}
    monkeypatch.setattr("lib.code_version.code_files", lambda script, task: dict(files))

    def key(config: Config = CONFIG) -> str:
        return shards.open_store(stage, config).key  # pyright: ignore[reportArgumentType]

    before = key()
    assert key() == before != key(load_config(quick_test=True, overrides=["seed=5"]))
    files["lib/synthetic.py"] = "1"
    assert key() != before
    monkeypatch.undo()
    from lib.code_version import code_files

    made_by = code_files(shards.PRODUCER, "text")
    assert {"lib/candidates/producer.py", "lib/synthetic.py", "lib/tasks/text/rewriting.py"} <= made_by.keys()


def test_a_producer_of_other_shards_is_no_producer(tmp_path):
    from lib.shards import ShardStore

    ours, other = ShardStore(tmp_path, "ours", 1), ShardStore(tmp_path, "other", 1)
    with other.alive("producer"):
        assert other.is_alive("producer") and not ours.is_alive("producer")


def test_shards_are_made_until_every_model_that_learns_from_them_is_trained(tmp_path, hollow):
    from lib.candidates.producer import has_streamed

    off, config = CONFIG, load_config(quick_test=True, overrides=["stream.enabled=true"])
    for stage in STAGES[:4]:
        with Hollow(f"{stage}.py", config, RunArgs(run_dir=tmp_path), uses=("seed",)):
            pass

    def train(config: Config, *names: str, **flags) -> None:
        hollow("04_train").main(config, RunArgs(run_dir=tmp_path, only=names, **flags))

    train(off)
    assert not has_streamed(tmp_path, config)
    train(config, "inspector", overwrite=True)
    assert not has_streamed(tmp_path, config)
    train(config, "judge", overwrite=True)
    assert has_streamed(tmp_path, config)
    for folder in ("04_train.new", "04_train/judge.new"):
        (tmp_path / folder).mkdir()
        assert not has_streamed(tmp_path, config)
        (tmp_path / folder).rmdir()


# ------------------------------------------------------------------------------------------------- locks and new runs


def test_locks_come_before_the_manifests_of_earlier_stages(tmp_path, code):
    """While --overwrite is at work there may be no manifest: that is Busy, not damage."""
    enter(tmp_path, "00_check_data")
    (tmp_path / "00_check_data" / "manifest.json").write_text("{")
    with open(tmp_path / ".locks" / "00_check_data") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another process is at work on 00_check_data"):
            enter(tmp_path, "01_prepare_dataset", reads=("00_check_data",))


def test_two_processes_start_two_runs(tmp_path, monkeypatch):
    """Both look before either has made its folder."""
    other = load_config(quick_test=True, overrides=["seed=5"])
    monkeypatch.setattr("lib.runs.existing_runs", lambda outputs: [])
    runs = [find_run("00_check_data", config, RunArgs(), tmp_path) for config in (CONFIG, other)]
    assert [run.name for run in runs] == ["run_001", "run_002"] and all(run.is_dir() for run in runs)
    monkeypatch.undo()
    assert [p.name for p in existing_runs(tmp_path)] == ["run_001", "run_002"]
    assert (
        find_run("00_check_data", other, RunArgs(), tmp_path).name == "run_002"
    )  # it is known by its config at once
    assert find_run("00_check_data", CONFIG, RunArgs(), tmp_path).name == "run_001"
    shutil.rmtree(tmp_path / "run_001")
    assert find_run("00_check_data", CONFIG, RunArgs(), tmp_path).name == "run_003"
