"""The formula of training memory, compared with the bytes of real models."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from lib.config import load_config
from lib.errors import BadConfig, MissingInput
from lib.models.build import heads_of, start_model
from lib.models.checkpointing import checkpoint_activations
from lib.models.encoders import with_lora
from lib.models.hugging_face import modeling_remask_gpt
from lib.models.packing import Pools
from lib.models.ranker import CandidateRanker
from lib.training.memory.formula import GB, Account, Batch, Plan, account, kept_by_layer
from lib.training.memory.of_config import Device, accounts, backbone_of, encoder_config, weights_of
from lib.training.optimizer import Optimizer
from tests.live_bytes import LiveBytes
from tests.trainings import settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LLAMA_3 = CONFIGS / "models" / "llama-3-8b.yaml"
GPU_MEMORY = 38 * GB  # what a GPU of 40 GB leaves to a program


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def held_after(model: nn.Module, forward: Any) -> int:
    """Bytes that live between the forward and the backward pass, without the weights."""
    with LiveBytes(model.parameters()) as live:
        output = forward()
        held = live.now - size_of(list(model.parameters()))
    del output
    return held


# --- Llama of the width of Llama 3 -----------------------------------------------------------------------------------


def wide_llama(adapter_dropout: float) -> CandidateRanker:
    """Two layers: no gradient flows to the input of the first, so it keeps less than the others."""
    shape = LlamaConfig(
        vocab_size=1000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        base = LlamaModel(shape).bfloat16()
    base = base.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.fill_(0.001)
    base.rotary_emb = type(base.rotary_emb)(shape)  # its buffers are no weights
    base.config._name_or_path = "wide"
    return CandidateRanker(with_lora(base, 16, 32, adapter_dropout, seed=0), seed=0, packs=True)


def pools_of(tokens: int) -> Pools:
    """One pool with four candidates, packed into a row of `tokens` tokens."""
    ids = torch.arange(tokens)
    prompt, candidates = ids[None, : tokens // 2], ids[tokens // 2 :].view(1, 4, -1)
    return Pools(prompt, torch.ones_like(prompt).bool(), candidates, torch.ones_like(candidates).bool())


@pytest.mark.slow
@pytest.mark.parametrize("adapter_dropout", [pytest.param(0.0, marks=pytest.mark.long), 0.05])
def test_a_wide_llama_with_adapters_keeps_what_the_formula_says(adapter_dropout):
    model, tokens = wide_llama(adapter_dropout).train(), 64
    training = settings(optimizer="adamw")
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model, "m")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            held = held_after(model, lambda: model(pools_of(tokens)))
        plan = Plan("bf16", checkpointed, 1, adapter_dropout=adapter_dropout > 0, mask_bytes=4)
        found = account(
            weights_of(model, training),
            backbone_of(model, load_config()),
            Batch(1, tokens, masked=True),
            plan,
        )
        step = found.moments["step"]
        expected = step["kept activations"] + step["weights in bfloat16 for products"]
        assert held == pytest.approx(expected, rel=0.1)
    check_weights(model, training, found)


def check_weights(model: nn.Module, training: Any, found: Account) -> None:
    """Compares weights, gradients and moments with those of one real update."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert size_of(list(model.parameters())) == pytest.approx(
        found.always["frozen weights"] + found.always["trained weights"], rel=0.01
    )
    assert size_of(trained) == pytest.approx(found.always["trained weights"], rel=0.01)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in trained if p.grad is not None]
    assert size_of(gradients) == pytest.approx(found.moments["step"]["gradients (1 copies)"], rel=0.01)
    optimizer = Optimizer(model, training)
    optimizer.step(0)
    moments = size_of(list(optimizer.state().values()))
    assert moments == pytest.approx(found.always["optimizer moments"], rel=0.01)


# --- own backbones -----------------------------------------------------------------------------------------------------


def own(family: str, layers: int, dropout: float, conv_width: int = 0) -> Any:
    config = load_config(quick_test=True)
    changes = {
        "family": family,
        "num_hidden_layers": layers,
        "hidden_size": 128,
        "dropout": dropout,
        "conv_width": conv_width,
    }
    architecture = config.architecture.model_copy(update=changes | {"context": 64})
    model, _ = start_model(
        "language_model", architecture, "bidirectional", 500, 0, "m", **heads_of("language_model")
    )
    return model.train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["remask_gpt", "ltg_bert"])
def test_a_layer_of_an_own_backbone_keeps_what_the_formula_says(monkeypatch, family, dropout):
    # The formula is about a GPU; what is written for the cache of a CPU keeps less
    monkeypatch.setattr(modeling_remask_gpt, "_use_native_kernels", lambda tensor: True)
    ids, held, model = torch.randint(4, 500, (8, 64)), [], None
    for layers in (2, 4):
        model = own(family, layers, dropout)
        held.append(held_after(model, lambda model=model: model(input_ids=ids).logits))
    plan = Plan("fp32", False, 1, dropout=dropout > 0, mask_bytes=4)
    expected = kept_by_layer(backbone_of(model, load_config()), Batch(8, 64), plan)
    assert (held[1] - held[0]) / 2 == pytest.approx(expected, rel=0.05)


def test_a_convolution_keeps_what_the_formula_says():
    ids, held, kept = torch.randint(4, 500, (8, 64)), [], []
    for width in (0, 9):
        model = own("remask_gpt", 2, 0.0, width)
        held.append(held_after(model, lambda model=model: model(input_ids=ids).logits))
        backbone = backbone_of(model, load_config())
        found = account(weights_of(model, settings()), backbone, Batch(8, 64), Plan("fp32", False, 1))
        kept.append(found.moments["step"]["kept activations"])
    assert kept[1] > kept[0] and held[1] - held[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["remask_gpt", "ltg_bert"])
def test_weights_gradients_and_moments_of_own_backbones(family, optimizer):
    model, training = own(family, 2, 0.0), settings(optimizer=optimizer)
    found = account(
        weights_of(model, training), backbone_of(model, load_config()), Batch(8, 64), Plan("fp32", False, 1)
    )
    check_weights(model, training, found)


# --- configs -----------------------------------------------------------------------------------------------------------


def test_llama_3_fits_a_gpu_of_40_gb_and_its_config_states_the_bytes():
    text = LLAMA_3.read_text(encoding="utf-8")
    stated = re.search(r"needs ([\d.]+) GB of it", text)
    assert stated is not None
    found = dict(accounts(load_config([CONFIGS / "finqa.yaml", LLAMA_3]), Device("bf16")))
    assert set(found) == {"ranker", "ranker_blind"}
    for name, item in found.items():
        assert item.total <= GPU_MEMORY, name
        assert item.always["frozen weights"] == pytest.approx(2 * 7.5e9, rel=0.01)
    assert max(item.total for item in found.values()) / GB == pytest.approx(float(stated[1]), abs=0.05)


def test_parts_and_checkpointing_save_memory_of_the_step():
    files = [CONFIGS / "finqa.yaml", LLAMA_3]
    kept = {}
    for name, changes in (
        ("as it is", []),
        ("one part", ["training.parts=1"]),
        ("not checkpointed", ["training.activation_checkpointing=false"]),
    ):
        found = dict(accounts(load_config(files, overrides=changes), Device("bf16")))["ranker"]
        kept[name] = found.moments["step"]["kept activations"]
    assert kept["one part"] == pytest.approx(4 * kept["as it is"])
    assert kept["not checkpointed"] > 10 * kept["as it is"]


def test_a_divided_encoder_needs_its_share_and_what_is_gathered():
    files = [CONFIGS / "finqa.yaml", LLAMA_3]

    def ranker(processes: int, shard: str) -> Account:
        changes = ["training.parts=8", f"ranker.shard={shard}"]
        return dict(accounts(load_config(files, overrides=changes), Device("bf16", processes)))["ranker"]

    whole, divided = ranker(8, "false"), ranker(8, "true")
    assert divided.always["frozen weights"] == pytest.approx(whole.always["frozen weights"] / 8)
    # Of Llama 3, 2 bytes each: four layers of 218 million weights, or 2.5 times the embedding of 525 million
    for moment in ("step", "evaluation"):
        gathered = divided.moments[moment].pop("gathered weights")
        assert gathered == pytest.approx(2 * max(4 * 218.1e6, 2.5 * 128256 * 4096), rel=0.01)
        assert divided.moments[moment] == whole.moments[moment]
    assert ranker(1, "true") == ranker(1, "false")


def test_encoders_of_unknown_shape_or_kind_are_refused(tmp_path):
    with pytest.raises(MissingInput, match=r"shape of someone/else is not known.*--shape"):
        encoder_config("someone/else", None)
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "gpt2"}', encoding="utf-8")
    config = load_config([CONFIGS / "finqa.yaml", LLAMA_3])
    with pytest.raises(BadConfig, match=r"no memory formula for a backbone of type gpt2"):
        list(accounts(config, Device(), file))
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(BadConfig, match=r"is not the config.json of a model"):
        encoder_config("someone/else", file)
