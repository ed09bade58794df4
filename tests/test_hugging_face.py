"""What both model families promise as Hugging Face models: masks, padding, labels, saving, and the tools around them.

It tests the public behaviour of `lib.models.hugging_face`. What only one family has is tested in its own file.
"""

import copy
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

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

from lib.models import hugging_face as models

VOCAB = 31
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 48,
}  # fmt: skip
LTG = {"intermediate_size": 40, "position_bucket_size": 8, "pad_token_id": 0, "mask_token_id": 1, "cls_token_id": 2,
       "unk_token_id": 3, "sep_token_id": None, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
CLASSES = {
    ("remask", "model"): models.RemaskGptModel,
    ("remask", "masked"): models.RemaskGptForMaskedLM,
    ("remask", "causal"): models.RemaskGptForCausalLM,
    ("remask", "token"): models.RemaskGptForTokenClassification,
    ("remask", "sequence"): models.RemaskGptForSequenceClassification,
    ("ltg", "model"): models.LtgBertModel,
    ("ltg", "masked"): models.LtgBertForMaskedLM,
    ("ltg", "token"): models.LtgBertForTokenClassification,
    ("ltg", "sequence"): models.LtgBertForSequenceClassification,
}
AUTO = {
    "model": AutoModel,
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "token": AutoModelForTokenClassification,
    "sequence": AutoModelForSequenceClassification,
}
BIDIRECTIONAL = [key for key in CLASSES if key[1] != "causal"]
FAMILIES = ["remask", "ltg"]


def make_config(family: str, **changes):
    if family == "ltg":
        return models.LtgBertConfig(**{**SMALL, **LTG, **changes})
    return models.RemaskGptConfig(**{**SMALL, **changes})


def make(key: tuple[str, str], seed: int = 0, **changes: Any):
    """A small model in evaluation mode whose every weight is random: zero projections would hide mistakes."""
    if key[1] == "causal":
        changes["attention"] = "causal"
    torch.manual_seed(seed)
    model = CLASSES[key](make_config(key[0], **changes)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


def make_ids(batch: int = 3, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def output_of(model, *args, **kwargs) -> torch.Tensor:
    out = model(*args, **kwargs)
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


def backbone_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, output_hidden_states=True).hidden_states[-1]


every_class = pytest.mark.parametrize("key", CLASSES, ids="-".join)
every_family = pytest.mark.parametrize("family", FAMILIES)


# --- configuration ---------------------------------------------------------------------------------------------------


@every_family
def test_config_survives_saving(family, tmp_path):
    config = make_config(family, num_labels=5, classifier_dropout=0.25)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)


@every_family
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 4}, "did you mean 'hidden_size'"),
        ({"hidden_size": 25}, "not divisible"),
        ({"vocab_size": "70"}, "vocab_size"),
        ({"mask_token_id": VOCAB}, "mask_token_id"),
        ({"score_activation": "tanh"}, "sigmoid"),
        ({"classifier_dropout": 1.0}, "classifier_dropout"),
        ({"num_hidden_layers": -1, "num_attention_heads": 0}, r"num_hidden_layers.*num_attention_heads"),
    ],
)
def test_config_refuses(family, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(family, **changes)


@every_family
def test_values_set_later_are_checked_too(family):
    config = make_config(family)
    config.hidden_size = 25
    with pytest.raises(ValueError, match="not divisible"):
        CLASSES[family, "model"](config)


@every_family
def test_heads_refuse_a_config_of_another_kind(family):
    with pytest.raises(ValueError, match="num_labels"):
        CLASSES[family, "token"](make_config(family, num_labels=1))
    with pytest.raises(ValueError, match="num_labels=1"):
        CLASSES[family, "sequence"](make_config(family, score_activation="sigmoid", num_labels=3))
    several = {"problem_type": "multi_label_classification", "num_labels": 1, "score_activation": "sigmoid"}
    with pytest.raises(ValueError, match='problem_type "regression" or None, got "multi_label'):
        CLASSES[family, "sequence"](make_config(family, **several))


# --- attention and padding -------------------------------------------------------------------------------------------


@every_class
def test_eager_equals_sdpa(key):
    model, ids = make(key).double(), make_ids()
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    expected = output_of(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(output_of(model, ids, attention_mask=mask), expected, rtol=1e-10, atol=1e-10)
    weights = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (3, 3, 20, 20)
    assert weights[0][1, :, :12, 12:].abs().max() == 0
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(3, 3, 20, dtype=torch.float64))


@every_class
def test_attention_weights_are_refused_where_they_are_not_made(key):
    with pytest.raises(ValueError, match="eager"):
        make(key)(make_ids(), output_attentions=True)


@every_class
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(key, side):
    model, ids = make(key), make_ids(1, 13)
    alone = output_of(model, ids)
    padding = torch.zeros(1, 6, dtype=torch.long)
    pair = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat((torch.cat(pair, dim=1), make_ids(1, 19, seed=2)))
    mask = torch.ones_like(padded)
    mask[0, slice(0, 6) if side == "left" else slice(13, None)] = 0
    batched = output_of(model, padded, attention_mask=mask)[:1]
    if key[1] != "sequence":
        batched = batched[:, 6:] if side == "left" else batched[:, :13]
    torch.testing.assert_close(
        batched, alone, rtol=1e-5, atol=1e-6 * max(1.0, float(alone.detach().abs().max()))
    )


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_of_padding_only_stay_finite(family, implementation):
    model, ids = make((family, "masked")), make_ids()
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


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_row_of_the_lowest_numbers_stays_finite_in_bfloat16(family, implementation, autocast):
    """There they are -inf, since bfloat16 rounds the lowest number of float32 away from zero."""
    model, ids = make((family, "model")), make_ids()
    model.set_attn_implementation(implementation)
    mask = torch.zeros(3, 1, 20, 20)
    mask[1, :, 5] = torch.finfo(torch.float32).min
    exact = model(ids, attention_mask=mask).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = (model if autocast else model.bfloat16())(ids, attention_mask=mask).last_hidden_state
    assert F.cosine_similarity(states.float().flatten(), exact.flatten(), dim=0) > 0.98


@every_family
def test_four_dimensional_masks(family):
    model, ids = make((family, "model")), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state
    full = mask.bool()[:, None, None, :].expand(3, 1, 20, 20)
    additive = torch.zeros(3, 1, 20, 20).masked_fill(~full, torch.finfo(torch.float32).min)
    for given in (full, full.long(), additive):
        torch.testing.assert_close(model(ids, attention_mask=given).last_hidden_state, expected)
    for wrong in (mask[:, :5], mask[:, None], full[..., :7]):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=wrong)


@every_family
def test_positions_of_a_wrong_shape_are_refused(family):
    model, ids = make((family, "masked"), critic_layers=1), make_ids(4, 20)
    positions = torch.arange(20)
    expected = model(ids, head="both", position_ids=positions)
    for given in (positions[None], positions.expand(4, 20)):
        assert torch.equal(model(ids, head="both", position_ids=given).critic_logits, expected.critic_logits)
    for wrong in (positions.expand(2, 20), positions[:7]):
        with pytest.raises(ValueError, match=r"position_ids is .*expected"):
            model(ids, position_ids=wrong)


@every_family
def test_packed_candidates_see_only_themselves(family):
    """prompt | a | b: with a block mask and positions that start again, b does not notice a."""
    model, prompt, first, second = (
        make((family, "model")),
        make_ids(1, 6),
        make_ids(1, 5, 2),
        make_ids(1, 4, 3),
    )
    packed = torch.cat((prompt, first, second), dim=1)
    owner = torch.tensor([0] * 6 + [1] * 5 + [2] * 4)
    sees = (owner[:, None] == owner) | (owner == 0)  # the prompt sees itself only
    positions = torch.tensor([[*range(6), *range(6, 11), *range(6, 10)]])
    states = model(packed, attention_mask=sees[None, None], position_ids=positions).last_hidden_state
    pair, two = torch.cat((prompt, second), dim=1), torch.tensor([0] * 6 + [2] * 4)
    alone = model(pair, attention_mask=((two[:, None] == two) | (two == 0))[None, None]).last_hidden_state
    torch.testing.assert_close(states[:, 11:], alone[:, 6:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[:, :6], alone[:, :6], rtol=1e-4, atol=1e-5)


@every_family
def test_embeddings_instead_of_ids(family):
    model, ids = make((family, "masked")), make_ids()
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one"):
        model()


@every_family
def test_ids_outside_the_vocabulary_are_refused(family):
    model = make((family, "masked"))
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the vocabulary of {VOCAB}"):
        model(torch.tensor([[5, VOCAB]]))
    with pytest.raises(ValueError, match="token id -1"):
        model(torch.tensor([[5, -1]]))


@every_family
def test_hidden_states_and_tuples(family):
    model, ids = make((family, "masked")), make_ids()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (3, 20, 24)
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)


@every_class
def test_gradient_checkpointing_gives_equal_gradients(key):
    model, ids = make(key), make_ids()
    model.train()

    def gradients():
        model.zero_grad()
        output_of(model, ids).square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize(
    ("family", "key"),
    [("remask", "dropout"), ("ltg", "hidden_dropout_prob"), ("ltg", "attention_probs_dropout_prob")],
)
def test_dropout_only_while_training(family, key):
    model, ids = make((family, "masked"), 0, **{key: 0.5}), make_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@every_class
def test_bfloat16_is_close_and_finite(key):
    model, ids = make(key), make_ids()
    exact = output_of(model, ids)
    half = copy.deepcopy(model).bfloat16()
    out = output_of(half, ids)
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in half.parameters())
    assert F.cosine_similarity(out.float().flatten(), exact.flatten(), dim=0) > 0.98
    with torch.autocast("cpu", torch.bfloat16):
        assert output_of(model, ids).isfinite().all()


@every_family
@pytest.mark.parametrize("autocast", [True, False])
def test_scores_are_exact_in_bfloat16(family, autocast):
    """There the sigmoid of 6.6 is 1, and its gradient 0: a confident error could not be unlearned."""
    model, ids = make((family, "sequence"), num_labels=1, score_activation="sigmoid"), make_ids()
    check_exact_scores(model if autocast else model.bfloat16(), last_layer(model), ids, autocast)


def last_layer(model) -> nn.Linear:
    return getattr(model.classifier, "decoder", model.classifier)


def check_exact_scores(model, last: nn.Linear, ids: torch.Tensor, autocast: bool) -> None:
    """Scores are float32 and have a gradient at a logit of 6.6. Under autocast the last layer does not round its outputs."""
    nn.init.zeros_(last.bias)  # on a CPU it is added in float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids).logits.logit()
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 6.6)
        scores = model(ids).logits
    assert scores.dtype == torch.float32
    assert not autocast or (logits - logits.bfloat16()).abs().max() > 1e-4
    scores.square().sum().backward()
    assert last.bias.grad is not None and last.bias.grad > 0


# --- labels ----------------------------------------------------------------------------------------------------------


@every_family
def test_masked_loss_is_the_mean_over_labelled_positions(family):
    model, ids = make((family, "masked")), make_ids()
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, ids, -100)
    full = model(ids, labels=labels)
    expected = F.cross_entropy(full.logits.view(-1, VOCAB), labels.view(-1))
    torch.testing.assert_close(full.loss, expected)
    where = (labels.view(-1) != -100).nonzero().squeeze(1)
    for out in (model(ids, labels=labels, logits_at="labels"), model(ids, labels=labels, logits_at=where)):
        torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(out.logits, full.logits.view(-1, VOCAB)[where], rtol=1e-5, atol=1e-5)


@every_family
def test_soft_targets(family):
    model, ids = make((family, "masked")), make_ids()
    labels = ids.clone()
    labels[:, ::2] = -100
    hard = model(ids, labels=labels).loss
    soft = F.one_hot(labels.clamp_min(0), VOCAB).float() * (labels != -100).unsqueeze(-1)
    torch.testing.assert_close(model(ids, labels=soft).loss, hard)
    soft[:, ::2] = -100
    torch.testing.assert_close(model(ids, labels=soft, logits_at="labels").loss, hard)


@every_family
def test_bad_labels_are_refused(family):
    model, ids = make((family, "masked")), make_ids()
    with pytest.raises(ValueError, match="no position has a label"):
        model(ids, labels=torch.full_like(ids, -100))
    with pytest.raises(ValueError, match=f"label {VOCAB} is not one of the {VOCAB} classes"):
        model(ids, labels=torch.full_like(ids, VOCAB))
    with pytest.raises(ValueError, match="labels are"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(ValueError, match="soft targets"):
        model(ids, labels=torch.rand(3, 20, 7))
    with pytest.raises(ValueError, match="logits_at"):
        model(ids, logits_at="labels")


@every_family
def test_critic_head(family):
    model, ids = make((family, "masked"), critic_layers=1), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    out = model(ids, attention_mask=mask, head="critic")
    assert out.logits.shape == ids.shape
    labels = torch.where(mask.bool(), (ids % 2 == 0).long(), -100)
    loss = model(ids, attention_mask=mask, head="critic", labels=labels).loss
    kept = labels != -100
    torch.testing.assert_close(
        loss, F.binary_cross_entropy_with_logits(out.logits[kept], labels[kept].float())
    )
    both = model(ids, attention_mask=mask, head="both")
    torch.testing.assert_close(both.critic_logits, out.logits)
    torch.testing.assert_close(both.origin_logits, out.origin_logits)
    assert out.origin_logits.shape == ids.shape and not torch.equal(out.origin_logits, out.logits)
    assert model(ids).origin_logits is None
    at = torch.tensor([3, 25, 40])
    chosen = model(ids, attention_mask=mask, head="critic", logits_at=at).logits
    torch.testing.assert_close(chosen, out.logits.flatten()[at])
    assert make((family, "masked"), critic_layers=0)(ids, head="critic").logits.shape == ids.shape
    with pytest.raises(ValueError, match="critic_layers"):
        make((family, "masked"))(ids, head="critic")
    with pytest.raises(ValueError, match="head"):
        model(ids, head="critc")


@every_family
def test_an_untrained_conditioning_vector_changes_nothing(family):
    torch.manual_seed(0)
    model, ids = CLASSES[family, "masked"](make_config(family, critic_layers=1)).eval(), make_ids()
    known = torch.ones(ids.shape, dtype=torch.bool)
    plain = model(ids, head="critic").logits
    assert torch.equal(model(ids, head="critic", conditioning_mask=known).logits, plain)


@every_family
def test_the_critic_can_be_conditioned_on_known_tokens(family, tmp_path):
    model, ids = make((family, "masked"), critic_layers=1), make_ids()
    known = torch.zeros(ids.shape, dtype=torch.bool)
    plain = model(ids, head="critic").logits
    assert torch.equal(model(ids, head="critic", conditioning_mask=known).logits, plain)  # nothing is known
    known[1, 3:9] = True
    conditioned = model(ids, head="critic", conditioning_mask=known).logits
    assert not torch.allclose(conditioned[1], plain[1])
    torch.testing.assert_close(conditioned[[0, 2]], plain[[0, 2]])
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeddings, head="critic", conditioning_mask=known).logits, conditioned
    )
    with pytest.raises(ValueError, match="conditioning_mask is for"):
        model(ids, conditioning_mask=known)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeddings, head="critic", conditioning_mask=known)


@every_family
def test_token_classification(family):
    model, ids = make((family, "token"), num_labels=3), make_ids()
    labels = ids % 3
    labels[:, 5:] = -100
    out = model(ids, labels=labels)
    assert out.logits.shape == (3, 20, 3)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.view(-1, 3), labels.view(-1)))
    soft = F.one_hot(labels.clamp_min(0), 3).float() * (labels != -100).unsqueeze(-1)
    torch.testing.assert_close(model(ids, labels=soft).loss, out.loss)
    with pytest.raises(ValueError, match="no position has a label"):
        model(ids, labels=torch.full_like(ids, -100))


@every_family
def test_an_empty_text_has_empty_scores_of_the_critic(family):
    model, ids = make((family, "masked"), critic_layers=1), torch.empty(2, 0, dtype=torch.long)
    critic = model(ids, attention_mask=torch.empty(2, 0), head="critic")
    both = model(ids, head="both")
    assert both.logits.shape == (2, 0, VOCAB)
    for scores in (critic.logits, critic.origin_logits, both.critic_logits, both.origin_logits):
        assert scores.shape == (2, 0)


@pytest.mark.parametrize(
    "key", [key for key in CLASSES if key[1] in ("masked", "causal", "token")], ids="-".join
)
def test_an_empty_text_has_empty_logits(key):
    """Also where a tokenizer made floats of it, as torch does of an empty list."""
    changes = {"num_labels": 3} if key[1] == "token" else {}
    for ids in (torch.empty(1, 0), torch.empty(1, 0, dtype=torch.long)):
        logits = make(key, **changes)(ids, attention_mask=torch.empty(1, 0)).logits
        assert logits.shape == (1, 0, 3 if key[1] == "token" else VOCAB)


@every_family
def test_sequence_problems_are_inferred_per_call(family):
    ids = make_ids()
    model = make((family, "sequence"), num_labels=3)
    logits = model(ids).logits
    classes, several = torch.tensor([0, 2, 1]), torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    torch.testing.assert_close(model(ids, labels=classes).loss, F.cross_entropy(logits, classes))
    expected = F.binary_cross_entropy_with_logits(logits, several)
    torch.testing.assert_close(model(ids, labels=several).loss, expected)
    torch.testing.assert_close(model(ids, labels=classes).loss, F.cross_entropy(logits, classes))
    assert model.config.problem_type is None
    number = make((family, "sequence"), num_labels=1)
    targets = torch.tensor([3.0, -1.0, 0.5])
    torch.testing.assert_close(
        number(ids, labels=targets).loss, F.mse_loss(number(ids).logits.squeeze(1), targets)
    )


@every_family
@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([0, 3, 1])),
        ({"num_labels": 3}, torch.tensor([0, -1, 1])),
        ({"num_labels": 3}, torch.tensor([[0, 1], [1, 0], [0, 0]])),
        ({"num_labels": 3}, torch.tensor([0.0, 1.0, 2.0])),
        ({"num_labels": 3}, torch.tensor([[2.0, 0, 0]] * 3)),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([[1.0, 0, 0]] * 3)),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, torch.tensor([0, 0, 0])),
        ({"num_labels": 1}, torch.tensor([0.0, float("nan"), 1.0])),
        ({"num_labels": 1, "score_activation": "sigmoid"}, torch.tensor([0.0, 1.5, 1.0])),
        ({"num_labels": 1}, torch.tensor([0.0, 1.0])),
    ],
)
def test_sequence_labels_that_contradict_are_refused(family, changes, labels):
    with pytest.raises(ValueError, match="label"):
        make((family, "sequence"), **changes)(make_ids(), labels=labels)


@every_family
def test_a_sequence_has_no_ignored_label(family):
    with pytest.raises(ValueError, match=r"label -100 is not one of the 3 classes$"):
        make((family, "sequence"), num_labels=3)(make_ids(), labels=torch.tensor([0, -100, 1]))
    with pytest.raises(ValueError, match=r"label 3 is not one of the 3 classes \(or -100\)$"):
        make((family, "token"), num_labels=3)(make_ids(), labels=torch.full((3, 20), 3))


@every_family
def test_the_scorer(family):
    config = make_config(family, num_labels=1, score_activation="sigmoid")
    model, ids = CLASSES[family, "sequence"](config).eval(), make_ids()
    targets = torch.tensor([0.0, 1.0, 0.25])
    out = model(ids, labels=targets)
    assert out.logits.shape == (3, 1) and ((out.logits > 0) & (out.logits < 1)).all()
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits.squeeze(1), targets))
    assert config.problem_type is None


# --- a first-class citizen -------------------------------------------------------------------------------------------


def poison_memory() -> None:
    """Fill and free memory: what nobody initialises afterwards must not look right by chance."""
    torch.full((4_000_000,), 7.0)


@every_class
def test_save_load_and_auto_classes(key, tmp_path):
    model, ids = make(key), make_ids()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    poison_memory()
    loaded, info = AUTO[key[1]].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CLASSES[key] and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(output_of(loaded.eval(), ids), output_of(model, ids))
    assert isinstance(AUTO[key[1]].from_config(model.config), CLASSES[key])
    assert not list(loaded.buffers())  # nothing that a loader could leave unfilled


@every_class
def test_initialisation_fills_every_weight_and_is_a_function_of_the_seed(key):
    def fresh():
        torch.manual_seed(3)
        poison_memory()
        return CLASSES[key](make_config(key[0], **({"attention": "causal"} if key[1] == "causal" else {})))

    first, second = fresh().state_dict(), fresh().state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert weight.abs().max() <= 3, name  # poisoned memory holds 7


@every_family
def test_weights_are_tied_and_stay_so(family, tmp_path):
    model = make((family, "masked"))
    model.save_pretrained(tmp_path)
    loaded = CLASSES[family, "masked"].from_pretrained(tmp_path)
    tied = lambda m: m.get_output_embeddings().weight is m.get_input_embeddings().weight  # noqa: E731
    assert tied(loaded)
    loaded.resize_token_embeddings(VOCAB + 4)
    assert tied(loaded)
    assert loaded(make_ids()).logits.shape[-1] == VOCAB + 4 == loaded.config.vocab_size
    torch.testing.assert_close(loaded(make_ids()).logits[..., :VOCAB], model(make_ids()).logits)
    assert not tied(make((family, "masked"), tie_word_embeddings=False))


@every_family
def test_transfer_from_the_masked_model_makes_a_new_head_and_says_so(family, tmp_path):
    model, ids = make((family, "masked")), make_ids()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    for name in ("sequence", "token"):
        poison_memory()
        loaded, info = CLASSES[family, name].from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
        missing = set(info["missing_keys"])
        assert missing and all(entry.startswith("classifier.") for entry in missing)
        dropped = info["unexpected_keys"]
        assert all(entry.startswith("lm_head.") for entry in dropped)
        assert bool(dropped) == (family == "ltg")  # the other head is the embedding
        assert all(weight.abs().max() < 3 for weight in loaded.classifier.parameters())
        assert torch.equal(backbone_of(loaded, ids), backbone_of(model, ids))
        assert loaded.config.num_labels == 3
    assert (tmp_path / "config.json").read_bytes() == before
    assert model.config.num_labels == 2  # the default of transformers


LOADS = """
import sys, torch, transformers
from safetensors.torch import save_file
assert not any(name.split('.')[0] == 'lib' for name in sys.modules)
for folder in sys.argv[1:]:
    auto = getattr(transformers, open(folder + "/auto").read())
    model = auto.from_pretrained(folder + "/saved", trust_remote_code=True).eval()
    ids = torch.randint(4, 31, (3, 20), generator=torch.Generator().manual_seed(1))
    out = model(ids)
    out = out.last_hidden_state if 'last_hidden_state' in out else out.logits
    save_file({'out': out.detach().contiguous()}, folder + "/out.safetensors")
assert not any(name.split('.')[0] == 'lib' for name in sys.modules)
"""


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory) -> dict[tuple[str, str], torch.Tensor]:
    """What a small model of each class gives when a process that has only its folder loads it."""
    root = tmp_path_factory.mktemp("elsewhere")
    folders = {key: root / "-".join(key) for key in CLASSES}
    for key, folder in folders.items():
        make(key).save_pretrained(folder / "saved")
        (folder / "auto").write_text(AUTO[key[1]].__name__)
    environment = {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-c", LOADS, *map(str, folders.values())], check=True, cwd=root, env=environment
    )
    return {key: load_file(folder / "out.safetensors")["out"] for key, folder in folders.items()}


@every_class
def test_a_saved_folder_loads_where_this_repository_is_not(key, loaded_elsewhere):
    assert torch.equal(loaded_elsewhere[key], output_of(make(key), make_ids()))


@every_class
def test_a_saved_folder_has_the_code_that_its_model_imports(key, tmp_path):
    make(key).save_pretrained(tmp_path)
    family = {"remask": "remask_gpt", "ltg": "ltg_bert"}[key[0]]
    names = [f"configuration_{family}", f"modeling_{family}", "shared_configuration", "shared_modeling"]
    assert sorted(path.stem for path in tmp_path.glob("*.py")) == sorted(names)
    for path in tmp_path.glob("*.py"):
        assert path.read_bytes() == (Path(models.__file__).parent / path.name).read_bytes()
    # Of a local folder, transformers 5.5 copies to its cache only what the loaded file itself imports.
    text = (tmp_path / f"modeling_{family}.py").read_text()
    assert all(f"from .{name} import" in text for name in names if not name.startswith("modeling"))


@every_family
def test_lora_trains_saves_and_reloads(family, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make((family, "sequence"), num_labels=3)
    names = ["qkv_proj", "o_proj"] if family == "remask" else ["in_proj_qk", "in_proj_v", "out_proj"]
    targets = [*names, "up_proj", "down_proj"]
    wanted = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), wanted).eval()
    ids, labels = make_ids(), torch.tensor([0, 1, 2])
    assert not torch.equal(model(ids).logits, base(ids).logits)
    model(input_ids=ids, labels=labels).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert all("lora" in name or "classifier" in name for name in trained)
    assert len(trained) >= 2 * 2 * len(targets) + 1
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


@pytest.mark.slow
@every_family
def test_trainer_trains_evaluates_and_resumes(family, tmp_path):
    rows: Any = [{"input_ids": row, "labels": row} for row in make_ids(32, 12).tolist()]
    collate = lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}  # noqa: E731

    def train(steps: int, resume: bool) -> Trainer:
        model = CLASSES[family, "masked"](make_config(family))
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=8, report_to=[],
            learning_rate=1e-2, disable_tqdm=True, use_cpu=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    before = train(2, False).evaluate()["eval_loss"]
    after = train(6, True)
    assert after.state.global_step == 6
    assert after.evaluate()["eval_loss"] < before
    after.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    ids = make_ids()
    assert after.model is not None
    torch.testing.assert_close(loaded(ids).logits, after.model.eval()(ids).logits)


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


@every_family
def test_pipelines(family):
    tokenizer = make_tokenizer()
    fill = pipeline("fill-mask", model=make((family, "masked")), tokenizer=tokenizer)
    assert len(fill("w1 [MASK] w3")) == 5
    classify = pipeline(
        "text-classification", model=make((family, "sequence"), num_labels=3), tokenizer=tokenizer
    )
    assert classify("w1 w2")[0]["label"].startswith("LABEL_")
    scorer = make((family, "sequence"), num_labels=1, score_activation="sigmoid")
    judge = pipeline("text-classification", model=scorer, tokenizer=tokenizer)
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    assert judge("w1 w2 w3")[0]["score"] == pytest.approx(scorer(ids).logits.item(), abs=1e-6)


class Plain(nn.Module):
    """Ids and mask in, one tensor out: what exporters like."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask):
        return output_of(self.inner, input_ids, attention_mask=attention_mask)


@pytest.mark.slow
@every_class
def test_export_gives_equal_outputs(key):
    model, ids = make(key), make_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    exported = torch.export.export(Plain(model), (ids, mask)).module()
    torch.testing.assert_close(
        exported(ids, mask), output_of(model, ids, attention_mask=mask), rtol=0, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        ("ltg", "masked"),
        *(pytest.param(k, marks=pytest.mark.long) for k in [("remask", "masked"), ("ltg", "sequence")]),
    ],
    ids="-".join,
)
def test_onnx_gives_equal_outputs_at_other_lengths(key, tmp_path):
    pytest.importorskip(
        "onnxscript", reason="ONNX export needs onnxscript: pip install onnxscript onnxruntime"
    )
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxscript onnxruntime")
    model, ids = make(key), make_ids(2, 16)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=48)
    dynamic = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Plain(model).eval(), (ids, torch.ones_like(ids)), str(path), dynamo=True, dynamic_shapes=dynamic
    )
    session = onnxruntime.InferenceSession(str(path))
    for batch_size, width in ((2, 16), (3, 27)):
        ids = make_ids(batch_size, width)
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = output_of(model, ids, attention_mask=mask)
        torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=0, atol=1e-4)


@every_family
def test_the_model_files_import_nothing_of_the_project(family):
    for part in (CLASSES[family, "model"], type(make_config(family))):
        source = Path(inspect.getfile(part)).read_text()
        assert "from lib" not in source and "import lib" not in source


@pytest.mark.slow
@every_family
def test_it_learns(family):
    """A pulse: the masked model memorises eight short rows."""
    torch.manual_seed(0)
    model, ids = CLASSES[family, "masked"](make_config(family)), make_ids(8, 16)
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
