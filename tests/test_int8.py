"""Masked LMs in 8 bits: nearly the same logits, and a row that does not depend on the rows beside it."""

import pytest
import torch
from torch import nn

from lib.models.int8 import Int8Linear, to_int8
from tests.test_hugging_face import FAMILIES, make, make_ids


def test_a_layer_is_right_to_a_hundredth_of_its_largest_output():
    torch.manual_seed(0)
    linear = nn.Linear(192, 768)
    x = torch.randn(3, 40, 192) * torch.logspace(-3, 3, 40)[:, None]  # rows of all sizes keep their digits
    expected, got = linear(x), Int8Linear(linear)(x)
    error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert got.shape == expected.shape and got.dtype == x.dtype
    assert 0 < error.max() < 0.02
    assert torch.equal(Int8Linear(linear)(torch.zeros(2, 192)), linear.bias.expand(2, -1))


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(64, 64))
    x = torch.randn(50, 64)
    x[7] *= 1000  # with one scale for the batch, the others would lose ten bits
    assert torch.equal(layer(x)[:5], layer(x[:5]))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_both_families_keep_their_logits(family):
    model = make((family, "masked"))
    with torch.no_grad():
        expected = model(input_ids=make_ids()).logits
        got = to_int8(model)(input_ids=make_ids()).logits
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) >= 4
    assert 0 < (got - expected).norm() / expected.norm() < 0.05
