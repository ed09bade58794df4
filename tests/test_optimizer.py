"""Which weights are in which optimizer group, for every family of backbones, and what the record lists."""

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import models as hf

from lib.config import load_config
from lib.errors import BadConfig
from lib.models.build import heads_of, start_model
from lib.models.encoders import with_lora
from lib.models.ranker import CandidateRanker
from lib.ranking.actor_critic import ActorCritic, ValueHead
from lib.sections.models import TrainingConfig
from lib.training.freezing import head_parameters
from lib.training.muon import Muon, NorMuon, _stacks, orthogonalised
from lib.training.optimizer import Optimizer, hidden_matrices, learning_rate_factor
from tests.trainings import settings

COMMON: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                        "max_position_embeddings": 16}  # fmt: skip
DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False,
                           "position_buckets": 8, "conv_kernel_size": 3, "norm_rel_ebd": "layer_norm"}  # fmt: skip
BERT_LAYER = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
              "intermediate.dense", "output.dense")  # fmt: skip


def each(prefix: str, layers: tuple[str, ...], count: int = 2) -> set[str]:
    return {f"{prefix}{number}.{layer}.weight" for number in range(count) for layer in layers}


# Config and the names, written out by hand from the families' own code, of every weight that is decayed
FAMILIES: dict[str, tuple[PreTrainedConfig, set[str]]] = {
    "bert": (hf.bert.BertConfig(**COMMON, **BERT), each("encoder.layer.", BERT_LAYER) | {"pooler.dense.weight"}),
    "roberta": (
        hf.roberta.RobertaConfig(**COMMON, **BERT),
        each("encoder.layer.", BERT_LAYER) | {"pooler.dense.weight"},
    ),
    "distilbert": (
        hf.distilbert.DistilBertConfig(**COMMON, dim=8, n_layers=2, n_heads=2, hidden_dim=16),
        each("transformer.layer.", ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
                                    "ffn.lin1", "ffn.lin2")),
    ),
    "albert": (
        hf.albert.AlbertConfig(**COMMON, **BERT, embedding_size=6),
        each("encoder.albert_layer_groups.0.albert_layers.", (
            "attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"), 1)
        | {"encoder.embedding_hidden_mapping_in.weight", "pooler.weight"},
    ),
    "electra": (
        hf.electra.ElectraConfig(**COMMON, **BERT, embedding_size=6),
        each("encoder.layer.", BERT_LAYER) | {"embeddings_project.weight"},
    ),
    "deberta": (
        hf.deberta_v2.DebertaV2Config(**COMMON, **BERT, **DEBERTA),
        each("encoder.layer.", (
            "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj",
            "attention.self.pos_key_proj", "attention.self.pos_query_proj", "attention.output.dense",
            "intermediate.dense", "output.dense")),
    ),
    "modernbert": (
        hf.modernbert.ModernBertConfig(**COMMON, **BERT, cls_token_id=1, sep_token_id=2),
        each("layers.", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")),
    ),
    "gpt2": (
        hf.gpt2.GPT2Config(**COMMON, n_embd=8, n_layer=2, n_head=2, n_positions=16),
        each("h.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    ),
    "llama": (
        hf.llama.LlamaConfig(**COMMON, **BERT),
        each("layers.", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    ),
}  # fmt: skip
OWN = {
    "remask_gpt": ("attn.qkv_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    "ltg_bert": ("attention.in_proj_qk", "attention.in_proj_v", "attention.out_proj", "mlp.up_proj", "mlp.down_proj"),
}  # fmt: skip
OWN_LAYERS = {"remask_gpt": "model.layers.", "ltg_bert": "transformer.layers."}


def make_backbone(family: str) -> Any:
    return AutoModel.from_config(FAMILIES[family][0])


def own(mode: str, family: str, **changes) -> Any:
    small = {
        "hidden_size": 32,
        "context": 12,
        "num_hidden_layers": 2,
        "family": family,
        "position_buckets": 8,
        "bias": True,
    }
    architecture = load_config(quick_test=True).architecture.model_copy(update=small)
    return start_model(mode, architecture, "bidirectional", 14, 3, "t", **heads_of(mode), **changes)[0]


def groups(model: nn.Module, **changes) -> dict[str, dict[str, Any]]:
    found = Optimizer(model, settings(**changes)).groups()
    assert len({g["group"] for g in found}) == len(found)
    return {g["group"]: g for g in found}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_ranker_on_any_family_decays_the_matrices_of_its_linear_layers_and_nothing_else(family, optimizer):
    attention = "prefix" if family in ("gpt2", "llama") else "full"
    model = CandidateRanker(make_backbone(family), pooling="last", attention=attention, seed=0)
    expected = {f"backbone.{name}" for name in FAMILIES[family][1]}
    found = groups(model, optimizer=optimizer, weight_decay=0.3, head_learning_rate=0.5)
    assert set(found["hidden matrices"]["names"]) == expected
    assert {g: v["weight_decay"] for g, v in found.items()} == {
        "hidden matrices": 0.3, "embeddings, vectors": 0.0, "head": 0.0
    }  # fmt: skip
    every = [name for group in found.values() for name in group["names"]]
    assert sorted(every) == sorted(name for name, p in model.named_parameters())
    assert found["hidden matrices"]["optimizer"] == ("Muon" if optimizer == "muon" else "AdamW")
    assert {found[g]["optimizer"] for g in ("embeddings, vectors", "head")} == {"AdamW"}


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("mode", ["language_model", "token_classifier", "sequence_scorer", "ranker"])
def test_our_own_backbones(mode, family):
    prefix = ("encoder." if mode == "ranker" else "") + OWN_LAYERS[family]
    assert hidden_matrices(own(mode, family)) == each(prefix, OWN[family])


def test_a_backbone_of_ours_without_a_head_has_no_head():
    bare = own("language_model", "remask_gpt").model
    assert head_parameters(bare) == set()
    assert hidden_matrices(bare) == each("layers.", OWN["remask_gpt"])


@pytest.mark.parametrize("family", OWN)
def test_blocks_of_a_critic_are_hidden_layers_and_its_outputs_are_not(family):
    found = hidden_matrices(own("language_model", family, critic_layers=2))
    assert found == each(OWN_LAYERS[family], OWN[family]) | each("critic.layers.", OWN[family])


HEADED: dict[str, type[PreTrainedModel]] = {
    "bert": hf.bert.BertForSequenceClassification,
    "gpt2": hf.gpt2.GPT2LMHeadModel,  # its last layer is the embedding
    "llama": hf.llama.LlamaForCausalLM,  # its last layer is not
    "distilbert": hf.distilbert.DistilBertForMaskedLM,
}


@pytest.mark.parametrize("family", HEADED)
def test_heads_of_any_model_of_transformers_are_left_out(family):
    model = HEADED[family](FAMILIES[family][0])
    expected = {f"{model.base_model_prefix}.{name}" for name in FAMILIES[family][1]}
    assert hidden_matrices(model) == expected
    assert head_parameters(model) == {
        n for n, _ in model.named_parameters() if not n.startswith(f"{model.base_model_prefix}.")
    }


def test_a_linear_layer_that_shares_its_weight_with_an_embedding_is_none():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.embedding, self.inner = nn.Linear(4, 9), nn.Embedding(9, 4), nn.Linear(4, 4)
            self.out.weight = self.embedding.weight

    assert hidden_matrices(Tied()) == {"inner.weight"}


def test_the_policy_of_ppo_has_two_heads_and_neither_is_decayed():
    ranker = CandidateRanker(make_backbone("bert"), pooling="cls", attention="full", seed=0)
    found = hidden_matrices(ActorCritic(ranker, ValueHead(8)))
    assert found == {f"policy.backbone.{name}" for name in FAMILIES["bert"][1]}


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_under_lora_the_matrices_of_the_adapters_are_hidden_and_those_they_wrap_do_not_learn(family):
    backbone = make_backbone(family)
    backbone.config._name_or_path = "somewhere"
    model = CandidateRanker(with_lora(backbone, 2, 4, 0.0), pooling="last", seed=0)
    found = groups(model, optimizer="muon", head_learning_rate=0.5)
    wrapped = [n for n in FAMILIES[family][1] if "pooler" not in n]
    layers = {f"backbone.base_model.model.{name.removesuffix('.weight')}" for name in wrapped}
    assert set(found["hidden matrices"]["names"]) == {
        f"{layer}.lora_{which}.default.weight" for layer in layers for which in "AB"
    }
    assert set(found) == {"hidden matrices", "head"}
    assert found["hidden matrices"]["tensors"] == 2 * len(layers)


def test_modules_that_peft_saves_whole_are_counted_once():
    backbone = get_peft_model(
        make_backbone("bert"), LoraConfig(target_modules=["query"], modules_to_save=["pooler"])
    )
    found = groups(CandidateRanker(backbone, pooling="cls", attention="full", seed=0), optimizer="muon")
    pooler = [n for n in found["hidden matrices"]["names"] if "pooler" in n]
    assert pooler == ["backbone.base_model.model.pooler.modules_to_save.default.dense.weight"]


# --- Muon where it has nothing to do ---------------------------------------------------------------------------------


class OnlyVectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)


def test_muon_without_hidden_matrices_is_refused():
    with pytest.raises(BadConfig, match=r"training\.optimizer is muon.*OnlyVectors.*to adamw"):
        Optimizer(OnlyVectors(), settings(optimizer="muon"))
    assert set(groups(OnlyVectors(), optimizer="adamw")) == {"embeddings, heads, vectors"}


# --- what the groups do and what the record says ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_without_a_gradient_only_the_decayed_weights_shrink(optimizer):
    """With gradients of 0 AdamW and Muon change nothing by themselves: what is left is the decay, rate x weight_decay."""
    model = own("sequence_scorer", "ltg_bert")
    rates = {"muon_learning_rate": 0.5, "learning_rate": 0.25, "head_learning_rate": 0.125}
    optimiser = Optimizer(
        model, settings(optimizer=optimizer, weight_decay=0.1, warmup_fraction=0, steps=100, **rates)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimiser.step(0)
    rate = 0.5 if optimizer == "muon" else 0.25
    decayed = hidden_matrices(model)
    assert decayed
    for name, p in model.named_parameters():
        kept = 1 - rate * 0.1 if name in decayed else 1.0
        torch.testing.assert_close(p, torch.full_like(p, kept), msg=name)


def test_the_record_of_every_model_names_its_groups(quick_run, quick_config):
    for name in ("generator", "judge", "ranker"):
        record = json.loads((quick_run / "04_train" / name / "training_manifest.json").read_text())
        check_record(record["optimizer"], record["learning_parameters"], quick_config.models[name].training)
    stats = json.loads((quick_run / "05_train_critic" / "manifest.json").read_text())["stats"]
    check_record(stats["optimizer"], stats["learning_parameters"], quick_config.critic.training)


def check_record(record: dict, learning: int, training: TrainingConfig) -> None:
    by_name = {g["group"]: g for g in record["groups"]}
    hidden, rest = by_name["hidden matrices"], by_name["embeddings, heads, vectors"]
    assert record["frozen"] is None and len(by_name) == 2
    assert (hidden["optimizer"], hidden["learning_rate"]) == ("NorMuon", training.muon_learning_rate)
    assert (rest["optimizer"], rest["learning_rate"]) == ("AdamW", training.learning_rate)
    assert (hidden["weight_decay"], rest["weight_decay"]) == (training.weight_decay, 0.0)
    assert hidden["parameters"] + rest["parameters"] == learning
    for group in record["groups"]:
        assert len(group["names"]) == group["tensors"] > 0


# --- NorMuon ---------------------------------------------------------------------------------------------------------


def orthogonal(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Five Newton-Schulz iterations with Muon's coefficients, written out once more."""
    x = matrix.to(dtype)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return (wide if x.shape[0] <= x.shape[1] else wide.T).float()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_normuon_follows_its_formula_over_several_steps(shape, dtype, tolerance):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    start = p.detach().clone()
    wanted, momentum, moment = start.clone(), torch.zeros(shape), torch.zeros(shape[0], 1)
    optimizer = NorMuon(
        [p], lr=0.1, weight_decay=0.3, momentum=0.8, adjust_lr_fn="match_rms_adamw", dtype=dtype
    )
    for _ in range(4):
        grad = torch.randn(shape) * torch.logspace(-2, 0, shape[0])[:, None]  # rows of very different size
        p.grad = grad.clone()
        optimizer.step()
        momentum = 0.8 * momentum + 0.2 * grad
        update = orthogonal(0.2 * grad + 0.8 * momentum, dtype)
        moment = 0.95 * moment + 0.05 * (update**2).mean(1, keepdim=True)
        equal = update / (moment + 1e-8).sqrt()
        equal *= update.norm() / equal.norm()
        wanted = wanted * (1 - 0.1 * 0.3) - 0.1 * 0.2 * max(shape) ** 0.5 * equal
        assert (p - wanted).norm() < tolerance * (wanted - start).norm()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_muon_is_that_of_torch(shape):
    """In bfloat16 over several steps, many matrices at once, with momentum, weight decay and the scale of the update."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    starts = [p.detach().clone() for p in ours]
    given = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon(ours, **given), torch.optim.Muon(theirs, **given)  # type: ignore[arg-type]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(ours, theirs, starts, strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm()


def test_the_first_update_of_normuon_has_equal_rows_and_the_norm_of_muon():
    torch.manual_seed(0)
    grad = torch.randn(6, 4) @ torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.01]))
    updates = {}
    for kind in (torch.optim.Muon, NorMuon):
        p = nn.Parameter(torch.zeros(6, 4))
        p.grad = grad.clone()
        kind([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        updates[kind] = p.detach()
    rows = updates[NorMuon].norm(dim=1)
    assert torch.allclose(rows, rows.mean().expand(6), rtol=1e-3)
    assert updates[torch.optim.Muon].norm(dim=1).std() > 0.1 * rows.mean(), "Muon's rows are equal already"
    assert torch.isclose(updates[NorMuon].norm(), updates[torch.optim.Muon].norm(), rtol=1e-3)


def test_matrices_that_are_orthogonalised_together_are_those_of_torch():
    """As torch's Muon does it one by one; also where only some fit together, and for both orientations."""
    shapes = [(24, 8), (8, 24), (8, 8), (24, 8), (8, 8), (30, 8)]
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in shapes]
    stacks = list(_stacks(matrices))
    assert [[tuple(m.shape) for m in stack] for stack in stacks] == [
        [(24, 8), (8, 24), (24, 8)], [(8, 8), (8, 8)], [(30, 8)]
    ]  # fmt: skip
    for stack in stacks:
        for matrix, found in zip(
            stack, orthogonalised(stack, (3.4445, -4.7750, 2.0315), 5, 1e-7), strict=True
        ):
            expected = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
            torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.02)


def test_large_matrices_are_orthogonalised_one_by_one(monkeypatch):
    monkeypatch.setattr("lib.training.muon.MAX_STACKED", 150)
    matrices = [torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 100)]
    assert [len(stack) for stack in _stacks(matrices)] == [2, 1, 1]


def test_normuon_continues_from_its_saved_state():
    torch.manual_seed(0)
    grads = [torch.randn(6, 4) for _ in range(4)]

    def run(optimizer: Optimizer, model: nn.Module, steps: range) -> None:
        for step in steps:
            for p in optimizer.parameters.values():
                p.grad = grads[step][: p.shape[0], : p.shape[1]].clone() if p.ndim == 2 else None
            optimizer.step(step)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 6, bias=False)])

    chosen = settings(optimizer="normuon", steps=4)
    whole = Net()
    start = {n: p.detach().clone() for n, p in whole.named_parameters()}
    run(Optimizer(whole, chosen), whole, range(4))
    first, second = Net(), Net()
    first.load_state_dict(start)
    optimizer = Optimizer(first, chosen)
    run(optimizer, first, range(2))
    second.load_state_dict(first.state_dict())
    continued = Optimizer(second, chosen)
    assert {name.rpartition("/")[2] for name in optimizer.state()} == {"momentum_buffer", "row_moment"}
    continued.load_state(optimizer.state())
    run(continued, second, range(2, 4))
    assert torch.equal(second.layers[0].weight, whole.layers[0].weight)  # type: ignore[union-attr]


def test_the_learning_rate_of_muon_may_decay_for_longer():
    chosen = settings(steps=100, warmup_fraction=0.0, decay_fraction=0.4, muon_decay_fraction=0.8)
    assert learning_rate_factor(50, chosen) == 1.0
    assert learning_rate_factor(50, chosen, of_muon=True) == pytest.approx(50 / 80)
    assert learning_rate_factor(50, settings(steps=100, decay_fraction=0.4), of_muon=True) == 1.0
    with pytest.raises(ValueError, match="warmup_fraction \\+ muon_decay_fraction must not exceed 1"):
        settings(warmup_fraction=0.3, muon_decay_fraction=0.8)
