"""What samples start from: masks only, a prompt followed by masks, or a text with gaps."""

from pathlib import Path
from typing import Any

import numpy as np

from lib import durable
from lib.artifacts import Stage
from lib.diffusion.blocks import blocks_of
from lib.errors import BadConfig, BadData
from lib.evaluation.infilling import UNKNOWN, Start, read_infill_file
from lib.log import say
from lib.sections.sampler import SamplerConfig
from lib.tokenization import describe_unknown, encode_with_masks, load_tokenizer
from lib.user_files.decoding import clean_text

MAX_LISTED = 10  # row names in one message


def generator_context(stage: Stage) -> int:
    """The number of tokens that the generator reads, without [CLS]."""
    file = stage.folder_of("05_train_critic", "best_model") / "config.json"
    return durable.read_json(file)["max_position_embeddings"] - 1


def sampling_starts(settings: SamplerConfig, tokenizer: Any, context: int) -> list[Start]:
    """The starts of all samples: one `Start` per text length.

    Raises:
        BadConfig, BadData: the prompt, the text or the file with gaps cannot be used.
    """
    if settings.infill_file:
        starts = read_infill_file(Path(settings.infill_file), tokenizer, context)
        if "oracle" in settings.policies:
            _require_targets(starts)
        return starts
    row = starting_ids(settings, tokenizer, context)
    ids = np.tile(row, (settings.num_samples, 1))
    return [Start(ids, ids == tokenizer.mask_token_id, np.arange(len(ids)))]


def check_starts(settings: SamplerConfig, tokenizer: Any, context: int) -> None:
    """Say which settings have no effect on what samples start from. Raises what `sampling_starts` raises."""
    sampling_starts(settings, tokenizer, context)
    if settings.length is not None and (settings.infill or settings.infill_file):
        say("sampler.length has no effect: a text with gaps keeps its own length")


def check_starts_of(stage: Stage) -> None:
    """The same for a run, while its previous samples are still there."""
    tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
    check_starts(stage.config.sampler, tokenizer, generator_context(stage))


def starting_ids(settings: SamplerConfig, tokenizer: Any, context: int) -> np.ndarray:
    """(T,) ids of one start: all masks, `sampler.prompt` followed by masks, or `sampler.infill`."""
    length = settings.length or context
    blocks_of(length, settings.block_tokens, context)  # raises BadConfig if the length cannot be sampled
    if settings.infill:
        row = _encode(tokenizer, "infill", settings.infill)
        if not (row == tokenizer.mask_token_id).any():
            raise BadConfig("sampler.infill has no [MASK]; write one [MASK] for each token to fill")
        if len(row) > context:
            raise BadConfig(
                f"sampler.infill has {len(row)} tokens, but the generator reads at most {context}"
            )
        return row
    row = np.full(length, tokenizer.mask_token_id, np.int64)
    if settings.prompt:
        prompt = _encode(tokenizer, "prompt", settings.prompt)
        if len(prompt) >= length:
            raise BadConfig(
                f"sampler.prompt has {len(prompt)} tokens, but a sample has only {length}; "
                "give a shorter prompt or a larger sampler.length"
            )
        row[: len(prompt)] = prompt
    return row


def _encode(tokenizer: Any, name: str, text: str) -> np.ndarray:
    """(T,) ids of the text of `sampler.<name>`, with a mask for each [MASK]. Line ends are read as in the data."""
    text, _ = clean_text(text)
    (ids,) = encode_with_masks(tokenizer, [text], "unk")
    if tokenizer.unk_token_id is not None and (ids == tokenizer.unk_token_id).any():
        unknown = describe_unknown(tokenizer, text.split("[MASK]"))
        raise BadConfig(f"sampler.{name}: {unknown}; the generator has never seen them: write it without")
    return ids.astype(np.int64)


def _require_targets(starts: list[Start]) -> None:
    without = [
        name
        for s in starts
        for name, row in zip(s.names or [], s.truth if s.truth is not None else [], strict=True)
        if (row == UNKNOWN).all()
    ]
    if without:
        names = ", ".join(without[:MAX_LISTED])
        raise BadData(
            f"the policy oracle needs the correct text, but {len(without)} rows of sampler.infill_file have no "
            f"target: {names}; add their targets, or remove oracle from sampler.policies"
        )
