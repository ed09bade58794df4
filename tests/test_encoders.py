"""Encoders of other families behind a ranker: what they cannot read is found by trying, before any training."""

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    EsmConfig,
    EsmModel,
    LongformerConfig,
    LongformerModel,
    MPNetConfig,
    MPNetModel,
)

from lib.errors import BadConfig
from lib.models.backbones import why_not_packed
from lib.models.ranker import CandidateRanker, HeadOptions
from tests.test_ranker import BACKBONES, BERT, HEADS, STILL, make_backbone, make_pools


def randomised(backbone):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
UNFIT = {
    "deberta_v2": lambda: DebertaV2Model(DebertaV2Config(**HEADS, **STILL, **RELATIVE)),
    "deberta_v2_absolute": lambda: DebertaV2Model(DebertaV2Config(**HEADS, **STILL)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**HEADS, **STILL)),  # its relative positions are those in the row
    "longformer": lambda: LongformerModel(LongformerConfig(**HEADS, **STILL, attention_window=8)),
    "esm": lambda: EsmModel(EsmConfig(**HEADS, **STILL, pad_token_id=1, mask_token_id=2)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_encoder_that_takes_no_packed_rows_is_refused_and_reads_with_full_attention(name):
    """Its forward takes positions and a mask, so it must be tried."""
    backbone = randomised(UNFIT[name]()).train()
    with pytest.raises(BadConfig, match=r"cannot be a prefix-LM: .*Set ranker\.attention to full"):
        CandidateRanker(backbone, seed=0)
    assert backbone.training
    model, pools = (
        CandidateRanker(backbone, attention="full", head=HeadOptions(dropout=0.0), seed=0).eval(),
        make_pools((2, 3)),
    )
    torch.nn.init.normal_(model.head.out.weight)
    scores = model(pools)
    alone = model(pools.rows(slice(1, 2)))
    assert torch.isfinite(scores[pools.present()]).all() and scores[pools.present()].std() > 0
    assert torch.allclose(scores[1:], alone, atol=1e-5)


class Deaf(BertModel):
    """Takes a mask of four dimensions and reads as if all were visible."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, token_type_ids=None):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None
        return super().forward(
            input_ids, attention_mask, position_ids=position_ids, token_type_ids=token_type_ids
        )


class Shifted(BertModel):
    """Counts given positions from 1."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(
            input_ids,
            attention_mask,
            position_ids=None if position_ids is None else position_ids + 1,
            **kwargs,
        )


@pytest.mark.parametrize(
    ("kind", "words"), [(Deaf, "when candidates share a row"), (Shifted, "change with a custom mask")]
)
def test_an_encoder_that_misreads_masks_or_positions_is_refused(kind, words):
    with pytest.raises(BadConfig, match=words):
        CandidateRanker(randomised(kind(BertConfig(**BERT))), seed=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_that_take_packed_rows_are_let_through_in_any_precision(name):
    backbone = make_backbone(name, torch.float32)
    state = torch.get_rng_state()
    assert why_not_packed(backbone) is None and torch.equal(torch.get_rng_state(), state)
    assert why_not_packed(backbone.to(torch.bfloat16)) is None
