"""Hostile folders of models: safetensors, config.json, tokenizers, pickled weights and code."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.corpus import CONFIG, DATA, MISSING, Case, Place, fifo, pickled

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
    "potion",
    "near",
    "old",
    "stone",
    "bridge",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
Change = Callable[[Place, Path], Any]


def make_bert(folder: Path) -> None:
    """A masked LM of transformers with random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz.,'"
    pieces = dict.fromkeys([*SPECIAL, *WORDS, *letters, *("##" + c for c in letters)])
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    core.decoder = decoders.WordPiece()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(
        vocab_size=core.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128,
    ))  # fmt: skip
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


# ------------------------------------------------------------------------------------------ safetensors


def _tensors(header: bytes | dict, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(dtype: str, shape: list, offsets: list) -> dict:
    return {
        "bert.embeddings.word_embeddings.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    }


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of 2^60 bytes": _tensors({}, length=2**60),
    "header of 2^64 - 1 bytes": _tensors({}, length=2**64 - 1),
    "header longer than the file": _tensors({}, length=4096),
    "header that is no JSON": _tensors(b"{'a': 1}"),
    "header of 100,000 brackets": _tensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "header that is not UTF-8": _tensors(b'{"\xff": {}}'),
    "header that is a list": _tensors(b"[1, 2]"),
    "overlapping offsets": _tensors(_one("F32", [2, 2], [0, 16]) | {"b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]}}),
    "offsets beyond the file": _tensors(_one("F32", [1000, 1000], [0, 4_000_000])),
    "negative offsets": _tensors(_one("F32", [2, 2], [-16, 0])),
    "offsets that run backwards": _tensors(_one("F32", [2, 2], [16, 0])),
    "shape that overflows": _tensors(_one("F32", [2**62, 2**62], [0, 16])),
    "negative shape": _tensors(_one("F32", [-2, -2], [0, 16])),
    "unknown dtype": _tensors(_one("PICKLE", [2, 2], [0, 16])),
    "wrong dtype": _tensors(_one("I64", [4, 2], [0, 64])),
    "fewer bytes than the shape": _tensors(_one("F32", [4, 4], [0, 16])),
    "hole between tensors": _tensors(_one("F32", [2], [0, 8]) | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}}),
    "300,000 tensors": _tensors(b"{%s}" % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(300_000)), b""),
    "no tensors": _tensors({}, b""),
    "pickle under another name": b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.",
}  # fmt: skip


def _safetensors(content: bytes) -> Change:
    return lambda place, folder: (folder / "model.safetensors").write_bytes(content)


# ------------------------------------------------------------------------------------------ config.json

CODE = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForMaskedLM": "evil.Model"}
CONFIG_KEYS: dict[str, dict[str, Any]] = {
    "negative sizes": {"hidden_size": -32},
    "width of zero": {"hidden_size": 0},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^6 layers": {"num_hidden_layers": 10**6},
    "vocabulary of 10^12": {"vocab_size": 10**12},
    "width of 10^9": {"hidden_size": 10**9},
    "10^12 positions": {"max_position_embeddings": 10**12},
    "negative layers": {"num_hidden_layers": -3},
    "layers as text": {"num_hidden_layers": "many"},
    "layers as a fraction": {"num_hidden_layers": 1.5},
    "auto_map to code": {"auto_map": CODE, "model_type": "evil", "architectures": ["EvilModel"]},
    "auto_map with a known type": {"auto_map": CODE, "vocab_size": -1},
    "code of another repository": {"auto_map": {"AutoModelForMaskedLM": "evil/repo--evil.Model"}, "model_type": "evil"},
    "attention kernel of the hub": {"_attn_implementation_internal": "evil/kernel", "_attn_implementation": "evil/kernel"},
    "unknown type": {"model_type": "not-a-model"},
    "type as a path": {"model_type": "../../../evil"},
    "type as a list": {"model_type": ["bert"]},
    "no type": {"model_type": None},
    "dtype that is a function": {"dtype": "load", "torch_dtype": "load"},
    "NaN": {"layer_norm_eps": float("nan"), "hidden_size": float("nan")},
    "unknown activation": {"hidden_act": "__import__('os').system"},
    "quantization of another library": {"quantization_config": {"quant_method": "evil", "load_in_8bit": True}},
    "decoder": {"is_decoder": True},
    "nested type": {"model_type": "encoder-decoder", "encoder": {"model_type": "evil"}, "decoder": {}},
    "adapter of another folder": {"_name_or_path": "/etc", "model_type": "evil"},
}  # fmt: skip
CONFIG_TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "list": "[1, 2, 3]",
    "number": "7",
    "100,000 brackets": "[" * 100_000,
    "deep": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "pickle": b"\x80\x04}.",
    "20 MB": '{"model_type": "bert", "x": "' + "y" * 20_000_000 + '"}',
}


def _keys(changes: dict[str, Any]) -> Change:
    def change(place: Place, folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        (folder / "evil.py").write_text(place.payload() + "\nclass Config: pass\nclass Model: pass\n")

    return change


def _config_text(text: str | bytes) -> Change:
    def change(place: Place, folder: Path) -> None:
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


# ------------------------------------------------------------------------------------------ tokenizers


def _tokenizer(change: Callable[[dict], Any]) -> Change:
    def apply(place: Place, folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content = change(content) or content
        path.write_text(json.dumps(content))

    return apply


def _grow(content: dict) -> None:
    """Each replacement makes ten letters of one: the text of twelve of them does not fit in any memory."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    content["normalizer"] = {"type": "Sequence", "normalizers": [step] * 12}


def _backtrack(content: dict) -> None:
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+|b+|[a-z ]+)+\u0001"}, "behavior": "Isolated", "invert": False
    }  # fmt: skip


TOKENIZERS: dict[str, Change] = {
    "ids beyond the model": _tokenizer(lambda c: c["model"]["vocab"].update(zebra=10**6)),
    "negative ids": _tokenizer(lambda c: c["model"]["vocab"].update(the=-5)),
    "ids of 2^40": _tokenizer(lambda c: c["model"]["vocab"].update(the=2**40)),
    "vocabulary of one million": _tokenizer(lambda c: c["model"]["vocab"].update({f"w{i}": 200 + i for i in range(1_000_000)})),
    "vocabulary that is a list": _tokenizer(lambda c: c["model"].update(vocab=["a", "b"])),
    "no model": _tokenizer(lambda c: c.pop("model")),
    "unknown model": _tokenizer(lambda c: c["model"].update(type="Evil")),
    "normalizer that grows": _tokenizer(_grow),
    "pattern that backtracks": _tokenizer(_backtrack),
    "pattern that is wrong": _tokenizer(lambda c: c.update(normalizer={"type": "Replace", "pattern": {"Regex": "(((("}, "content": ""})),
    "10,000 nested sequences": lambda place, folder: (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordPiece"}, "normalizer": '
        + '{"type": "Sequence", "normalizers": [' * 10_000 + "]}" * 10_000 + "}"
    ),
    "template of 100,000 pieces": _tokenizer(
        lambda c: c["post_processor"].update(single=[{"Sequence": {"id": "A", "type_id": 0}}] * 100_000)
    ),
    "template of unknown tokens": _tokenizer(
        lambda c: c["post_processor"].update(single=[{"SpecialToken": {"id": "[EVIL]", "type_id": 0}}])
    ),
    "no mask token": lambda place, folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}'),
    "class of code": lambda place, folder: (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "mask_token": "[MASK]"})
    ),
    "damaged": lambda place, folder: (folder / "tokenizer.json").write_text('{"version"'),
    "zero bytes": lambda place, folder: (folder / "tokenizer.json").write_bytes(bytes(100)),
    "list": lambda place, folder: (folder / "tokenizer.json").write_text("[]"),
    "settings that are a list": lambda place, folder: (folder / "tokenizer_config.json").write_text("[]"),
    "mask token that is a map": lambda place, folder: (folder / "tokenizer_config.json").write_text('{"mask_token": {"a": 1}}'),
    "pickled vocabulary": lambda place, folder: ((folder / "tokenizer.json").unlink(), (folder / "vocab.txt").write_bytes(pickled(place))),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ whole folders


def _only_pickled(place: Place, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(place))


def _index(weight_map: Any, also: str | None = None) -> Change:
    def change(place: Place, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        if also:
            (folder / also).write_bytes(pickled(place))

    return change


def _replaced_by(make: Callable[[Path], Any]) -> Change:
    def change(place: Place, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make(folder / "model.safetensors")

    return change


def _nan(place: Place, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v * float("nan") for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _adapter(place: Place, folder: Path) -> None:
    """Adapter files in the folder of a model: transformers would load them, too."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/etc"}')
    (folder / "adapter_model.bin").write_bytes(pickled(place))


def _trained_with_code(place: Place, folder: Path) -> None:
    """It says that this project trained it on a backbone with code, and allows that code itself."""
    (folder / "evil.py").write_text(place.payload() + "\nclass Config: pass\nclass Model: pass\n")
    content = {
        "model_type": "remask_adapted", "architectures": ["AdaptedForMaskedLM"], "backbone": {"model_type": "x"},
        "backbone_class": "evil.Model", "backbone_config_class": "evil.Config",
        "code_files": {"evil.py": hashlib.sha256((folder / "evil.py").read_bytes()).hexdigest()},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))


EMBEDDING = "bert.embeddings.word_embeddings.weight"
FOLDERS: dict[str, Change] = {
    "only pickled weights": _only_pickled,
    "cut in half": lambda place, folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[: (folder / "model.safetensors").stat().st_size // 2]
    ),
    "link to a text": lambda place, folder: _replaced_by(lambda path: path.symlink_to(place.file("text", "a text")))(place, folder),
    "link to a device": _replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "link to itself": _replaced_by(lambda path: path.symlink_to(path.name)),
    "pipe": _replaced_by(fifo),
    "folder in place of weights": _replaced_by(lambda path: path.mkdir()),
    "index without shards": _index({EMBEDDING: "model-00001-of-00002.safetensors"}),
    "index that points outside": _index({EMBEDDING: "../../../../../etc/hostname"}),
    "index of a pickle": _index({EMBEDDING: "pytorch_model.bin"}, "pytorch_model.bin"),
    "index that is a list": _index([EMBEDDING]),
    "index without names": _index({}),
    "weights of NaN": _nan,
    "adapter beside the weights": _adapter,
    "trained model with code": _trained_with_code,
    "config that is a pipe": lambda place, folder: ((folder / "config.json").unlink(), fifo(folder / "config.json")),
    "tokenizer that is a pipe": lambda place, folder: ((folder / "tokenizer.json").unlink(), fifo(folder / "tokenizer.json")),
    "empty folder": lambda place, folder: (shutil.rmtree(folder), folder.mkdir()),
}  # fmt: skip


def model_cases() -> list[Case]:
    def of(change: Change) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            folder = place.folder / "model"
            shutil.copytree(place.bases / "bert", folder)
            change(place, folder)
            place.stages("00_check_data", "01_prepare_dataset")
            return place.command("02_generate_candidates", f"generator.checkpoint={folder}")

        return make

    def own(change: Change) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            folder = place.folder / "model"
            shutil.copytree(
                place.bases / "text" / "02_generate_candidates" / "generator" / "best_model", folder
            )
            change(place, folder)
            place.stages("00_check_data", "01_prepare_dataset")
            return place.command("04_train", f"models.generator.start={folder}", more=("--only", "generator"))

        return make

    groups: list[tuple[str, dict[str, Change]]] = [
        ("safetensors", {name: _safetensors(content) for name, content in SAFETENSORS.items()}),
        ("config.json", {name: _keys(keys) for name, keys in CONFIG_KEYS.items()}),
        ("config.json", {name: _config_text(text) for name, text in CONFIG_TEXTS.items()}),
        ("tokenizer", TOKENIZERS),
        ("model folder", FOLDERS),
    ]
    cases = [
        Case(group, name, of(change), (DATA, MISSING, CONFIG))
        for group, changes in groups
        for name, change in changes.items()
    ]
    chosen = {
        "safetensors": ("empty", "header of 2^60 bytes", "overlapping offsets", "300,000 tensors"),
        "config.json": ("negative sizes", "10^9 layers", "10^6 layers", "width of 10^9", "auto_map to code", "list", "deep"),
        "model folder": ("only pickled weights", "link to a text", "pipe", "cut in half", "empty folder", "trained model with code"),
    }  # fmt: skip
    cases += [
        Case(f"{group}, start of a model", name, own(change), (DATA, MISSING, CONFIG))
        for group, changes in groups
        for name, change in changes.items()
        if name in chosen.get(group, ())
    ]
    return cases
