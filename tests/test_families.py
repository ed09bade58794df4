"""Backbones that a config names: every mode of the pipeline with LTG-BERT, transfer, and models made ready to push.

Known here: `architecture.family`, lib.models.build and lib.models.publish.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lib.config import load_config
from lib.errors import BadConfig, BadData, CannotCreate, MissingInput
from lib.models.build import load_model, start_model
from lib.models.families import FAMILIES
from lib.models.ltg_bert import LtgBertForMaskedLM, LtgBertForSequenceClassification
from lib.models.publish import publish
from lib.runs import load_manifest
from tests.conftest import run_stages

SHORT = ["training.steps=4", "generator.training.steps=4", "critic.training.steps=4", "training.evaluate_every=4",
         "sampler.num_samples=2", "sampler.nfe=[4]"]  # fmt: skip
MODELS = ("generator", "reference_lm", "ar_baseline", "inspector", "judge", "ranker")


def manifest_of(folder: Path) -> dict:
    manifest = load_manifest(folder)
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def ltg_run(tmp_path_factory) -> Path:
    """All seven stages on the built-in text, a few steps each, LTG-BERT wherever a model reads both ways."""
    run_dir = tmp_path_factory.mktemp("ltg") / "run_001"
    steps = [f"models.{name}.training.steps=4" for name in MODELS]
    config = load_config(["configs/models/ltg-bert-xs.yaml"], quick_test=True, overrides=[*SHORT, *steps])
    run_stages(run_dir, config)
    return run_dir


def test_every_mode_runs_on_ltg_bert(ltg_run):
    families = {}
    for name in MODELS:
        model = load_model(ltg_run / "04_train" / name / "best_model")
        families[name] = model.config.model_type
    assert families == dict.fromkeys(MODELS, "ltg_bert") | {
        "reference_lm": "remask_gpt",
        "ar_baseline": "remask_gpt",
    }
    critic = load_model(ltg_run / "05_train_critic" / "best_model")
    assert isinstance(critic, LtgBertForMaskedLM) and critic.critic is not None
    judge = load_model(ltg_run / "04_train" / "judge" / "best_model")
    assert isinstance(judge, LtgBertForSequenceClassification)
    scores = judge(torch.randint(4, 20, (3, 12))).logits
    assert ((scores >= 0) & (scores <= 1)).all()
    policies = {row["policy"] for row in manifest_of(ltg_run / "06_sample")["stats"]["policies"]}
    assert "critic" in policies


def test_transfer_between_modes_keeps_the_trunk_and_says_what_is_new(ltg_run):
    record = json.loads((ltg_run / "04_train" / "inspector" / "training_manifest.json").read_text())
    for part, head in (("created", "classifier."), ("dropped", "lm_head.")):
        names = record["transfer"][part]
        assert names and all(name.startswith(head) for name in names), part
    config = load_config(["configs/models/ltg-bert-xs.yaml"], quick_test=True)
    source = ltg_run / "04_train" / "generator" / "best_model"
    model, transfer = start_model(
        "token_classifier", config.architecture, "bidirectional", load_model(source).config.vocab_size, 0, "x", source,
        num_labels=3,
    )  # fmt: skip
    given = load_model(source).state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(FAMILIES["ltg_bert"].trunk):
            assert torch.equal(tensor, given[name]), name
    assert len(transfer.loaded) == sum(name.startswith(FAMILIES["ltg_bert"].trunk) for name in given)


def test_a_causal_ltg_bert_is_refused():
    config = load_config(["configs/models/ltg-bert-xs.yaml"])
    with pytest.raises(BadConfig, match="cannot be causal"):
        start_model("language_model", config.architecture, "causal", 70, 0, "x")


@pytest.mark.parametrize("size", ["xs", "small", "base"])
def test_the_shipped_configs_are_the_published_sizes(size):
    architecture = load_config([f"configs/models/ltg-bert-{size}.yaml"]).architecture
    family = FAMILIES["ltg_bert"]
    made = family.config_of(architecture, 16384, "bidirectional").to_dict()
    expected = family.config_class.published(size).to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    for key in family.shape:
        assert made[key] == expected[key], key


def test_a_context_without_far_buckets_is_refused():
    with pytest.raises(BadConfig, match="position_buckets"):
        load_config(["configs/models/ltg-bert-xs.yaml"], overrides=["architecture.context=16"])


# --- ready to push ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_a_published_folder_has_a_card_from_the_manifest(ltg_run, name, tmp_path):
    out = publish(ltg_run, name, tmp_path / "out")
    text = (out / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["ltg_bert", "masked-diffusion"],
    }
    stage = manifest_of(ltg_run / ("05_train_critic" if name == "critic" else "04_train"))
    rows = [row for row in stage["stats"]["table"] if name in ("critic", row["model"])]
    assert rows and all(row["metric"] in body and f"{row['value']:.4g}" in body for row in rows)
    assert "AutoModelForMaskedLM" in body and stage["environment"]["torch"] in body


def test_the_example_of_the_card_runs_without_this_repository(ltg_run, tmp_path):
    out = publish(ltg_run, "inspector", tmp_path / "out")
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("THIS_FOLDER", str(out)) + (
        "\nids = tokenizer('the value of', return_tensors='pt')['input_ids']"
        "\nassert model(ids).logits.shape == (1, ids.shape[1], 3)\n"
    )
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_published_is_refused(ltg_run, tmp_path):
    with pytest.raises(MissingInput, match="did you mean 'generator'"):
        publish(ltg_run, "generater", tmp_path / "out")
    with pytest.raises(MissingInput, match="not complete"):
        publish(tmp_path, "generator", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(CannotCreate, match="not empty"):
        publish(ltg_run, "generator", tmp_path / "full")
    weights = ltg_run / "04_train" / "judge" / "best_model" / "config.json"
    before = weights.read_bytes()
    weights.write_bytes(before + b" ")
    with pytest.raises(BadData, match="is not what"):
        publish(ltg_run, "judge", tmp_path / "out")
    weights.write_bytes(before)
    assert not (tmp_path / "out").exists()


def test_pipelines_work_with_our_tokenizers(ltg_run):
    from transformers import pipeline

    folder = str(ltg_run / "04_train" / "generator" / "best_model")
    found = pipeline("fill-mask", model=folder, tokenizer=folder)("the val[MASK]e", top_k=3)
    assert len(found) == 3 and all(len(f["sequence"].replace(" ", "")) >= 7 for f in found)
    judge = str(ltg_run / "04_train" / "judge" / "best_model")
    (score,) = pipeline("text-classification", model=judge, tokenizer=judge)("the value of x")
    assert 0 <= score["score"] <= 1
