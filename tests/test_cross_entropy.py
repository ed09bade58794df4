"""The cross-entropy that makes no float32 copy: same values and gradients as torch's own."""

import pytest
import torch
import torch.nn.functional as F

from lib.training import cross_entropy
from lib.training.cross_entropy import cross_entropies


def random_rows(count: int, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, classes, generator=generator, dtype=dtype) * 4
    return logits.requires_grad_(), torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("elements", [8, 64, 2**18])
def test_values_and_gradients_are_torchs_whatever_the_slices(monkeypatch, elements):
    monkeypatch.setattr(cross_entropy, "ELEMENTS_IN_CACHE", elements)
    logits, targets = random_rows(11, 17, torch.float64)
    weights = torch.linspace(0, 2, 11, dtype=torch.float64)
    (cross_entropies(logits, targets) * weights).sum().backward()
    found, logits.grad = logits.grad, None
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropies(logits, targets), expected, rtol=1e-12, atol=1e-12)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_sums_in_float32_and_leaves_the_logits_alone(dtype):
    logits, targets = random_rows(64, 300, dtype)
    before = logits.detach().clone()
    found = cross_entropies(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits.float(), targets, reduction="none"))
    found.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    assert torch.equal(logits.detach(), before)


def test_no_rows_have_no_loss():
    logits, targets = random_rows(0, 5, torch.float32)
    cross_entropies(logits, targets).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)
