"""Load a masked language model for synthetic text: one of this project, or any of transformers, from a saved folder."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from lib.errors import BadData, MissingInput
from lib.models.folder_check import first_line

DEFAULT_LENGTH = 512  # tokens, for a model without a limit


def load_masked_lm(folder: Path) -> tuple[Any, Any, int]:
    """(model, its tokenizer, tokens of text that it reads at most) of a saved folder.

    Raises:
        MissingInput: files are missing.
        BadData: the folder has no masked LM, or its tokenizer belongs to another model.
    """
    from lib.models.backbones import longest_input, require_model_files
    from lib.models.build import is_ours
    from lib.models.folder_check import refuse_non_finite

    require_model_files(folder)
    tokenizer = load_fast_tokenizer(folder)
    is_own = is_ours(folder)
    model: Any = _load_own(folder) if is_own else load_foreign(folder)
    size = model.get_input_embeddings().weight.shape[0]
    refuse_non_finite(model.state_dict(), folder)
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise BadData(
            f"{folder}: the tokenizer has ids up to {largest}, but the model embeds only {size}, from 0 on; "
            "they do not belong together"
        )
    longest = longest_input(model) or DEFAULT_LENGTH
    return model, tokenizer, longest - is_own  # own models have a position for [CLS], which is not used here


def argument_names(model: nn.Module) -> set[str]:
    """Names of the arguments of the model's `forward`."""
    return set(inspect.signature(model.forward).parameters)


def load_fast_tokenizer(folder: Path):
    """The fast tokenizer of a folder, with a mask and a padding token. Raises MissingInput or BadData."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what the files of a tokenizer say decides which kind
        raise MissingInput(f"{folder} has no tokenizer that can be loaded: {first_line(error)}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise BadData(f"{folder} has no fast tokenizer; save it with a tokenizer.json")
    for name in ("mask", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise BadData(
                f"{folder}: its tokenizer has no {name} token, so its model is no masked LM; set generator.checkpoint to "
                "the folder of one"
            )
    return tokenizer


def _load_own(folder: Path) -> nn.Module:
    """A model of this project."""
    from lib.models.build import load_model
    from lib.models.families import FAMILIES

    model = load_model(folder)
    if type(model) is not FAMILIES[model.config.model_type].heads["masked_lm"]:
        raise BadData(
            f"{folder} has a {type(model).__name__}, which is no masked LM; give a model of mode language_model with "
            "attention bidirectional"
        )
    return model


def load_foreign(folder: Path, where: str = "") -> nn.Module:
    """A masked LM of transformers, with its head, in evaluation mode. `where`: begins every message."""
    import torch
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of missing tensors would advise to train them
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # what config.json says decides which kind
        raise BadData(
            f"{where}{folder} is not a masked LM that transformers can load: {first_line(error)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise BadData(
            f"{where}{folder} lacks {len(missing)} tensors of {type(model).__name__}, such as {', '.join(missing[:3])}; "
            "give the folder of a masked LM with its head, not of an encoder, a classifier or a discriminator"
        )
    if getattr(model.config, "is_decoder", False):
        raise BadData(
            f"{where}{folder}/config.json says is_decoder: a token attends only to earlier ones; give a bidirectional masked LM"
        )
    if "attention_mask" not in argument_names(model):
        raise BadData(
            f"{where}{folder}: {type(model).__name__} takes no attention_mask, so it would read padding as text; give another masked LM"
        )
    return model.eval()
