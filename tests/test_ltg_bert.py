"""LTG-BERT: equal to the reference implementation, its positions, and the conversion of its checkpoints.

What it promises as a Hugging Face model is tested beside our backbone in test_hugging_face.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lib.errors import BadData
from lib.models.hugging_face import LtgBertConfig, LtgBertForMaskedLM, LtgBertModel
from lib.models.hugging_face.modeling_ltg_bert import LtgBertLayer, bucket_index, bucket_of_distance
from lib.models.ltg_bert import load_reference
from lib.models.ltg_bert.__main__ import main
from lib.models.ltg_bert.conversion import _reference_name
from tests.conftest import SHARED
from tests.process_runs import run_jobs
from tests.test_hugging_face import LTG, SMALL, make, make_ids, make_tokenizer

ROOT = Path(__file__).parent.parent
VECTORS = SHARED / "ltg_bert" / "reference_small.safetensors"


@pytest.fixture(scope="module")
def vectors():
    """(tensors by name, config) of the reference implementation's run in float64."""
    with safe_open(str(VECTORS), "pt") as file:
        config = json.loads(file.metadata()["config"])
        return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118


def reference_weights(vectors) -> dict[str, torch.Tensor]:
    tensors, _ = vectors
    return {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}


@pytest.mark.data("ltg_bert/reference_small.safetensors")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_to_the_reference(vectors, implementation, checkpointing):
    tensors, config = vectors
    model = load_reference(reference_weights(vectors), config)
    model.set_attn_implementation(implementation)
    if checkpointing:  # takes effect in training mode; without dropout that is the same function
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        model.train()
        model.gradient_checkpointing_enable()
    out = model(
        tensors["input_ids"],
        attention_mask=~tensors["padding_mask"],
        labels=tensors["labels"],
        output_hidden_states=True,
    )
    exact = {"rtol": 0, "atol": 1e-10}
    real = ~tensors["padding_mask"]
    for number, hidden in enumerate(out.hidden_states):
        torch.testing.assert_close(hidden[real], tensors[f"hidden_states.{number}"][real], **exact)
    torch.testing.assert_close(out.logits[real], tensors["logits"][real], **exact)
    torch.testing.assert_close(out.loss, tensors["loss"].squeeze(), **exact)
    out.loss.backward()
    seen = set()
    for name, weight in model.named_parameters():
        expected = tensors["grads." + _reference_name(name)]
        torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-8, msg=name)
        seen.add("grads." + _reference_name(name))
    assert seen == {name for name in tensors if name.startswith("grads.")}


@pytest.mark.parametrize(("size", "millions"), [("xs", 8.5), ("small", 27.7), ("base", 98)])
def test_published_sizes(size, millions):
    with torch.device("meta"):
        model = LtgBertForMaskedLM(LtgBertConfig.published(size))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert LtgBertConfig.published(size, vocab_size=70).vocab_size == 70
    with pytest.raises(ValueError, match="xs, small, base"):
        LtgBertConfig.published("large")


# --- relative positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [129, 512, 1025])
def test_buckets_are_exact_near_and_logarithmic_far(longest):
    """Also where the logarithm is an integer: 128 = 16 * 2^3 and 1024 = 16 * 2^6, and there are 15 far buckets."""
    distance = torch.arange(-1100, 1101)
    bucket = bucket_of_distance(distance, 32, longest) - 31
    assert torch.equal(bucket, -bucket.flip(0))  # odd
    near = distance.abs() <= 16
    assert torch.equal(bucket[near], distance[near])
    assert (bucket.diff() >= 0).all() and bucket.max() == 31
    last = longest - 1
    # The formula in integers: the first n with (far / 16)^15 <= (last / 16)^n
    for far in range(17, last + 1):
        expected = 16 + next(n for n in range(1, 16) if far**15 * 16**n <= last**n * 16**15)
        assert bucket[1100 + far] == expected
    assert (bucket[distance >= last] == 31).all()


def test_index_depends_on_differences_only():
    config = LtgBertConfig(**{**SMALL, **LTG})
    plain = bucket_index(config, torch.arange(20))
    assert torch.equal(plain, bucket_index(config, torch.arange(20) + 1000))
    both = bucket_index(config, torch.stack([torch.arange(20), torch.arange(20) * 2]))
    assert torch.equal(both[:1], plain) and not torch.equal(both[1:], plain)


def test_inputs_longer_than_the_buckets_are_read():
    """Beyond max_position_embeddings all distances share a bucket: nothing fails, and near context still counts."""
    model = make(("ltg", "model"))
    ids = make_ids(1, 100)
    long = model(ids).last_hidden_state
    assert long.isfinite().all() and long.shape[1] == 100
    changed = ids.clone()
    changed[0, 1] = 4 + (ids[0, 1] - 3) % 20
    assert not torch.equal(model(changed).last_hidden_state[0, 99], long[0, 99])


def test_initial_spread_is_as_published():
    torch.manual_seed(0)
    model = LtgBertModel(LtgBertConfig.published("xs", num_hidden_layers=3)).requires_grad_(False)
    std = math.sqrt(2 / (5 * 192))
    cut = 0.8796  # standard deviation of a normal cut at two of its own
    for depth, layer in enumerate(model.transformer.layers):
        assert isinstance(layer, LtgBertLayer)
        scale = math.sqrt(1 / (2 * (1 + depth)))
        for name, weight in layer.mlp.named_parameters():
            assert weight.std() == pytest.approx(cut * std * scale, rel=0.02), name
            assert weight.abs().max() <= 2 * std * scale * 1.0001
        assert layer.attention.in_proj_qk.weight.std() == pytest.approx(cut * std, rel=0.02)
        assert not layer.attention.in_proj_qk.bias.any()
        assert (layer.attention.post_layer_norm.weight == 1).all()
    assert model.embedding.relative_embedding.std() == pytest.approx(cut * std, rel=0.02)


def test_state_dicts_move_by_hand():
    masked = make(("ltg", "masked"))
    classifier = make(("ltg", "sequence"), seed=5, num_labels=3)
    classifier.embedding.load_state_dict(masked.embedding.state_dict())
    classifier.transformer.load_state_dict(masked.transformer.state_dict())
    ids = make_ids()
    states = [m(ids, output_hidden_states=True).hidden_states[-1] for m in (masked, classifier)]
    assert torch.equal(*states)


# --- checkpoints of the reference implementation ---------------------------------------------------------------------


def reference_dict(model: LtgBertForMaskedLM) -> dict[str, torch.Tensor]:
    """A state dict as the reference implementation would write it for this model."""
    state = {_reference_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    index = bucket_index(model.config, torch.arange(model.config.max_position_embeddings))[0]
    for layer in range(model.config.num_hidden_layers):
        state[f"transformer.layers.{layer}.attention.position_indices"] = index.clone()
    return state


def small_model() -> LtgBertForMaskedLM:
    return make(("ltg", "masked"))


def test_a_reference_state_dict_and_back():
    model, ids = small_model(), make_ids()
    state = reference_dict(model)
    assert "transformer.layers.1.mlp.mlp.4.weight" in state and "classifier.nonlinearity.5.weight" in state
    assert torch.equal(load_reference(state, model.config)(ids).logits, model(ids).logits)
    del state["classifier.nonlinearity.5.weight"]  # tied: some files leave it out
    assert torch.equal(load_reference(state, model.config)(ids).logits, model(ids).logits)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    model = small_model()

    def refused(message: str, **changes) -> None:
        state = reference_dict(model)
        for name, tensor in changes.items():
            name = name.replace("__", ".")
            state.pop(name) if tensor is None else state.update({name: tensor})
        with pytest.raises(BadData, match=message):
            load_reference(state, model.config)

    refused(
        "missing: transformer.layers.1.attention.out_proj.bias",
        transformer__layers__1__attention__out_proj__bias=None,
    )
    refused("missing: embedding.word_embedding.weight", embedding__word_embedding__weight=None)
    refused("left over: gate.weight", gate__weight=torch.zeros(2))
    refused(
        "transformer.layers.0.mlp.mlp.1.weight is",
        transformer__layers__0__mlp__mlp__1__weight=torch.zeros(3, 3),
    )
    refused("position_bucket_size", transformer__layers__0__attention__position_indices=torch.zeros(48, 48))
    refused("is not the same as", classifier__nonlinearity__5__weight=torch.zeros(31, 24))
    with pytest.raises(BadData, match=r"lacks .*hidden_size"):
        load_reference(reference_dict(model), {"vocab_size": 4})


def convert(*arguments) -> tuple[int, str, str]:
    """The command as users start it: (exit code, output, errors)."""
    command = [sys.executable, "-m", "lib.models.ltg_bert", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def convert_in_fork(*arguments) -> tuple[int, str, str]:
    """The same without the seconds in which a new process imports transformers."""
    argv = ["ltg_bert", *map(str, arguments)]
    [done] = run_jobs([{"size": 1, "module": "lib.models.ltg_bert.__main__", "argv": argv}])
    return done["codes"][0], done["output"], done["errors"]


@pytest.fixture
def checkpoint_folder(tmp_path):
    """What the reference implementation leaves: config.json and tokenizer.json beside the weights."""
    model = small_model()
    keys = ("attention_probs_dropout_prob", "hidden_dropout_prob", "hidden_size", "intermediate_size",
            "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
            "position_bucket_size", "vocab_size")  # fmt: skip
    config = {key: getattr(model.config, key) for key in keys} | {"output_all_encoded_layers": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path, model


@pytest.mark.slow
def test_the_command_converts_safetensors_and_legacy_files(checkpoint_folder):
    folder, model = checkpoint_folder
    state = reference_dict(model)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    wrapped = {"model": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(wrapped, folder / "model.bin")
    ids = make_ids()
    for name, called in (("model.safetensors", convert), ("model.bin", convert_in_fork)):
        out = folder / f"from_{name}"
        code, output, errors = called(folder / name, out)
        assert code == 0, errors
        assert "with its tokenizer" in output
        loaded = AutoModelForMaskedLM.from_pretrained(out).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.mask_token_id == loaded.config.mask_token_id == 1
        assert loaded.config.pad_token_id == tokenizer.pad_token_id == 0
        assert loaded.config.sep_token_id is None  # this tokenizer has none


@pytest.fixture
def convert_here(monkeypatch, capsys):
    """The command in this process: (exit code, what it said on stderr)."""

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ltg_bert", *map(str, arguments)])
        return main(), capsys.readouterr().err

    return run


def test_the_command_refuses_what_it_cannot_convert(checkpoint_folder, convert_here):
    folder, model = checkpoint_folder
    out = folder / "out"
    code, said = convert_here(folder / "nowhere.bin", out)
    assert code == 66 and "there is no checkpoint" in said
    (folder / "torn.safetensors").write_bytes(b"\0" * 40)
    code, said = convert_here(folder / "torn.safetensors", out)
    assert code == 65 and "not a safetensors file" in said
    state = {name: tensor.contiguous() for name, tensor in reference_dict(model).items()}
    del state["embedding.relative_embedding"]
    save_file(state, folder / "short.safetensors")
    code, said = convert_here(folder / "short.safetensors", out)
    assert code == 65 and "missing: embedding.relative_embedding" in said
    assert not out.exists()
    (folder / "config.json").unlink()
    code, said = convert_here(folder / "short.safetensors", out)
    assert code == 66 and "--config" in said
    out.mkdir()
    (out / "mine.txt").write_text("do not lose me")
    code, said = convert_here(folder / "short.safetensors", out)
    assert code == 73 and "not empty" in said


@pytest.mark.slow
def test_a_pickle_with_code_in_it_is_refused_and_not_run(checkpoint_folder, convert_here):
    folder, _ = checkpoint_folder
    marker = folder / "ran"

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    torch.save({"weight": Hostile()}, folder / "hostile.bin")
    code, said = convert_here(folder / "hostile.bin", folder / "out")
    assert code == 65 and "cannot be read safely" in said and not marker.exists()
