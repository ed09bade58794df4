"""Look into the folder of a model before any library builds the model: sizes, links, patterns and weights must be plausible.

A few bytes of JSON can ask for a billion layers, for a text that grows without end, or for code of somebody else. Libraries find
that out when the memory is gone. This module reads headers only, and runs nothing of the folder.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib import durable
from lib.errors import BadData

MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_TOKENIZER_BYTES = 2**22, 2**27, 2**28
MAX_TENSORS = 200_000
MAX_POSITIONS = 2**24  # some models allocate a number for each of them
MAX_GROWTH = 64  # characters that a tokenizer may make of one
MAX_STEPS = 1_000  # of a tokenizer's normalizer, template and so on
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "max_position_embeddings", "embedding_size",
         "num_hidden_layers", "n_layer", "n_embd", "n_head", "n_positions", "dim", "n_layers", "n_heads", "hidden_dim")  # fmt: skip
ADVICE = "copy the model's folder again from where it came"


def check_folder(folder: Path, weights: list[Path]) -> None:
    """Raises BadData if config.json, the weights or tokenizer.json cannot belong to a model that can be loaded.

    `weights`: the safetensors files, which exist.
    """
    if (folder / "adapter_config.json").exists() and not (folder / "ranker.json").exists():
        raise BadData(
            f"{folder} has adapter_config.json: adapters are not read from the folder of a model; merge them into its weights"
        )
    headers = [read_header(path) for path in weights]
    tensors = sum(len(header) for header in headers)
    size = sum(path.stat().st_size for path in weights)
    check_config(folder / "config.json", tensors, size)
    if (folder / "tokenizer.json").exists():
        check_tokenizer(folder / "tokenizer.json", max_tokens=size)


def shards_of(index: Path) -> list[Path]:
    """The files that model.safetensors.index.json names. Raises BadData unless they lie beside it."""
    content = _json_map(index, MAX_HEADER_BYTES)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise BadData(f"{index} has no weight_map of tensors to files; {ADVICE}")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadData(f"{index} names {name!r}; weights are read from .safetensors files beside it only")
        if not (index.parent / name).is_file():
            raise BadData(f"{index.parent} lacks {name}, which {index.name} names; {ADVICE}")
    return [index.parent / name for name in files]


def read_header(path: Path) -> dict[str, Any]:
    """Tensor name -> dtype, shape and offsets, of a safetensors file. Raises BadData if it has no valid header."""
    try:
        with durable.open_file(path) as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            size = path.stat().st_size
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                found = f"its header should have {length:,} bytes, the file has {size:,}"
                raise ValueError(found if len(start) == 8 else f"it has {size:,} bytes")
            header = json.loads(file.read(length))
    except RecursionError:
        raise BadData(f"{path} is no safetensors file: its header is nested too deeply; {ADVICE}") from None
    except (OSError, ValueError) as error:
        raise BadData(f"{path} is no safetensors file: {first_line(error)}; {ADVICE}") from None
    if not isinstance(header, dict):
        raise BadData(f"{path} is no safetensors file: its header is no map; {ADVICE}")
    header.pop("__metadata__", None)
    if not 0 < len(header) <= MAX_TENSORS:
        raise BadData(f"{path} has {len(header):,} tensors; expected 1 to {MAX_TENSORS:,}")
    return header


def check_config(path: Path, tensors: int, weight_bytes: int) -> dict[str, Any]:
    """The content of config.json. Raises BadData if its sizes cannot be those of the weights.

    Every layer has a tensor, and no side of a tensor is longer than its file has bytes.
    """
    config = _json_map(path, MAX_CONFIG_BYTES)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[\w.-]{1,100}", kind):
        raise BadData(f"{path}: model_type is {kind!r:.60}; expected the name of a model type, such as bert")
    for key in ("_attn_implementation", "_attn_implementation_internal", "attn_implementation"):
        if config.get(key) not in (None, *ATTENTIONS):
            raise BadData(f"{path}: {key} is {config[key]!r:.60}; known: {', '.join(ATTENTIONS)}")
    for key, value in _sizes(config):
        limit = weight_bytes
        if "layer" in key:
            limit = tensors
        elif "position" in key:
            limit = MAX_POSITIONS
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise BadData(
                f"{path}: {key} is {value!r:.60}; the weights allow a whole number from 1 to {limit:,}; {ADVICE}"
            )
    return config


def check_tokenizer(path: Path, max_tokens: int = 2**31) -> None:
    """Raises BadData if a tokenizer.json is damaged, has too many tokens, or could make a text grow or a search run on."""
    from tokenizers import Tokenizer

    content = _json_map(path, MAX_TOKENIZER_BYTES)
    model = content.get("model")
    if not isinstance(model, dict):
        raise BadData(f"{path} has no model; {ADVICE}")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict | list) and len(vocabulary) > max_tokens:
        raise BadData(f"{path} has {len(vocabulary):,} tokens, more than the weights can embed; {ADVICE}")
    if isinstance(vocabulary, dict):
        ids = list(vocabulary.values())
        if not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
            raise BadData(f"{path}: token ids must be different whole numbers from 0 on; {ADVICE}")
    growth, steps = 1, 0
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for step in _steps(content.get(name)):
            steps += 1
            if name != "decoder" and step.get("type") == "Replace" and isinstance(step.get("content"), str):
                growth *= max(1, len(step["content"]))
            pattern = step.get("pattern")
            if isinstance(pattern, dict) and may_backtrack(str(pattern.get("Regex", ""))):
                raise BadData(
                    f"{path}: the pattern {pattern['Regex']!r:.80} repeats a group that repeats itself, so a search may "
                    "never end; write it without a repetition inside of another"
                )
    if growth > MAX_GROWTH or steps > MAX_STEPS:
        raise BadData(
            f"{path}: it makes up to {growth:,} characters of one, in {steps:,} steps; allowed are {MAX_GROWTH} and {MAX_STEPS:,}"
        )
    try:
        Tokenizer.from_file(str(path)).encode("a word, ANOTHER 1")
    except Exception as error:  # the library raises errors of many kinds
        raise BadData(f"{path} cannot be read: {first_line(error)}; {ADVICE}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust
            raise
        raise BadData(f"{path} cannot be read: {first_line(error)}; {ADVICE}") from None


def refuse_non_finite(tensors: Mapping[str, Any], folder: Path | str) -> None:
    """Raises BadData if a weight is NaN or infinite: whatever the model computes would be noise."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadData(f"{folder}: the tensor {name} has values that are NaN or infinite; {ADVICE}")


def may_backtrack(pattern: str) -> bool:
    """Whether a regular expression repeats, without limit, a group that holds an unlimited repetition: `(a+|b)*`."""
    groups, holds, repeated = [], False, False  # of the open groups: whether they hold a repetition
    i = 0
    while i < len(pattern):
        c = pattern[i]
        if c == "\\":
            i += 1
        elif c == "[":
            i = _end_of_class(pattern, i)
        elif c == "(":
            groups.append(False)
        elif c == ")" and groups:
            holds = groups.pop()
            following = pattern[i + 1 : i + 2]
            unlimited = following in ("*", "+") or re.match(r"\{\d*,\}", pattern[i + 1 :])
            if unlimited and pattern[i + 2 : i + 3] != "+":  # a possessive repetition does not go back
                repeated |= holds
            if groups:
                groups[-1] |= holds or bool(unlimited)
        elif (c in "*+" or re.match(r"\{\d*,\}", pattern[i:])) and groups:
            groups[-1] = True
        i += 1
    return repeated


def _end_of_class(pattern: str, start: int) -> int:
    """The position of the bracket that closes a class of characters."""
    depth, i = 0, start
    while i < len(pattern):
        if pattern[i] == "\\":
            i += 1
        elif pattern[i] == "[":
            depth += 1
        elif pattern[i] == "]" and i > start + 1:
            depth -= 1
            if not depth:
                return i
        i += 1
    return i


def _steps(node: Any) -> Iterator[dict[str, Any]]:
    """All maps below a part of a tokenizer; its depth is limited by the reader of JSON."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _sizes(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) of the sizes in a config, also in the configs of its parts."""
    waiting = [config]
    while waiting:
        one = waiting.pop()
        for key, value in one.items():
            if isinstance(value, dict):
                waiting.append(value)
            elif (
                key in SIZES and value is not None and not (key == "max_position_embeddings" and value == -1)
            ):
                yield key, value


def _json_map(path: Path, max_bytes: int) -> dict[str, Any]:
    try:
        content = durable.read_json(path, max_bytes)
    except (OSError, ValueError) as error:
        raise BadData(f"{path} is not JSON that can be read: {first_line(error)}; {ADVICE}") from None
    if not isinstance(content, dict):
        raise BadData(f"{path} is no map of settings, but a {type(content).__name__}; {ADVICE}")
    return content


def first_line(error: BaseException) -> str:
    """The first line of an error's message, short enough for a line."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return (text.partition("\n")[0] or type(error).__name__)[:200]
