"""Save and load the folder of a trained ranker.

The folder has `ranker.json`, `score_head.safetensors`, the tokenizer, and one of:

- with LoRA, `adapter_config.json` and `adapter_model.safetensors`. The encoder stays in its own folder and is identified by
  its hash.
- otherwise the whole backbone, in `config.json` and `model.safetensors`.
"""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import durable
from lib.errors import BadData, MissingInput
from lib.models.collation import collate
from lib.models.encoders import open_encoder, open_tokenizer, weights_digest, with_lora
from lib.models.ranker import CandidateRanker, HeadOptions
from lib.tokenization import load_tokenizer

__all__ = [
    "RANKER_FILE",
    "collate",
    "load_ranker",
    "open_encoder",
    "open_tokenizer",
    "save_ranker",
    "with_lora",
]

RANKER_FILE, HEAD_FILE, ADAPTER_FILE = "ranker.json", "score_head.safetensors", "adapter_model.safetensors"


def save_ranker(model: CandidateRanker, folder: Path, tokenizer: Any) -> None:
    """Write a ranker's folder; see the module's docstring. `ranker.json` is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = model.base
    has_lora = isinstance(model.backbone, PeftModel)
    record: dict[str, Any] = {
        "pooling": model.pooling,
        "head": model.head_kind,
        "head_dropout": model.head.dropout.p,
        "attention": model.attention,
        "packs": model.packs,
        "prompt_tokens": model.prompt_tokens,
        "candidate_tokens": model.candidate_tokens,
        "suffix": model.suffix,
        "blind": model.blind,
        "backbone": base.config.model_type,
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "lora": has_lora,
        "base": _origin(base, has_lora, folder),
    }
    if has_lora:
        model.backbone.peft_config["default"].base_model_name_or_path = record["base"]["name"]
        model.backbone.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        base.save_pretrained(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.head.state_dict().items()}
    save_file(tensors, folder / HEAD_FILE)
    tokenizer.save_pretrained(folder)
    durable.write_json(folder / RANKER_FILE, record)


def load_ranker(folder: Path, learning: bool = False) -> tuple[CandidateRanker, Any]:
    """(ranker in evaluation mode, tokenizer) of a folder of `save_ranker`.

    Args:
        learning: adapters get gradients, to continue training.

    Raises:
        MissingInput: files of the ranker or its encoder are missing.
        BadData: the files do not match each other, or the encoder is not the one that was adapted.
    """
    folder = Path(folder)
    record = _read_record(folder)
    dtype = getattr(torch, record["dtype"])
    if record["lora"]:
        tokenizer = load_tokenizer(folder)
        backbone = _with_saved_lora(folder, record["base"], dtype, learning)
    else:
        backbone, tokenizer = open_encoder(folder, dtype)
    model = CandidateRanker(
        backbone, pooling=record["pooling"], head=HeadOptions(record["head"], record["head_dropout"]),
        attention=record["attention"], seed=0, packs=record.get("packs"),
    )  # fmt: skip
    model.prompt_tokens, model.candidate_tokens = record.get("prompt_tokens"), record.get("candidate_tokens")
    model.suffix, model.blind = record.get("suffix", ""), record.get("blind", False)
    try:
        model.head.load_state_dict(load_file(folder / HEAD_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise BadData(f"{folder / HEAD_FILE} is not the head of this ranker: {error}") from None
    if record["head"] == "yes_no":
        model.head.take(model.head.out.weight[0].detach().clone())
    return model.eval(), tokenizer


def _with_saved_lora(folder: Path, origin: dict[str, Any], dtype: torch.dtype, learning: bool) -> Any:
    """The encoder of a ranker, with the ranker's adapters."""
    name = str(folder / origin["name"]) if origin.get("relative") else origin["name"]
    backbone, _ = open_encoder(name, dtype, origin["revision"])
    found = weights_digest(name)
    if found != origin["weights_sha256"]:
        raise BadData(
            f"{folder} has adapters for other weights than those of {name}: its sha256 is {found}, expected "
            f"{origin['weights_sha256']}; restore the encoder's folder, or train the ranker again"
        )
    try:
        tensors = load_file(folder / ADAPTER_FILE)
        backbone = PeftModel.from_pretrained(backbone, str(folder), is_trainable=learning)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise BadData(f"the adapters in {folder} cannot be loaded: {error}") from None
    differing = set(tensors) ^ set(get_peft_model_state_dict(backbone, save_embedding_layers=False))
    if differing:
        raise BadData(
            f"{folder / ADAPTER_FILE} does not match {name}: {len(differing)} tensors differ, such as {min(differing)}"
        )
    return backbone


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RANKER_FILE
    if not path.exists():
        raise MissingInput(f"{folder} has no {RANKER_FILE}; give the folder of a trained ranker")
    try:
        record = durable.read_json(path)
        weights = ADAPTER_FILE if record["lora"] else None
        keys = ("pooling", "head", "head_dropout", "attention", "dtype", "base")
        lacking = [key for key in keys if key not in record]
    except (ValueError, KeyError, TypeError):
        raise BadData(f"{path} is not a record of a ranker; copy the ranker's folder again") from None
    if lacking:
        raise BadData(f"{path} lacks {', '.join(lacking)}; copy the ranker's folder again")
    absent = [name for name in (HEAD_FILE, weights) if name and not (folder / name).exists()]
    if absent:
        raise MissingInput(f"{folder} has no {' and no '.join(absent)}; copy the ranker's folder again")
    return record


def _origin(base: Any, with_digest: bool, folder: Path) -> dict[str, Any]:
    """Where the backbone was loaded from, with the hash of its weights if the ranker does not contain them.

    A model of the same run is named relative to the ranker's `folder`, because the two move together.
    """
    name = base.config._name_or_path or None
    revision = getattr(base.config, "_commit_hash", None)
    digest = weights_digest(name) if with_digest and name is not None else None
    origin = {"name": name, "revision": revision, "weights_sha256": digest}
    if name is not None and Path(name).parts[-1:] == ("best_model",):
        runs = [
            Path(path).absolute().parents[2:3] for path in (name, folder)
        ]  # .../<run>/<stage>/<model>/best_model
        if runs[0] == runs[1]:
            return origin | {"name": os.path.relpath(name, folder), "relative": True}
    return origin
