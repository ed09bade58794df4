"""Tokenizers: special ids collide with nothing, texts come back exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import BadData
from lib.tokenization import (
    SPECIAL_TOKENS,
    decode_batch,
    encode_batch,
    encode_with_masks,
    load_tokenizer,
    train_tokenizer,
)

TEXT = "To be, or not to be: [MASK] [PAD]\n\n\tthat is the question… naïve  café {} <s>\r\n"
KINDS = {
    "character": train_tokenizer("character", [TEXT], 0),
    "bpe": train_tokenizer("bpe", [TEXT * 20], 300),
}


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_the_first_four_and_text_never_becomes_one(kind):
    tokenizer = KINDS[kind]
    assert [tokenizer.get_vocab()[t] for t in SPECIAL_TOKENS] == [0, 1, 2, 3]
    (ids,) = encode_batch(tokenizer, [TEXT])
    assert ids.dtype == np.int32 and ids.min() > 3
    assert decode_batch(tokenizer, [ids]) == [TEXT]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same(kind, tmp_path):
    KINDS[kind].save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == KINDS[kind].get_vocab()
    np.testing.assert_array_equal(encode_batch(again, [TEXT])[0], encode_batch(KINDS[kind], [TEXT])[0])
    assert (again.pad_token_id, again.mask_token_id, again.cls_token_id, again.unk_token_id) == (0, 1, 2, 3)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_byte_level_bpe_holds_any_text(text):
    ids = encode_batch(KINDS["bpe"], [text])
    assert decode_batch(KINDS["bpe"], ids) == [text]


def test_characters_outside_the_vocabulary():
    with pytest.raises(BadData, match=r"2 characters .* 'Ω' \(U\+03A9\), '🙂' \(U\+1F642\)"):
        encode_batch(KINDS["character"], ["to Ω", "be 🙂"])
    (ids,) = encode_batch(KINDS["character"], ["to Ω"], "unk")
    assert ids[-1] == 3 and decode_batch(KINDS["character"], [ids]) == ["to [UNK]"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_user_types_reads_the_mask(kind):
    tokenizer = KINDS[kind]
    (ids,) = encode_with_masks(tokenizer, ["to [MASK][MASK] be"])
    assert (ids == 1).sum() == 2
    left, right = encode_batch(tokenizer, ["to ", " be"])
    np.testing.assert_array_equal(ids, [*left, 1, 1, *right])


def test_the_hugging_face_view_agrees():
    """The folder is a Hugging Face tokenizer: its own call gives the ids that ours gives."""
    for tokenizer in KINDS.values():
        theirs = tokenizer("that is the question", add_special_tokens=False)["input_ids"]
        assert theirs == encode_batch(tokenizer, ["that is the question"])[0].tolist()
        assert tokenizer("a [MASK] b")["input_ids"].count(1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_serves_the_fill_mask_pipeline(kind, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

    KINDS[kind].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token, tokenizer.mask_token, tokenizer.cls_token, tokenizer.unk_token) == (
        "[PAD]", "[MASK]", "[CLS]", "[UNK]"
    )  # fmt: skip
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = BertForMaskedLM(shape)
    fills = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)("To be or not [MASK]o be")
    assert len(fills) == 3 and all("o be" in fill["sequence"] for fill in fills)


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_shown_by_name_between_exact_texts(kind):
    tokenizer = KINDS[kind]
    left, right = encode_batch(tokenizer, ["To be ", " not\n"])
    ids = np.concatenate([[2], left, [1, 1], right, [0]])
    assert decode_batch(tokenizer, [ids, left, []]) == ["[CLS]To be [MASK][MASK] not\n[PAD]", "To be ", ""]
    assert encode_batch(tokenizer, []) == [] and encode_batch(tokenizer, [""])[0].dtype == np.int32


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(BadData, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(BadData, match="needs at least 260"):
        train_tokenizer("bpe", [TEXT], 100)
