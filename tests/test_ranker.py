"""The candidate ranker: packed rows against separate ones on every kind of backbone, pooling, padding, bad inputs."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)

from lib.errors import BadConfig, BadData
from lib.models import packing
from lib.models.encoders import with_lora
from lib.models.hugging_face import LtgBertConfig, LtgBertModel, RemaskGptConfig, RemaskGptModel
from lib.models.packing import Pools, by_length, last_token_index, pack, pack_by_tokens
from lib.models.ranker import CandidateRanker, HeadOptions

VOCAB, LONGEST = 60, 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": LONGEST,
}
HEADS: dict[str, Any] = SHAPE | {"num_attention_heads": 3, "intermediate_size": 40}
GROUPED: dict[str, Any] = HEADS | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT: dict[str, Any] = HEADS | STILL | {"layer_norm_eps": 1e-5}
ROBERTA: dict[str, Any] = BERT | {
    "max_position_embeddings": LONGEST + 2,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}


def remask(attention: str) -> RemaskGptModel:
    return RemaskGptModel(RemaskGptConfig(**HEADS, attention=attention))


BACKBONES = {
    "llama": lambda: LlamaModel(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**GROUPED)),
    "mistral": lambda: MistralModel(MistralConfig(**GROUPED, sliding_window=LONGEST)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=LONGEST,
                                         resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "roberta": lambda: RobertaModel(RobertaConfig(**ROBERTA)),
    "ltg_bert": lambda: LtgBertModel(LtgBertConfig(**HEADS, **STILL, position_bucket_size=8)),
    "remask_causal": lambda: remask("causal"),
    "remask_bidirectional": lambda: remask("bidirectional"),
}  # fmt: skip
CAUSAL = ("llama", "qwen2", "mistral", "gpt2", "remask_causal")


def make_backbone(name: str, dtype=torch.float64):
    """A tiny backbone with weights that matter: biases, norms and output projections are not left at their start."""
    torch.manual_seed(0)
    backbone = BACKBONES[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def make(name: str, dtype=torch.float64, lora: bool = False, **choices) -> CandidateRanker:
    backbone = make_backbone(name, dtype)
    if lora:
        backbone.config._name_or_path = "tiny"
        backbone = with_lora(backbone, rank=2, alpha=4, dropout=0.0, seed=0)
        for key, parameter in backbone.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    model = CandidateRanker(backbone, **{"head": HeadOptions(dropout=0.0), "seed": 0} | choices).to(dtype)
    torch.nn.init.normal_(model.head.out.weight)
    return model.eval()


def make_pools(counts=(1, 16, 5), seed=0) -> Pools:
    """Ragged pools: prompts of 1 to 20 tokens, `counts` candidates of 1 to 8 tokens."""
    rng = np.random.default_rng(seed)
    rows, widest = len(counts), max(counts)
    lengths = rng.integers(1, 21, rows)
    sizes = rng.integers(1, 9, (rows, widest)) * (np.arange(widest) < np.array(counts)[:, None])
    prompt_mask = np.arange(20) < lengths[:, None]
    candidate_mask = np.arange(8) < sizes[..., None]
    prompt = np.where(prompt_mask, rng.integers(3, VOCAB, prompt_mask.shape), 1)
    return Pools(
        prompt,
        prompt_mask,
        np.where(candidate_mask, rng.integers(3, VOCAB, candidate_mask.shape), 1),
        candidate_mask,
    )


def greatest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert torch.equal(a.isinf(), b.isinf())
    return float((a - b)[~a.isinf()].detach().abs().max())


def gradients(model: CandidateRanker, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).view_as(scores)
    torch.where(scores.isinf(), 0.0, scores * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def mirrored(pools: Pools) -> Pools:
    """The same pools, padded on the left."""
    parts = []
    for ids, mask in ((pools.prompt_ids, pools.prompt_mask), (pools.candidate_ids, pools.candidate_mask)):
        order = np.argsort(mask, -1, kind="stable")
        parts += [np.take_along_axis(ids, order, -1), np.take_along_axis(mask, order, -1)]
    return Pools(*parts)


# --- packed rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_packed_equals_one_by_one(name):
    pools = make_pools()
    for pooling in ("last", "cls", "mean"):
        for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            model = make(name, dtype, pooling=pooling)
            assert model.is_causal == (name in CAUSAL)
            scores = model.score_packed(pools)
            assert scores[~scores.isinf()].std() > 0.05  # else equality would mean little
            assert greatest_difference(scores, model.score_one_by_one(pools)) < limit
            assert max(model.self_check(pools)) < limit and model.packs
            assert greatest_difference(model(pools), scores) < limit and scores.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_of_packed_rows_equal_those_of_separate_ones(name, lora):
    """Of every parameter, in training mode with gradient checkpointing."""
    model, pools = make(name, lora=lora, pooling="mean"), make_pools((16, 2))
    model.base.gradient_checkpointing_enable()
    if lora:
        model.base.enable_input_require_grads()
    model.train()
    packed, separate = (gradients(model, way(pools)) for way in (model.score_packed, model.score_one_by_one))
    assert packed.keys() == separate.keys() and any("head" in n for n in packed)
    assert all("lora" in n or n.startswith("head.") for n in packed) == lora
    for key, value in packed.items():
        assert (value - separate[key]).norm() <= 1e-6 * max(float(separate[key].norm()), 1e-6), key


@pytest.mark.parametrize("name", BACKBONES)
def test_scores_are_those_of_the_plain_backbone(name):
    """Each candidate alone, by hand: its tokens behind the prompt's, without padding; two-way backbones with a mask."""
    model, pools = make(name), make_pools((3, 2))
    scores = model(pools)
    for row, place in zip(*np.nonzero(pools.candidate_mask.any(-1)), strict=True):
        prompt = pools.prompt_ids[row][pools.prompt_mask[row]]
        candidate = pools.candidate_ids[row, place][pools.candidate_mask[row, place]]
        ids = torch.tensor([[*prompt, *candidate]])
        arguments = {}
        if name not in CAUSAL:
            sees = [
                [j < len(prompt) or i >= len(prompt) for j in range(ids.shape[1])]
                for i in range(ids.shape[1])
            ]
            arguments["attention_mask"] = torch.tensor(sees)[None, None]
        if name == "bert":
            arguments["token_type_ids"] = torch.tensor([[0] * len(prompt) + [1] * len(candidate)])
        states = model.base(ids, **arguments).last_hidden_state
        torch.testing.assert_close(model.head(states[0, -1]), scores[row, place], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "roberta", "ltg_bert", "remask_bidirectional"])
@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_full_attention_reads_both_ways(name, pooling):
    """The backbone sees one ordinary sequence; `cls` goes through BERT's own pooler."""
    model, pools = make(name, attention="full", pooling=pooling), make_pools((2,))
    prompt, candidate = (
        pools.prompt_ids[0][pools.prompt_mask[0]],
        pools.candidate_ids[0, 1][pools.candidate_mask[0, 1]],
    )
    ids, types = (
        torch.tensor([[*prompt, *candidate]]),
        torch.tensor([[0] * len(prompt) + [1] * len(candidate)]),
    )
    output = model.base(ids, **({"token_type_ids": types} if name == "bert" else {}))
    states = output.last_hidden_state[0]
    pooled = {"last": states[-1], "cls": states[0], "mean": states[len(prompt) :].mean(0)}[pooling]
    if pooling == "cls" and name in ("bert", "roberta"):
        pooled = output.pooler_output[0]
    torch.testing.assert_close(model(pools)[0, 1], model.head(pooled), rtol=0, atol=1e-10)
    assert greatest_difference(model(pools), make(name, pooling=pooling)(pools)) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "ltg_bert", "remask_causal"])
def test_eager_attention_gives_the_same(name):
    """To float32's precision: transformers takes the softmax of some models in it."""
    model, pools = make(name), make_pools()
    scores = model(pools)
    model.base.set_attn_implementation("eager")
    assert greatest_difference(model.score_packed(pools), scores) < 1e-5
    assert greatest_difference(model.score_one_by_one(pools), scores) < 1e-5


# --- padding and order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "roberta", "ltg_bert"])
@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_side_and_ids_of_padding_do_not_matter(name, pooling):
    model, pools = make(name, pooling=pooling), make_pools()
    end = int(pools.candidate_ids[1, 0][pools.candidate_mask[1, 0]][-1])  # as with pad = eos
    other = Pools(np.where(pools.prompt_mask, pools.prompt_ids, end), pools.prompt_mask,
                  np.where(pools.candidate_mask, pools.candidate_ids, end), pools.candidate_mask)  # fmt: skip
    for way in (model.score_packed, model.score_one_by_one):
        assert greatest_difference(way(pools), way(other)) < 1e-12
        assert greatest_difference(way(pools), way(mirrored(other))) < 1e-12


def test_last_token_index_on_both_sides():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert last_token_index(mask).tolist() == [1, 3, 2, 3, 0]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_order_and_company_of_candidates_do_not_matter(name):
    model, pools = make(name), make_pools((16, 16))
    order = np.random.default_rng(1).permutation(16)
    moved = Pools(
        pools.prompt_ids, pools.prompt_mask, pools.candidate_ids[:, order], pools.candidate_mask[:, order]
    )
    assert greatest_difference(model(pools)[:, order], model(moved)) < 1e-12
    alone = pools.candidate_mask * (np.arange(16) == 3)[:, None]
    scores = model(Pools(pools.prompt_ids, pools.prompt_mask, pools.candidate_ids, alone))
    assert scores.isinf().sum() == 30 and (scores[:, 3] - model(pools)[:, 3]).abs().max() < 1e-12
    gradient = gradients(model, scores)
    assert all(value.isfinite().all() for value in gradient.values())


def test_prompts_may_be_empty():
    pools = make_pools()
    empty = Pools(
        pools.prompt_ids[:, :0], pools.prompt_mask[:, :0], pools.candidate_ids, pools.candidate_mask
    )
    for name in ("gpt2", "bert"):
        model = make(name)
        assert greatest_difference(model.score_packed(empty), model.score_one_by_one(empty)) < 1e-10


def test_packed_rows_hold_valid_tokens_only():
    pools = make_pools()
    packed = pack(mirrored(pools))
    lengths = pools.prompt_mask.sum(1) + pools.candidate_mask.sum((1, 2))
    assert packed.ids.shape[1] == lengths.max() and ((packed.owner >= 0).sum(1).numpy() == lengths).all()
    assert packed.visible(True).any(-1).all()  # nobody sees nothing


# --- what does not fit ---------------------------------------------------------------------------------------------------


class Unplaced(GPT2Model):
    """Takes positions and does not use them."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


class Leaking(BertModel):
    """Takes a mask of four dimensions and lets everyone see everything."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class Flat(BertModel):
    """Multiplies its embeddings by the mask, as DeBERTa does, which fits a mask of two dimensions only."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        embedded = self.embeddings(input_ids, position_ids=position_ids)
        assert attention_mask is not None
        return super().forward(inputs_embeds=embedded * attention_mask.unsqueeze(-1).to(embedded.dtype))


def test_a_causal_backbone_that_cannot_share_rows_is_found_out_at_once(capsys):
    torch.manual_seed(0)
    backbone = Unplaced(GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=256)).train()
    torch.nn.init.normal_(backbone.wpe.weight)
    state = torch.get_rng_state()
    model, pools = CandidateRanker(backbone, seed=0).train(), make_pools()
    assert torch.equal(torch.get_rng_state(), state) and model.training and backbone.training
    assert model.packs is False
    assert "when candidates share a row" in capsys.readouterr().err
    torch.set_rng_state(state)
    scores = model(pools)
    torch.set_rng_state(state)
    assert torch.equal(scores, model.score_one_by_one(pools))


@pytest.mark.parametrize("backbone, said", [(Leaking, "they differ by"), (Flat, "fails on a row of several")])
def test_a_bidirectional_backbone_that_cannot_share_rows_is_refused(backbone, said):
    torch.manual_seed(0)
    encoder = backbone(BertConfig(**BERT, initializer_range=0.3))
    with pytest.raises(BadConfig, match=rf"prefix-LM: .*{said}.*Set ranker\.attention to full"):
        CandidateRanker(encoder, seed=0)
    assert CandidateRanker(encoder, attention="full", seed=0).packs is False


def test_a_backbone_without_a_limit_reads_any_length():
    backbone = XLNetModel(XLNetConfig(vocab_size=VOCAB, d_model=8, n_layer=1, n_head=2, d_inner=16))
    assert backbone.config.max_position_embeddings == -1
    pools = make_pools((2,))
    scores = CandidateRanker(backbone, attention="full", seed=0).eval()(pools)
    assert scores[pools.present()].isfinite().all()


def test_what_a_ranker_packs_does_not_depend_on_what_it_reads_first():
    """It is decided before the first batch, and a trained ranker keeps it."""
    model = make("bert", torch.float32)
    assert model.packs is True
    model(make_pools((1,)))
    assert model.packs is True
    backbone = make_backbone("gpt2", torch.float32)
    assert CandidateRanker(backbone, seed=0, packs=False).packs is False
    short = MistralModel(MistralConfig(**GROUPED, sliding_window=6))  # the probe stays inside the window
    assert CandidateRanker(short, seed=0).packs is True


@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision_is_not_taken_for_a_wrong_backbone(name):
    pools, autocast = make_pools(), make(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast(pools).dtype == torch.float32
    half = CandidateRanker(make_backbone(name, torch.float32).to(torch.bfloat16), seed=0).eval()
    assert half(pools).dtype == torch.float32
    assert autocast.packs and half.packs


def test_a_sliding_window_is_respected(capsys):
    torch.manual_seed(0)
    settings: dict[str, Any] = GROUPED | {"max_position_embeddings": 64}
    model = CandidateRanker(MistralModel(MistralConfig(**settings, sliding_window=6)), seed=0).double().eval()
    pools = make_pools()
    assert torch.equal(model(pools), model.score_one_by_one(pools))
    assert greatest_difference(model(pools), model.score_packed(pools)) > 1e-9
    assert capsys.readouterr().err.count("sliding window 6") == 1


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
def test_too_long_inputs_are_refused(name):
    model, fits = make(name), np.ones((1, LONGEST - 8), bool)
    candidate = np.ones((1, 2, 8), bool)
    model(Pools(fits * 5, fits, candidate * 5, candidate))
    long = np.ones((1, LONGEST - 7), bool)
    with pytest.raises(
        BadData, match=f"{LONGEST + 1} tokens together, but this backbone has only {LONGEST} positions"
    ):
        model(Pools(long * 5, long, candidate * 5, candidate))


def test_bad_choices_are_refused():
    with pytest.raises(BadConfig, match="causal"):
        CandidateRanker(make_backbone("llama"), attention="full", seed=0)
    with pytest.raises(BadConfig, match=r"ranker\.pooling is 'max'"):
        CandidateRanker(make_backbone("llama"), pooling="max", seed=0)


def test_head_follows_its_seed_alone():
    backbone, state = make_backbone("bert"), torch.get_rng_state()
    heads: list[Any] = [CandidateRanker(backbone, seed=seed).head for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0].dense.weight, heads[1].dense.weight)
    assert not torch.equal(heads[0].dense.weight, heads[2].dense.weight)
    assert heads[0].out.weight.std() < 0.03
    assert [
        n for n, _ in CandidateRanker(backbone, head=HeadOptions("linear"), seed=0).head.named_parameters()
    ] == ["out.weight"]


# --- rows of about equal length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "ltg_bert", "remask_bidirectional"])
def test_pools_of_any_size_in_rows_of_equal_length_have_the_same_scores(name, monkeypatch):
    """Rows of 40 tokens: pools are divided among rows, and share rows with others."""
    monkeypatch.setattr(packing, "SHORTEST_ROW", 40)
    monkeypatch.setattr(packing, "best_length", lambda prompt, width: np.where(prompt > 12, 100, 40.0))
    pools = make_pools((1, 16, 5, 2, 9, 0, 12))
    for pooling in ("last", "cls", "mean"):
        model = make(name, pooling=pooling)
        rows = pack_by_tokens(pools, 24)
        assert len(rows) >= 2  # short and long prompts are read apart
        assert (
            max(int(r.segment.max()) for r in rows) > 0
        )  # rows with several pools, and pools in several rows
        assert any(len(r.row[r.pool == n].unique()) > 1 for r in rows for n in range(7))
        assert greatest_difference(model(pools), model.score_one_by_one(pools)) < 1e-10
        model.one_pass = True
        assert len(pack_by_tokens(pools, 24, one_pass=True)) == 1
        assert greatest_difference(model(pools), model.score_one_by_one(pools)) < 1e-10


def test_rows_have_little_padding_and_each_candidate_is_there_once():
    draw = np.random.default_rng(0)
    counts = np.exp(draw.uniform(np.log(2), np.log(64), 24)).astype(int)
    sizes = draw.integers(10, 30, (24, 64)) * (np.arange(64) < counts[:, None])
    mask = np.arange(30) < sizes[..., None]
    ids = draw.integers(3, 60, mask.shape)
    pools = Pools(ids[:, 0, :14], np.ones((24, 14), bool), ids, mask)
    (rows,) = pack_by_tokens(pools, 384, one_pass=True)
    needed = 24 * 14 + sizes.sum()
    assert rows.ids.numel() < 1.15 * needed  # padding, and copies of prompts
    seen = list(zip(rows.pool.tolist(), rows.candidate.tolist(), strict=True))
    assert len(set(seen)) == len(seen) == (sizes > 0).sum()
    for pool, candidate, row, number in zip(rows.pool, rows.candidate, rows.row, rows.number, strict=True):
        own = rows.ids[row][rows.owner[row] == number + 1]
        assert own.tolist() == ids[pool, candidate][mask[pool, candidate]].tolist()


@pytest.mark.parametrize(
    ("device", "lengths", "wanted"),
    [
        ("cpu", [10, 10, 9, 4], [[10, 10, 9], [4]]),  # 9 is similar to 10
        ("cpu", [10, 10, 8, 4], [[10, 10, 8], [4]]),
        ("cpu", [10, 10, 7, 4], [[10, 10], [7, 4]]),
        ("cpu", [10, 4, 4, 3], [[10, 4], [4, 3]]),  # a row of 10 is no 20 tokens
        ("other", [10, 10, 9, 4], [[10, 10, 9], [4]]),  # as many as 30 tokens hold
        ("other", [10, 4, 4, 3], [[10, 4, 4], [3]]),
        ("other", [40, 10, 4], [[40], [10, 4]]),  # a row is read, however long
        ("other", [7, 7, 7, 7], [[7, 7, 7, 7]]),
    ],
)
def test_a_pass_is_as_long_as_the_device_needs_and_as_memory_allows(monkeypatch, device, lengths, wanted):
    """At least 20 tokens on the CPU, before shorter rows get a pass of their own. At most 30 tokens."""
    monkeypatch.setattr(packing, "PASS_TOKENS", {"cpu": 20})
    monkeypatch.setattr(packing, "MAX_PASS_TOKENS", 30)
    size = np.array(lengths)[::-1, None, None] - 2  # of pools of one candidate, behind prompts of two tokens
    mask = np.arange(max(lengths)) < size
    pools = Pools(np.ones((len(size), 2), int), np.ones((len(size), 2), bool), mask * 5, mask)
    found = [p.separate() for p in by_length(pools, device)]
    assert [sorted((p.candidate_mask.sum((1, 2)) + 2).tolist(), reverse=True) for p in found] == wanted


def test_full_attention_reads_rows_of_similar_length_together(monkeypatch):
    monkeypatch.setattr(packing, "PASS_TOKENS", {"cpu": 40})
    model, pools = make("bert", attention="full", pooling="cls"), make_pools((12, 7, 0, 16))
    scores = model(pools)
    parts = by_length(pools, "cpu")
    assert len(parts) > 2 and sum(int(p.present().sum()) for p in parts) == int(pools.present().sum())
    model.one_pass = True
    assert greatest_difference(scores, model(pools)) < 1e-12
