"""Properties of a Hugging Face backbone that a ranker needs: causality, accepted arguments, positions, packed rows."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.errors import BadConfig, BadData, MissingInput
from lib.models.folder_check import check_folder, shards_of
from lib.models.packing import Packed, Pools, pack

WEIGHTS_FILE, SHARDS_FILE = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model",
                   "spiece.model", "spm.model")  # fmt: skip
CUSTOM_MASKS = ("sdpa", "eager")  # attention implementations that take a mask of four dimensions
# Largest relative difference between packed and separate states that rounding explains
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}
TOLERANCE_OF_HALF = 0.1


def is_causal_backbone(backbone: Any) -> bool:
    """Whether the backbone's tokens attend only to earlier ones, by its config or its attention layers.

    Raises:
        BadConfig: the backbone is an encoder with a decoder.
    """
    config = backbone.config
    if getattr(config, "is_encoder_decoder", False):
        raise BadConfig(
            f"{type(backbone).__name__} has an encoder and a decoder, and a ranker needs only one of them; "
            "use a model like BERT or GPT"
        )
    declared = getattr(config, "is_causal", None)
    if declared is not None:
        return bool(declared)
    layers = [m.is_causal for m in backbone.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(layers) if layers else bool(getattr(config, "is_decoder", False))


def width_of(backbone: Any) -> int:
    """D, the size of the backbone's hidden states."""
    return backbone.config.get_text_config().hidden_size


def arguments_of(backbone: Any) -> frozenset[str]:
    """Names of the arguments of the backbone's forward."""
    return frozenset(inspect.signature(backbone.forward).parameters)


def attention_of(backbone: Any) -> str:
    """The attention implementation in use."""
    return getattr(backbone.config, "_attn_implementation", None) or "eager"


def why_not_packed(backbone: Any) -> str | None:
    """The reason why the backbone cannot read packed rows; None if it can.

    The arguments of its forward do not tell, so it is tried. Two candidates of a prompt are read in one row, and one by one. A
    single row is read with a custom mask and positions, and without. The states must be equal.
    """
    if attention_of(backbone) not in CUSTOM_MASKS:
        return f"attention implementation {attention_of(backbone)!r} takes no custom mask; {' or '.join(CUSTOM_MASKS)} do"
    if "position_ids" not in arguments_of(backbone):
        return "its forward takes no position_ids"
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad(), torch.autocast(next(backbone.parameters()).device.type, enabled=False):
            return _compare(backbone)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"it fails on a row of several candidates ({type(error).__name__}: {reason})"
    finally:
        for module, mode in modes.items():
            module.training = mode


def _compare(backbone: Any) -> str | None:
    device, table = next(backbone.parameters()).device, backbone.get_input_embeddings()
    causal = is_causal_backbone(backbone)
    padding = (getattr(backbone.config, "pad_token_id", None), getattr(table, "padding_idx", None))
    size = table.weight.shape[0]
    ids = [
        i for i in range(max(0, size - 11), size) if i not in padding
    ]  # models like RoBERTa give padding no position
    words = torch.tensor((ids * 9)[-9:])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    pools = Pools(
        words[None, :3], torch.ones(1, 3, dtype=torch.bool), words[None, 3:].view(1, 2, 3), mask[None]
    )

    def read(packed: Packed, ordinary: bool) -> Tensor:
        packed = packed.to(device)
        arguments = (
            {"attention_mask": (packed.owner >= 0).long()}
            if ordinary
            else _packed_arguments(backbone, packed, causal)
        )
        states = backbone(input_ids=packed.ids, **arguments).last_hidden_state
        return states.double()

    packed, alone = pack(pools), pack(pools.separate())
    shared, single = read(packed, ordinary=False)[0], read(alone, ordinary=causal)
    together = [shared[packed.owner[0] == number] for number in (1, 2)]
    separate = [states[owner == 1] for states, owner in zip(single, alone.owner, strict=True)]
    tolerance = TOLERANCE.get(next(backbone.parameters()).dtype, TOLERANCE_OF_HALF)
    difference = _relative(torch.cat(together), torch.cat(separate))
    if not difference <= tolerance:
        return (
            f"its states change when candidates share a row: they differ by {difference:.1e} of their size, allowed is "
            f"{tolerance:.0e}"
        )
    if causal:  # the separate rows were already read without a custom mask
        return None
    one = pack(
        Pools(
            words[None], torch.ones(1, 9, dtype=torch.bool), words[None, None, :1], mask[None, :1, :1] & False
        )
    )
    difference = _relative(read(one, ordinary=False), read(one, ordinary=True))
    if not difference <= tolerance:
        return (
            f"its states change with a custom mask and positions: they differ by {difference:.1e} of their "
            f"size, allowed is {tolerance:.0e}"
        )
    return None


def _relative(one: Tensor, other: Tensor) -> float:
    """Largest difference of vectors (..., D), relative to the norm of the second ones. NaN for NaN."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-12)).max())


def _packed_arguments(backbone: Any, packed: Packed, is_causal: bool) -> dict[str, Tensor]:
    """Mask and positions of packed rows."""
    visible = packed.visible(is_causal)
    if attention_of(backbone) != "sdpa":
        dtype = next(backbone.parameters()).dtype
        none = torch.zeros((), dtype=dtype, device=visible.device)
        visible = torch.where(visible, none, torch.finfo(dtype).min)
    arguments = {"attention_mask": visible}
    if "position_ids" in arguments_of(backbone):
        arguments["position_ids"] = packed.positions + position_offset(backbone)
    return arguments


def position_offset(backbone: Any) -> int:
    """The position of the first token.

    In RoBERTa, XLM-R, CamemBERT, MPNet, Longformer and ESM, positions start after the id of padding, which is the
    `padding_idx` of their table of positions.
    """
    table = _position_table(backbone)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        return int(padding) + 1
    for module in backbone.modules():  # Nystromformer, MRA and YOSO start at 2
        if getattr(module, "position_embeddings", None) is table and table is not None:
            positions = getattr(module, "position_ids", None)
            return int(positions.flatten()[0]) if isinstance(positions, Tensor) and positions.numel() else 0
    return 0


def longest_input(model: Any) -> int | None:
    """Maximum number of tokens that the model reads, special ones included; None if it declares no limit."""
    table = _position_table(model)
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if declared is not None and declared <= 0:  # XLNet has no limit
        declared = None
    if table is None:
        return declared
    rows = table.weight.shape[0] - position_offset(model)
    return rows if declared is None else min(rows, declared)


def _position_table(backbone: Any) -> Any:
    """The embedding of absolute positions, None if there is none."""
    return next(
        (module for name, module in backbone.named_modules()
         if name.rpartition(".")[2] == "position_embeddings" and isinstance(getattr(module, "weight", None), Tensor)),
        None,
    )  # fmt: skip


def require_model_files(folder: Path) -> None:
    """Raise MissingInput or BadData if a folder has no Hugging Face model with a tokenizer; see lib/models/folder_check.py."""
    if not (folder / "config.json").exists():
        raise MissingInput(f"{folder} has no config.json; give the folder of a Hugging Face model")
    if not any((folder / name).exists() for name in (WEIGHTS_FILE, SHARDS_FILE)):
        pickled = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern)
        )
        if pickled:
            raise BadData(
                f"{folder} has its weights only in {pickled[0]}; it is a pickle, which can run any code, and is not read. "
                "Convert it to model.safetensors with save_pretrained, on a machine that may run it"
            )
        raise MissingInput(f"{folder} has no {WEIGHTS_FILE}; give a folder with the model's weights")
    weights = [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else shards_of(folder / SHARDS_FILE)
    check_folder(folder, weights)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise MissingInput(
            f"{folder} has no tokenizer (tokenizer.json or a vocabulary); copy the one of the model into it"
        )
