"""The backbone as a transformers model: shapes, losses, masks, batches, saving, and the tools around it.

It tests the public behaviour of `lib.models.hugging_face.modeling_remask_gpt`.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from lib.config import ROOT, load_config
from lib.errors import BadConfig
from lib.models.build import Checkpoint, start_model
from lib.models.hugging_face import RemaskGptConfig, RemaskGptForCausalLM, RemaskGptForMaskedLM
from lib.models.hugging_face import modeling_remask_gpt as modeling
from lib.models.packing import Pools
from lib.models.ranker import CandidateRanker
from tests import test_hugging_face as common
from tests.test_hugging_face import VOCAB, make_ids, output_of


def make_config(**changes) -> RemaskGptConfig:
    config = common.make_config("remask", **changes)
    assert isinstance(config, RemaskGptConfig)
    return config


def make(name: str, seed: int = 0, **changes):
    return common.make(("remask", name), seed, **changes)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 9}, "even"),
        ({"attention": "sideways"}, "bidirectional"),
        ({"dropout": 1.0}, "dropout"),
        ({"critic_layers": -1}, "critic_layers"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"pooling": "median"}, "pooling"),
        ({"conv_width": 4}, "odd"),
        ({"conv_width": -3}, "conv_width"),
        ({"conv_width": 999_999_999}, "up to 255"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_classes_refuse_a_config_of_another_kind():
    with pytest.raises(ValueError, match="bidirectional"):
        RemaskGptForMaskedLM(make_config(attention="causal"))
    with pytest.raises(ValueError, match="causal"):
        RemaskGptForCausalLM(make_config())


# --- the convolution -----------------------------------------------------------------------------------------------------


def with_convolution(width: int = 5, **changes) -> RemaskGptForMaskedLM:
    """A model whose convolution has weights that are not zero."""
    model = make("masked", conv_width=width, **changes)
    torch.nn.init.normal_(model.model.conv.linear.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("width", [1, 3, 5])
def test_the_convolution_is_that_of_torch(width):
    model = with_convolution(width).double()
    size = model.config.hidden_size
    hidden, conv = torch.randn(2, 9, size, dtype=torch.float64), model.model.conv
    assert conv is not None
    weight = conv.linear.weight.view(size, width, size).transpose(1, 2)  # (out, in, width)
    expected = hidden + F.conv1d(hidden.transpose(1, 2), weight, padding=width // 2).transpose(1, 2)
    torch.testing.assert_close(conv(hidden, None), expected)


def test_a_token_changes_its_neighbours_and_no_others():
    model = with_convolution(5, num_hidden_layers=0)
    ids = make_ids(1, 12)
    changed = ids.clone()
    changed[0, 6] = 4 + (ids[0, 6] - 3) % (VOCAB - 4)
    differs = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_padding_is_no_neighbour():
    model, ids = with_convolution(), make_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    mask[1, :3] = 0  # padding before a text
    logits = model(ids, attention_mask=mask).logits
    alone = model(ids[:1, :7]).logits
    torch.testing.assert_close(logits[:1, :7], alone, rtol=1e-4, atol=1e-5)
    other = ids.clone()
    other[mask == 0] = 4
    torch.testing.assert_close(model(other, attention_mask=mask).logits[mask == 1], logits[mask == 1])


def test_a_new_convolution_changes_nothing_and_learns():
    plain, model = make("masked"), make("masked", conv_width=5)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["model.conv.linear.weight"]
    with torch.no_grad():
        model.model.conv.linear.weight.zero_()
    ids = make_ids()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert model.model.conv.linear.weight.grad.abs().sum() > 0
    new = RemaskGptForMaskedLM(make_config(conv_width=5))
    assert new.model.conv is not None and not new.model.conv.linear.weight.any()


def test_the_bits_of_a_row_with_a_convolution_do_not_depend_on_the_batch():
    model = with_convolution(hidden_size=96, num_attention_heads=3, max_position_embeddings=64)
    ids = make_ids(64, 64)
    with torch.no_grad():
        everything = model(ids).logits
        for rows in (slice(1), slice(5), slice(40, 41)):
            assert torch.equal(model(ids[rows]).logits, everything[rows])


def test_a_mask_that_does_not_say_who_is_near_is_refused():
    model, ids = with_convolution(), make_ids(1, 6)
    with pytest.raises(ValueError, match="conv_width 5 takes a mask"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(BadConfig, match=r"cannot be a prefix-LM.*conv_width.*Set ranker.attention to full"):
        CandidateRanker(model.model, seed=0)
    assert not CandidateRanker(model.model, attention="full", seed=0).packs


def causal_convolution(width: int = 5):
    model = make("causal", conv_width=width)
    torch.nn.init.normal_(model.model.conv.linear.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize("width", [3, 5, 9])
def test_the_convolution_of_a_causal_model_reads_only_earlier_tokens(width):
    conv = causal_convolution(width).double().model.conv
    size = conv.linear.out_features
    hidden = torch.randn(2, 12, size, dtype=torch.float64)
    weight = conv.linear.weight.view(size, width, size).transpose(1, 2)  # (out, in, width)
    before = F.pad(hidden.transpose(1, 2), (width - 1, 0))
    torch.testing.assert_close(conv(hidden, None), hidden + F.conv1d(before, weight).transpose(1, 2))
    model, ids = causal_convolution(width), make_ids(2, 14)
    other = ids.clone()
    other[:, 9:] = (ids[:, 9:] + 1) % 20 + 4
    with torch.no_grad():
        one, two = (model(x, use_cache=False).logits for x in (ids, other))
    assert torch.equal(one[:, :9], two[:, :9]) and not torch.equal(one[:, 9], two[:, 9])


@pytest.mark.parametrize("pieces", [[1] * 14, [4, 1, 1, 8], [2, 12], [13, 1]], ids=str)
@pytest.mark.parametrize("of_config", [True, False])
def test_a_cache_keeps_the_embeddings_that_a_convolution_reads(pieces, of_config):
    model, ids, at, found = causal_convolution(), make_ids(3, 14), 0, []
    cache = DynamicCache(config=model.config) if of_config else DynamicCache()
    with torch.no_grad():
        for size in pieces:
            found.append(model(ids[:, at : at + size], past_key_values=cache).logits)
            at += size
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=0, atol=1e-5)
    cache.crop(-4)  # as assisted generation does
    with torch.no_grad():
        again = model(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(again, wanted[:, 10:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_convolution_generates_the_same_text_with_a_cache_and_beside_padding(beams):
    model, ids = causal_convolution(), make_ids(1, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    wanted = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), wanted)
    padded, mask = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 4:], wanted)


def test_architectures_give_models_a_convolution_of_their_attention(tmp_path):
    architecture = load_config(quick_test=True, overrides=["architecture.conv_width=3"]).architecture
    masked, _ = start_model("language_model", architecture, "bidirectional", 44, 0, "m")
    causal, _ = start_model("language_model", architecture, "causal", 44, 0, "m")
    assert masked.model.conv.width == causal.model.conv.width == 3
    masked.save_pretrained(tmp_path)
    start = Checkpoint(tmp_path, 0.0)
    again, _ = start_model("token_classifier", start, "bidirectional", 44, 0, "t", num_labels=2)
    assert torch.equal(again.model.conv.linear.weight, masked.model.conv.linear.weight)
    with pytest.raises(BadConfig, match="belong to other neighbours in a model that is causal"):
        start_model("language_model", start, "causal", 44, 0, "m")
    for wrong, said in (
        (["architecture.conv_width=4"], "must be odd"),
        (["architecture.conv_width=1000000001"], "conv_width"),
        (
            [CONV, "models.judge={start: scratch, architecture: {family: ltg_bert}}"],
            "ltg_bert has no convolution",
        ),
    ):
        with pytest.raises(BadConfig, match=said):
            load_config(quick_test=True, overrides=wrong)


CONV = "architecture.conv_width=3"


def test_a_ranker_that_would_mix_candidates_is_refused_before_any_stage(tmp_path):
    def pools(*settings: str) -> None:
        load_config([ROOT / "configs" / "pools.yaml"], quick_test=True, overrides=[CONV, *settings])

    pools("ranker.attention=full")
    pools("models.ranker.architecture.conv_width=0")
    pools("models.ranker.attention=causal")
    pools("ranker.encoder=some/encoder")
    pools(f"models.ranker.start={tmp_path}")  # its backbone is that of the folder, at which stage 04 looks
    generator = "models.generator={mode: language_model, attention: bidirectional, start: scratch}"
    from_generator = (generator, "models.ranker.start=generator", "models.ranker.architecture.conv_width=0")
    for settings in ((), from_generator, (*from_generator, "ranker.encoder=some/encoder")):
        with pytest.raises(BadConfig, match=r"models.ranker has a convolution .* would mix the candidates"):
            pools(*settings)


def test_a_causal_model_that_starts_from_a_convolution_is_refused_before_any_stage():
    load_config(quick_test=True, overrides=[CONV])  # models from scratch have their own
    for settings in (
        ["models.ar_baseline.start=generator"],
        ["models.ar_baseline.start=02_generate_candidates"],
        ["models.ar_baseline.start=judge", "models.judge.start=generator"],
    ):
        with pytest.raises(
            BadConfig, match=r"models.ar_baseline has a convolution .* bidirectional, and the model is causal"
        ):
            load_config(quick_test=True, overrides=[CONV, *settings])
        load_config(quick_test=True, overrides=settings)


def test_no_model_starts_from_a_convolution_over_other_neighbours(tmp_path):
    for attention, other in (("causal", "bidirectional"), ("bidirectional", "causal")):
        folder = tmp_path / attention
        make({"causal": "causal", "bidirectional": "masked"}[attention], conv_width=3).save_pretrained(folder)
        with pytest.raises(
            BadConfig, match=f"is {attention} .* start from scratch, or from a model that is {other}"
        ):
            start_model("language_model", Checkpoint(folder, 0.0), other, VOCAB, 0, "m")


def test_a_causal_ranker_with_a_convolution_scores_candidates_one_by_one():
    """In one row, the convolution would mix them."""
    model = CandidateRanker(causal_convolution().model, seed=0).eval()
    assert model.is_causal and not model.packs
    everything = np.ones((2, 3, 4), bool)
    ids = make_ids(2, 6).numpy(), make_ids(6, 4, seed=1).view(2, 3, 4).numpy()
    scores = model(Pools(ids[0], everything[:, 0, :1].repeat(6, 1), ids[1], everything))
    for row, place in np.ndindex(2, 3):
        text = torch.tensor(np.concatenate((ids[0][row], ids[1][row, place])))[None]
        state = model.base(text).last_hidden_state[:, -1]
        torch.testing.assert_close(scores[row, place], model.head(state).squeeze(), rtol=0, atol=1e-5)


def test_a_mask_of_another_length_is_refused_in_the_same_words():
    for model in (make("masked"), with_convolution()):
        with pytest.raises(ValueError, match="expected"):
            model(make_ids(2, 12), attention_mask=torch.ones(2, 13))


def test_a_convolution_is_exported_and_keeps_to_half_precision():
    model, ids = with_convolution(), make_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    exported = torch.export.export(common.Plain(model), (ids, mask)).module()
    wanted = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(exported(ids, mask), wanted, rtol=0, atol=1e-4)
    at = torch.tensor([0, 9, 20])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half, some = model(ids).logits, model(ids, logits_at=at).logits
    assert torch.equal(some, half.flatten(0, 1)[at])
    torch.testing.assert_close(half.float(), model(ids).logits, rtol=0.1, atol=0.1)


# --- the backbone -------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(modeling, "is_tracing", lambda: True)
    composed = run()
    torch.testing.assert_close(ours, composed, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sliced, composed, rtol=1e-9, atol=1e-12)


def test_causal_sees_no_later_token_and_bidirectional_does():
    ids = make_ids(1)
    changed = ids.clone()
    changed[0, -1] = 4 + (ids[0, -1] - 3) % (VOCAB - 4)
    for name, same in (("causal", True), ("masked", False)):
        model = make(name)
        assert torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1]) == same


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


@pytest.mark.parametrize("name", [name for family, name in common.CLASSES if family == "remask"])
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


@pytest.mark.parametrize("length", [3, 48])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_last_block_computes_only_the_states_that_are_wanted(precision, length):
    """Logits at some positions have the bits that they have at all positions, and the same gradients."""
    model, ids = make("masked", hidden_size=96, dropout=0.0).train(), make_ids(8, length)
    at = torch.randperm(8 * length)[: 4 * length]
    weights = torch.randn(len(at), model.config.vocab_size)
    grads = []
    seen: list[torch.Size] = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for some in (False, True):
            model.zero_grad()
            logits = model(ids, logits_at=at).logits if some else model(ids).logits.flatten(0, 1)[at]
            (logits.float() * weights).sum().backward()
            grads.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))  # pyright: ignore[reportOptionalMemberAccess]
    assert seen == [(8, length, 96), (max(len(at), 16), 96)]
    assert torch.equal(grads[0][0], grads[1][0])
    rtol, atol = (2e-2, 2e-2) if precision == torch.bfloat16 else (1e-4, 1e-5)
    for one, other in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=rtol, atol=atol)


def test_all_states_are_there_for_who_asks_for_them():
    model, ids, at = make("masked"), make_ids(2, 20), torch.tensor([3, 39])
    output = model(ids, logits_at=at, output_hidden_states=True)
    assert [tuple(h.shape[:2]) for h in output.hidden_states] == [(2, 20)] * 3
    assert torch.equal(output.logits, model(ids, logits_at=at).logits)
    assert output.logits.shape[0] == 2


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


# --- language models -------------------------------------------------------------------------------------------------


def test_the_critic_says_the_same_alone_and_beside_the_language_model():
    model, ids = make("masked", critic_layers=1), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    out = model(ids, attention_mask=mask, head="critic")
    assert torch.equal(model(ids, attention_mask=mask, head="both").critic_logits, out.logits)


def test_labels_may_be_given_per_chosen_position():
    model, ids = make("masked"), make_ids()
    where = torch.tensor([3, 17, 40])
    full = model(ids).logits.view(-1, VOCAB)[where]
    out = model(ids, labels=ids.view(-1)[where], logits_at=where)
    assert torch.equal(out.logits, full)
    torch.testing.assert_close(out.loss, F.cross_entropy(full, ids.view(-1)[where]))
    with pytest.raises(ValueError, match="logits_at"):
        model(ids, logits_at=torch.zeros(3, dtype=torch.bool))


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
    with pytest.raises(ValueError, match="static key/value cache is not supported"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


# --- classifiers -----------------------------------------------------------------------------------------------------


def test_pooling_places():
    ids, mask = make_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:], mask[1, :2] = 0, 0
    for pooling, places in (("first", (0, 2)), ("last", (4, 7))):
        model = make("sequence", pooling=pooling)
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        expected = model.classifier(torch.stack([hidden[row, place] for row, place in enumerate(places)]))
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    mean = make("sequence", pooling="mean")
    hidden = mean.model(ids, attention_mask=mask).last_hidden_state
    expected = mean.classifier(
        torch.stack([row[m.bool()].mean(0) for row, m in zip(hidden, mask, strict=True)])
    )
    torch.testing.assert_close(mean(ids, attention_mask=mask).logits, expected)
    causal = make("sequence", attention="causal")
    padded = torch.cat((ids, torch.zeros(2, 3, dtype=torch.long)), dim=1)
    torch.testing.assert_close(causal(padded).logits, causal(ids).logits, rtol=1e-4, atol=1e-5)


def test_only_the_cpu_takes_the_code_that_is_written_for_its_cache(monkeypatch):
    """Elsewhere torch's own kernels, a few in place of hundreds; the numbers are the same."""

    def node(result: torch.Tensor) -> str:
        assert result.grad_fn is not None
        return result.grad_fn.name()

    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    away = torch.empty(3, 40, 24, device="meta", requires_grad=True)
    for function, written in (
        (lambda t: modeling.rms_norm(t, 1e-6), "_RmsNormBackward"),
        (modeling.squared_relu, "_SquaredReluBackward"),
    ):
        here = function(x)
        assert node(here) == written != node(function(away))
        (gradient,) = torch.autograd.grad(here.square().sum(), x)
        with monkeypatch.context() as patch:
            patch.setattr(modeling, "_use_native_kernels", lambda tensor: True)
            native = function(x)
            assert node(native) != written
            torch.testing.assert_close(native, here)
            torch.testing.assert_close(torch.autograd.grad(native.square().sum(), x)[0], gradient)
