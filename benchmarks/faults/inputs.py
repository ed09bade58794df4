"""Files of a user that the stages of some scenarios read: a pretrained masked LM, a text, and a file to score or to rank."""

import json
import random
from pathlib import Path

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "old", "wizards", "brew", "potion",
    "near", "stone", "river", "and", "sing",
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SIGNS = ".,;:!?'\"()-"
MODEL, TEXT, SCORED, RANKED = "masked_lm", "text.txt", "scored.txt", "ranked.jsonl"


def make_inputs(folder: Path) -> None:
    """Make what is missing. The bytes of each file depend on nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=9)) + "." for _ in range(120)]
    pools = [
        {"id": f"p{n}", "prompt": line, "candidates": draw.sample(lines, 3), "rewards": [1, 0, 0]}
        for n, line in enumerate(lines[:12])
    ]
    texts = {
        TEXT: "\n\n".join(lines),
        SCORED: "\n\n".join(lines[:6]),
        RANKED: "\n".join(json.dumps(pool) for pool in pools),
    }
    for name, text in texts.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)
    if not (folder / MODEL / "tokenizer.json").exists():
        masked_lm(folder / MODEL)


def masked_lm(folder: Path) -> None:
    """A BERT of two narrow layers with random weights and a word-piece tokenizer, in a folder as transformers writes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}  # fmt: skip
    pieces = [*special.values(), *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *SIGNS]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(vocabulary),
            max_position_embeddings=96,
            pad_token_id=0,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
