"""Make an English masked LM that no code of this project trained: WordPiece, ModernBertForMaskedLM and Trainer of Hugging Face.

Its text are novels: the file classics/classics_train.txt.xz in the folder that REMASK_DATA names. ModernBERT and not BERT: a BERT of
the same size predicted hardly more than how frequent words are after half an hour on two cores (LOG.md).

python -m benchmarks.english_mlm OUT_DIR
python -m benchmarks.english_mlm OUT_DIR --quick
"""

import argparse
import itertools
import lzma
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.config import ROOT

TEXT = Path("classics") / "classics_train.txt.xz"
LENGTH = 128  # tokens of a row, [CLS] and [SEP] included


@dataclass(frozen=True)
class Training:
    """Size and training of the masked LM. `characters`: of the text that it learns from, from its beginning."""

    characters: int
    layers: int
    width: int
    vocabulary: int
    steps: int
    batch: int


FULL = Training(characters=28_000_000, layers=6, width=256, vocabulary=512, steps=2400, batch=16)
QUICK = Training(characters=3_000_000, layers=2, width=128, vocabulary=1024, steps=700, batch=32)


def novels() -> str:
    """The text. Raises SystemExit if the file is not there."""
    roots = [Path(os.environ["REMASK_DATA"])] if "REMASK_DATA" in os.environ else []
    for root in [*roots, ROOT.parent / "shared" / "data"]:
        if (root / TEXT).exists():
            return lzma.open(root / TEXT, "rt", encoding="utf-8").read()
    raise SystemExit(f"{TEXT} was not found; set REMASK_DATA to the folder that holds {TEXT.parent}/")


def make(folder: Path, training: Training) -> Path:
    """Train the masked LM and save it with its tokenizer. Nothing to do if the folder is there."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import (
        BertTokenizerFast,
        DataCollatorForLanguageModeling,
        ModernBertConfig,
        ModernBertForMaskedLM,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from lib.runtime import has_native_bf16

    # 1. WordPiece, which keeps the case of letters
    lines = [" ".join(p.split()) for p in novels()[: training.characters].split("\n\n") if p.strip()]
    words = BertWordPieceTokenizer(lowercase=False)
    words.train_from_iterator(lines, vocab_size=training.vocabulary, show_progress=False)
    with tempfile.TemporaryDirectory() as place:
        words.save_model(place)
        tokenizer: Any = BertTokenizerFast(vocab=str(Path(place) / "vocab.txt"), do_lower_case=False)

    # 2. Rows of equal length, between [CLS] and [SEP]
    coded = itertools.chain.from_iterable(e.ids for e in words.encode_batch(lines, add_special_tokens=False))
    ids = torch.tensor(list(coded))
    inner = LENGTH - 2
    rows = ids[: len(ids) // inner * inner].view(-1, inner)
    front, back = (
        torch.full((len(rows), 1), tokenizer.cls_token_id),
        torch.full((len(rows), 1), tokenizer.sep_token_id),
    )
    data: Any = [{"input_ids": row} for row in torch.cat([front, rows, back], 1)]

    # 3. Train with 30 % masks, as ModernBERT was. `sparse_prediction`: logits of masked tokens only
    set_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first, last, empty = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    config = ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=training.width, num_hidden_layers=training.layers,
        num_attention_heads=max(2, training.width // 64), intermediate_size=5 * training.width // 2, max_position_embeddings=LENGTH,
        local_attention=2 * LENGTH, sparse_prediction=True, pad_token_id=empty, cls_token_id=first, bos_token_id=first,
        sep_token_id=last, eos_token_id=last,
    )  # fmt: skip
    model = ModernBertForMaskedLM(config)
    place = Path(tempfile.mkdtemp())
    arguments = TrainingArguments(
        output_dir=str(place), max_steps=training.steps, per_device_train_batch_size=training.batch, learning_rate=1e-3,
        warmup_steps=training.steps // 20, lr_scheduler_type="linear", weight_decay=0.01, save_strategy="no",
        logging_steps=max(1, training.steps // 20), report_to=[], seed=0, use_cpu=device.type == "cpu",
        bf16=has_native_bf16(device),
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    temporary = folder.with_name(folder.name + ".new")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(place)
    temporary.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.english_mlm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", type=Path, help="a new folder")
    parser.add_argument("--quick", action="store_true", help="a small model")
    options = parser.parse_args()
    print(make(options.out_dir, QUICK if options.quick else FULL))


if __name__ == "__main__":
    main()
