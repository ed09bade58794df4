"""The tokenizer of a pretrained masked LM as the tokenizer of a run.

A run's tokenizer adds no special tokens. Those that the model expects around a text are its framing tokens, and the model
puts them there itself (lib/models/hugging_face/modeling_adapted.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import BadData, MissingInput
from lib.tokenization import forbidden_ids, num_ids

ROLES = ("pad_token", "mask_token", "cls_token", "unk_token", "sep_token", "bos_token", "eos_token")
_NAMED = re.compile(r"<.+>|\[.+\]")  # special tokens of a vocabulary of characters
_PROBES = 64  # tokens that are tried until one is encoded as itself


@dataclass(frozen=True)
class Framing:
    """Special ids before and after every text."""

    prefix: list[int]
    suffix: list[int]

    @property
    def count(self) -> int:
        return len(self.prefix) + len(self.suffix)


def open_tokenizer(folder: Path, mask_token: str | None = None) -> tuple[Any, Framing]:
    """(the run's tokenizer, framing tokens) of the folder of a masked LM.

    Args:
        mask_token: name of the mask, for tokenizers that do not say which token it is.

    Raises:
        MissingInput: there is no tokenizer.
        BadData: it cannot be used, or has no mask.
    """
    from transformers import AutoTokenizer

    try:
        found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise MissingInput(
            f"pretrained.model: {folder} has no tokenizer that can be loaded ({_first_line(error)}); copy the one that the model "
            "was trained with into it"
        ) from None
    if not getattr(found, "is_fast", False):
        found = _of_characters(found, folder)
    if mask_token is not None:
        if mask_token not in found.get_vocab():
            raise BadData(
                f"pretrained.mask_token is {mask_token!r}, which is not a token of {folder}; name the token that the model was "
                "trained to replace"
            )
        found.mask_token = mask_token
    if found.mask_token_id is None:
        raise BadData(
            f"pretrained.model: the tokenizer of {folder} has no mask token. If the model is a masked LM, name its mask with "
            "pretrained.mask_token; otherwise give another model"
        )
    return _without_framing(found), framing_of(found)


def _of_characters(slow: Any, folder: Path) -> Any:
    """A fast tokenizer for a slow one whose vocabulary is single characters, as of ESM. Raises BadData for others."""
    vocabulary: dict[str, int] = slow.get_vocab()
    roles = {role: str(token) for role in ROLES if (token := getattr(slow, role, None)) is not None}
    named = {t for t in vocabulary if t in roles.values() or _NAMED.fullmatch(t)}
    if any(len(token) != 1 for token in vocabulary if token not in named) or "unk_token" not in roles:
        raise BadData(
            f"pretrained.model: {folder} has no fast tokenizer; save it with a tokenizer.json, for example by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    framed = slow.build_inputs_with_special_tokens([])
    fast = character_tokenizer(vocabulary, roles)
    from tokenizers import processors

    names = {i: t for t, i in vocabulary.items()}
    before = [i for i in framed if i in (slow.cls_token_id, slow.bos_token_id)]
    after = framed[len(before) :]
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[*(names[i] for i in before), "$A", *(names[i] for i in after)],
        special_tokens=[(names[i], i) for i in {*before, *after}],
    )
    return fast


def character_tokenizer(vocabulary: dict[str, int], roles: dict[str, str]) -> Any:
    """A fast tokenizer with one token per character, of the ids of `vocabulary`. Longer tokens of it are never in a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary, unk_token=roles["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    others = sorted(t for t in vocabulary if len(t) > 1 and t not in roles.values())
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        extra_special_tokens=others,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _without_framing(found: Any) -> Any:
    """The same tokens in a tokenizer that adds nothing and cuts nothing. It has a padding token and a front token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(found.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    core.post_processor = _nothing()
    roles = {role: str(token) for role in ROLES if (token := getattr(found, role, None)) is not None}

    def first_of(*names: str) -> str:
        return next(roles[name] for name in names if name in roles)

    # Padding is hidden by masks, and models read a front token only where they learn it anew: any special token serves
    roles.setdefault("pad_token", first_of("eos_token", "unk_token", "sep_token", "mask_token"))
    roles.setdefault("cls_token", first_of("bos_token", "sep_token", "eos_token", "pad_token"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=int(1e9), clean_up_tokenization_spaces=False, **roles
    )


def framed_tokenizer(tokenizer: Any, prefix: list[int], suffix: list[int], max_length: int) -> Any:
    """A tokenizer with the tokens of a run's tokenizer that puts framing tokens around a text.

    `max_length`: tokens of a text, without the framing tokens.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in {*prefix, *suffix}}
    before, after = [names[i] for i in prefix], [names[i] for i in suffix]
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B", *after],
        special_tokens=[(token, i) for i, token in names.items()],
    )
    roles = {role: str(token) for role in ROLES if (token := getattr(tokenizer, role, None)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length + len(prefix) + len(suffix),
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _nothing() -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(single=["$A"], pair=["$A", "$B"], special_tokens=[])


def framing_of(tokenizer: Any) -> Framing:
    """The special ids that a tokenizer puts around a text."""
    never = set(forbidden_ids(tokenizer))
    names = {i: t for t, i in tokenizer.get_vocab().items()}
    for i in [i for i in range(num_ids(tokenizer)) if i not in never and i in names][:_PROBES]:
        text = tokenizer.decode([i], clean_up_tokenization_spaces=False).strip()
        bare: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if not len(bare):
            continue
        full, count = list(tokenizer(text)["input_ids"]), len(bare)
        for start in range(len(full) - count + 1):
            if full[start : start + count] == list(bare):
                return Framing(full[:start], full[start + count :])
    return Framing([], [])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
