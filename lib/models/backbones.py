"""What a ranker must know of a Hugging Face backbone before it asks it anything. Knows no ranker."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.errors import BadConfig, BadData, MissingInput
from lib.models.packing import Packed, Pools, pack

TRUNK_FILE, SHARDS_FILE = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model",
                   "spiece.model", "spm.model")  # fmt: skip
TAKES_OWN_MASKS = ("sdpa", "eager")  # attention implementations that let a mask of four dimensions through
# Greatest relative difference of states, packed and one by one, that rounding explains
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}
TOLERANCE_OF_HALF = 0.1


def is_causal_backbone(backbone: Any) -> bool:
    """Whether the backbone's tokens see only earlier ones, by its config or its attention layers.

    Raises:
        BadConfig: the backbone is an encoder with a decoder.
    """
    config = backbone.config
    if getattr(config, "is_encoder_decoder", False):
        raise BadConfig(
            f"{type(backbone).__name__} has an encoder and a decoder; a ranker needs one of both: "
            "take a BERT- or GPT-like model"
        )
    said = getattr(config, "is_causal", None)
    if said is not None:
        return bool(said)
    layers = [m.is_causal for m in backbone.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(layers) if layers else bool(getattr(config, "is_decoder", False))


def width_of(backbone: Any) -> int:
    """D, the width of the backbone's hidden states."""
    return backbone.config.get_text_config().hidden_size


def arguments_of(backbone: Any) -> frozenset[str]:
    """Names that the backbone's forward takes."""
    return frozenset(inspect.signature(backbone.forward).parameters)


def attention_of(backbone: Any) -> str:
    """The attention implementation in use."""
    return getattr(backbone.config, "_attn_implementation", None) or "eager"


def why_not_packed(backbone: Any) -> str | None:
    """Why the backbone takes no packed rows, None if it does: what its forward takes does not say, so it is tried.

    A pool of two candidates is read in one row and one by one, and a single row with a mask and positions of ours and
    as anyone would read it. The states must be the same.
    """
    if attention_of(backbone) not in TAKES_OWN_MASKS:
        return f"attention implementation {attention_of(backbone)!r} takes no mask of its own; {' or '.join(TAKES_OWN_MASKS)} do"
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
    ids = [i for i in range(max(0, size - 11), size) if i not in padding]  # RoBERTa's kin count no padding
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
    apart = [states[owner == 1] for states, owner in zip(single, alone.owner, strict=True)]
    tolerance = TOLERANCE.get(next(backbone.parameters()).dtype, TOLERANCE_OF_HALF)
    off = _relative(torch.cat(together), torch.cat(apart))
    if not off <= tolerance:
        return (
            f"it gives other states when candidates share a row: states differ by {off:.1e} of their size, allowed is "
            f"{tolerance:.0e}"
        )
    if causal:  # their rows of one candidate were the ordinary ones
        return None
    one = pack(
        Pools(
            words[None], torch.ones(1, 9, dtype=torch.bool), words[None, None, :1], mask[None, :1, :1] & False
        )
    )
    off = _relative(read(one, ordinary=False), read(one, ordinary=True))
    if not off <= tolerance:
        return (
            f"it reads a row otherwise when the mask and the positions are given; states differ by {off:.1e} of their "
            f"size, allowed is {tolerance:.0e}"
        )
    return None


def _relative(one: Tensor, other: Tensor) -> float:
    """Greatest difference of two sets of vectors (..., D) relative to the size of the second; NaN counts as one."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-12)).max())


def _packed_arguments(backbone: Any, packed: Packed, is_causal: bool) -> dict[str, Tensor]:
    """The mask and positions with which a backbone reads packed rows."""
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
    """The position of a first token: RoBERTa and its kin (XLM-R, CamemBERT, MPNet, Longformer, ESM) count on from the
    padding's id, which their table of positions knows."""
    table = _position_table(backbone)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        return int(padding) + 1
    for module in backbone.modules():  # Nystromformer, MRA and YOSO begin at 2
        if getattr(module, "position_embeddings", None) is table and table is not None:
            positions = getattr(module, "position_ids", None)
            return int(positions.flatten()[0]) if isinstance(positions, Tensor) and positions.numel() else 0
    return 0


def longest_input(model: Any) -> int | None:
    """Tokens that the model reads at most, special ones among them; None where it says no limit."""
    table = _position_table(model)
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if said is not None and said <= 0:  # XLNet has no limit
        said = None
    if table is None:
        return said
    rows = table.weight.shape[0] - position_offset(model)
    return rows if said is None else min(rows, said)


def _position_table(backbone: Any) -> Any:
    """The embedding of absolute positions, None if there is none."""
    return next(
        (module for name, module in backbone.named_modules()
         if name.rpartition(".")[2] == "position_embeddings" and isinstance(getattr(module, "weight", None), Tensor)),
        None,
    )  # fmt: skip


def require_model_files(folder: Path) -> None:
    """Raise MissingInput or BadData if a folder is not that of a Hugging Face model with a tokenizer."""
    if not (folder / "config.json").exists():
        raise MissingInput(f"{folder} has no config.json; give the folder of a Hugging Face model")
    if not any((folder / name).exists() for name in (TRUNK_FILE, SHARDS_FILE)):
        pickled = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern)
        )
        if pickled:
            raise BadData(
                f"{folder} has its weights only in {pickled[0]}, a pickle, which can run any code and is not read; "
                "convert it to model.safetensors with save_pretrained on a machine that may run it"
            )
        raise MissingInput(f"{folder} has no {TRUNK_FILE}; give a folder with the model's weights")
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise MissingInput(
            f"{folder} has no tokenizer (tokenizer.json or a vocabulary); copy there the one that the model was "
            "trained with"
        )
