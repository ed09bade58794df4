"""Character and BPE tokenizers, stored as Hugging Face tokenizers.

The special ids are 0 to 3 in tokenizers that are trained here. Those of pretrained models have their own
(lib/models/pretrained_tokenizer.py). Data is encoded without looking for the names of special tokens: the text "[MASK]" becomes
ordinary tokens, such as six characters. Only `encode_with_masks`, for text that a user types, reads [MASK] as the mask.

The tokenizer of a run adds no special tokens: objectives add [CLS] themselves. `model_tokenizer` makes the tokenizer for
a model's folder. Its plain call gives the input that the model was trained on.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import BadData
from lib.surfaces import RESERVED

SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[CLS]", "[UNK]")
PAD, MASK, CLS, UNK = range(4)
TEXTS_AT_A_TIME = (
    512  # the tokenizers library needs about 100 bytes per token of the texts that it encodes together
)


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Any:
    """A PreTrainedTokenizerFast of kind `character` (one id per character of the texts) or `bpe` (byte-level)."""
    from transformers import PreTrainedTokenizerFast

    core = _character(texts) if kind == "character" else _byte_pairs(texts, vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        unk_token="[UNK]",
        model_max_length=int(1e9),
        clean_up_tokenization_spaces=False,
    )


def _character(texts: Iterable[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(characters)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return core


def _byte_pairs(texts: Iterable[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise BadData(
            f"tokenizer.vocab_size is {vocab_size}; byte-level BPE needs at least {len(alphabet) + len(SPECIAL_TOKENS)}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return core


def model_tokenizer(
    tokenizer: Any, max_length: int, *, cls_in_front: bool, reads_masks: bool, padding_side: str = "right"
) -> Any:
    """A tokenizer for a model's folder: the tokens of `tokenizer`, with the special tokens that the model expects.

    Args:
        max_length: the model's context, [CLS] included; `truncation=True` cuts there.
        cls_in_front: the model was trained with [CLS] before every text. Otherwise nothing is added to a text.
        reads_masks: "[MASK]" in a text is the mask. Otherwise names of special tokens are ordinary text, as in
            `encode_batch`.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    front = [tokenizer.cls_token] if cls_in_front else []
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[*front, "$A"],
        pair=[*front, "$A", "$B"],
        special_tokens=[(token, tokenizer.cls_token_id) for token in front],
    )
    roles = ("pad_token", "mask_token", "cls_token", "unk_token", "sep_token", "bos_token", "eos_token")
    named = {role: str(token) for role in roles if (token := getattr(tokenizer, role)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side=padding_side,
        split_special_tokens=not reads_masks,
        clean_up_tokenization_spaces=False,
        **named,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in the folder of a stage or a model. Raises BadData if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadData(f"{folder} has no tokenizer that can be loaded: {error}") from None


def encode_batch(tokenizer: Any, texts: Sequence[str], unknown: str = "error") -> list[np.ndarray]:
    """int32 ids of each text. Unless `unknown` is unk, raises BadData that lists the characters outside the vocabulary."""
    if not len(texts):
        return []
    table = _code_points(tokenizer)
    if table is not None:
        ids = [table[np.minimum(_points(text), len(table) - 1)] for text in texts]
    else:
        ids = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            part = list(texts[start : start + TEXTS_AT_A_TIME])
            coded = tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids += _without_names(tokenizer, part, [np.asarray(i, np.int32) for i in coded])
    if unknown == "error" and tokenizer.unk_token_id is not None:
        unk = tokenizer.unk_token_id
        with_unknown = [text for text, i in zip(texts, ids, strict=True) if (i == unk).any()]
        if with_unknown:
            raise BadData(
                f"{describe_unknown(tokenizer, with_unknown)}; remove them, train the tokenizer on text that has them, or "
                "set tokenizer.unknown=unk"
            )
    return ids


def _without_names(tokenizer: Any, texts: Sequence[str], ids: list[np.ndarray]) -> list[np.ndarray]:
    """The ids, with the texts encoded again in which the tokenizer found the name of a special token, such as a mask.

    Some kinds of tokenizers have these names in their ordinary vocabulary. Such a name is divided after its first character.
    """
    special = set(forbidden_ids(tokenizer)) - {tokenizer.unk_token_id}
    is_special = np.zeros(num_ids(tokenizer), bool)
    is_special[list(special)] = True
    names = None
    for n, row in enumerate(ids):
        if not is_special[row].any():
            continue
        if names is None:
            found = (t for t, i in tokenizer.get_vocab().items() if i in special and len(t) > 1)
            names = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in found))
        pieces = names.split(texts[n])
        coded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        row = np.asarray([i for piece in coded for i in piece], np.int32)
        ids[n] = (
            row if tokenizer.unk_token_id is None else np.where(is_special[row], tokenizer.unk_token_id, row)
        )
    return ids


def describe_unknown(tokenizer: Any, texts: Sequence[str]) -> str:
    """The characters of the texts that are outside the vocabulary, for a message. At most 20 are listed."""
    known = set("".join(tokenizer.get_vocab()) if _code_points(tokenizer) is None else tokenizer.get_vocab())
    unknown = sorted(set("".join(texts)) - known)
    if not unknown:  # words of known characters
        return f"{len(texts)} texts have words outside the vocabulary, the first one {texts[0][:80]!r}"
    listed = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:20])
    return f"{len(unknown)} characters are outside the vocabulary: {listed}"


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _code_points(tokenizer: Any) -> np.ndarray | None:
    """The id of each code point for a character tokenizer, cached on it; None for others. The last entry is [UNK]."""
    if hasattr(tokenizer, "_remask_code_points"):
        return tokenizer._remask_code_points
    special = set(forbidden_ids(tokenizer))
    words = {t: i for t, i in tokenizer.get_vocab().items() if i not in special}
    table = None
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel" and all(len(t) == 1 for t in words):
        table = np.full(max((ord(t) for t in words), default=0) + 2, tokenizer.unk_token_id, np.int32)
        for token, i in words.items():
            table[ord(token)] = i
    tokenizer._remask_code_points = table
    return table


def characters_of(tokenizer: Any) -> frozenset[str] | None:
    """The characters in the vocabulary of a character tokenizer; None for other tokenizers, which read all characters."""
    table = _code_points(tokenizer)
    return None if table is None else frozenset(map(chr, np.flatnonzero(table != tokenizer.unk_token_id)))


def decode_batch(tokenizer: Any, sequences: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
    """The exact text of each sequence of ids. Special tokens appear by their names."""
    if _code_points(tokenizer) is not None:
        names = {i: t for t, i in tokenizer.get_vocab().items()}
        return ["".join(names[int(i)] for i in sequence) for sequence in sequences]
    lists = [[int(i) for i in sequence] for sequence in sequences]
    return tokenizer.batch_decode(lists, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def num_ids(tokenizer: Any) -> int:
    """V, the number of ids from 0 to the highest one. Some of them may have no token."""
    return max(tokenizer.get_vocab().values()) + 1


def forbidden_ids(tokenizer: Any) -> list[int]:
    """Ids that no text contains and that are never sampled: of special and reserved tokens, and those without a token."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    reserved = {i for token, i in vocabulary.items() if RESERVED.fullmatch(token)}
    unnamed = set(range(num_ids(tokenizer))) - set(vocabulary.values())
    return sorted({*tokenizer.all_special_ids, *special, *reserved, *unnamed})


def newline_ids(tokenizer: Any) -> np.ndarray:
    """Ids of the tokens that end a line: those whose text contains a line feed."""
    never = set(forbidden_ids(tokenizer))
    ids = np.array([i for i in range(num_ids(tokenizer)) if i not in never], int)
    return ids[["\n" in text for text in decode_batch(tokenizer, ids[:, None])]]


def encode_with_masks(tokenizer: Any, texts: Sequence[str], unknown: str = "error") -> list[np.ndarray]:
    """int32 ids of each text, with [MASK] as the mask token. `unknown` as in `encode_batch`.

    The name that the tokenizer has for its mask is read, too. If its mask stands for a word with the space before it, that
    space belongs to the mask.
    """
    token = tokenizer.added_tokens_decoder.get(tokenizer.mask_token_id)
    names = "|".join(re.escape(name) for name in ("[MASK]", tokenizer.mask_token))
    before = r"\s*" if token is not None and token.lstrip else ""
    after = r"\s*" if token is not None and token.rstrip else ""
    pieces = [re.split(f"{before}(?:{names}){after}", text) for text in texts]
    coded = iter(encode_batch(tokenizer, [piece for row in pieces for piece in row], unknown))
    mask = np.array([tokenizer.mask_token_id], np.int32)
    rows = [[part for _ in row for part in (mask, next(coded))] for row in pieces]
    return [np.concatenate(row[1:]) for row in rows]
