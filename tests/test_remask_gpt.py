"""The backbone as a transformers model: shapes, losses, masks, batches, saving, and the tools around it.

Known here: the public behaviour of `lib.models.remask_gpt`. Not known: how training or sampling uses it.
"""

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lib.models.remask_gpt import (
    RemaskGptConfig,
    RemaskGptForCausalLM,
    RemaskGptForMaskedLM,
    RemaskGptForSequenceClassification,
    RemaskGptForTokenClassification,
    RemaskGptModel,
)
from lib.models.remask_gpt import modeling_remask_gpt as modeling

VOCAB = 31
HEADS = {
    "model": RemaskGptModel,
    "masked": RemaskGptForMaskedLM,
    "causal": RemaskGptForCausalLM,
    "token": RemaskGptForTokenClassification,
    "sequence": RemaskGptForSequenceClassification,
}


def make_config(**changes) -> RemaskGptConfig:
    small = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return RemaskGptConfig(**{**small, "max_position_embeddings": 48, **changes})


def make(name: str, seed: int = 0, **changes):
    """A small model in evaluation mode whose every weight is random: zero projections would hide mistakes."""
    if name == "causal":
        changes["attention"] = "causal"
    torch.manual_seed(seed)
    model = HEADS[name](make_config(**changes)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


def make_ids(batch: int = 3, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def output_of(model, *args, **kwargs) -> torch.Tensor:
    out = model(*args, **kwargs)
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


# --- configuration ---------------------------------------------------------------------------------------------------


def test_config_survives_saving(tmp_path):
    config = make_config(critic_layers=1, attention="causal", num_labels=5, logit_softcap=30.0)
    config.save_pretrained(tmp_path)
    assert RemaskGptConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RemaskGptConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 4}, "hidden_size"),
        ({"hidden_size": 25}, "not divisible"),
        ({"hidden_size": 9}, "even"),
        ({"attention": "sideways"}, "bidirectional"),
        ({"dropout": 1.0}, "dropout"),
        ({"critic_layers": -1}, "critic_layers"),
        ({"vocab_size": "70"}, "vocab_size"),
        ({"mask_token_id": VOCAB}, "mask_token_id"),
        ({"score_activation": "tanh"}, "sigmoid"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_values_set_later_are_checked_too():
    config = make_config()
    config.hidden_size = 25
    with pytest.raises(ValueError, match="not divisible"):
        RemaskGptModel(config)


def test_classes_refuse_a_config_of_another_kind():
    with pytest.raises(ValueError, match="bidirectional"):
        RemaskGptForMaskedLM(make_config(attention="causal"))
    with pytest.raises(ValueError, match="causal"):
        RemaskGptForCausalLM(make_config())
    with pytest.raises(ValueError, match="num_labels"):
        RemaskGptForTokenClassification(make_config(num_labels=1))
    with pytest.raises(ValueError, match="num_labels=1"):
        RemaskGptForSequenceClassification(make_config(score_activation="sigmoid", num_labels=3))


# --- the trunk -------------------------------------------------------------------------------------------------------


def test_a_new_model_starts_as_its_embeddings():
    """Output projections start at zero, so the blocks add nothing and all logits are small."""
    model = RemaskGptForMaskedLM(make_config()).eval()
    out = model(make_ids(), output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[0], out.hidden_states[1])
    assert out.logits.std() < 0.5


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_derivatives_written_out_equal_the_composed_ones(name, monkeypatch):
    model = make(name).double()
    ids, mask = make_ids(), torch.ones(3, 20, dtype=torch.long)
    mask[0, 15:] = 0

    def run():
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        return [out.logits.detach(), *(weight.grad.clone() for weight in model.parameters())]

    ours = run()
    monkeypatch.setattr(modeling, "ELEMENTS_IN_CACHE", 1)  # a slice per sequence and per row
    sliced = run()
    monkeypatch.setattr(modeling, "_is_tracing", lambda: True)
    composed = run()
    torch.testing.assert_close(ours, composed, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sliced, composed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_eager_equals_sdpa(name):
    model, ids = make(name), make_ids()
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    expected = output_of(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(output_of(model, ids, attention_mask=mask), expected, rtol=1e-4, atol=1e-5)
    weights = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (3, 3, 20, 20)
    assert weights[0][1, :, :12, 12:].abs().max() == 0


def test_causal_sees_no_later_token_and_bidirectional_does():
    ids = make_ids(1)
    changed = ids.clone()
    changed[0, -1] = 4 + (ids[0, -1] - 3) % (VOCAB - 4)
    for name, same in (("causal", True), ("masked", False)):
        model = make(name)
        assert torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1]) == same


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    model, ids = make(name), make_ids(1, 13)
    alone = output_of(model, ids)
    padding = torch.zeros(1, 6, dtype=torch.long)
    pair = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat((torch.cat(pair, dim=1), make_ids(1, 19, seed=2)))
    mask = torch.ones_like(padded)
    mask[0, slice(0, 6) if side == "left" else slice(13, None)] = 0
    batched = output_of(model, padded, attention_mask=mask)[:1]
    if name != "sequence":
        batched = batched[:, 6:] if side == "left" else batched[:, :13]
    torch.testing.assert_close(
        batched, alone, rtol=1e-5, atol=1e-6 * max(1.0, float(alone.detach().abs().max()))
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["masked", "causal"])
def test_rows_of_padding_only_stay_finite(name, implementation):
    model, ids = make(name), make_ids()
    model.set_attn_implementation(implementation)
    model.train()
    mask = torch.ones_like(ids)
    mask[1] = 0
    additive = torch.zeros(3, 1, 20, 20).masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    for given in (mask, additive):
        out = model(ids, attention_mask=given, labels=ids)
        out.loss.backward()
        assert out.logits.isfinite().all()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_four_dimensional_masks():
    model, ids = make("model"), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state
    full = mask.bool()[:, None, None, :].expand(3, 1, 20, 20)
    additive = torch.zeros(3, 1, 20, 20).masked_fill(~full, torch.finfo(torch.float32).min)
    for given in (full, full.long(), additive):
        torch.testing.assert_close(model(ids, attention_mask=given).last_hidden_state, expected)
    tril = torch.ones(20, 20, dtype=torch.bool).tril().expand(3, 1, 20, 20)
    causal = make("causal")
    torch.testing.assert_close(causal(ids, attention_mask=tril).logits, causal(ids).logits)
    for wrong in (mask[:, :5], mask[:, None], full[..., :7]):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=wrong)


def test_packed_candidates_equal_separate_ones():
    """prompt | a | b with a block mask and continued positions equals prompt + a and prompt + b, causally."""
    model, prompt, first, second = make("causal"), make_ids(1, 6), make_ids(1, 5, 2), make_ids(1, 4, 3)
    packed = torch.cat((prompt, first, second), dim=1)
    owner = torch.tensor([0] * 6 + [1] * 5 + [2] * 4)
    sees = torch.ones(15, 15).tril().bool() & ((owner[:, None] == owner) | (owner == 0))
    positions = torch.tensor([[*range(6), *range(6, 11), *range(6, 10)]])
    logits = model(packed, attention_mask=sees[None, None], position_ids=positions).logits
    torch.testing.assert_close(
        logits[:, 6:11], model(torch.cat((prompt, first), 1)).logits[:, 6:], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        logits[:, 11:], model(torch.cat((prompt, second), 1)).logits[:, 6:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", HEADS)
def test_bits_do_not_depend_on_the_batch(name):
    """float32: a sample alone, in a small batch and in a large one."""
    model = make(name, hidden_size=96, num_attention_heads=3, max_position_embeddings=64)
    ids = make_ids(64, 64)
    with torch.no_grad():
        everything = output_of(model, ids)
        for batch in (1, 2, 5, 33):
            assert torch.equal(output_of(model, ids[:batch]), everything[:batch])
        assert torch.equal(output_of(model, ids[40:41]), everything[40:41])


def test_bits_of_chosen_rows_do_not_depend_on_their_number():
    model, ids = make("masked", critic_layers=1, hidden_size=96), make_ids(32, 48)
    rows = model.model(ids).last_hidden_state.flatten(0, 1)
    everything = model.lm_logits(rows)
    critic = model(ids, head="critic").logits.flatten()
    for count in (1, 2, 3, 7, 15, 16, 17, 100, 999):
        at = torch.arange(count)
        assert torch.equal(model.lm_logits(rows[:count]), everything[:count])
        assert torch.equal(model(ids, logits_at=at, head="critic").logits, critic[:count])


def test_embeddings_instead_of_ids():
    model, ids = make("masked"), make_ids()
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_bad_ids_and_lengths_are_refused():
    model = make("masked")
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the vocabulary of {VOCAB}"):
        model(torch.tensor([[5, VOCAB]]))
    with pytest.raises(ValueError, match="token id -1"):
        model(torch.tensor([[5, -1]]))
    with pytest.raises(ValueError, match="48 positions"):
        model(make_ids(1, 49))
    with pytest.raises(ValueError, match="position 48"):
        model(make_ids(1, 2), position_ids=torch.tensor([[0, 48]]))


def test_hidden_states_and_tuples():
    model, ids = make("masked"), make_ids()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(
        model.lm_logits(out.hidden_states[-1].flatten(0, 1)).view_as(out.logits), out.logits
    )
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)
    with pytest.raises(ValueError, match="eager"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize("name", HEADS)
def test_gradient_checkpointing_gives_equal_gradients(name):
    model, ids = make(name), make_ids()
    model.train()

    def gradients():
        model.zero_grad()
        output_of(model, ids).square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), plain)


def test_dropout_only_while_training():
    model, ids = make("masked", dropout=0.5), make_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_bfloat16_is_close_and_finite(name):
    model, ids = make(name), make_ids()
    exact = model(ids).logits
    half = copy.deepcopy(model).bfloat16()
    out = half(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert F.cosine_similarity(out.logits.float().flatten(), exact.flatten(), dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.item() - out.loss.item()) < 0.1


# --- language models -------------------------------------------------------------------------------------------------


def test_masked_loss_is_the_mean_over_labelled_positions():
    model, ids = make("masked"), make_ids()
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, ids, -100)
    full = model(ids, labels=labels)
    expected = F.cross_entropy(full.logits.view(-1, VOCAB), labels.view(-1))
    torch.testing.assert_close(full.loss, expected)
    where = (labels.view(-1) != -100).nonzero().squeeze(1)
    chosen = [model(ids, labels=labels, logits_at="labels"), model(ids, labels=labels, logits_at=where)]
    chosen.append(model(ids, labels=labels.view(-1)[where], logits_at=where))
    for out in chosen:
        torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-6)
        assert torch.equal(out.logits, full.logits.view(-1, VOCAB)[where])


def test_soft_targets():
    model, ids = make("masked"), make_ids()
    labels = ids.clone()
    labels[:, ::2] = -100
    hard = model(ids, labels=labels).loss
    soft = F.one_hot(labels.clamp_min(0), VOCAB).float() * (labels != -100).unsqueeze(-1)
    torch.testing.assert_close(model(ids, labels=soft).loss, hard)
    soft[:, ::2] = -100
    torch.testing.assert_close(model(ids, labels=soft, logits_at="labels").loss, hard)


def test_bad_labels_are_refused():
    model, ids = make("masked"), make_ids()
    with pytest.raises(ValueError, match="no position has a label"):
        model(ids, labels=torch.full_like(ids, -100))
    with pytest.raises(ValueError, match=f"label {VOCAB} is not one of the {VOCAB} classes"):
        model(ids, labels=torch.full_like(ids, VOCAB))
    with pytest.raises(ValueError, match="labels are"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(ValueError, match="soft targets"):
        model(ids, labels=torch.rand(3, 20, 7))
    with pytest.raises(ValueError, match="logits_at"):
        model(ids, logits_at=torch.zeros(3, dtype=torch.bool))


def test_critic_head():
    model, ids = make("masked", critic_layers=1), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    out = model(ids, attention_mask=mask, head="critic")
    assert out.logits.shape == ids.shape
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.critic_logits(hidden, mask), out.logits)
    labels = torch.where(mask.bool(), (ids % 2 == 0).long(), -100)
    loss = model(ids, attention_mask=mask, head="critic", labels=labels).loss
    kept = labels != -100
    torch.testing.assert_close(
        loss, F.binary_cross_entropy_with_logits(out.logits[kept], labels[kept].float())
    )
    assert make("masked", critic_layers=0)(ids, head="critic").logits.shape == ids.shape
    with pytest.raises(ValueError, match="critic_layers"):
        make("masked")(ids, head="critic")
    with pytest.raises(ValueError, match="head"):
        model(ids, head="critc")


def test_softcap_bounds_the_logits():
    assert make("masked", logit_softcap=2.0)(make_ids()).logits.abs().max() <= 2


def test_causal_labels_are_shifted_inside():
    model, ids = make("causal"), make_ids()
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(ids, labels=ids, logits_at="labels").loss, expected)
    last = model(ids, logits_to_keep=2, use_cache=False).logits
    torch.testing.assert_close(last, out.logits[:, -2:], rtol=1e-5, atol=1e-6)
    at = torch.tensor([0, 25, 59])
    chosen = model(ids, logits_at=at, use_cache=False).logits
    torch.testing.assert_close(chosen, out.logits.view(-1, VOCAB)[at], rtol=1e-5, atol=1e-6)


def test_generation_with_and_without_cache():
    model, ids = make("causal"), make_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    cached, plain = (
        model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use, pad_token_id=0
        )
        for use in (True, False)
    )
    assert torch.equal(cached, plain) and cached.shape == (2, 20)
    alone = model.generate(ids[:1, 3:], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(alone[:, 5:], cached[:1, 8:])
    first = model(ids[1:, :5], use_cache=True)
    second = model(ids[1:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids[1:]).logits[:, 5:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="bidirectional"):
        make("masked").model(ids, use_cache=True)


# --- classifiers -----------------------------------------------------------------------------------------------------


def test_token_classification():
    model, ids = make("token", num_labels=3), make_ids()
    labels = ids % 3
    labels[:, 5:] = -100
    out = model(ids, labels=labels)
    assert out.logits.shape == (3, 20, 3)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.view(-1, 3), labels.view(-1)))
    soft = F.one_hot(labels.clamp_min(0), 3).float() * (labels != -100).unsqueeze(-1)
    torch.testing.assert_close(model(ids, labels=soft).loss, out.loss)


def test_sequence_problems_are_inferred_per_call():
    ids = make_ids()
    model = make("sequence", num_labels=3)
    logits = model(ids).logits
    classes, several = torch.tensor([0, 2, 1]), torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    torch.testing.assert_close(model(ids, labels=classes).loss, F.cross_entropy(logits, classes))
    expected = F.binary_cross_entropy_with_logits(logits, several)
    torch.testing.assert_close(model(ids, labels=several).loss, expected)
    torch.testing.assert_close(model(ids, labels=classes).loss, F.cross_entropy(logits, classes))
    assert model.config.problem_type is None
    number = make("sequence", num_labels=1)
    targets = torch.tensor([3.0, -1.0, 0.5])
    torch.testing.assert_close(
        number(ids, labels=targets).loss, F.mse_loss(number(ids).logits.squeeze(1), targets)
    )


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([0, 3, 1])),
        ({"num_labels": 3}, torch.tensor([[0, 1], [1, 0], [0, 0]])),
        ({"num_labels": 3}, torch.tensor([0.0, 1.0, 2.0])),
        ({"num_labels": 3}, torch.tensor([[2.0, 0, 0]] * 3)),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([[1.0, 0, 0]] * 3)),
        ({"num_labels": 1}, torch.tensor([0.0, float("nan"), 1.0])),
        ({"num_labels": 1, "score_activation": "sigmoid"}, torch.tensor([0.0, 1.5, 1.0])),
        ({"num_labels": 1}, torch.tensor([0.0, 1.0])),
    ],
)
def test_sequence_labels_that_contradict_are_refused(changes, labels):
    with pytest.raises(ValueError, match="label"):
        make("sequence", **changes)(make_ids(), labels=labels)


def test_the_scorer():
    config = make_config(num_labels=1, score_activation="sigmoid")
    model, ids = RemaskGptForSequenceClassification(config).eval(), make_ids()
    targets = torch.tensor([0.0, 1.0, 0.25])
    out = model(ids, labels=targets)
    assert out.logits.shape == (3, 1)
    assert (out.logits - 0.5).abs().max() < 0.2  # small initial weights: no opinion yet
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits.squeeze(1), targets))
    assert config.problem_type is None


def test_pooling_places():
    ids, mask = make_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:], mask[1, :2] = 0, 0
    for pooling, places in (("first", (0, 2)), ("last", (4, 7))):
        model = make("sequence", pooling=pooling)
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        expected = model.classifier(torch.stack([hidden[row, place] for row, place in enumerate(places)]))
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    causal = make("sequence", attention="causal")
    padded = torch.cat((ids, torch.zeros(2, 3, dtype=torch.long)), dim=1)
    torch.testing.assert_close(causal(padded).logits, causal(ids).logits, rtol=1e-4, atol=1e-5)


# --- a first-class citizen -------------------------------------------------------------------------------------------


AUTO = {
    "model": AutoModel,
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "token": AutoModelForTokenClassification,
    "sequence": AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("name", HEADS)
def test_save_load_and_auto_classes(name, tmp_path):
    model, ids = make(name), make_ids()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    torch.full(
        (4_000_000,), 7.0
    )  # freed at once: memory that nobody filled must not look like a right buffer
    loaded, info = AUTO[name].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HEADS[name] and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(output_of(loaded.eval(), ids), output_of(model, ids))
    assert isinstance(AUTO[name].from_config(model.config), HEADS[name])
    assert not list(loaded.buffers())


def test_weights_are_tied_and_stay_so(tmp_path):
    model = make("masked")
    model.save_pretrained(tmp_path)
    loaded = RemaskGptForMaskedLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.resize_token_embeddings(VOCAB + 4)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded(make_ids()).logits.shape[-1] == VOCAB + 4 == loaded.config.vocab_size
    torch.testing.assert_close(loaded(make_ids()).logits[..., :VOCAB], model(make_ids()).logits)
    untied = make("masked", tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_transfer_from_the_masked_model_makes_a_new_head_and_says_so(tmp_path):
    model = make("masked", critic_layers=0)
    model.save_pretrained(tmp_path)
    for name in ("sequence", "token"):
        loaded, info = HEADS[name].from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
        assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        assert all(key.startswith("critic.") for key in info["unexpected_keys"])
        assert loaded.classifier.weight.isfinite().all() and loaded.classifier.weight.std() < 0.05
        assert torch.equal(
            loaded.model(make_ids()).last_hidden_state, model.model(make_ids()).last_hidden_state
        )
    causal = RemaskGptForCausalLM.from_pretrained(tmp_path, attention="causal")
    assert causal.config.is_causal


def test_a_saved_folder_loads_where_this_repository_is_not(tmp_path):
    model, ids = make("masked"), make_ids()
    model.save_pretrained(tmp_path / "saved")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForMaskedLM\n"
        "from safetensors.torch import save_file\n"
        "model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "assert not any(name.split('.')[0] == 'lib' for name in sys.modules)\n"
        "ids = torch.randint(4, 31, (3, 20), generator=torch.Generator().manual_seed(1))\n"
        "save_file({'logits': model(ids).logits.detach().contiguous()}, sys.argv[2])\n"
    )
    out = tmp_path / "logits.safetensors"
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), str(out)],
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert torch.equal(load_file(out)["logits"], model(ids).logits)


def test_lora_trains_saves_and_reloads(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make("sequence", num_labels=3)
    names = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
    wanted = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=names, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), wanted).eval()
    ids, labels = make_ids(), torch.tensor([0, 1, 2])
    assert not torch.equal(model(ids).logits, base(ids).logits)
    model(input_ids=ids, labels=labels).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert all("lora" in name or "classifier" in name for name in trained) and len(trained) >= 17
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_trainer_trains_evaluates_and_resumes(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in make_ids(32, 12).tolist()]
    collate = lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}  # noqa: E731

    def train(steps: int, resume: bool) -> Trainer:
        model = RemaskGptForMaskedLM(make_config())
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=8, report_to=[],
            learning_rate=1e-2, disable_tqdm=True, use_cpu=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    before = train(2, False).evaluate()["eval_loss"]
    after = train(6, True).evaluate()["eval_loss"]
    assert after < before


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[MASK]", "[CLS]", "[UNK]", *(f"w{index}" for index in range(VOCAB - 4))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        unk_token="[UNK]",
    )


def test_pipelines():
    tokenizer = make_tokenizer()
    fill = pipeline("fill-mask", model=make("masked"), tokenizer=tokenizer)
    assert len(fill("w1 [MASK] w3")) == 5
    classify = pipeline("text-classification", model=make("sequence", num_labels=3), tokenizer=tokenizer)
    assert classify("w1 w2")[0]["label"].startswith("LABEL_")
    scorer = make("sequence", num_labels=1, score_activation="sigmoid")
    judge = pipeline("text-classification", model=scorer, tokenizer=tokenizer)
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    assert judge("w1 w2 w3")[0]["score"] == pytest.approx(scorer(ids).logits.item(), abs=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_export_gives_equal_outputs(name):
    model, ids = make(name), make_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return output_of(self.inner, input_ids, attention_mask=attention_mask)

    exported = torch.export.export(Plain(), (ids, mask)).module()
    torch.testing.assert_close(
        exported(ids, mask), output_of(model, ids, attention_mask=mask), rtol=0, atol=1e-4
    )


def test_the_model_file_imports_nothing_of_the_project():
    source = Path(inspect.getfile(RemaskGptModel)).read_text()
    assert "from lib" not in source and "import lib" not in source


def test_it_learns():
    """A pulse: the masked model memorises eight short rows."""
    torch.manual_seed(0)
    model, ids = RemaskGptForMaskedLM(make_config()), make_ids(8, 16)
    hidden = torch.rand(ids.shape) < 0.4
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(
            ids.masked_fill(hidden, 1), labels=torch.where(hidden, ids, -100), logits_at="labels"
        ).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.5
