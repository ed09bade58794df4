"""Checkpoints of the reference implementation (ltgoslo/ltg-bert) as `LtgBertForMaskedLM`.

Some tensors have other names here. Every tensor of the checkpoint must match one of the model, and the other way round. Pickled
checkpoints are read in a separate process, by torch's weights-only loader.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.errors import BadData, MissingInput
from lib.models.hugging_face import LtgBertConfig, LtgBertForMaskedLM
from lib.models.hugging_face.modeling_ltg_bert import bucket_index

# (part of a reference name, part of the name here), where the two differ
_NAMES = (
    ("classifier.nonlinearity.1.", "lm_head.dense."),
    ("classifier.nonlinearity.5.", "lm_head.decoder."),
    (".mlp.mlp.1.", ".mlp.up_proj."),
    (".mlp.mlp.4.", ".mlp.down_proj."),
)
_POSITION_INDICES = re.compile(r"^transformer\.layers\.\d+\.attention\.position_indices$")
_TIED, _EMBEDDING = "classifier.nonlinearity.5.weight", "embedding.word_embedding.weight"
_CONFIG_KEYS = (
    "attention_probs_dropout_prob", "hidden_dropout_prob", "hidden_size", "intermediate_size", "layer_norm_eps",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "position_bucket_size", "vocab_size",
)  # fmt: skip


def reference_config(reference: Mapping[str, Any]) -> LtgBertConfig:
    """An `LtgBertConfig` from the reference's config. Keys that do not concern the model are ignored.

    Raises:
        BadData: a key is missing.
    """
    missing = [key for key in _CONFIG_KEYS if key not in reference]
    if missing:
        raise BadData(f"the reference config lacks {', '.join(missing)}")
    return LtgBertConfig(**{key: reference[key] for key in _CONFIG_KEYS})


def load_reference(
    state_dict: Mapping[str, Tensor], config: LtgBertConfig | Mapping[str, Any]
) -> LtgBertForMaskedLM:
    """The model of a reference state dict, in its dtype and in evaluation mode.

    Args:
        state_dict: tensors by the reference's names. The tied output matrix and the tables of position indices are
            optional, and are compared with their expected values.
        config: an `LtgBertConfig`, or the reference's config as a mapping.

    Raises:
        BadData: names of all tensors that are missing, unknown, of a wrong shape, or contradict the config.
    """
    if not isinstance(config, LtgBertConfig):
        config = reference_config(config)
    weights = {name: tensor for name, tensor in state_dict.items() if not _POSITION_INDICES.match(name)}
    _compare_position_indices(state_dict, config)
    problems = []
    tied = weights.pop(_TIED, None)
    if tied is not None and _EMBEDDING in weights and not torch.equal(tied, weights[_EMBEDDING]):
        problems.append(f"{_TIED} is not the same as {_EMBEDDING}")
    own_names = {_our_name(name): name for name in weights}
    with torch.device("meta"):
        expected_tensors = LtgBertForMaskedLM(config).state_dict()
    expected_tensors.pop("lm_head.decoder.weight")
    missing = sorted(_reference_name(name) for name in expected_tensors.keys() - own_names.keys())
    extra = sorted(own_names[name] for name in own_names.keys() - expected_tensors.keys())
    problems += [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"left over: {', '.join(extra)}"] if extra else []
    for name in sorted(own_names.keys() & expected_tensors.keys()):
        shape, expected = weights[own_names[name]].shape, expected_tensors[name].shape
        if shape != expected:
            problems.append(f"{own_names[name]} is {tuple(shape)}, the config says {tuple(expected)}")
    if problems:
        raise BadData(f"the checkpoint is no LTG-BERT of that config: {'; '.join(problems)}")
    dtype = weights[_EMBEDDING].dtype
    model = LtgBertForMaskedLM(config).to(dtype)  # pyright: ignore[reportArgumentType]
    model.load_state_dict({ours: weights[theirs] for ours, theirs in own_names.items()}, strict=False)
    return model.eval()


def _our_name(reference: str) -> str:
    for theirs, ours in _NAMES:
        reference = reference.replace(theirs, ours)
    return reference


def _reference_name(name: str) -> str:
    for theirs, ours in _NAMES:
        name = name.replace(ours, theirs)
    return name


def _compare_position_indices(state_dict: Mapping[str, Tensor], config: LtgBertConfig) -> None:
    """Raise BadData if the checkpoint's tables of position buckets differ from those of the config."""
    expected = bucket_index(config, torch.arange(config.max_position_embeddings))[0]
    for name, tensor in state_dict.items():
        if _POSITION_INDICES.match(name) and not torch.equal(tensor.long(), expected):
            raise BadData(
                f"{name} of the checkpoint differs from the buckets of the config; check "
                f"position_bucket_size ({config.position_bucket_size}) and max_position_embeddings "
                f"({config.max_position_embeddings})"
            )


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors by the reference's names, config when the file carries one) of a .safetensors file or a legacy .bin.

    Raises:
        MissingInput: there is no such file.
        BadData: its content does not match its suffix.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingInput(f"there is no checkpoint {path}; give a .safetensors, .bin, .pt or .pth file")
    if path.suffix != ".safetensors":
        return _read_legacy(path), None
    try:
        with safe_open(str(path), "pt") as file:
            config = (file.metadata() or {}).get("config")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise BadData(f"{path} is not a safetensors file: {error}") from None
    inside = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    return inside or tensors, json.loads(config) if config else None


def _read_legacy(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint, loaded by a separate process that accepts tensors only.

    The process runs a file, and no module of a package, which would import transformers for seconds.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        safe = Path(folder) / "weights.safetensors"
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).with_name("legacy_import.py")), str(path), str(safe)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise BadData(f"{path} cannot be read safely: {said[-1] if said else 'the loader was killed'}")
        return load_file(str(safe))
