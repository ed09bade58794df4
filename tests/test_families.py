"""Backbones that a config names: every mode of the pipeline with LTG-BERT, transfer, and models made ready to push.

Known here: `architecture.family`, lib.models.build and lib.models.publish.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
import yaml

from lib.config import ROOT, load_config
from lib.diffusion.calibration import Calibration, Curve, Curves
from lib.diffusion.sampler import Sampler
from lib.errors import BadConfig, BadData, CannotCreate, MissingInput
from lib.evaluation.text_scores import score, windows
from lib.models.build import Checkpoint, heads_of, load_model, save_model, start_model
from lib.models.cards import FLOOR
from lib.models.collation import collate
from lib.models.families import FAMILIES
from lib.models.hugging_face import LtgBertForMaskedLM, LtgBertForSequenceClassification
from lib.models.publish import card, manifests_of, publish, publish_model
from lib.models.ranker_export import export_classifier
from lib.runs import load_manifest
from lib.tokenization import decode_batch, encode_batch, encode_with_masks, load_tokenizer, train_tokenizer
from lib.training.data import Sequences
from lib.training.objectives.candidates import CandidateSplits
from lib.training.objectives.sequence_scorer import ScoredSequences, SequenceClasses, SequenceScore
from tests.conftest import run_stages
from tests.test_ranker_files import ranker_of, saved_encoder
from tests.trainings import CPU, context

SHORT = ["training.steps=4", "generator.training.steps=4", "critic.training.steps=4", "training.evaluate_every=4",
         "sampler.num_samples=2", "sampler.nfe=[4]"]  # fmt: skip
OWN = ("remask_gpt", "ltg_bert")  # families whose weights begin here
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


def test_transfer_between_modes_keeps_the_backbone_and_says_what_is_new(ltg_run):
    record = json.loads((ltg_run / "04_train" / "inspector" / "training_manifest.json").read_text())
    for part, head in (("created", "classifier."), ("dropped", "lm_head.")):
        names = record["transfer"][part]
        assert names and all(name.startswith(head) for name in names), part
    config = load_config(["configs/models/ltg-bert-xs.yaml"], quick_test=True)
    source = ltg_run / "04_train" / "generator" / "best_model"
    model, transfer = start_model(
        "token_classifier", Checkpoint(source, config.architecture.dropout), "bidirectional",
        load_model(source).config.vocab_size, 0, "x", num_labels=3,
    )  # fmt: skip
    given = load_model(source).state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(FAMILIES["ltg_bert"].backbone):
            assert torch.equal(tensor, given[name]), name
    assert len(transfer.loaded) == sum(name.startswith(FAMILIES["ltg_bert"].backbone) for name in given)


def test_a_causal_ltg_bert_is_refused():
    config = load_config(["configs/models/ltg-bert-xs.yaml"])
    with pytest.raises(BadConfig, match="cannot be causal"):
        start_model("language_model", config.architecture, "causal", 70, 0, "x")


@pytest.mark.parametrize("size", ["xs", "small", "base"])
def test_the_shipped_configs_are_the_published_sizes(size):
    architecture = load_config([f"configs/models/ltg-bert-{size}.yaml"]).architecture
    family = FAMILIES["ltg_bert"]
    assert family.config_of is not None
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
        "license": "unknown",
        "pipeline_tag": "fill-mask",
        "tags": ["ltg_bert", "masked-diffusion"],
    }
    stage = manifest_of(ltg_run / ("05_train_critic" if name == "critic" else "04_train"))
    rows = [row for row in stage["stats"]["table"] if name in ("critic", row["model"])]
    assert rows and all(row["metric"] in body and f"{row['value']:.4g}" in body for row in rows)
    assert "AutoModelForMaskedLM" in body and stage["environment"]["torch"] in body
    assert "Python files are part of Remask, licensed under Apache-2.0" in body
    assert "`modeling_ltg_bert.py`" in body and "authors of the pretrained model" not in body
    assert "No licence is chosen for the weights" in body


def test_a_stages_own_folders_call_a_model_as_it_was_trained(ltg_run):
    """[CLS] in front where objectives put it there, a length, names of classes; the run's own tokenizer adds nothing."""
    run = load_tokenizer(ltg_run / "01_prepare_dataset" / "tokenizer")
    bare = encode_batch(run, ["ab [MASK]"], "unk")[0].tolist()
    assert run("ab [MASK]", split_special_tokens=True)["input_ids"] == bare
    with_cls = {"reference_lm", "ar_baseline", "judge", "ranker"}
    places = [f"04_train/{name}/{part}_model" for name in MODELS for part in ("best", "final")]
    for place in (*places, "02_generate_candidates/generator/best_model", "05_train_critic/best_model"):
        tokenizer, config = load_tokenizer(ltg_run / place), load_model(ltg_run / place).config
        assert tokenizer.get_vocab() == run.get_vocab()
        front = [run.cls_token_id] if with_cls & set(place.split("/")) else []
        reads_masks = config.architectures[0].endswith("MaskedLM")
        own = [*bare[:3], run.mask_token_id] if reads_masks else bare
        assert tokenizer("ab [MASK]")["input_ids"] == [*front, *own], place
        assert encode_batch(tokenizer, ["ab [MASK]"], "unk")[0].tolist() == bare
        limit = config.max_position_embeddings - (not front)
        assert len(tokenizer("a" * 999, truncation=True)["input_ids"]) == tokenizer.model_max_length == limit
    labels = {name: load_model(ltg_run / "04_train" / name / "best_model").config for name in MODELS[3:]}
    assert labels["inspector"].id2label == {0: "original", 1: "random", 2: "predicted"}
    assert labels["judge"].id2label == labels["ranker"].id2label == {0: "score"}
    assert labels["judge"].problem_type == labels["ranker"].problem_type == "regression"


def test_what_an_earlier_version_trained_is_published_as_it_must_be(ltg_run, tmp_path):
    """Its folder has the run's tokenizer and no names; published, it is as this version would have saved it."""
    shutil.copytree(ltg_run / "04_train" / "ranker" / "best_model", tmp_path / "old")
    load_tokenizer(ltg_run / "01_prepare_dataset" / "tokenizer").save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["problem_type"], config["label2id"]
    config["id2label"] = {"0": "LABEL_0"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    publish_model(tmp_path / "old", tmp_path / "new", manifests_of(ltg_run, "04_train")[0], "ranker")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        trained = ltg_run / "04_train" / "ranker" / "best_model" / file
        assert (tmp_path / "new" / file).read_bytes() == trained.read_bytes(), file


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
    with pytest.raises(BadData, match="differs from"):
        publish(ltg_run, "judge", tmp_path / "out")
    weights.write_bytes(before)
    assert not (tmp_path / "out").exists()


# --- what the card says, run where this project is not -----------------------------------------------------------------

TEXTS = ["The value of an object", "", "a [MASK] of [CLS]", "x", "the value of the list is the list " * 9]
SPECS = {  # head -> mode and settings of stage 04
    "masked": {"mode": "language_model"},
    "causal": {"mode": "language_model", "attention": "causal"},
    "token": {"mode": "token_classifier", "num_classes": 3},
    "own_token": {"mode": "token_classifier", "num_classes": 4},
    "score": {"mode": "sequence_scorer"},
    "classes": {"mode": "sequence_scorer", "target_type": "classification", "num_classes": 4},
    "ranker": {"mode": "ranker"},
    "critic": {"mode": "language_model"},
}
PLANTED = [("remask_gpt", head) for head in SPECS] + [
    ("ltg_bert", head) for head in SPECS if head not in ("causal", "own_token")
]
REAL = ("generator", "reference_lm", "inspector", "judge", "ranker", "critic")
PAIRED = {"remask_causal": {}, "bert": {"attention": "full", "pooling": "cls"}}


def planted_model(family: str, head: str, vocabulary: int):
    """A small model whose every weight is large and random, so that all it reads matters much, [CLS] above all."""
    changes = {
        "family": family,
        "context": 40,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "position_buckets": 8,
    }
    architecture = load_config(quick_test=True).architecture.model_copy(update=changes)
    spec = SPECS[head]
    heads = heads_of(
        spec["mode"], spec.get("target_type", "score"), spec.get("num_classes", 3), head == "own_token"
    )
    if head == "critic":
        heads["critic_layers"] = 1
    attention = spec.get("attention", "bidirectional")
    model, _ = start_model(spec["mode"], architecture, attention, vocabulary, 0, "planted", **heads)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def planted_folder(run: Path, family: str, head: str, tokenizer, folder: Path) -> Path:
    """The folder of such a model, its card made of the manifests of a run that had trained it."""
    save_model(planted_model(family, head, len(tokenizer)), folder, tokenizer)
    name = "critic" if head == "critic" else "inspector"
    manifest, data = manifests_of(run, "05_train_critic" if head == "critic" else "04_train")
    if head != "critic":
        manifest["config"]["models"][name] |= SPECS[head]
    else:
        calibration = Calibration({"unknown": Curves(Curve((0.0, 0.5, 1.0), (0.1, 0.3, 0.95)))})
        calibration.save(folder / "calibration.json")
    text = card(name, manifest, data, folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


HEADS_OF_DOCUMENT = {
    "masked language model": "masked",
    "causal language model": "causal",
    "critic": "critic",
    "inspector": "token",
    "judge": "score",
    "ranker of texts": "ranker",
}


def test_the_classes_of_the_document_load_every_weight(tmp_path):
    """Each row of docs/your_models.md: a class with another head would drop weights and make random ones."""
    rows = re.findall(
        r"^\| ([^|`]+) \| `(AutoModelFor\w+)` \|$", (ROOT / "docs/your_models.md").read_text(), re.M
    )
    classes = {mode: name for modes, name in rows for mode in modes.split(", ")}
    assert classes.keys() == HEADS_OF_DOCUMENT.keys()
    tokenizer = train_tokenizer("bpe", ["the value of the list "] * 20, 300)
    for mode, name in classes.items():
        head = HEADS_OF_DOCUMENT[mode]
        save_model(planted_model("remask_gpt", head, len(tokenizer)), tmp_path / head, tokenizer)
        model, found = getattr(transformers, name).from_pretrained(tmp_path / head, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"], mode
        if mode == "critic":
            assert model(torch.tensor([[5, 6, 7]]), head="critic").logits.shape == (1, 3)


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> dict[str, tuple[Path, Any, Any]]:
    """Rankers with prompts as stock classifiers: name -> folder, the ranker itself, its tokenizer."""
    root, made = tmp_path_factory.mktemp("paired"), {}
    for name, choices in PAIRED.items():
        model, tokenizer = ranker_of(
            saved_encoder(root / f"{name} base", name), False, head="linear", **choices
        )
        export_classifier(model, root / name, tokenizer)
        made[name] = root / name, model, tokenizer
    return made


@pytest.fixture(scope="module")
def folders(ltg_run, paired, tmp_path_factory) -> dict[str, Path]:
    """Published folders by name: those of a run, and planted ones of every head of both families."""
    root = tmp_path_factory.mktemp("published")
    made = {name: publish(ltg_run, name, root / name) for name in REAL}
    tokenizer = load_tokenizer(ltg_run / "01_prepare_dataset" / "tokenizer")
    for family, head in PLANTED:
        made[f"{family} {head}"] = planted_folder(ltg_run, family, head, tokenizer, root / f"{family}_{head}")
    pieces = train_tokenizer("bpe", ["the value of the list is wörldly "] * 20, 300)
    made["pieces"] = planted_folder(ltg_run, "remask_gpt", "token", pieces, root / "pieces")
    for name, (folder, _, _) in paired.items():
        (folder / "README.md").write_text(card("ranker", *manifests_of(ltg_run, "04_train"), folder, True))
        made[name] = folder
    return made


def run_cards(python: str, folders: dict[str, Path], root: Path) -> dict:
    """What every card's examples give in one process of another interpreter or this one, without this repository."""
    jobs = {name: {"folder": str(folder), "texts": TEXTS} for name, folder in folders.items()}
    (root / "jobs.json").write_text(json.dumps(jobs))
    runner = shutil.copy(Path(__file__).parent / "card_runner.py", root)
    environment = {
        "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [python, "-W", "ignore", runner, "jobs.json", "results.json"],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run the custom code?" not in done.stdout  # the examples have said so already
    return json.loads((root / "results.json").read_text())


@pytest.fixture(scope="module")
def seen(folders, tmp_path_factory) -> dict:
    return run_cards(sys.executable, folders, tmp_path_factory.mktemp("elsewhere"))["models"]


def bench_of(folder: Path, tokenizer, **roles):
    """What --score reads of a run, with one model in it."""
    nothing = dict.fromkeys(("inspector", "reference", "judge"))
    sampler = SimpleNamespace(critic_error=lambda ids: np.zeros(ids.shape))
    given = {"sampler": sampler, **nothing, **{name: load_model(folder) for name in roles}}
    return SimpleNamespace(runtime=CPU, tokenizer=tokenizer, **given)


def scored(folder: Path, tokenizer, texts: list[str], role: str) -> list[dict]:
    """The rows of `06_sample.py --score` for texts that a window holds."""
    width = load_model(folder).config.max_position_embeddings - 1
    parts = list(windows([(str(i), t) for i, t in enumerate(texts)], tokenizer, width, "unk"))
    assert len(parts) == len(texts)
    return score(parts, bench_of(folder, tokenizer, **{role: True}))


@torch.no_grad()
def evaluated(folder: Path, tokenizer, texts: list[str], classes: int | None = None) -> np.ndarray:
    """Stage 04's own figures of what the model reads of texts."""
    model = load_model(folder)
    width = model.config.max_position_embeddings - 1
    cut = [row[:width] for row in encode_batch(tokenizer, texts, "unk")]
    rows = Sequences(pa.chunked_array([pa.array(cut, pa.list_(pa.int32()))]), width, tokenizer.pad_token_id)
    targets = np.zeros(len(texts))
    split, every = ScoredSequences(rows, targets), np.arange(len(texts))
    splits = CandidateSplits(split, split, split, every)
    arguments: Any = (context("judge", seed=0), splits, tokenizer.cls_token_id)
    if classes is not None:
        return np.exp(SequenceClasses(*arguments, num_classes=classes).predict(model, rows, every))
    return SequenceScore(*arguments).predict(model, rows, every)


def tokenizer_of_run(run: Path):
    return load_tokenizer(run / "01_prepare_dataset" / "tokenizer")


def test_every_example_of_every_card_runs_without_this_repository(seen, folders):
    assert seen.keys() == folders.keys()
    assert {name: found["error"] for name, found in seen.items() if found["error"]} == {}


@pytest.mark.parametrize(
    "name", ["judge", "ranker", "remask_gpt score", "ltg_bert score", "remask_gpt ranker", "ltg_bert ranker"]
)
def test_scores_of_card_pipeline_score_and_evaluation_are_equal(ltg_run, folders, seen, name):
    tokenizer, folder = tokenizer_of_run(ltg_run), folders[name]
    piped = [found[0] for found in seen[name]["piped"]]
    assert {found["label"] for found in piped} == {"score"}
    expected = evaluated(folder, tokenizer, TEXTS)
    np.testing.assert_allclose([found["score"] for found in piped], expected, atol=1e-5)
    card_texts = ["The value of an object", "The valve on and object"]
    by_score = [row["judge_score"] for row in scored(folder, tokenizer, card_texts, "judge")]
    np.testing.assert_allclose(seen[name]["made"]["scores"], by_score, atol=1e-5)
    np.testing.assert_allclose(evaluated(folder, tokenizer, card_texts), by_score, atol=1e-5)
    if " " in name:  # without [CLS] these would be far off
        bare = encode_batch(tokenizer, TEXTS[:1], "unk")[0][None]
        assert abs(load_model(folder)(torch.from_numpy(bare).long()).logits.item() - expected[0]) > 0.01


@pytest.mark.parametrize("family", OWN)
def test_shares_of_classes_are_those_of_the_evaluation(ltg_run, folders, seen, family):
    name = f"{family} classes"
    expected = evaluated(folders[name], tokenizer_of_run(ltg_run), TEXTS, classes=4)
    labels = ["score 0.00 to 0.25", "score 0.25 to 0.50", "score 0.50 to 0.75", "score 0.75 to 1.00"]
    for found, shares in zip(seen[name]["piped"], expected, strict=True):
        by_label = {row["label"]: row["score"] for row in found}
        np.testing.assert_allclose([by_label[label] for label in labels], shares, atol=1e-5)


@pytest.mark.parametrize("name", ["inspector", "remask_gpt token", "ltg_bert token"])
def test_token_classes_of_card_pipeline_and_score_are_equal(ltg_run, folders, seen, name):
    tokenizer, folder = tokenizer_of_run(ltg_run), folders[name]
    model = load_model(folder)
    whole, empty, special, short, long = seen[name]["piped"]
    assert empty == []
    assert len(long) == model.config.max_position_embeddings - 1
    (row,) = scored(folder, tokenizer, TEXTS[:1], "inspector")
    np.testing.assert_allclose(
        1 - np.array(seen[name]["made"]["shares"])[:, 0], row["inspector_changed"], atol=1e-5
    )
    names = ["original", "random", "predicted"]
    for text, found in ((TEXTS[0], whole), (TEXTS[2], special), (TEXTS[3], short)):
        ids = torch.from_numpy(encode_batch(tokenizer, [text], "unk")[0][None]).long()
        shares = model(ids).logits.softmax(-1)[0].detach().numpy()
        assert [(f["start"], f["end"]) for f in found] == [(i, i + 1) for i in range(len(text))]
        assert [f["entity"] for f in found] == [names[i] for i in shares.argmax(1)]
        np.testing.assert_allclose([f["score"] for f in found], shares.max(1), atol=1e-5)


def test_stretches_of_pieces_are_those_of_the_text(folders, seen):
    """Byte-level pieces: what a class was given to stands at the characters that it says."""
    tokenizer = load_tokenizer(folders["pieces"])
    found = seen["pieces"]["piped"][0]
    assert len(found) < len(TEXTS[0])  # pieces, no characters
    assert "".join(TEXTS[0][f["start"] : f["end"]] for f in found) == TEXTS[0]
    assert [tokenizer.convert_tokens_to_string([f["word"]]) for f in found] == [
        TEXTS[0][f["start"] : f["end"]] for f in found
    ]


def test_own_token_classes_have_names_of_their_own(folders):
    labels = json.loads((folders["remask_gpt own_token"] / "config.json").read_text())["id2label"]
    assert labels == {"0": "unlabelled", "1": "class_1", "2": "class_2", "3": "class_3"}


@pytest.mark.parametrize("name", ["reference_lm", "remask_gpt causal"])
def test_the_likelihood_of_the_card_is_that_of_score(ltg_run, folders, seen, name):
    tokenizer, folder = tokenizer_of_run(ltg_run), folders[name]
    (row,) = scored(folder, tokenizer, ["The value of"], "reference")
    assert seen[name]["made"]["loss"] == pytest.approx(row["reference_nll_mean"], abs=1e-5)
    first = encode_batch(tokenizer, TEXTS[:1], "unk")[0]
    assert seen[name]["made"]["inputs"]["input_ids"] == [[tokenizer.cls_token_id, *first[:12]]]
    model = load_model(folder)
    for text, found in zip(TEXTS[:4], seen[name]["piped"], strict=False):
        written = [tokenizer.cls_token_id, *encode_batch(tokenizer, [text], "unk")[0].tolist()]
        for _ in range(4):
            logits = model(torch.tensor([written])).logits[0, -1]
            logits[tokenizer.all_special_ids] = -torch.inf  # nothing but text is written
            written.append(int(logits.argmax()))
        assert found[0]["generated_text"] == text + "".join(decode_batch(tokenizer, [written[-4:]]))
    assert "beyond this model's" in seen[name]["piped"][4]
    own = load_tokenizer(
        folder
    )  # pads on the left, so that prompts of different length are gone on from together
    settings: Any = {
        "do_sample": False,
        "max_new_tokens": 4,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    one = model.generate(**own("x", return_tensors="pt"), **settings)
    two = model.generate(**own(["The value of", "x"], padding=True, return_tensors="pt"), **settings)
    assert two.sequences[1, -4:].tolist() == one.sequences[0, -4:].tolist()
    torch.testing.assert_close(two.logits[0][1], one.logits[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["generator", "critic", *(f"{f} {h}" for f in OWN for h in ("masked", "critic"))]
)
def test_masks_are_filled_as_the_model_was_trained(ltg_run, folders, seen, name):
    """Without [CLS]; a text without a mask is refused by name."""
    tokenizer = tokenizer_of_run(ltg_run)
    (ids,) = encode_with_masks(tokenizer, ["a [MASK] of x"], "unk")
    (found,) = run_fill(folders[name], "a [MASK] of x")
    logits = load_model(folders[name])(torch.from_numpy(ids[None]).long()).logits[0, 2].detach()
    assert found["token"] == int(logits.argmax())
    assert found["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    assert all("No mask_token" in seen[name]["piped"][i] for i in (0, 1, 3, 4))


def run_fill(folder: Path, text: str) -> list[dict]:
    from transformers import pipeline

    return pipeline("fill-mask", model=str(folder), tokenizer=str(folder))(text, top_k=1)


@pytest.mark.parametrize("name", ["critic", "remask_gpt critic", "ltg_bert critic"])
def test_chances_of_error_of_the_card_are_those_of_score(ltg_run, folders, seen, name):
    tokenizer, folder = tokenizer_of_run(ltg_run), folders[name]
    sampler = Sampler(
        load_model(folder), 1, [0, 1, 2, 3], CPU, load_config(quick_test=True).sampler, 0,
        Calibration.load(folder / "calibration.json"), 40,
    )  # fmt: skip
    expected = sampler.critic_error(encode_batch(tokenizer, ["The valve of an object"], "unk")[0][None])
    np.testing.assert_allclose(seen[name]["made"]["errors"], expected[0], atol=1e-5)
    if name != "critic":
        assert np.ptp(expected) > 0.03


@pytest.mark.parametrize("name", PAIRED)
def test_scores_of_pairs_are_those_of_the_ranker(paired, seen, name):
    folder, model, tokenizer = paired[name]
    question = "what was the change in net revenue from 2012 to 2013?"
    candidates = ["subtract(2257, 1748) = 509", "add(2257, 1748) = 4005"]
    with torch.no_grad():
        expected = model(collate(tokenizer, [question], [candidates], 32, 32))[0]
    np.testing.assert_allclose(seen[name]["made"]["scores"], expected, rtol=1e-5, atol=1e-5)
    exported, limit = load_tokenizer(folder), model.base.config.max_position_embeddings
    assert exported.model_max_length == limit == len(exported("a " * 200, "b", truncation=True)["input_ids"])
    assert exported(f"a {exported.unk_token}")["input_ids"] == exported("a ?")["input_ids"]


@pytest.mark.skipif(
    "REMASK_FLOOR_PYTHON" not in os.environ, reason="no interpreter with transformers 5.5 is named"
)
def test_the_oldest_transformers_gives_the_same(folders, seen, tmp_path):
    found = run_cards(os.environ["REMASK_FLOOR_PYTHON"], folders, tmp_path)
    assert found["transformers"].startswith(FLOOR + ".")
    assert {name: m["error"] for name, m in found["models"].items() if m["error"]} == {}
    for name, expected in seen.items():
        assert found["models"][name]["made"].keys() == expected["made"].keys(), name
        for key, value in expected["made"].items():
            if key != "inputs":
                np.testing.assert_allclose(found["models"][name]["made"][key], value, atol=1e-5, err_msg=name)
        assert found["models"][name]["piped"] == approximately(expected["piped"]), name


def approximately(value):
    """Nested results, their numbers to five digits."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-5)
    if isinstance(value, dict):
        return {key: approximately(part) for key, part in value.items()}
    return [approximately(part) for part in value] if isinstance(value, list) else value
