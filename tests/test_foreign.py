"""Masked LMs with tokenizers of their own: nothing but written words changes, and nothing but the words tells of it."""

import dataclasses
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers as hf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lib import schema
from lib.candidates.counters import CandidateCounters
from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.models.backbones import longest_input, position_offset
from lib.models.build import make_model, model_config, save_model
from lib.runtime import Runtime
from lib.surfaces import Surfaces
from lib.synthetic import MaskedLMEngine, MaskedRows
from lib.tasks import CandidateContext, get_task
from lib.tasks.finqa.rewriting import rewrite_arguments
from lib.tasks.text.other_tokenizer import _Composer, rewrite_with_other_tokenizer
from lib.tasks.text.rewriting import candidates
from lib.tasks.text.units import Reader
from lib.tokenization import encode_batch, train_tokenizer

CPU = Runtime(torch.device("cpu"), "fp32")
SENTENCE = (
    "the quick brown fox jumps over lazy dog while seven wizards brew potion near old stone of Type value and"
)
WORDS = SENTENCE.split()
LETTERS = [*"abcdefghijklmnopqrstuvwxyzTM"]
SIGNS = [*".,;:!?()'\"-*[]<>/_#1234567890"]
TEXTS = (
    "Type of the value and the fox",
    " the fox  jumps\tover\n\n  the lazy dog \n",
    "caf\u00e9 cafe\u0301, \u201cquick\u201d \u2018fox\u2019s\u2019 na\u00efve\u2026",
    "fox \U0001f98a dog \U0001f469\u200d\U0001f52c\ufe0f jumps",
    "\u05e9\u05dc\u05d5\u05dd the \u0639\u0631\u0628\u064a fox",
    "\ufb01ne \u00bd old\u00a0stone\u3000near \u597d\u7684the",
    "[MASK] the <mask> [UNK]fox [PAD] <s>",
    "(the fox) brew-potion, don't: the dog's.",
    "\u200bthe\u200d fox\ufeff \x0cdog",
    "x",
)


# --- tokenizers of every kind ----------------------------------------------------------------------------------------


def wrap(core: Tokenizer, **changes: Any) -> Any:
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, **names | changes)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *tokens]))}


def word_piece(**choices) -> Any:
    words = [w.lower() for w in WORDS] if choices.get("lowercase", True) else WORDS
    core = Tokenizer(models.WordPiece(numbered([*words, *LETTERS, *("##" + c for c in LETTERS), "##ing", *SIGNS, "[unused1]", "\u597d"]),
                                      unk_token="[UNK]"))  # fmt: skip
    core.normalizer = normalizers.BertNormalizer(**choices)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return wrap(core)


def byte_level(prefix: bool = False, normalizer=None) -> Any:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator([" " + " ".join(WORDS)] * 30, trainer)
    tokenizer = wrap(core)
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.RobertaProcessing(
        ("[SEP]", 3), ("[CLS]", 2), trim_offsets=True, add_prefix_space=prefix
    )
    return tokenizer


PIECES = [*("\u2581" + w for w in WORDS), "ing", *LETTERS, *SIGNS, "\u2581", "\n", "\t"]


def unigram(scheme: str = "always", words_first: bool = False, normalizer=None, **choices) -> Any:
    vocabulary = [(t, 0.0) for t in SPECIAL] + [
        (p, -3.0 if len(p) > 1 else -9.0) for p in dict.fromkeys(PIECES)
    ]
    if choices.get("byte_fallback"):
        vocabulary += [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=1, **choices))
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    core.pre_tokenizer = split if words_first else space
    core.decoder, core.normalizer = decoders.Metaspace(prepend_scheme=scheme), normalizer
    return wrap(core)


def bpe_metaspace() -> Any:
    """As Llama's: spaces become a mark in the normaliser, unknown characters become bytes."""
    merges = list(dict.fromkeys(("\u2581" + word[:n], word[n]) for word in WORDS for n in range(len(word))))
    pieces = numbered([*PIECES, *(f"<0x{b:02X}>" for b in range(256)), *(a + b for a, b in merges)])
    core = Tokenizer(models.BPE(pieces, merges, byte_fallback=True, unk_token="[UNK]", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(core)


def characters() -> Any:
    core = Tokenizer(models.WordLevel(numbered([*LETTERS, *SIGNS, " ", "\n", "\t"]), unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return wrap(core)


def whole_words() -> Any:
    core = Tokenizer(models.WordLevel(numbered([*WORDS, *SIGNS]), unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(core)


def end_of_word() -> Any:
    core = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    core.train_from_iterator([" ".join([*WORDS, *LETTERS])] * 30, trainer)
    return wrap(core)


COLLAPSE = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
ALBERT = normalizers.Sequence([normalizers.Replace("''", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])  # fmt: skip
TOKENIZERS = {
    "word_piece": lambda: word_piece(lowercase=False, strip_accents=False),
    "word_piece_uncased": word_piece,
    "byte_level": byte_level,
    "byte_level_prefix": lambda: byte_level(prefix=True),
    "byte_level_nfc": lambda: byte_level(normalizer=normalizers.NFC()),
    "unigram_always": unigram,
    "unigram_first": lambda: unigram("first"),
    "unigram_never": lambda: unigram("never"),
    "unigram_bytes": lambda: unigram("first", byte_fallback=True),
    "unigram_words": lambda: unigram(words_first=True, normalizer=COLLAPSE),
    "albert": lambda: unigram(normalizer=ALBERT),
    "bpe_metaspace": bpe_metaspace,
    "characters": characters,
    "whole_words": whole_words,
    "end_of_word": end_of_word,
}
EXACT = ("byte_level", "byte_level_prefix", "unigram_always", "unigram_first", "unigram_never", "unigram_bytes", "bpe_metaspace",
         "characters", "whole_words", "end_of_word")  # what their tokens write is what stood there  # fmt: skip
SPELLED = ("word_piece", *EXACT)  # the same for lower and upper case letters and signs
MADE: dict[str, Any] = {}


def make(name: str) -> Any:
    if name not in MADE:
        MADE[name] = TOKENIZERS[name]()
    return MADE[name]


def write(
    reader: Reader, text: str, masked=None, words: dict[int, list[int]] | None = None, force: bool = False
) -> str:
    """The text with units masked and some of them given other tokens. `force`: tokens written as they were count as new."""
    read = reader.read([text])
    masked = np.ones(len(read.text_of_unit), bool) if masked is None else masked
    filled = read.ids.copy()
    for unit, ids in (words or {}).items():
        filled[read.unit_of_token == unit] = ids
    if force:
        hidden = np.append(masked, False)[read.unit_of_token]
        read = dataclasses.replace(read, ids=np.where(hidden, len(reader.surfaces.cores) - 1, read.ids))
        read.space_before.flags.writeable = False
    return _Composer(read, [text], masked, filled, reader, None).text(0)[0]


# --- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_token_in_place_of_itself_leaves_the_text_unchanged(name):
    """For every unit alone and for all together. The units and the gaps between them are the text."""
    reader = Reader.of(make(name))
    for text in TEXTS:
        read = reader.read([text])
        assert write(reader, text) == text
        assert (read.start < read.end).all() and (read.start[1:] >= read.end[:-1]).all()
        between = np.ones(len(text), bool)
        for start, end in zip(read.start, read.end, strict=True):
            between[start:end] = False
            assert not re.search(r"^\s|\s$", text[start:end])
        assert "".join(c for c, out in zip(text, between, strict=True) if out).strip() == "", name
        for unit in range(len(read.text_of_unit)):
            assert write(reader, text, np.arange(len(read.text_of_unit)) == unit) == text


@pytest.mark.parametrize("name", EXACT)
def test_what_tokens_write_is_what_they_read(name):
    """Through the bytes and spaces of every token, with nothing kept because it had been there."""
    reader = Reader.of(make(name))
    for text in TEXTS:
        read = reader.read([text])
        for masked in (read.known, *np.eye(len(read.text_of_unit), dtype=bool)[read.known]):
            assert write(reader, text, masked, force=True) == text, (name, text)


@pytest.mark.parametrize(
    "name", ["word_piece_uncased", "albert", "unigram_words", "byte_level_nfc", "word_piece"]
)
def test_a_normaliser_changes_no_character_that_is_not_rewritten(name):
    reader = Reader.of(make(name))
    for text in TEXTS:
        read = reader.read([text])
        for unit in np.flatnonzero(read.known):
            new = write(reader, text, np.arange(len(read.text_of_unit)) == unit, force=True)
            before, after = text[: read.start[unit]].rstrip(" "), text[read.end[unit] :].lstrip(" ")
            assert new.startswith(before) and new.endswith(after), (name, text, unit)


def test_tokens_that_share_characters_are_one_unit():
    text = "caf\u00e9 \u201cfox\u201d \U0001f98a"
    for name in ("byte_level", "unigram_bytes", "bpe_metaspace"):
        read = Reader.of(make(name)).read([text])
        units = [text[a:b] for a, b in zip(read.start, read.end, strict=True)]
        assert {"\u00e9", "\U0001f98a"} <= {
            u for u in units
        } or name == "unigram_bytes"  # it spells runs of unknown ones
        assert not read.is_single_token[[u for u, word in enumerate(units) if word == "\U0001f98a"]].any()
    fine = Reader.of(make("albert")).read(["\u00bd"])
    assert len(fine.ids) > 1 and len(fine.text_of_unit) == 1  # 1, a stroke and 2 stand for one character


# --- spaces ----------------------------------------------------------------------------------------------------------

BEGINS = {"word_piece": "{}", "unigram_always": "\u2581{}", "unigram_first": "\u2581{}", "unigram_never": "\u2581{}",
          "unigram_words": "\u2581{}", "unigram_bytes": "\u2581{}", "byte_level": "\u0120{}", "byte_level_prefix": "\u0120{}",
          "bpe_metaspace": "\u2581{}", "whole_words": "{}"}  # fmt: skip
GLUES = {"word_piece": "##ing", "unigram_always": "ing", "unigram_first": "ing", "unigram_never": "ing", "unigram_words": "ing",
         "byte_level": "x", "byte_level_prefix": "x", "bpe_metaspace": "ing"}  # fmt: skip


def swap(name: str, text: str, old: str, token: str) -> str:
    tokenizer, reader = make(name), Reader.of(make(name))
    read = reader.read([text])
    units = [text[a:b] for a, b in zip(read.start, read.end, strict=True)]
    unit = units.index(old)
    new = tokenizer.convert_tokens_to_ids(token)
    assert new not in (None, 1)
    return write(reader, text, np.arange(len(units)) == unit, {unit: [new]})


@pytest.mark.parametrize("name", BEGINS)
def test_a_word_in_place_of_a_word_keeps_all_spaces(name):
    for text in ("over the lazy fox near the dog", "lazy  fox\n\nthe\told the dog \n"):
        for old in ("lazy", "old", "dog"):
            units = [
                text[a:b]
                for r in [Reader.of(make(name)).read([text])]
                for a, b in zip(r.start, r.end, strict=True)
            ]
            if old in units:
                assert swap(name, text, old, BEGINS[name].format("the")) == text.replace(old, "the")
    if name not in (
        "unigram_never",
        "byte_level",
    ):  # whose first word is another token than those behind a space
        assert (
            swap(name, "the lazy dog", "the", BEGINS[name].format("of")) == "of lazy dog"
        )  # no space at the start


@pytest.mark.parametrize("name", GLUES)
def test_a_continuation_is_glued_and_a_word_in_its_place_is_not(name):
    text, glue = "over the lazy dog", GLUES[name]
    assert swap(name, text, "the", glue) == "over" + glue.removeprefix("##") + " lazy dog"
    assert swap(name, " the\n\nlazy  the", "the", glue) == " " + glue.removeprefix("##") + "\n\nlazy  the"
    word = BEGINS[name].format("the")
    assert swap(name, "dog, the dog", ",", word) == "dog the the dog"
    if name != "word_piece":
        assert swap(name, "the  x", "x", word) == "the  the"  # what stands there is no single space: it stays


def test_word_pieces_and_signs_keep_the_spaces_that_text_has():
    assert swap("word_piece", "the fox jumps", "fox", ".") == "the. jumps"
    assert swap("word_piece", "the fox. dog", ".", "dog") == "the fox dog dog"
    assert swap("word_piece", "(the fox)", "(", "old") == "old the fox)"
    assert swap("word_piece", "(the fox)", "the", "old") == "(old fox)"
    assert swap("word_piece", "the fox of", "fox", "(") == "the (of"
    assert swap("word_piece", "don't the", "'", "fox") == "don fox t the"
    assert (
        swap("word_piece", "\u597dthe fox", "the", "old") == "\u597dold fox"
    )  # no space between what never has one
    assert swap("end_of_word", "the fox dog", "fox", "the</w>") == "the the dog"
    assert swap("end_of_word", "the fox dog", "fox", "x") == "the xdog"
    assert swap("whole_words", "the fox.", ".", "dog") == "the fox dog"
    assert swap("characters", "the fox", "f", "d") == "the dox"


def test_surfaces_say_what_is_never_written():
    def of(name: str, token: str) -> tuple:
        s, i = Surfaces.of(make(name)), make(name).convert_tokens_to_ids(token)
        return bool(s.writable[i]), bool(s.partial[i]), bool(s.begins[i]), s.cores[i]

    assert of("byte_level", "\u00c3") == (True, True, False, b"\xc3")
    assert of("byte_level", "\u0120the") == (True, False, True, b"the")
    assert of("byte_level", "\u0120")[0] is of("byte_level", "\u010a")[0] is False
    assert of("unigram_always", "\u2581")[0] is of("unigram_always", "\n")[0] is False
    assert of("unigram_bytes", "<0xC3>")[:2] == (True, True) and of("unigram_bytes", "<0x41>")[:2] == (
        True,
        False,
    )
    assert of("unigram_bytes", "<0x0A>")[0] is False and of("unigram_bytes", "<0x00>")[0] is False
    assert of("word_piece", "[unused1]") == (False, False, False, None)
    assert of("word_piece", "##ing") == (True, False, False, b"ing")
    for name in TOKENIZERS:
        assert not Surfaces.of(make(name)).writable[:5].any()
    added = word_piece()
    added.add_tokens(["<user>"])
    assert not Surfaces.of(added).writable[added.convert_tokens_to_ids("<user>")]
    assert Surfaces.of(make("byte_level")).write([0]) is None


# --- engines ---------------------------------------------------------------------------------------------------------


class Stub(torch.nn.Module):
    """Writes ids of a list, each as likely; keeps what it was given."""

    def __init__(self, size: int, ids) -> None:
        super().__init__()
        self.bias = torch.full((size,), -50.0).index_fill(0, torch.as_tensor(ids), 0.0)
        self.seen: list[tuple[Any, Any]] = []

    def forward(self, input_ids, attention_mask=None):
        self.seen.append((input_ids, attention_mask))
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1).clone())


def engine_of(name: str, ids=None, width: int = 64, extra: int = 0) -> MaskedLMEngine:
    tokenizer = make(name)
    size = max(tokenizer.get_vocab().values()) + 1 + extra
    return MaskedLMEngine(Stub(size, range(size) if ids is None else ids), tokenizer, CPU, width)


def whole(name: str) -> list[int]:
    """Ids of the whole words of a tokenizer."""
    found = make(name).convert_tokens_to_ids([BEGINS[name].format(w) for w in WORDS])
    return [i for i in found if i not in (None, 1)]


def context(engine: MaskedLMEngine, own: Any, **changes: Any) -> CandidateContext:
    config = load_config(quick_test=True)
    updated = config.candidates.model_copy(update={"mask_ratio": (0.5, 0.5)} | changes)
    return CandidateContext(config.model_copy(update={"candidates": updated}), own, [engine])


def rewrite(engine: MaskedLMEngine, texts, own: Any = None, ratio: float = 0.5, **changes: Any):
    own = own or train_tokenizer("bpe", [" ".join(WORDS)], 300)
    given = context(engine, own, **changes)
    return rewrite_with_other_tokenizer(
        list(texts), np.full(len(texts), ratio), np.arange(len(texts)), given
    ), given


def table_of(texts, own: Any, group: int = 4) -> pa.Table:
    rows = [
        {"example_id": f"d:{i}", "prompt": "", "target": t, "split": "held_out" if i % 4 == 0 else "train",
         "group": f"g{i // group}", "continues": False, "token_ids": ids.tolist()}
        for i, (t, ids) in enumerate(zip(texts, encode_batch(own, texts), strict=True))
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema.EXAMPLES.arrow)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_kind_of_tokenizer_writes_whole_characters(name):
    """Whatever the model draws: spare rows, halves of characters, white space, special tokens; all of it is likely."""
    engine = engine_of(name, extra=7)
    texts = [*TEXTS, "\n\n", "   "]
    for _ in range(2):
        results, given = rewrite(engine, texts, ratio=0.7)
        for text, new in zip(texts, results, strict=True):
            assert (
                "\ufffd" not in new.text
                and 1 not in new.token_ids.tolist()
                and len(new.labels) == len(new.token_ids)
            )
            assert [w for w in re.findall(r"\s+", text) if w != " "] == [
                w for w in re.findall(r"\s+", new.text) if w != " "
            ]
    assert [r.text for r in results[-2:]] == ["\n\n", "   "] and not any(r.labels.any() for r in results[-2:])
    counts = given.counts
    assert counts["without a unit to mask"] >= 2 and counts["rewritten"] == len(texts)
    assert 0 < counts["masked units"] <= counts["units"] - counts["unknown units"]
    assert (counts["unreadable units"] > 0) == (name in ("byte_level", "byte_level_prefix", "byte_level_nfc", "unigram_bytes",
                                                         "bpe_metaspace"))  # fmt: skip


def test_masked_shares_are_counted_in_units_and_labels_touch_only_them():
    own = train_tokenizer("character", ["".join(TEXTS) + " ".join(WORDS)], 0)
    engine, text = engine_of("word_piece", whole("word_piece")), "the lazy fox jumps over the old dog, near"
    (new, *_), given = rewrite(engine, [text] * 3, own, ratio=0.4)
    assert given.counts["masked units"] == 3 * round(0.4 * 10)
    written = "".join(c for c, label in zip(new.text, new.labels, strict=True) if label == 2)
    kept = "".join(c for c, label in zip(new.text, new.labels, strict=True) if label == 0)
    assert len(kept.split()) >= 5 and all(w in text for w in kept.split()) and " " not in written
    assert set(new.labels[new.differs]) <= {2} and new.differs.sum() <= (new.labels == 2).sum()
    same = engine_of("word_piece", make("word_piece").convert_tokens_to_ids(["fox"]))
    (kept_word,), _ = rewrite(same, ["fox fox"], own, ratio=1.0)
    assert kept_word.text == "fox fox" and not kept_word.differs.any()
    assert kept_word.labels.tolist() == [2, 2, 2, 0, 2, 2, 2]  # word pieces do not write the space
    (spaced,), _ = rewrite(engine_of("unigram_always", whole("unigram_always")), ["fox fox"], own, ratio=1.0)
    assert (spaced.labels == 2).all()  # and SentencePiece does
    fox = engine_of("unigram_always", make("unigram_always").convert_tokens_to_ids(["\u2581fox"]))
    (held,), _ = rewrite(fox, ["fox x fox"], own, ratio=1.0)
    assert held.text == "fox fox fox"
    assert held.labels.tolist() == [2, 2, 2, 0, *[2] * 7]  # but the space of a lone mark, which stays


def test_what_the_run_cannot_read_is_never_written():
    """No accents in the run's vocabulary, so none in a candidate, and no [UNK]; a unit that comes out so stays."""
    own = train_tokenizer("character", [" ".join(WORDS) + "\u00e9"], 0)
    engine = engine_of("unigram_bytes")
    results, given = rewrite(engine, ["the fox caf\u00e9 of the dog " * 3] * 4, own, ratio=0.9)
    assert all(set(r.text) <= set(" ".join(WORDS) + "\u00e9") for r in results)
    assert given.counts["unreadable units"] > 0
    with pytest.raises(BadData, match="no token that the run's tokenizer can read"):
        rewrite(engine_of("word_piece"), ["fox"], train_tokenizer("character", ["\u05d0\u05d1"], 0))


def test_long_texts_are_read_in_windows_that_hold_every_token_once():
    engine = engine_of("unigram_always", whole("unigram_always"), width=12)
    text = " ".join(np.random.default_rng(0).choice(WORDS, 33))
    results, given = rewrite(engine, [text, "the fox", text], ratio=1.0)
    assert given.counts["read in windows"] == 2 and given.counts["masked units"] == 33 * 2 + 2
    rows = [
        row[mask.bool()].tolist()
        for ids, mask in engine.model.seen
        for row, mask in zip(ids, mask, strict=True)
    ]
    assert sorted(len(r) for r in rows) == [
        4,
        8,
        8,
        11,
        11,
        11,
        11,
        11,
        11,
    ]  # four windows of 9, 9, 9 and 6 words
    assert all(r[0] == 2 and r[-1] == 3 and len(r) <= 12 and set(r[1:-1]) == {4} for r in rows)
    assert results[0].text != results[2].text and len(results[0].text.split()) == 33
    half, _ = rewrite(engine, [text], ratio=0.5)
    kept = sum(a == b for a, b in zip(half[0].text.split(), text.split(), strict=True))
    assert 33 - 17 <= kept < 33  # the words that were not masked stand where they stood
    with pytest.raises(BadData, match="has a context of 2 tokens"):
        rewrite(engine_of("unigram_always", width=2), ["fox"])


@pytest.mark.parametrize("masking", ["sticky", "span", "line"])
def test_masks_of_every_kind_go_by_units(masking):
    from pydantic import TypeAdapter

    from lib.sections.masking import Masking

    kinds: dict[str, dict] = {
        "sticky": {"p1": 0.05, "p2": 0.5},
        "span": {"num_spans": 1},
        "line": {"min_ratio": 0.1, "max_ratio": 0.9},
    }
    kind = TypeAdapter(Masking).validate_python({"type": masking} | kinds[masking])
    text = "\n".join(["lazy lazy lazy lazy"] * 6)
    engine = engine_of("word_piece", make("word_piece").convert_tokens_to_ids(["fox"]))
    (new,), _ = rewrite(engine, [text], ratio=0.5, masking=kind)
    lines = [set(line.split()) for line in new.text.split("\n")]
    assert len(lines) == 6 and new.text.split().count("fox") == 12
    if masking == "line":
        assert all(len(line) == 1 for line in lines)
    if masking == "span":
        assert re.fullmatch(r"(lazy\s)*(fox\s)*fox(\slazy)*", new.text)


# --- length and spaces tell nothing ----------------------------------------------------------------------------------


def measures(text: str) -> list[Any]:
    words = text.split()
    return [len(text), text.count(" "), text.count("  "), text.count("\n"), len(words), np.mean([len(w) for w in words]),
            max(len(w) for w in words), len(text) - len(text.rstrip()), len(text) - len(text.lstrip())]  # fmt: skip


@pytest.mark.parametrize("name", BEGINS)
def test_length_and_spaces_do_not_tell_written_text_from_original(name):
    """Models that write whole words, drawn as those of the text: what is left to see would be ours."""
    rng = np.random.default_rng(3)
    vocabulary = {BEGINS[name].format(w): w for w in WORDS}
    words = [vocabulary[make(name).convert_ids_to_tokens(i)] for i in whole(name)]
    separators = [" "] * 9 + ["  "]
    texts = [
        str(rng.choice(["", " "] if name not in ("unigram_never", "byte_level") else [" "])) + "".join(w + str(rng.choice(separators)) for w in rng.choice(words, 11)) + str(rng.choice(["", "\n\n", " "]))
        for _ in range(120)
    ]  # fmt: skip
    own = train_tokenizer("character", ["".join(TEXTS) + " ".join(WORDS)], 0)
    table = candidates(
        table_of(texts, own), context(engine_of(name, whole(name)), own, per_example=2, mask_ratio=(0.3, 0.9))
    )
    rows = table.to_pylist()
    original = {r["example_id"]: r["text"] for r in rows if r["kind"] == "original"}
    assert np.mean([r["changed_fraction"] for r in rows if r["kind"] != "original"]) > 0.3
    for r in rows:  # not a single character of white space is another
        assert re.findall(r"\s+", r["text"]) == re.findall(r"\s+", original[r["example_id"]]), name
        assert set(r["text"].split()) <= set(words)
    features, written = (
        np.array([measures(r["text"]) for r in rows]),
        np.array([r["kind"] != "original" for r in rows]),
    )
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    half = len(rows) // 4 * 2  # pairs of one text stay together
    model = LogisticRegression().fit(features[:half], written[:half])
    scores, written = model.decision_function(features[half:]), written[half:]
    pairs, draws = np.arange(len(scores)).reshape(-1, 2), []
    for _ in range(60):
        some = pairs[rng.integers(0, len(pairs), len(pairs))].reshape(-1)
        draws.append(roc_auc_score(written[some], scores[some]))
    assert np.quantile(draws, 0.01) <= 0.5 <= np.quantile(draws, 0.99)


# --- models of every family ------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
FAMILIES: dict[str, tuple[str, Any, dict]] = {
    "bert": ("word_piece", hf.BertConfig, SHAPE),
    "bert_uncased": ("word_piece_uncased", hf.BertConfig, SHAPE),
    "distilbert": ("word_piece", hf.DistilBertConfig, {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}),
    "electra": ("word_piece", hf.ElectraConfig, SHAPE | {"embedding_size": 16}),
    "albert": ("albert", hf.AlbertConfig, SHAPE | {"embedding_size": 16}),
    "roberta": ("byte_level", hf.RobertaConfig, SHAPE),
    "xlm_roberta": ("unigram_words", hf.XLMRobertaConfig, SHAPE),
    "camembert": ("unigram_always", hf.CamembertConfig, SHAPE),
    "mpnet": ("word_piece", hf.MPNetConfig, SHAPE),
    "longformer": ("byte_level", hf.LongformerConfig, SHAPE | {"attention_window": 8}),
    "deberta_v2": ("unigram_first", hf.DebertaV2Config, SHAPE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "modernbert": ("byte_level_prefix", hf.ModernBertConfig, SHAPE | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2,
                                                                      "eos_token_id": 3}),
    "esm": ("characters", hf.EsmConfig, SHAPE | {"mask_token_id": 4}),
    "esm_rotary": ("characters", hf.EsmConfig, SHAPE | {"mask_token_id": 4, "position_embedding_type": "rotary"}),
}  # fmt: skip
OFFSETS = dict.fromkeys(("roberta", "xlm_roberta", "camembert", "longformer", "esm"), 1) | {
    "mpnet": 2
}  # padding's id + 1


def masked_lm(family: str, extra: int = 0, positions: int = 34) -> Any:
    name, config, shape = FAMILIES[family]
    size = max(make(name).get_vocab().values()) + 1 + extra
    torch.manual_seed(0)
    given = {"vocab_size": size, "max_position_embeddings": positions, "pad_token_id": 0} | shape
    return hf.AutoModelForMaskedLM.from_config(config(**given))


def save(family: str, folder, **choices) -> Any:
    masked_lm(family, **choices).save_pretrained(folder)
    make(FAMILIES[family][0]).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lms_of_every_family_rewrite_text(family, tmp_path):
    """Loaded from a folder, with spare rows, on white space, accents and texts longer than the model; in any batch."""
    engine = MaskedLMEngine.load(save(family, tmp_path, extra=5), CPU)
    assert engine.width == 34 - OFFSETS.get(family, 0)
    own = train_tokenizer("character", ["".join(TEXTS) + " ".join(WORDS)], 0)
    rng = np.random.default_rng(0)
    texts = [*TEXTS[:6], "\n", " ".join(rng.choice(WORDS, 70))]
    table = table_of(texts, own)
    whole_table, given = candidates(table, made := context(engine, own, batch_size=64)), made.counts
    schema.conform(whole_table, schema.CANDIDATES)
    assert given["read in windows"] >= 3 and given["without a unit to mask"] == 3
    for text in whole_table["text"].to_pylist():
        assert "\ufffd" not in text
    small = context(engine, own, batch_size=1)
    assert whole_table.slice(24).equals(candidates(table.slice(6), small))
    assert whole_table.slice(0, 4).equals(candidates(table.slice(0, 1), small))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_is_just_what_the_model_takes(family):
    model = masked_lm(family).eval()
    longest = longest_input(model)
    assert longest is not None and longest == 34 - OFFSETS.get(family, 0)
    assert position_offset(model) == position_offset(model.base_model) == OFFSETS.get(family, 0)
    for length in (longest, longest + 1) if family not in ("modernbert", "esm_rotary") else (longest,):
        ids = torch.full((1, length), 7)
        if length == longest:
            assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape[1] == length
        else:
            with pytest.raises((RuntimeError, IndexError)):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_positions_of_a_padding_id_above_zero_count_from_behind_it():
    config = hf.RobertaConfig(vocab_size=20, max_position_embeddings=66, pad_token_id=1, **SHAPE)
    assert (position_offset(hf.RobertaModel(config)), longest_input(hf.RobertaForMaskedLM(config))) == (2, 64)


def test_no_spare_row_and_no_reserved_token_is_ever_drawn():
    """Where they alone are likely, others are drawn; the run's own engines still write white space."""
    tokenizer = make("word_piece")
    size = max(tokenizer.get_vocab().values()) + 1
    spare = [*range(5), *range(size, size + 7), tokenizer.convert_tokens_to_ids("[unused1]")]
    results, _ = rewrite(engine_of("word_piece", spare, extra=7), ["the lazy fox jumps"] * 20, ratio=1.0)
    assert all("unused" not in r.text and "[" not in r.text.replace("[", "", 1) for r in results)
    own = train_tokenizer("character", ["ab \n"], 0)
    stub = MaskedLMEngine(Stub(len(own) + 3, [own.convert_tokens_to_ids("\n"), len(own) + 1, 1]), own, CPU, 8)
    ids = np.full((4, 8), 4)
    config = context(stub, own).config.candidates
    filled = stub.fill(MaskedRows(ids, ids > 0, ids > 0, np.arange(4)), config, 0)
    assert (filled == own.convert_tokens_to_ids("\n")).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_folders_that_are_no_masked_lm_are_refused_in_one_line(tmp_path):
    def refused(kind: type[Exception], words: str, folder) -> None:
        with pytest.raises(kind, match=words) as found:
            MaskedLMEngine.load(folder, CPU)
        assert "\n" not in str(found.value) and str(folder) in str(found.value)

    folder = save("bert", tmp_path / "whole")
    assert MaskedLMEngine.load(folder, CPU).width == 34
    bare = tmp_path / "no_tokenizer"
    masked_lm("bert").save_pretrained(bare)
    refused(MissingInput, "no tokenizer", bare)

    no_mask = tmp_path / "no_mask"
    masked_lm("bert").save_pretrained(no_mask)
    core = make("word_piece").backend_tokenizer
    hf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]").save_pretrained(no_mask)
    refused(BadData, "no mask token", no_mask)

    causal = tmp_path / "causal"
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=200, n_embd=8, n_layer=1, n_head=1)).save_pretrained(causal)
    make("word_piece").save_pretrained(causal)
    refused(BadData, "not a masked LM", causal)

    decoder = tmp_path / "decoder"
    save("bert", decoder)
    config = json.loads((decoder / "config.json").read_text()) | {"is_decoder": True}
    (decoder / "config.json").write_text(json.dumps(config))
    refused(BadData, "is_decoder", decoder)

    headless = tmp_path / "headless"
    masked_lm("bert").bert.save_pretrained(headless)
    make("word_piece").save_pretrained(headless)
    refused(BadData, r"lacks \d+ tensors of BertForMaskedLM", headless)

    pickled = tmp_path / "pickled"
    save("bert", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(BadData, "a pickle", pickled)

    cut = tmp_path / "cut"
    save("bert", cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    refused(BadData, "not a masked LM that transformers can load", cut)

    own = train_tokenizer("character", ["abc"], 0)
    for mode, attention in (("language_model", "causal"), ("token_classifier", "bidirectional")):
        shape = model_config(load_config(quick_test=True).architecture, attention, len(own))
        save_model(make_model(mode, shape, 0, "m"), tmp_path / mode, own)
        refused(BadData, "which is no masked LM; give a model of mode language_model", tmp_path / mode)


def test_a_model_of_another_language_is_refused_when_all_is_done():
    task = get_task("text")
    own = train_tokenizer("character", ["".join(TEXTS)], 0)
    made = context(engine_of("whole_words"), own)
    table = candidates(table_of(["\u05e9\u05dc\u05d5\u05dd \u05e9\u05dc\u05d5\u05dd"], own), made)
    assert len(set(table["text"].to_pylist())) == 1
    with pytest.raises(BadData, match="knows none of the 6 words and signs of 3 passages"):
        task.review_candidates(made)
    candidates(table_of(["the fox"], own), made)
    assert task.review_candidates(made)[0]["rewriting"]["rewritten"] == 6
    with pytest.raises(BadConfig, match="label_rule changed"):
        candidates(table_of(["the fox"], own), context(engine_of("whole_words"), own, label_rule="changed"))


def test_the_counters_count_tokens_that_came_out_as_they_were():
    """Also where the places of the tokens have moved, and equal lengths mean nothing."""
    own = train_tokenizer("character", ["".join(TEXTS) + " ".join(WORDS)], 0)
    texts = ["the lazy fox jumps over the dog"] * 40
    engine = engine_of(
        "unigram_always", make("unigram_always").convert_tokens_to_ids(["\u2581fox", "\u2581jumps"])
    )
    table = candidates(table_of(texts, own), context(engine, own, mask_ratio=(0.4, 0.9)))
    counters = CandidateCounters()
    counters.add(table)
    predicted, right = 0, 0
    for row in table.to_pylist():
        if row["kind"] != "original" and row["split"] == "train":
            words = re.findall(r" ?\w+", row["text"])
            labels = np.split(np.array(row["token_labels"]), np.cumsum([len(w) for w in words])[:-1])
            for new, old, label in zip(words, re.findall(r" ?\w+", texts[0]), labels, strict=True):
                assert len(set(label)) == 1 or set(label[1:]) == {label[-1]}
                predicted += int((label == 2).sum())
                right += int(
                    (label == 2).sum() - (0 if new == old else (label[new.startswith(" ") :] == 2).sum())
                )
    assert counters.summary()["generator_accuracy"]["train"] == pytest.approx(right / predicted)


def test_programs_are_rewritten_in_the_runs_tokens_or_not_at_all():
    own = train_tokenizer("character", ["subtract(1, 2)"], 0)
    with pytest.raises(BadConfig, match=r"has a tokenizer of its own.*finqa\.pools\.changes\.masked_lm to 0"):
        rewrite_arguments(["subtract(1, 2)"], context(engine_of("word_piece"), own))


def test_a_unit_of_one_token_never_gets_half_a_character():
    results, given = rewrite(engine_of("byte_level"), [" the fox jumps over the lazy dog"] * 8, ratio=1.0)
    assert given.counts["masked units"] == 56 and given.counts["unreadable units"] == 0
    assert all(r.differs.any() for r in results)
