"""Programs whose numbers a masked LM resamples: a source of wrong programs (`finqa.pools.changes.masked_lm`).

The masked LM was trained on the programs of the train split. Its output may be no valid program, so the caller parses
and executes it.
"""

import numpy as np

from lib import randomness
from lib.errors import BadConfig
from lib.tasks import CandidateContext
from lib.tokenization import decode_batch


def rewrite_arguments(programs: list[str], context: CandidateContext) -> list[str]:
    """Mask and resample a share of the tokens of each program's numbers.

    The share is drawn per program from `candidates.mask_ratio`, and at least one token is masked. The result is a function
    of the seed and the program.

    Raises:
        BadConfig: the masked LM has another tokenizer than the run.
    """
    from lib.synthetic import MaskedRows

    if not context.same_tokenizer:
        raise BadConfig(
            f"generator.checkpoint {context.config.generator.checkpoint} has a tokenizer of its own, but programs are "
            "resampled in the run's tokens; set it to null to train a masked LM on the programs, or set "
            "finqa.pools.changes.masked_lm to 0"
        )
    tokenizer, config = context.tokenizer, context.config.candidates
    coded = tokenizer(
        programs, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    lengths = np.array([len(ids) for ids in coded["input_ids"]])
    valid = np.arange(lengths.max()) < lengths[:, None]  # (N, T)
    ids = np.full(valid.shape, tokenizer.pad_token_id, np.int64)
    ids[valid] = np.concatenate([np.asarray(row, np.int64) for row in coded["input_ids"]])
    numeric = np.zeros_like(valid)
    for row, (program, spans) in enumerate(zip(programs, coded["offset_mapping"], strict=True)):
        numeric[row, : len(spans)] = [_is_numeric(program, start, end) for start, end in spans]
    rows = np.array([randomness.key(0, program) for program in programs], dtype=np.uint64).astype(np.int64)
    low, high = config.mask_ratio
    ratio = low + (high - low) * randomness.uniform(context.key("argument ratio"), rows, 1)  # (N, 1)
    noise = np.where(numeric, randomness.uniform(context.key("argument"), rows, ids.shape[-1]), np.inf)
    masked = numeric & ((noise < ratio) | (noise == noise.min(1, keepdims=True)))
    filled = context.engines[0].fill(MaskedRows(ids, valid, masked, rows), config, context.seed)
    return decode_batch(tokenizer, [filled[row, :length] for row, length in enumerate(lengths)])


def _is_numeric(program: str, start: int, end: int) -> bool:
    """Whether the token at these characters belongs to a number, and not to the `#1` of an earlier step."""
    piece = program[start:end]
    return any(c.isdigit() for c in piece) and "#" not in program[max(0, start - 1) : end]
