"""Packed rows with FlexAttention: the same outputs as with a mask of every pair of tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from lib.config import load_config
from lib.errors import BadConfig
from lib.models.backbones import attention_of
from lib.models.block_attention import BLOCKS, block_mask, on_a_gpu, use_blocks
from lib.models.packing import Pools, pack
from lib.models.ranker import CandidateRanker
from lib.models.ranker_files import load_ranker, save_ranker
from tests.test_big_models import lora_ranker
from tests.test_ranker import make_pools
from tests.test_ranker_files import saved_encoder


def pools_of(counts: tuple[int, ...] = (4, 3, 4, 2)) -> Pools:
    return Pools(*(a % 20 if a.dtype != bool else a for a in vars(make_pools(counts)).values()))


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_show_the_same_tokens_as_the_dense_mask(is_causal):
    packed = pack(pools_of())
    rows, length = packed.ids.shape
    torch.manual_seed(0)
    query, key, value = torch.randn(3, rows, 2, length, 16)
    dense: Any = packed.visible(is_causal)
    assert not dense.all() and (packed.owner < 0).any()  # some rows are padded
    wanted = F.scaled_dot_product_attention(query, key, value, dense)
    found: Any = flex_attention(query, key, value, block_mask=block_mask(packed, is_causal))
    assert (found - wanted).abs().max() < 1e-5
    other: Any = flex_attention(query, key, value, block_mask=block_mask(packed, not is_causal))
    assert (other - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_ranker_with_blocks_has_the_same_scores(tmp_path, name):
    model, tokenizer = lora_ranker(saved_encoder(tmp_path / "base", name), torch.float32)
    pools = pools_of()
    model.eval()
    with torch.no_grad():
        assert model.packs and attention_of(model.base) == "sdpa"
        wanted, separate = model(pools), model.score_one_by_one(pools)
        use_blocks(model.base)
        assert attention_of(model.base) == BLOCKS
        found = model(pools)
        alone = model.score_one_by_one(pools)
    present = wanted.isfinite()
    assert torch.equal(found.isfinite(), present)
    assert (found - wanted)[present].abs().max() < 1e-5
    assert (alone - separate)[present].abs().max() < 1e-5
    # The attention is no part of a saved ranker
    save_ranker(model, tmp_path / "ranker", tokenizer)
    loaded, _ = load_ranker(tmp_path / "ranker")
    assert attention_of(loaded.base) == "sdpa"
    with torch.no_grad():
        assert (loaded(pools) - wanted)[present].abs().max() < 1e-5


def test_only_packed_rows_on_a_gpu_have_blocks(tmp_path):
    model, _ = lora_ranker(saved_encoder(tmp_path / "base", "llama"), torch.float32)
    assert load_config().ranker.mask == "dense"
    on_a_gpu("blocks", model, torch.device("cpu"))
    on_a_gpu("dense", model, torch.device("cuda"))
    model.packs = False
    on_a_gpu("blocks", model, torch.device("cuda"))
    assert attention_of(model.base) == "sdpa"
    model.packs = True
    on_a_gpu("blocks", model, torch.device("cuda"))
    assert attention_of(model.base) == BLOCKS


def test_backbones_that_cannot_have_blocks_are_refused(tmp_path):
    own, _ = lora_ranker(saved_encoder(tmp_path / "own", "remask_bidirectional"), torch.float32)
    assert isinstance(own, CandidateRanker)
    with pytest.raises(
        BadConfig, match=r"ranker.mask is blocks, but RemaskGpt\w+ does not support FlexAttention"
    ):
        use_blocks(own.base)
    llama, _ = lora_ranker(saved_encoder(tmp_path / "llama", "llama"), torch.float32)
    llama.base.config.attention_dropout = 0.1
    with pytest.raises(BadConfig, match=r"attention_dropout 0.1, which FlexAttention does not compute"):
        use_blocks(llama.base)
