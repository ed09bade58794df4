"""Compiled layers: they compute what plain ones do, auto compiles where that pays back, and a resumed training follows."""

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

from lib.config import load_config
from lib.errors import BadConfig
from lib.models import compiling
from lib.models.build import make_model, model_config
from lib.models.compiling import CompiledLayers, can_compile
from lib.training.objectives.language_model import MaskedDiffusion
from tests.trainings import TOKENS, Killed, context, fingerprint, settings, splits, train_tiny


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """Skips a test where torch cannot compile. It takes seconds to find out, so only these tests ask.

    The C++ compiler does not optimise: code that runs for a moment need not be fast, and it computes the same.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")
        # No processes of a compiler of their own: each would import torch first
        patch.setattr(torch._inductor.config, "compile_threads", 1)
        if not can_compile(torch.device("cpu")):
            pytest.skip("torch finds no C++ compiler here")
        yield


def new_model(family="remask_gpt", attention="bidirectional", **changes):
    architecture = load_config(quick_test=True).architecture.model_copy(update={"family": family, **changes})
    torch.manual_seed(0)
    model = make_model("language_model", model_config(architecture, attention, 20), 0, "test")
    for p in model.parameters():  # layers whose output projections are zero would hide everything before them
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.1)
    return model


def inputs_of(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(4, 20, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    return ids, (torch.arange(length) < lengths).long()


def loss_and_gradients(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = F.cross_entropy(logits[mask.bool()], ids[mask.bool()])
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), [g for g in gradients if g is not None]


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attention"),
    [("remask_gpt", "bidirectional"), pytest.param("remask_gpt", "causal", marks=pytest.mark.long)],
)
def test_compiled_layers_compute_what_plain_layers_do(family, attention):
    plain, model = new_model(family, attention), new_model(family, attention)
    torch._dynamo.utils.counters.clear()
    layers = CompiledLayers(model, "on", 10, learns=True, label="model")
    for rows, length in ((3, 24), (5, 33), (2, 16)):  # one compilation serves all shapes
        ids, mask = inputs_of(rows, length)
        loss, gradients = loss_and_gradients(model.train(), ids, mask)
        wanted, wanted_gradients = loss_and_gradients(plain.train(), ids, mask)
        assert layers.compiled
        assert torch.allclose(loss, wanted, atol=1e-5)
        for found, right in zip(gradients, wanted_gradients, strict=True):
            assert torch.allclose(found, right, atol=1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1, "other shapes were compiled again"
    assert all(p.grad is None for p in model.parameters()), "trying a layer left gradients behind"


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("remask_gpt", marks=pytest.mark.long), "ltg_bert"])
def test_compiled_passes_without_gradients_give_the_same_logits(family):
    plain, model = new_model(family).eval(), new_model(family).eval()
    layers = CompiledLayers(model, "on", 0, learns=False, label="sampler")
    ids, mask = inputs_of(4, 24)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        wanted = plain(input_ids=ids, attention_mask=mask).logits
    assert layers.compiled
    assert torch.allclose(found, wanted, atol=1e-5)


class Clock:
    """Stands for the time that a layer takes: plain, then compiled."""

    def __init__(self, monkeypatch, plain: float, compiled: float, markers=None):
        times = iter([plain, compiled])
        self.compilations = 0
        monkeypatch.setattr(compiling._Trial, "seconds", lambda trial, function: next(times))
        monkeypatch.setattr(compiling._Trial, "run", lambda trial, function: self._compile())
        monkeypatch.setattr(compiling, "_marker", lambda layer, trial: markers)

    def _compile(self):
        self.compilations += 1


def decision(mode: str, calls: int) -> CompiledLayers:
    layers = CompiledLayers(new_model(), mode, calls, learns=True, label="model")
    layer = layers._layers[0]
    layers._settle(layers._decide(layer, layer.forward, (torch.ones(2, 3, 4),), {}))
    plain = all("forward" not in vars(layer) for layer in layers._layers)
    assert plain == (not layers.compiled), "layers that are not compiled are left as they were"
    return layers


@pytest.mark.parametrize(
    ("calls", "is_cached", "wanted"),
    # Two layers of 0.1 s: 0.3 * 0.1 s * 2 * calls are expected to be saved
    [(200, False, False), (300, False, True), (60, True, True), (40, True, False)],
)
def test_auto_compiles_if_the_run_is_long_enough(monkeypatch, tmp_path, calls, is_cached, wanted):
    marker = tmp_path / "marker"
    if is_cached:
        marker.touch()
    clock = Clock(monkeypatch, plain=0.1, compiled=0.05, markers=marker)
    assert decision("auto", calls).compiled is wanted
    assert clock.compilations == wanted
    assert marker.exists() == (is_cached or wanted)


def test_auto_keeps_plain_layers_if_compiled_ones_are_not_faster(monkeypatch, capfd):
    Clock(monkeypatch, plain=0.1, compiled=0.1)
    assert decision("auto", 100_000).compiled is False
    assert "not faster (100.0 -> 100.0 ms per layer" in capfd.readouterr().err


def test_on_compiles_a_short_run_even_if_that_is_slower(monkeypatch):
    Clock(monkeypatch, plain=0.1, compiled=0.2)
    assert decision("on", 1).compiled is True


@pytest.mark.parametrize("works", [True, False])
def test_a_part_records_whether_compiled_layers_made_it(monkeypatch, works):
    """A machine without a compiler falls back to plain layers, whose bits differ."""
    Clock(monkeypatch, plain=0.1, compiled=0.05)
    if not works:
        monkeypatch.setattr(compiling._Trial, "run", lambda trial, function: 1 / 0)
    layers = decision("on", 1)
    assert layers.of_parts() == {"compiled": str(works)}
    assert CompiledLayers(new_model(), "on", 1, learns=False, label="model").of_parts() == {}, "no call yet"
    assert CompiledLayers(new_model(), "off", 1, learns=False, label="model").of_parts() == {}


def test_a_resumed_training_tests_the_compiler_of_its_own_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function: asked.append)
    layers = CompiledLayers(new_model().to("meta"), "on", 1, learns=True, label="model")
    layers.follow(True)
    assert layers.compiled and [given.device.type for given in asked] == ["meta"]


def test_off_leaves_the_layers_alone():
    model = new_model()
    layers = CompiledLayers(model, "off", 10**9, learns=True, label="model")
    assert layers.compiled is False
    assert all("forward" not in vars(layer) for layer in layers._layers)


def test_without_a_compiler_training_goes_on_and_says_so(tmp_path, monkeypatch, capfd):
    def fails(trial, function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(compiling._Trial, "run", fails)
    monkeypatch.setattr(compiling._Trial, "seconds", lambda trial, function: 0.1)
    result = train_once(tmp_path, compile="on")
    assert result.steps == 12
    printed = capfd.readouterr().err
    assert "the layers are not compiled, because torch cannot do it here: InvalidCxxCompiler" in printed
    assert "more" not in printed


def train_once(folder, fault=None, **changes):
    chosen = settings(**changes)
    objective = MaskedDiffusion(context(**changes), splits(), load_config().diffusion, TOKENS)
    one_layer = new_model(
        num_hidden_layers=1
    )  # a further one would be other code: only the last computes some rows alone
    return train_tiny(one_layer, objective, chosen, folder, fault)


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
def test_a_killed_training_goes_on_with_compiled_layers_to_the_same_bits(tmp_path):
    train_once(tmp_path / "whole", compile="on")
    with pytest.raises(Killed):
        train_once(tmp_path / "killed", 7, compile="on")
    with pytest.raises(BadConfig, match="compiled: True -> False"):
        train_once(tmp_path / "killed", compile="off")
    train_once(
        tmp_path / "killed", compile="auto"
    )  # follows the checkpoint: alone, it would not compile 12 steps
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    train_once(tmp_path / "plain", compile="off")
    assert fingerprint(tmp_path / "plain") != fingerprint(tmp_path / "whole"), "nothing was compiled"


@pytest.mark.usefixtures("compiler")
@pytest.mark.long
def test_compiled_layers_that_compute_activations_again_have_the_same_bits(tmp_path):
    train_once(tmp_path / "whole", compile="on")
    train_once(tmp_path / "forgetful", compile="on", activation_checkpointing=True)
    assert fingerprint(tmp_path / "forgetful") == fingerprint(tmp_path / "whole")
