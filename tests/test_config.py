"""Settings: one home per knob, every typo answered, strict YAML."""

import os
import re

import pytest
from pydantic import BaseModel

from lib import config_files
from lib.config import ROOT, Config, load_config
from lib.config_files import replaced_by_quick_test
from lib.errors import BadConfig, MissingInput, UsageError
from lib.sections.models import ModelSpec

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_loads_and_small_too(path):
    for quick in (False, True):
        config = load_config([path], quick_test=quick)
        again = load_config_of(config)
        assert again == config
    assert path.read_text().startswith("#"), "a config opens with what it changes, expects and got"


def load_config_of(config: Config) -> Config:
    return Config.model_validate(config.model_dump(mode="json"))


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += keys_of(kind, f"{prefix}{name}.") if inner else [prefix + name]  # type: ignore[arg-type]
    return found


def test_no_default_outside_the_yaml():
    sections = [f.annotation for f in Config.model_fields.values() if isinstance(f.annotation, type)]
    for section in sections:
        if issubclass(section, BaseModel) and section is not ModelSpec:
            assert all(f.is_required() for f in section.model_fields.values()), section


@pytest.mark.parametrize(
    "key", [k for k in keys_of(Config) if not k.startswith("models") and "top_" not in k]
)
def test_a_typo_of_any_key_is_refused_with_the_right_name(key):
    section, _, name = key.rpartition(".")
    typo = name[:-1] + ("x" if name[-1] != "x" else "y") if len(name) > 3 else name + "x"
    with pytest.raises(BadConfig) as caught:
        load_config(overrides=[f"{section + '.' if section else ''}{typo}=1"])
    assert typo in str(caught.value) and name in str(caught.value)


def test_order_of_precedence(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\ntraining: {steps: 11}\nquick_test: {training: {steps: 5}}\n")
    second.write_text("seed: 2\n")
    assert load_config([first, second]).seed == 2 and load_config([second, first]).seed == 1
    assert load_config([first]).training.steps == 11
    assert load_config([first], quick_test=True).training.steps == 5
    assert load_config([first], quick_test=True, overrides=["training.steps=7"]).training.steps == 7


def test_a_model_states_only_what_differs(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "training: {steps: 11, batch_size: 3}\nmodels: {judge: {training: {steps: 9}}, ranker: null}\n"
    )
    config = load_config([file])
    assert config.models["judge"].training.steps == 9 and config.models["judge"].training.batch_size == 3
    assert "ranker" not in config.models


def test_all_problems_at_once_each_with_its_line(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("seed: -3\ntraining:\n  stepz: 5\n  batch_size: many\nmodels:\n  judge: {mode: jugde}\n")
    with pytest.raises(BadConfig) as caught:
        load_config([file])
    text = str(caught.value)
    assert f"{file}:1: seed is -3" in text
    assert f"{file}:3: training.stepz: unknown key; did you mean 'steps'?" in text
    assert f"{file}:4: training.batch_size is 'many'" in text
    assert f"{file}:6: models.judge.mode is 'jugde'" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("architecture.hidden_size=101", "must be a multiple of 2 x num_attention_heads"),
        ("data.fractions={train: 0.5, held_out: 0.2}", "must add up to 1"),
        ("candidates.mask_ratio=[0.9, 0.1]", "low <= high"),
        ("candidates.source=original_only", "set candidates.per_example to 1"),
        ("sampler.schedule=custom", "needs masking_ratios"),
        ("sampler.policies=[ancestral, random_remask, ancestral]", "ancestral more than once"),
        ("sampler.nfe=[8, 8]", "8 more than once"),
        ("sampler.best_of=2 sampler.best_of_policy=oracle sampler.infill_file=a", "cannot be oracle"),
        ("sampler.nfe=[]", "sampler.nfe"),
        ("sampler.policies=[]", "sampler.policies"),
        ("sampler.infill_file=''", "sampler.infill_file: the path is empty"),
        ("data.path=", "data.path: the path is empty"),
        ("task=pools data.group_key=author", "task pools: set it to null, and pools.keys={group: COLUMN}"),
        ("task=finqa data.group_key=report", "task finqa: set it to null, and finqa.group=page"),
        ("sampler.nfe=32", "sampler.nfe is 32: expected a list, such as [32]"),
        ("candidates.mask_ratio=0.5", "candidates.mask_ratio is 0.5: expected a list, such as [0.1, 0.8]"),
        ("data.drop=null text", "data.drop is 'null text': expected a list, such as [\"null text\"]"),
        ("diffusion.masking.p1=0.1", "diffusion.masking.p1: type random has no such setting"),
        ("models.judge.start=judge", "models start from each other: judge -> judge"),
        ("models={1: {start: judge}}", "models.1: a new model needs a mode"),
        ("training.warmup_fraction=0.9", "must not exceed 1"),
        ("rewards.curve=[[0, 1], [0.5, 2]]", "less than or equal to 1"),
    ],
)
def test_rules_across_keys(override, message):
    with pytest.raises(BadConfig, match=re.escape(message)):
        load_config(overrides=re.split(" (?=sampler|data.group)", override))


def test_names_of_earlier_versions_are_accepted():
    for old, new in (("unmasking", "language_model"), ("remasking_binary", "token_classifier"),
                     ("token_classification", "token_classifier"), ("sequence_scoring", "sequence_scorer")):  # fmt: skip
        assert load_config(overrides=[f"models.extra={{mode: {old}}}"]).models["extra"].mode == new


def test_a_config_is_the_same_after_others_were_loaded(tmp_path):
    """What is read once and kept must not take on the changes of a config."""
    file = tmp_path / "more.yaml"
    file.write_text("models: {judge: {training: {steps: 7}}}\nquick_test: {seed: 5}\n")
    before = [load_config(quick_test=quick) for quick in (False, True)]
    for quick in (False, True):
        load_config(
            [file], quick_test=quick, overrides=["sampler.nfe=[3]", "models.new={mode: sequence_scorer}"]
        )
    assert [load_config(quick_test=quick) for quick in (False, True)] == before
    file.write_text("quick_test: 5\n")
    with pytest.raises(BadConfig, match=r"more.yaml:1: quick_test is 5: expected a section"):
        load_config([file])


def test_a_missing_file_and_a_bad_override():
    with pytest.raises(MissingInput, match=r"nowhere\.yaml does not exist"):
        load_config(["nowhere.yaml"])
    with pytest.raises(UsageError, match="KEY=VALUE"):
        load_config(overrides=["training.steps"])
    with pytest.raises(BadConfig, match="'steps' is not a section"):
        load_config(overrides=["training.steps.more=1"])


def test_text_settings_stay_text():
    config = load_config(overrides=["sampler.infill=[MASK]", "data.path=12", "sampler.prompt="])
    assert config.sampler.infill == "[MASK]" and config.data.path == "12" and config.sampler.prompt == ""
    config = load_config(overrides=["sampler.prompt= a: b "])
    assert (
        config.sampler.prompt == " a: b "
        and load_config(overrides=["sampler.prompt='c'"]).sampler.prompt == "c"
    )


PATHS = (
    "data.path", "labels.path", "generator.checkpoint", "ranker.encoder", "sampler.infill_file", "models.judge.start",
    "models.generator.modifiers.judge.model",
)  # fmt: skip


@pytest.mark.parametrize("key", PATHS)
def test_a_path_may_begin_at_the_home(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = key.split(".")
    more = ["candidates.source=original_only", "candidates.per_example=1"] if key == "labels.path" else []
    more += ["training.freeze_backbone=false"]
    judge = (
        ["models.generator.modifiers.judge={model: x, stop_step: 9, start_step: 0}"]
        if "modifiers" in key
        else []
    )

    def value(given: str) -> str:
        node = load_config(overrides=[*more, *judge, f"{key}={given}"])
        for k in keys:
            node = node[k] if isinstance(node, dict) else getattr(node, k)
        assert isinstance(node, str)
        return node

    assert value("~/my data/x") == "/home/me/my data/x"
    assert value("a~b/~/x") == "a~b/~/x" and value("/x") == "/x"


def test_config_files_may_lie_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(
        "\ufeffseed: 7\n", encoding="utf-8"
    )  # a byte order mark is no part of it
    assert load_config(["~/mine.yaml"]).seed == 7


def test_a_path_that_no_manifest_could_hold_is_refused_at_once():
    with pytest.raises(BadConfig, match=r"data\.path: the path is not UTF-8; rename the file"):
        load_config(overrides=["data.path=caf\udce9.txt"])


def test_masks_that_are_drawn_one_by_one_have_no_pattern():
    with pytest.raises(BadConfig, match="masking sticky would have no effect; set weight to exact_count"):
        load_config(
            overrides=["diffusion.weight=inverse_t", "diffusion.masking={type: sticky, p1: 0.02, p2: 0.9}"]
        )


def test_a_type_replaces_its_block_only_where_types_have_settings_of_their_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("executor: {type: processes}\ncandidates: {masking: {type: span, num_spans: 3}}\n")
    config = load_config([file])
    assert config.executor.type == "processes" and config.executor.workers == load_config().executor.workers
    assert config.candidates.masking.model_dump() == {"type": "span", "num_spans": 3}


def test_a_type_may_be_set_alone_and_in_any_order_with_its_settings():
    config = load_config(overrides=["candidates.masking.type=random", "diffusion.ratios.type=uniform"])
    assert config.candidates.masking.model_dump() == {"type": "random"}
    assert config.diffusion.ratios.model_dump() == {"type": "uniform"}
    spans = ["candidates.masking.num_spans=3", "candidates.masking.type=span"]
    for overrides in (spans, spans[::-1]):
        assert load_config(overrides=overrides).candidates.masking.model_dump() == {
            "type": "span",
            "num_spans": 3,
        }
    assert load_config(overrides=["candidates.masking.type=sticky"]) == load_config(), "the type that it has"
    with pytest.raises(BadConfig, match=r"candidates\.masking\.p7: unknown key"):
        load_config(overrides=["candidates.masking.p7=1", "candidates.masking.type=random"])


def test_a_map_on_the_command_line_merges_as_in_a_file(tmp_path):
    settings = "models: {reference_lm: null, inspector: {training: {steps: 300}}}\ndata: {fractions: {train: 0.9, held_out: 0.1}}\n"
    (tmp_path / "mine.yaml").write_text(settings)
    overrides = ["models.inspector.training={steps: 300}", "data.fractions={train: 0.9, held_out: 0.1}"]
    config = load_config(overrides=[*overrides, "models.reference_lm=null"])
    assert config == load_config([tmp_path / "mine.yaml"])
    assert (
        config.models["inspector"].training.learning_rate
        == load_config().models["inspector"].training.learning_rate
    )
    with pytest.raises(
        BadConfig, match=r"^the config is wrong:\n  --set models\.inspector.*: .*steps is 'many'"
    ):
        load_config(overrides=["models.inspector.training={steps: many}"])


def test_changes_to_a_removed_model_are_refused_except_in_blocks_for_quick_tests(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("models: {ranker: null}\n")
    second.write_text("models:\n  ranker: {trainin: {steps: 3}}\n")
    message = re.escape(f"{second}:2: models.ranker was set to null by an earlier config; give it a mode")
    with pytest.raises(BadConfig, match=message):
        load_config([first, second])
    second.write_text(
        "models:\n  ranker: {mode: ranker}\nquick_test: {models: {judge: {training: {steps: 3}}}}\n"
    )
    assert "ranker" in load_config([first, second]).models
    first.write_text("models: {judge: null}\n")
    small = load_config([first, second], quick_test=True)
    assert "judge" not in small.models


def test_settings_of_the_user_that_a_quick_test_replaces_are_named(tmp_path):
    file, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    file.write_text("data: {path: mine.txt}\nseed: 3\nsampler:\n  nfe: [4, 16]\n")
    assert replaced_by_quick_test([file]) == (
        f"--quick_test replaces data.path=mine.txt ({file}:1) by builtin_small, sampler.nfe=[4, 16] ({file}:4) by [8]; "
        "--set KEY=VALUE keeps a setting"
    )
    assert "data.path" not in replaced_by_quick_test([file], ["data.path=mine.txt"])
    other.write_text("quick_test: {data: {path: few.txt}, sampler: {nfe: [2]}}\n")
    assert replaced_by_quick_test([file, other]) == "", "the user's own block"
    assert replaced_by_quick_test(["configs/finqa.yaml"]) == "", "the project's own values"


def test_a_config_from_a_pipe_may_be_loaded_again():
    reading, writing = os.pipe()
    os.write(writing, b"seed: 7\n")
    os.close(writing)
    try:
        assert [load_config([f"/dev/fd/{reading}"]).seed for _ in range(2)] == [7, 7]
    finally:
        os.close(reading)
        config_files._content_of_pipe.cache_clear()
