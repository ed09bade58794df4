"""Rewriting text with a masked LM whose tokenizer is not the run's own.

The text is cut by the other tokenizer, some of its tokens are masked and filled, and only their stretches of the
text are replaced: all other characters stay as they were. The run's tokenizer then reads the new text, and each
of its tokens that touches a replaced stretch is labelled predicted.
"""

import numpy as np

from lib.tasks import CandidateContext
from lib.tokenization import encode_batch


def rewrite_with_other_tokenizer(
    texts: list[str], ratio: np.ndarray, rows: np.ndarray, context: CandidateContext
):
    """(ids, labels, text) for each text, in the run's own tokens. Texts longer than the engine reads are cut there."""
    engine = context.engines[0]
    tokenizer = engine.tokenizer
    spare = tokenizer.num_special_tokens_to_add()
    coded = tokenizer(
        texts, truncation=True, max_length=engine.width, return_offsets_mapping=True, return_special_tokens_mask=True,
        padding="max_length",
    )  # fmt: skip
    ids = np.asarray(coded["input_ids"], np.int64)
    valid = np.asarray(coded["attention_mask"], bool)
    free = valid & ~np.asarray(coded["special_tokens_mask"], bool)
    if not free.any(1).all():
        row = int(np.flatnonzero(~free.any(1))[0])
        raise ValueError(
            f"the masked LM's tokenizer finds no token in {texts[row]!r} ({spare} special ones aside)"
        )
    masked = context.draw_mask(free, ratio, rows, lambda: _line_ends(texts, coded["offset_mapping"]))
    filled = engine.fill(ids, valid, masked, context.config.candidates, context.seed, rows)
    new = [
        _replace(text, spans, mask, row, tokenizer)
        for text, spans, mask, row in zip(texts, coded["offset_mapping"], masked, filled, strict=True)
    ]
    own_ids = encode_batch(context.tokenizer, [t for t, _ in new], context.config.tokenizer.unknown)
    offsets = context.tokenizer(
        [t for t, _ in new], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    result = []
    for (text, touched), tokens, spans in zip(new, own_ids, offsets["offset_mapping"], strict=True):
        before = np.concatenate([[0], np.cumsum(touched)])
        bounds = np.asarray(spans)
        labels = np.where(before[bounds[:, 1]] > before[bounds[:, 0]], 2, 0).astype(np.int8)
        result.append((tokens, labels, text))
    return result


def _line_ends(texts: list[str], offsets) -> np.ndarray:
    """(B, T) bool: tokens whose stretch of the text holds a line feed."""
    return np.array([
        ["\n" in text[start:end] for start, end in spans]
        for text, spans in zip(texts, offsets, strict=True)
    ])  # fmt: skip


def _replace(text: str, spans, masked: np.ndarray, ids: np.ndarray, tokenizer) -> tuple[str, np.ndarray]:
    """The text with masked stretches replaced, and for every character of it whether it is new."""
    pieces, touched, position = [], [], 0
    for i in np.flatnonzero(masked):
        start, end = spans[i]
        word = tokenizer.convert_tokens_to_string([tokenizer.convert_ids_to_tokens(int(ids[i]))])
        word = word.removeprefix("##")
        if text[start:end][:1] != " ":  # the space before a word is not part of this tokenizer's stretches
            word = word.removeprefix(" ")
        pieces += [text[position:start], word]
        touched += [np.zeros(start - position, bool), np.ones(len(word), bool)]
        position = end
    pieces.append(text[position:])
    touched.append(np.zeros(len(text) - position, bool))
    return "".join(pieces), np.concatenate(touched)
