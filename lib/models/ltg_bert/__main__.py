"""Convert a checkpoint of the reference implementation to a folder that transformers loads.

python -m lib.models.ltg_bert CHECKPOINT OUT_DIR
python -m lib.models.ltg_bert model.bin OUT_DIR --config configs/base.json --tokenizer tokenizer.json
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lib import durable
from lib.durable import replacing_folder
from lib.errors import BadData, CannotCreate, MissingInput, RemaskError

from .conversion import load_reference, read_checkpoint, reference_config

SPECIALS = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}


def convert(checkpoint: Path, out: Path, config_file: Path | None, tokenizer_file: Path | None) -> str:
    """Write `out` and return a line that describes it."""
    if out.exists() and any(out.iterdir()):
        raise CannotCreate(f"{out} is not empty; give a new folder")
    tensors, stored_config = read_checkpoint(checkpoint)
    config_file = config_file or _beside(checkpoint, "config.json")
    if stored_config is None and config_file is None:
        raise MissingInput(
            f"{checkpoint} has no config, and there is no config.json beside it; give --config FILE"
        )
    config = reference_config(_read_json(config_file) if config_file else stored_config or {})
    tokenizer = _tokenizer(tokenizer_file or _beside(checkpoint, "tokenizer.json"), config.vocab_size)
    if tokenizer is not None:
        for name in ("unk", "cls", "sep", "pad", "mask"):
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    model = load_reference(tensors, config)
    with replacing_folder(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    note = (
        "with its tokenizer"
        if tokenizer is not None
        else "WITHOUT a tokenizer: there is none beside it; give --tokenizer FILE"
    )
    return f"{out}: LtgBertForMaskedLM, {count:,} parameters, {note}"


def _beside(checkpoint: Path, name: str) -> Path | None:
    path = checkpoint.parent / name
    return path if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return durable.read_json(path)
    except (OSError, ValueError) as error:
        raise BadData(f"{path} is not a JSON config: {error}") from None


def _tokenizer(path: Path | None, vocab_size: int):
    """The tokenizer of a tokenizer.json, with its special tokens; None without a file."""
    from transformers import PreTrainedTokenizerFast

    if path is None:
        return None
    try:
        plain = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the Rust library raises bare Exceptions
        raise BadData(f"{path} is not a tokenizer file: {error}") from None
    vocabulary = plain.get_vocab()
    if len(vocabulary) > vocab_size:
        raise BadData(
            f"{path} has {len(vocabulary)} tokens, the model {vocab_size}; it belongs to another model"
        )
    present = {role: token for role, token in SPECIALS.items() if token in vocabulary}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), model_input_names=["input_ids", "attention_mask"], **present
    )


def main() -> int:
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m lib.models.ltg_bert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help=".safetensors, or a legacy .bin, .pt or .pth")
    parser.add_argument("out_dir", type=Path, help="a new folder")
    parser.add_argument(
        "--config", type=Path, help="the reference's JSON config; else the file's own or config.json"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; else the one beside the checkpoint")
    options = parser.parse_args()
    try:
        print(convert(options.checkpoint, options.out_dir, options.config, options.tokenizer))
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ValueError as error:  # a config that no model can be built from
        print(f"error: {error}", file=sys.stderr)
        return BadData.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
