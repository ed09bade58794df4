"""Pretrained encoders and their tokenizers, from folders or the hub, and LoRA on them.

Weights are read from safetensors only. Code in the folder is not run.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lib import durable, randomness
from lib.errors import BadConfig, BadData, MissingInput
from lib.models import families as families  # registers this project's backbones with the Auto classes
from lib.models.backbones import WEIGHTS_FILE, require_model_files
from lib.models.folder_check import first_line, refuse_non_finite
from lib.outside import encoder_not_found, encoder_source

transformers_logging.disable_progress_bar()
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing`", category=FutureWarning
)  # peft reads it

EVERY_LINEAR = "all-linear"
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
_digests: dict[tuple, str] = {}


def open_encoder(
    name_or_folder: str | Path, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> tuple[Any, Any]:
    """(backbone, tokenizer) of a folder, or of a name on the hub unless `HF_HUB_OFFLINE` is set.

    A pooler without weights in the folder is removed, since a random one is useless. A tokenizer without a padding token pads
    with its end token; masks distinguish the two. Attention has no dropout: with it, torch's fused attention is off, and
    a training step takes twice as long.

    Raises:
        MissingInput: there is no such folder or name, or no tokenizer, or it cannot be downloaded.
        BadData: weights are pickled or incomplete, or need code from the folder.
    """
    tokenizer = open_tokenizer(name_or_folder, revision)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the report of missing tensors would advise to train them
    try:
        config = AutoConfig.from_pretrained(name_or_folder, **_source(name_or_folder, revision))
        for key in ATTENTION_DROPOUTS:
            if getattr(config, key, 0):
                setattr(config, key, 0.0)
        backbone, report = AutoModel.from_pretrained(
            name_or_folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
            **_source(name_or_folder, revision),
        )  # fmt: skip
    except OSError as error:
        raise MissingInput(_encoder_not_found(name_or_folder, error)) from None
    except Exception as error:  # what config.json says decides which kind
        raise BadData(f"{name_or_folder} cannot be loaded: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    absent = sorted(report["missing_keys"])
    missing = [key for key in absent if not key.startswith("pooler.")]
    if absent != missing:
        backbone.pooler = None
    if missing:
        raise BadData(
            f"{name_or_folder} lacks {len(missing)} of the backbone's tensors, such as {', '.join(missing[:3])}; "
            "give a complete model"
        )
    refuse_non_finite(backbone.state_dict(), name_or_folder)
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        raise BadData(
            f"{name_or_folder}: the tokenizer has {len(tokenizer)} ids, the model only "
            f"{backbone.get_input_embeddings().num_embeddings}; give the tokenizer that the model was trained with"
        )
    if getattr(backbone.config, "pad_token_id", None) is None:
        backbone.config.pad_token_id = tokenizer.pad_token_id
    return backbone, tokenizer


def configured(encoder: str) -> tuple[str, str | None]:
    """(folder or name on the hub, commit) of `ranker.encoder`: arguments of `open_encoder`."""
    source = encoder_source(encoder)
    return (encoder, None) if isinstance(source, Path) else (source.name, source.commit)


def open_tokenizer(name_or_folder: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of an encoder, padding on the right. Raises MissingInput or BadData, as `open_encoder`."""
    source = _source(name_or_folder, revision)
    folder = Path(name_or_folder)
    if folder.is_dir():
        require_model_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, **source)
    except OSError as error:
        raise MissingInput(_encoder_not_found(name_or_folder, error)) from None
    except Exception as error:
        raise BadData(f"the tokenizer of {name_or_folder} cannot be loaded: {first_line(error)}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise BadData(f"{name_or_folder} has no fast tokenizer; save it with a tokenizer.json")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BadData(
                f"the tokenizer of {name_or_folder} has neither a padding nor an end token; add one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _source(name_or_folder: str | Path, revision: str | None) -> dict[str, Any]:
    is_folder = Path(name_or_folder).is_dir()
    return {"local_files_only": is_folder, "trust_remote_code": False} | (
        {"revision": revision} if revision and not is_folder else {}
    )


def _encoder_not_found(name: str | Path, error: OSError) -> str:
    if Path(name).is_dir():
        return f"{name} cannot be read as an encoder: {str(error).strip().splitlines()[0]}"
    return encoder_not_found(name, error)


def with_lora(
    backbone: Any,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str] = EVERY_LINEAR,
    seed: int = 0,
) -> Any:
    """The backbone with low-rank adapters (Hu et al. 2021) on its linear layers, without the pooler. Only they are trained.

    Args:
        targets: "all-linear", or names of layers as peft takes them, separated by commas.
        seed: the adapters' initial weights are a function of it.

    Raises:
        BadConfig: the backbone has no such layers, or is new: adapters are saved without their encoder.
    """
    if not backbone.config._name_or_path:
        raise BadConfig(
            "ranker.adapter is lora, but the backbone is new, and adapters are saved without their encoder. "
            "Set ranker.encoder to a pretrained model, or ranker.adapter to none"
        )
    if isinstance(targets, str) and targets != EVERY_LINEAR:
        targets = [word.strip() for word in targets.split(",")]
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - peft divides by the rank, any number works
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(
            isinstance(module, Conv1D) for module in backbone.modules()
        ),  # GPT-2's transposed layers
        exclude_modules=r"(.*\.)?pooler\..*" if getattr(backbone, "pooler", None) is not None else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.key(seed, "lora weights") % 2**63)
        try:
            return get_peft_model(backbone, settings)
        except ValueError as error:
            raise BadConfig(f"ranker.lora.targets {targets!r}: {error}") from None


def weights_digest(name: str) -> str | None:
    """sha256 of a folder's weights, of all shards in the order of their names; None for a name on the hub.

    Cached while the sizes and times of the files stay the same, because large weights take a while.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    whole = folder / WEIGHTS_FILE
    files = [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))
    stats = [path.stat() for path in files]
    key = (str(folder.resolve()), *((s.st_size, s.st_mtime_ns) for s in stats))
    if key not in _digests:
        each = [durable.sha256_file(path) for path in files]
        _digests[key] = each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()
    return _digests[key]
