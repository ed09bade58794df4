"""Where the arithmetic runs: on a GPU only what gives the same bits each time, or an error that says so."""

import os
from typing import Any

import numpy as np
import pytest
import torch

from lib.cli import as_remask_error
from lib.config import load_config
from lib.diffusion.categorical import draw, running_sum
from lib.engine.processes import Processes
from lib.errors import BadConfig
from lib.runtime import FIXED_WORKSPACES, Runtime


@pytest.fixture
def chosen() -> list[int]:
    """The GPUs that processes have taken."""
    return []


@pytest.fixture
def cuda(monkeypatch, chosen) -> list[tuple[Any, ...]]:
    """A machine with a GPU, as far as `Runtime.detect` checks. Returns the calls that set determinism."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: chosen.append(number))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(
        torch,
        "use_deterministic_algorithms",
        lambda mode, *, warn_only=False: calls.append((mode, warn_only)),
    )
    return calls


def test_a_gpu_uses_deterministic_kernels_and_refuses_others(cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in FIXED_WORKSPACES  # set before CUDA can start
    assert Runtime.detect(load_config()).device.type == "cuda"
    assert cuda == [(True, False)] and not torch.backends.cudnn.benchmark


def test_each_process_takes_its_gpu_and_one_without_a_gpu_is_refused(cuda, chosen, monkeypatch):
    for number in range(3):
        monkeypatch.setattr("lib.runtime.current", lambda number=number: Processes(number, 3, number, 3))
        assert Runtime.detect(load_config(overrides=["device=cpu"])).device.type == "cpu"
        if number < 2:
            assert Runtime.detect(load_config()).device == torch.device("cuda", number)
    with pytest.raises(
        BadConfig, match=r"process 2 .* torch sees 2; start at most 2 processes .* device=cpu"
    ):
        Runtime.detect(load_config())
    assert chosen == [0, 1]


@pytest.mark.parametrize("value", [":0:0", None])
def test_a_workspace_that_is_not_deterministic_is_refused(cuda, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    with pytest.raises(BadConfig, match=rf"CUBLAS_WORKSPACE_CONFIG={value}"):
        Runtime.detect(load_config())
    assert not cuda
    assert (
        Runtime.detect(load_config(overrides=["device=cpu"])).device.type == "cpu"
    )  # where it means nothing


def test_an_operation_without_a_deterministic_kernel_is_an_error_in_words():
    said = (
        "foo_cuda does not have a deterministic implementation, but you set 'torch.use_...'. You can turn off"
    )
    error = as_remask_error(RuntimeError(said))
    assert isinstance(error, BadConfig) and "foo_cuda" in str(error) and "device=cpu" in str(error)
    assert as_remask_error(RuntimeError("another")) is None


def test_running_sums_are_exact_and_the_same_in_any_order():
    """Integers: reversed and cut into parts they add up to the same bits, as a GPU may do it."""
    shares = torch.softmax(torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)) * 5, -1)
    rising = running_sum(shares)
    assert rising.dtype == torch.float64 and (rising.diff(dim=-1) >= 0).all()
    np.testing.assert_allclose(rising.numpy(), shares.double().cumsum(-1).numpy(), rtol=0, atol=1e-12)
    assert torch.equal(rising[:, -1], running_sum(shares.flip(-1))[:, -1])
    assert torch.equal(rising[:, 500:], running_sum(shares[:, 500:]) + rising[:, 499:500])


def test_a_token_of_no_share_is_never_drawn():
    logits = torch.full((1, 6), -torch.inf)
    logits[0, [2, 4]] = torch.tensor([0.0, 1.0])
    noise = torch.tensor([0.0, 0.26, 0.27, 1 - 2**-53], dtype=torch.float64)
    found, _ = draw(logits.expand(4, -1), noise, torch.tensor([0, 1]))
    assert found.tolist() == [2, 2, 4, 4]
