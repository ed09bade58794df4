"""Collation: from texts to pools of token ids, in the layout of the tokenizer's pairs.

A pair is `before A between B after`, with the tokenizer's special tokens around the texts A and B. It is `[CLS] A [SEP] B [SEP]`
for BERT, `<s> A <s> B` or `<s> A B` for Llama, and `A B` for GPT-2. A prompt becomes `before A between`, a candidate `B after`.
Together they equal `tokenizer(prompt, candidate)`, which is also what stock tools give to an exported ranker.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from lib import randomness
from lib.errors import BadConfig, BadData
from lib.models.packing import Pools

MAX_PROBLEMS = 5  # that a message names


def collate(
    tokenizer: Any,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    prompt_tokens: int,
    candidate_tokens: int,
    suffix: str = "",
) -> Pools:
    """Pools of N prompts with their candidates, padded on the right. Names of special tokens in a text are ordinary text.

    Args:
        prompts: N texts; they may be empty.
        candidates: a list of texts for each prompt.
        prompt_tokens, candidate_tokens: maximum lengths, special tokens included; longer texts are truncated.
        suffix: a text behind every candidate, which is not truncated.

    Returns:
        Arrays. The longest prompt, the longest candidate and the largest pool of the batch give their shapes.

    Raises:
        BadData: a prompt without candidates, or a candidate without a token.
        BadConfig: a maximum leaves no room for text beside the special tokens.
    """
    before, between, after = _layout_with_suffix(tokenizer, suffix)
    for name, budget, around in (
        ("prompt_tokens", prompt_tokens, len(before) + len(between)),
        ("candidate_tokens", candidate_tokens, len(after)),
    ):
        if budget <= around:
            raise BadConfig(f"ranker.{name} is {budget}, and special tokens alone take {around}; raise it")
    counts = np.array([len(row) for row in candidates])  # (N,)
    row = np.repeat(np.arange(len(counts)), counts)  # (M,) the pool of each candidate
    index = np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)  # (M,) its index in the pool
    flat = _encode(tokenizer, list(chain.from_iterable(candidates)))
    _refuse_empty(counts, row, index, flat)
    pad = tokenizer.pad_token_id or 0
    prompt_ids, prompt_mask = _framed(_encode(tokenizer, list(prompts)), before, between, prompt_tokens, pad)
    ids, mask = _framed(flat, (), after, candidate_tokens, pad)  # (M, S)
    candidate_ids = np.full((len(counts), int(counts.max()), ids.shape[1]), pad)
    candidate_mask = np.zeros(candidate_ids.shape, bool)
    candidate_ids[row, index], candidate_mask[row, index] = ids, mask
    return Pools(prompt_ids, prompt_mask, candidate_ids, candidate_mask)


def too_long(
    tokenizer: Any,
    prompts: Sequence[str],
    candidates: Sequence[str],
    prompt_tokens: int,
    candidate_tokens: int,
    suffix: str = "",
) -> tuple[int, int]:
    """(prompts, candidates) that `collate` would truncate at these lengths, with this suffix."""
    before, between, after = _layout_with_suffix(tokenizer, suffix)

    def longer(texts: Sequence[str], room: int) -> int:
        return sum(len(tokens) > room for tokens in _encode(tokenizer, list(texts)))

    return (
        longer(prompts, prompt_tokens - len(before) - len(between)),
        longer(candidates, candidate_tokens - len(after)),
    )


def pair_layout(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Special ids before, between and after the texts of a pair."""
    encoded = tokenizer("a", "a")
    ids, owner = np.array(encoded["input_ids"]), encoded.sequence_ids(0)
    first, second = ([i for i, text in enumerate(owner) if text == number] for number in (0, 1))
    if not first or not second:
        raise BadData("the tokenizer has no token for the letter a; give one that can encode any text")
    parts = ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]
    before, between, after = (part.tolist() for part in parts)
    return before, between, after


def _layout_with_suffix(tokenizer: Any, suffix: str) -> tuple[list[int], list[int], list[int]]:
    """`pair_layout`; with a suffix, its ids are all that is after the texts. They are not truncated either.

    A suffix is a question that the model answers next, so no end token follows it.
    """
    before, between, after = pair_layout(tokenizer)
    return before, between, _encode(tokenizer, [suffix])[0] if suffix else after


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]


def _refuse_empty(counts: np.ndarray, row: np.ndarray, index: np.ndarray, flat: list[list[int]]) -> None:
    problems = [f"prompt {i} has no candidates" for i in np.flatnonzero(counts == 0)]
    empty = np.flatnonzero([not tokens for tokens in flat])
    problems += [f"candidate {index[i]} of prompt {row[i]} has no token" for i in empty]
    if problems:
        more = f" and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise BadData(f"pools cannot be scored: {'; '.join(problems[:MAX_PROBLEMS])}{more}")


def _framed(
    texts: list[list[int]], before: Sequence[int], after: Sequence[int], budget: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (M, L) of `before`, the truncated text, `after` and padding."""
    full = np.array([len(tokens) for tokens in texts])  # (M,)
    kept = np.minimum(full, budget - len(before) - len(after))
    flat = np.fromiter(chain.from_iterable(texts), np.int64, int(full.sum()))
    within = np.arange(len(flat)) - np.repeat(full.cumsum() - full, full)  # index of a token in its text
    column = np.arange(int(kept.max()) + len(before) + len(after))
    ids = np.full((len(texts), len(column)), pad, np.int64)
    ids[:, : len(before)] = before
    text_mask = (column >= len(before)) & (column < len(before) + kept[:, None])
    ids[text_mask] = flat[within < np.repeat(kept, full)]
    tail = len(before) + kept[:, None] + np.arange(len(after))  # (M, len(after))
    np.put_along_axis(ids, tail, np.broadcast_to(np.asarray(after, np.int64), tail.shape), 1)
    return ids, column < len(before) + kept[:, None] + len(after)


def hide_words(
    pools: Pools, tokenizer: Any, share: float, seed: int, rows: np.ndarray, suffix: str = ""
) -> Pools:
    """Word dropout: the pools (arrays) with a share of their tokens masked independently.

    Special tokens and the suffix behind every candidate, as in `collate`, are not masked: the suffix says what to answer.

    Whether a token is masked depends on the seed, `rows[b]`, the number of its candidate and its index there. It does not
    depend on the rest of the batch. Masked tokens become [MASK], or the unknown token.

    Raises:
        BadConfig: the tokenizer has neither.
    """
    replacement = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    if replacement is None:
        raise BadConfig(
            "ranker.word_dropout replaces tokens by [MASK] or the unknown token, and this tokenizer has neither; "
            "set it to 0"
        )
    special = np.array(tokenizer.all_special_ids)

    def hidden(ids: np.ndarray, purpose: str, *number: int) -> np.ndarray:
        """(B, L) ids."""
        noise = randomness.uniform(randomness.key(seed, purpose, *number), rows, ids.shape[1])
        return np.where((noise < share) & ~np.isin(ids, special), replacement, ids)

    candidates = np.stack(
        [
            hidden(pools.candidate_ids[:, k], "hidden words of candidates", k)
            for k in range(pools.candidate_ids.shape[1])
        ],
        1,
    )  # (B, K, S)
    after = _layout_with_suffix(tokenizer, suffix)[2]
    text_length = pools.candidate_mask.sum(-1, keepdims=True) - len(after)  # (B, K, 1)
    is_text = np.arange(candidates.shape[2]) < text_length
    return Pools(
        hidden(pools.prompt_ids, "hidden words of prompts"), pools.prompt_mask,
        np.where(is_text, candidates, pools.candidate_ids), pools.candidate_mask,
    )  # fmt: skip
