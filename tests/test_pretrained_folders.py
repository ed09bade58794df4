"""What is read of the folder of a pretrained model, and which folders are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from lib import own_code
from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.evaluation.lm_eval import Harness
from lib.models.build import (
    Checkpoint,
    PretrainedStart,
    load_model,
    save_model,
    start_model,
)
from lib.models.pretrained import _config_of, open_pretrained
from lib.outside import refuse_unnamed_pretrained
from lib.tokenization import (
    num_ids,
)
from tests.conftest import run_stages
from tests.pretrained_folders import LORA, settings_of, small_config, some_ids, started
from tests.test_foreign import make


def _edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _no_mask(folder: Path) -> None:
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=make("word_piece").backend_tokenizer, pad_token="[PAD]"
    )
    tokenizer.save_pretrained(folder)


def _other_vocabulary(folder: Path) -> None:
    make("byte_level").save_pretrained(folder)


def _causal(folder: Path) -> None:
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=113, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)


def _without_code(folder: Path) -> None:
    """As it was saved from the hub: its code lies in another repository."""
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    _edit(folder, auto_map={auto: f"owner/name--{name}" for auto, name in names.items()})
    for file in folder.glob("*.py"):
        file.unlink()


def _loose(folder: Path) -> None:
    """The decoder has weights of its own, although the config ties it to the embeddings."""
    weights = load_file(folder / "model.safetensors")
    decoder = weights["bert.embeddings.word_embeddings.weight"] * 2
    save_file(
        weights | {"cls.predictions.decoder.weight": decoder}, folder / "model.safetensors", {"format": "pt"}
    )


def _damaged_values(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["ln_f.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _code(old: str, new: str) -> Any:
    """Changes the code of a model that brings its own."""

    def spoil(folder: Path) -> None:
        file = folder / "modeling_tiny_diffusion.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return spoil


ATTENTION = "scaled_dot_product_attention(q, k, v, mask)"


REFUSED_CODE = {
    "causal": (_code(ATTENTION, "scaled_dot_product_attention(q, k, v, is_causal=True)"), "is causal only"),
    "reads padding": (_code(ATTENTION, "scaled_dot_product_attention(q, k, v)"), "reads padding although"),
    "no hidden states": (_code("tuple(states) if output_hidden_states else None", "None"), "no logits and hidden states"),
    "no attention mask": (_code("attention_mask=None, ", ""), "takes no attention_mask"),
    "missing package": (_code("import torch\n", "import torch\nimport no_such_package\n"), "by its own code.*no_such_package"),
    "fails": (_code("states = []", "raise KeyError('x')"), "cannot read a text: KeyError"),
    "not finite": (_damaged_values, "not finite"),
    "code elsewhere": (_without_code, "no modeling_tiny_diffusion.py. Copy it from owner/name"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CODE)
def test_code_that_cannot_serve_is_refused_by_one_message(name, pretrained_folder, tmp_path):
    spoil, message = REFUSED_CODE[name]
    folder = tmp_path / "model"
    shutil.copytree(pretrained_folder("own_code"), folder)
    spoil(folder)
    with pytest.raises(BadData, match=message):
        open_pretrained(settings_of(folder))


@torch.no_grad()
def test_a_decoder_with_weights_of_its_own_keeps_them(pretrained_folder, tmp_path):
    """Although the config says that they are those of the embeddings: as transformers reads such a folder."""
    shutil.copytree(pretrained_folder("bert"), tmp_path / "model")
    _loose(tmp_path / "model")
    opened = open_pretrained(settings_of(tmp_path / "model"))
    ids = some_ids(opened, 3)
    row = torch.cat([torch.full((3, 1), 2), ids, torch.full((3, 1), 3)], 1)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")(input_ids=row).logits[:, 1:-1]
    theirs, model = theirs[..., : num_ids(opened.tokenizer)], started(opened)
    assert torch.equal(model(ids).logits, theirs)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", opened.tokenizer)
    assert torch.equal(load_model(tmp_path / "saved")(ids).logits, theirs)
    tied = open_pretrained(settings_of(pretrained_folder("bert"))).model
    assert tied.config.tie_word_embeddings


def test_the_code_of_a_saved_model_runs_only_if_the_user_allowed_it(pretrained_folder, tmp_path, monkeypatch):
    """A folder cannot allow its own code: neither by the hashes in its config, nor by leaving them out."""
    opened = open_pretrained(settings_of(pretrained_folder("own_code")))
    (tmp_path / "saved").mkdir()
    save_model(started(opened), tmp_path / "saved", opened.tokenizer)
    monkeypatch.setattr(own_code, "_allowed", set())
    evil = tmp_path / "evil"
    shutil.copytree(tmp_path / "saved", evil)
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\nclass C: pass\n")
    _edit(evil, backbone_class="evil.M", backbone_config_class="evil.C", code_files={})
    with pytest.raises(BadData, match=r"evil needs code of its own, and has no evil\.py"):
        load_model(evil)
    _edit(evil, code_files=own_code.hashes_of(evil))
    for folder in (evil, tmp_path / "saved"):
        start = Checkpoint(folder, 0.0)
        for opening in (
            lambda folder=folder: load_model(folder),
            lambda folder=folder: Harness.open(str(folder)),
            lambda start=start: start_model("language_model", start, "bidirectional", num_ids(opened.tokenizer), 0, "x"),
        ):  # fmt: skip
            with pytest.raises(BadData, match=r"runs code of its own .*pretrained\.code_sha256="):
                opening()
    assert not (tmp_path / "ran").exists()
    digest = settings_of(pretrained_folder("own_code")).code_sha256
    load_config(overrides=[f"pretrained.code_sha256={digest}"])
    assert load_model(tmp_path / "saved").config.backbone_class


@torch.no_grad()
@pytest.mark.parametrize("kind", ["modernbert", "esm_rotary"])
def test_bfloat16_weights_leave_rotary_frequencies_exact(kind, pretrained_folder, tmp_path):
    opened = open_pretrained(settings_of(pretrained_folder(kind)))
    start = PretrainedStart(opened, 60, 0.0, "bfloat16")
    model, _ = start_model("language_model", start, "bidirectional", num_ids(opened.tokenizer), 0, "x")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = dict(opened.model.named_buffers())
    save_model(model, tmp_path, opened.tokenizer)
    for other in (model, load_model(tmp_path)):
        found = {n.removeprefix("backbone."): b for n, b in other.named_buffers() if "inv_freq" in n}
        assert found and all(torch.equal(b, exact[n]) for n, b in found.items())


@torch.no_grad()
def test_an_adapter_leaves_a_layer_alone_that_is_also_the_embedding(pretrained_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pretrained_folder("own_code"), folder)
    _code("    config_class", "    _tied_weights_keys = {'ff_out.weight': 'wte.weight'}\n    config_class")(
        folder
    )
    _edit(folder, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    del weights["ff_out.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    opened = open_pretrained(settings_of(folder))
    assert opened.model.ff_out.weight is opened.model.wte.weight
    model, ids = started(opened, adapter=LORA), some_ids(opened, 4)
    assert model.adapter.names and "ff_out" not in model.adapter.names
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", opened.tokenizer)
    torch.testing.assert_close(
        load_model(tmp_path / "saved")(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4
    )


REFUSED = {
    "no tokenizer": (_no_tokenizer, MissingInput, "has no tokenizer"),
    "no mask": (_no_mask, BadData, "no mask token.*pretrained.mask_token"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), BadData, "is a pickle"),
    "other vocabulary": (_other_vocabulary, BadData, "do not belong together"),
    "causal": (_causal, BadData, "not a masked LM"),
    "decoder": (lambda f: _edit(f, is_decoder=True), BadData, "is_decoder"),
    "quantised": (lambda f: _edit(f, quantization_config={"bits": 4}), BadData, "quantised"),
    "unknown kind": (lambda f: _edit(f, model_type="no_such"), BadData, "does not have"),
    "no folder": (lambda f: shutil.rmtree(f), MissingInput, "is not a folder"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), BadData, "model.safetensors|not a masked LM"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_serve_is_refused_in_stage_01(
    name, pretrained_folder, small_text, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spoil, error, message = REFUSED[name]
    folder = tmp_path / "model"
    shutil.copytree(pretrained_folder("bert"), folder)
    spoil(folder)
    config = small_config(folder, small_text)
    with pytest.raises(error, match=message):
        run_stages(tmp_path / "run", config, ["00_check_data", "01_prepare_dataset"])
    assert not (tmp_path / "run" / "01_prepare_dataset" / "manifest.json").exists()


def test_a_name_on_the_hub_and_a_long_context_are_refused_in_stage_01(
    pretrained_folder, small_text, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stages = ["00_check_data", "01_prepare_dataset"]
    for more, error, message in (
        (
            "pretrained.model=owner/no-such-model",
            MissingInput,
            "owner/no-such-model is not a folder.*HF_HUB_OFFLINE=0",
        ),
        ("architecture.context=200", BadConfig, "reads 96 tokens at most.*architecture.context=94"),
    ):
        with pytest.raises(error, match=message):
            run_stages(tmp_path / "run", small_config(pretrained_folder("bert"), small_text, more), stages)
        assert not (tmp_path / "run" / "01_prepare_dataset" / "manifest.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_code_runs_only_if_its_hash_is_given(pretrained_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pretrained_folder("own_code"), folder)
    with pytest.raises(
        BadData, match=r"runs code of its own \(configuration.*pretrained.code_sha256=[0-9a-f]{64}"
    ):
        open_pretrained(settings_of(folder, code_sha256=None))
    pinned = settings_of(folder)
    open_pretrained(pinned)
    with (folder / "modeling_tiny_diffusion.py").open("a") as file:
        file.write("\n# changed")
    with pytest.raises(BadData, match="runs code of its own"):
        open_pretrained(pinned)


def test_a_context_that_the_model_cannot_read_is_refused(pretrained_folder):
    opened = open_pretrained(settings_of(pretrained_folder("roberta")))
    assert opened.longest == 96 - 1 - 2  # positions start behind the padding; two special tokens
    opened.config(93)
    with pytest.raises(BadConfig, match=r"reads 95 tokens at most.*architecture.context=93"):
        opened.config(94)


def test_a_family_without_a_model_is_refused():
    with pytest.raises(BadConfig, match=r"pretrained\.model is null"):
        refuse_unnamed_pretrained(load_config(["configs/pretrained.yaml"]))
    with pytest.raises(BadConfig, match=r"models.ar_baseline.*cannot be causal"):
        load_config(overrides=["architecture.family=pretrained", "models.reference_lm=null"])


def test_a_config_that_is_nested_too_deeply_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(BadData, match=r"config\.json.*nested too deeply"):
        _config_of(tmp_path)
