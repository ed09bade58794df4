"""Open a pretrained masked LM of another project as the backbone of a run's models (`architecture.family: pretrained`).

Weights are read from safetensors. Code in the folder is run only if `pretrained.code_sha256` is its hash. What cannot work
is refused here, with one message that says what to do; stage 01 opens the model for this reason alone.

    open_pretrained  the model, the run's tokenizer and the facts of both
    adapted          a model of any mode that starts from it
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib import durable, own_code
from lib.errors import BadConfig, BadData, MissingInput, RemaskError
from lib.models.backbones import longest_input, require_model_files
from lib.models.folder_check import first_line
from lib.models.hugging_face.configuration_adapted import AdaptedConfig
from lib.models.hugging_face.modeling_adapted import check_code, logits_of
from lib.models.masked_lm import argument_names, load_foreign
from lib.models.pretrained_tokenizer import Framing, open_tokenizer
from lib.outside import pretrained_folder
from lib.sections.pretrained import PretrainedConfig
from lib.tokenization import forbidden_ids, num_ids

EXTRA_IDS = 256  # rows that the embedding may have without an id of the tokenizer; or 1 % of its rows
TOLERANCE = 1e-3  # of logits that are computed in two ways, relative to their size
NO_LIMIT = 8192  # tokens that a model without a declared maximum is trusted to read
CODE_CLASSES = (
    "AutoModelForMaskedLM",
    "AutoModel",
    "AutoModelForCausalLM",
)  # the first one in auto_map is used
LENGTHS = ("max_sequence_length", "n_positions", "max_seq_len")  # where custom code keeps a maximum


@dataclass(frozen=True)
class Pretrained:
    """An open pretrained masked LM.

    Attributes:
        folder: where it was read from.
        model: as transformers, or its own code, defines it.
        tokenizer: the run's tokenizer; it adds no framing tokens.
        longest: tokens of a text that the model can read beside its framing tokens.
        values: keys of `AdaptedConfig` that describe it.
    """

    folder: Path
    model: Any
    tokenizer: Any
    longest: int
    values: dict[str, Any]

    def config(self, context: int, dropout: float = 0.0, **heads: Any) -> AdaptedConfig:
        """The config of a model with this backbone. `context`: tokens of a text. Raises BadConfig if it reads fewer."""
        framing = len(self.values["prefix_ids"]) + len(self.values["suffix_ids"])
        if context > self.longest:
            raise BadConfig(
                f"architecture.context is {context}, but {self.folder} reads {self.longest + framing} tokens at most, of which "
                f"{framing} are its own special tokens; set architecture.context={self.longest} or less"
            )
        config = AdaptedConfig(max_position_embeddings=context + 1, dropout=dropout, **(self.values | heads))
        config.name_or_path = str(self.folder)
        return config


def open_pretrained(settings: PretrainedConfig) -> Pretrained:
    """The masked LM that `pretrained.model` names.

    Raises:
        MissingInput: there is no such folder or name, or files are missing.
        BadData: the model or its tokenizer cannot be used.
    """
    assert settings.model is not None
    folder = pretrained_folder(settings.model)
    require_model_files(folder)
    tokenizer, framing = open_tokenizer(folder, settings.mask_token)
    content = _config_of(folder)
    _refuse_kinds(folder, content)
    classes, code_files = _code_of(folder, content, settings.code_sha256)
    model: Any = _load_with_code(folder, classes) if classes else load_foreign(folder, "pretrained.model: ")
    if not classes:
        _untie(model)
    _check_vocabulary(folder, model, tokenizer)
    longest = _longest_text(model, framing)
    whole = bool(classes) or not _head_is_separate(model, tokenizer)
    probe = Probe(model, tokenizer, framing, whole, settings.shift_logits)
    try:
        probe.check(folder)
    except RemaskError:
        raise
    except Exception as error:  # of code that this project does not know
        raise BadData(
            f"pretrained.model: {folder}: {type(model).__name__} cannot read a text: {type(error).__name__}: {first_line(error)}"
        ) from None
    values: dict[str, Any] = {
        "backbone": json.loads(model.config.to_json_string(use_diff=False)),
        "backbone_class": classes[0] if classes else None,
        "backbone_config_class": classes[1] if classes else None,
        "code_files": code_files,
        "vocab_size": num_ids(tokenizer),
        "hidden_size": probe.width,
        "prefix_ids": framing.prefix,
        "suffix_ids": framing.suffix,
        "lm_head": "whole" if whole else "separate",
        "shift_logits": settings.shift_logits,
        **special_ids(tokenizer),
    }
    return Pretrained(folder, model, tokenizer, longest, values)


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """The config keys of the special tokens of a run's tokenizer."""
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "mask", "cls", "unk")
    }


# ----------------------------------------------------------------------------------------------- what is refused


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        content = durable.read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise BadData(f"pretrained.model: {folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise BadData(
            f"pretrained.model: {folder / 'config.json'} has no model_type; give the folder of a model"
        )
    return content


def _refuse_kinds(folder: Path, content: dict[str, Any]) -> None:
    """Raise BadData for kinds of models that can never be a backbone."""
    problems = {
        "quantization_config": "its weights are quantised, and cannot be trained; give the model that it was made from",
        "is_encoder_decoder": "it has an encoder and a decoder; give a masked LM such as BERT",
        "is_decoder": "a token attends only to earlier ones (is_decoder); give a bidirectional masked LM",
    }
    if content["model_type"] == "remask_adapted":
        raise BadData(
            f"pretrained.model: {folder} is a model that this project trained from a pretrained one; set models.NAME.start to it, "
            "and pretrained.model to the model that it comes from"
        )
    for key, problem in problems.items():
        if content.get(key):
            raise BadData(f"pretrained.model: {folder}/config.json has {key}: {problem}")


def _code_of(
    folder: Path, content: dict[str, Any], pinned: str | None
) -> tuple[tuple[str, str] | None, dict[str, str]]:
    """((class, config class) of a model with code of its own, hashes of its files); (None, {}) for one of transformers.

    Raises BadData if the code is not the pinned one.
    """
    from transformers import CONFIG_MAPPING

    from lib.models import families as families  # registers this project's models

    if content["model_type"] in CONFIG_MAPPING:
        return None, {}
    auto = content.get("auto_map", {})
    model = next((auto[name] for name in CODE_CLASSES if name in auto), None)
    if model is None or "AutoConfig" not in auto:
        raise BadData(
            f"pretrained.model: {folder} is of type {content['model_type']}, which this version of transformers does not have, "
            "and its config.json names no code (auto_map); give another model"
        )
    if pinned is not None:
        own_code.allow(pinned)
    files = own_code.hashes_of(folder)
    own_code.require_allowed(folder, files, (model, auto["AutoConfig"]), {pinned}, "pretrained.model: ")
    return (model.rpartition("--")[2], auto["AutoConfig"].rpartition("--")[2]), files


def _load_with_code(folder: Path, classes: tuple[str, str]) -> Any:
    """A model whose class is defined in the folder. Its code was compared with the pinned hash."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        kind, of_config = (
            get_class_from_dynamic_module(c, str(folder), local_files_only=True) for c in classes
        )
        config = of_config.from_pretrained(folder, local_files_only=True)
        model, report = kind.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # the code of another project may raise anything
        raise BadData(
            f"pretrained.model: {folder} cannot be loaded by its own code: {type(error).__name__}: {first_line(error)}"
        ) from None
    if "attention_mask" not in argument_names(model):
        raise BadData(
            f"pretrained.model: {folder}: {kind.__name__} takes no attention_mask, so it would read padding as text; give another model"
        )
    if missing := sorted(report["missing_keys"]):
        raise BadData(
            f"pretrained.model: {folder} lacks {len(missing)} tensors of {kind.__name__}, such as {', '.join(missing[:3])}"
        )
    return model.eval()


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    rows, ids = model.get_input_embeddings().weight.shape[0], num_ids(tokenizer)
    if ids > rows or rows - ids > max(EXTRA_IDS, rows // 100):
        raise BadData(
            f"pretrained.model: {folder} has {rows:,} embeddings, but its tokenizer has {ids:,} ids, so they do not belong "
            "together; copy the tokenizer that the model was trained with into the folder"
        )


def _untie(model: Any) -> None:
    """Correct the config of a model whose file has two tensors where the config says that they are one.

    transformers then keeps both and leaves the config as it is, so a model that is made from the config would have one.
    """
    by_config = model.get_expanded_tied_weights_keys(all_submodels=True)
    if set(by_config) - set(model.all_tied_weights_keys):
        model.config.tie_word_embeddings = False


def _longest_text(model: Any, framing: Framing) -> int:
    declared = longest_input(model)
    if declared is None:
        declared = next((n for key in LENGTHS if (n := getattr(model.config, key, None))), NO_LIMIT)
    return declared - framing.count


@torch.no_grad()
def _head_is_separate(model: Any, tokenizer: Any) -> bool:
    """Whether the logits can be computed from hidden states alone, as `logits_of` does."""
    if model.base_model is model or not hasattr(model, model.base_model_prefix):
        return False
    ids = torch.tensor([_text_ids(tokenizer, 8)])
    try:
        hidden = model.base_model(input_ids=ids, return_dict=True)[0]
        apart = logits_of(model, hidden[0])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    whole = model(input_ids=ids).logits[0]
    return apart.shape == whole.shape and _is_close(apart, whole)


def _is_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max().clamp_min(1e-6))


def _text_ids(tokenizer: Any, count: int) -> list[int]:
    """Different ids of text, repeated if there are fewer than `count`."""
    never = set(forbidden_ids(tokenizer))
    ids = [i for i in range(num_ids(tokenizer)) if i not in never]
    if not ids:
        raise BadData(
            "pretrained.model: its tokenizer has special tokens only; give the tokenizer of the model"
        )
    return [ids[n * 7919 % len(ids)] for n in range(count)]


@dataclass
class Probe:
    """Reads a few tokens, to learn what no config says reliably: is it bidirectional, and does it ignore padding?

    Attributes:
        width: D, the size of the hidden states.
    """

    model: Any
    tokenizer: Any
    framing: Framing
    whole: bool
    shift: bool
    width: int = 0

    @torch.no_grad()
    def check(self, folder: Path) -> None:
        """Raise BadData for a model that cannot serve."""
        ids = _text_ids(self.tokenizer, 12)
        row = torch.tensor([[*self.framing.prefix, *ids, *self.framing.suffix]])
        wanted = {"output_hidden_states": True, "return_dict": True}
        output = self.model(input_ids=row, **wanted)
        logits = getattr(output, "logits", None)
        if logits is None or logits.dim() != 3 or not output.hidden_states:
            raise BadData(
                f"pretrained.model: {folder}: {type(self.model).__name__} gives no logits and hidden states for every token; give a masked LM"
            )
        if not torch.isfinite(logits).all():
            raise BadData(
                f"pretrained.model: {folder}: its logits are not finite, so its weights are damaged"
            )
        self.width = output.hidden_states[-1].shape[-1]
        if not self.whole:
            self.width = self.model.base_model(input_ids=row, return_dict=True)[0].shape[-1]
        # The next token changes the logits of a token, unless attention is causal
        first = len(self.framing.prefix)
        changed = row.clone()
        changed[0, first + 1] = self.tokenizer.mask_token_id
        if torch.equal(self.model(input_ids=changed).logits[0, first], logits[0, first]):
            raise BadData(
                f"pretrained.model: {folder} is causal only: a token does not change the logits of the one before it. Give a "
                "bidirectional masked LM, or a model that was converted to one"
            )
        padding = torch.full((1, 4), self.tokenizer.pad_token_id)
        mask = torch.cat([torch.ones_like(row), torch.zeros_like(padding)], 1)
        padded = self.model(input_ids=torch.cat([row, padding], 1), attention_mask=mask).logits
        if not _is_close(padded[:, : row.shape[1]], logits):
            raise BadData(
                f"pretrained.model: {folder}: {type(self.model).__name__} reads padding although it gets an attention_mask, so "
                "results would depend on the batch; give another model"
            )


def check_pretrained(settings: PretrainedConfig, contexts: dict[str, int]) -> Pretrained:
    """Open the model, and refuse contexts that it cannot read. `contexts`: name of a model of the run -> its context."""
    opened = open_pretrained(settings)
    for context in contexts.values():
        opened.config(context)
    return opened


def code_files_of(config: Any) -> dict[str, Path]:
    """The code files of a backbone with code of its own, to be copied into the folder of a model."""
    folder = Path(config.name_or_path or ".")
    files = getattr(config, "code_files", {})
    if files:
        try:
            check_code(folder, files)
        except ValueError as error:
            raise MissingInput(str(error)) from None
    return {name: folder / name for name in files}
