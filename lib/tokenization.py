"""Character and BPE tokenizers, kept as Hugging Face tokenizers.

The special ids are 0 to 3 and collide with nothing: data is encoded without looking for their names, so a text that
contains "[MASK]" is seven ordinary tokens. Only `encode_with_masks`, for what a user types, reads [MASK] as the mask.

A run's own tokenizer puts nothing around a text: objectives add [CLS] themselves. `model_tokenizer` makes of it the one
that lies in a model's folder, whose plain call gives what that model was trained on.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import BadData

SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[CLS]", "[UNK]")
PAD, MASK, CLS, UNK = range(4)


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Any:
    """A PreTrainedTokenizerFast: `character` (an id per character of the texts) or `bpe` (byte-level)."""
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
    tokenizer: Any, longest: int, *, cls_in_front: bool, reads_masks: bool, padding_side: str = "right"
) -> Any:
    """The same tokens as `tokenizer` has, called as a model wants them, for the model's folder.

    Args:
        longest: most tokens that the model reads, [CLS] included; `truncation=True` cuts there.
        cls_in_front: the model was trained with [CLS] before every text; else nothing is added to a text.
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
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        padding_side=padding_side,
        split_special_tokens=not reads_masks,
        clean_up_tokenization_spaces=False,
        **named,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a stage's or a model's folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadData(f"{folder} holds no tokenizer that can be loaded: {error}") from None


def encode_batch(tokenizer: Any, texts: Sequence[str], unknown: str = "error") -> list[np.ndarray]:
    """int32 ids of each text. Raises BadData listing every character outside the vocabulary, unless `unknown: unk`."""
    if not len(texts):
        return []
    table = _code_points(tokenizer)
    if table is not None:
        ids = [table[np.minimum(_points(text), len(table) - 1)] for text in texts]
    else:
        coded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [np.asarray(i, np.int32) for i in coded]
    if unknown == "error":
        strange = [text for text, i in zip(texts, ids, strict=True) if (i == UNK).any()]
        if strange:
            raise BadData(
                f"{outside(tokenizer, strange)}; leave them out, train the tokenizer on text that has them, or set "
                "tokenizer.unknown=unk"
            )
    return ids


def outside(tokenizer: Any, texts: Sequence[str]) -> str:
    """What an error says of texts with characters that the vocabulary has not."""
    found = sorted(set("".join(texts)) - set(tokenizer.get_vocab()))
    shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in found[:20])
    return f"{len(found)} characters are outside the vocabulary: {shown}"


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _code_points(tokenizer: Any) -> np.ndarray | None:
    """Id of every code point for a character tokenizer, kept on it; None for others. The last entry is [UNK]."""
    if hasattr(tokenizer, "_remask_code_points"):
        return tokenizer._remask_code_points
    words = {t: i for t, i in tokenizer.get_vocab().items() if i > UNK}
    table = None
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel" and all(len(t) == 1 for t in words):
        table = np.full(max((ord(t) for t in words), default=0) + 2, UNK, np.int32)
        for token, i in words.items():
            table[ord(token)] = i
    tokenizer._remask_code_points = table
    return table


def characters_of(tokenizer: Any) -> frozenset[str] | None:
    """The characters that a character tokenizer reads; None for others, which read all."""
    table = _code_points(tokenizer)
    return None if table is None else frozenset(map(chr, np.flatnonzero(table != UNK)))


def decode_batch(tokenizer: Any, sequences: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
    """The exact text of each sequence of ids; special tokens are shown by their names."""
    if _code_points(tokenizer) is not None:
        names = {i: t for t, i in tokenizer.get_vocab().items()}
        return ["".join(names[int(i)] for i in sequence) for sequence in sequences]
    lists = [[int(i) for i in sequence] for sequence in sequences]
    return tokenizer.batch_decode(lists, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def newline_ids(tokenizer: Any) -> np.ndarray:
    """Ids of the tokens that end a line: those whose text holds a line feed."""
    size = len(tokenizer)
    return np.flatnonzero(["\n" in text for text in decode_batch(tokenizer, [[i] for i in range(size)])])


def encode_with_masks(tokenizer: Any, texts: Sequence[str], unknown: str = "error") -> list[np.ndarray]:
    """int32 ids of each text, in which [MASK] stands for one token to be written; `unknown` as in `encode_batch`."""
    pieces = [text.split("[MASK]") for text in texts]
    coded = iter(encode_batch(tokenizer, [piece for row in pieces for piece in row], unknown))
    mask = np.array([tokenizer.mask_token_id], np.int32)
    rows = [[part for _ in row for part in (mask, next(coded))] for row in pieces]
    return [np.concatenate(row[1:]) for row in rows]
