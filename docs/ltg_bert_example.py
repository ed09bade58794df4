"""Train a small LTG-BERT on the built-in text, move it to a three-class classifier, train that with Trainer."""

import pydoc_data.topics
import random
import tempfile

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from lib.models.hugging_face import LtgBertConfig, LtgBertForMaskedLM, LtgBertForSequenceClassification
from lib.tokenization import train_tokenizer

# Lines of Python's language reference, and a label for each: is it prose, code, or a heading?
lines = [line for text in pydoc_data.topics.topics.values() for line in text.splitlines() if len(line) > 20]
random.Random(0).shuffle(lines)


def label(line: str) -> int:
    if line.startswith((">>>", "   ")):
        return 1
    return 2 if set(line) <= set("*=-~^ ") or line.startswith("*") else 0


tokenizer = train_tokenizer("bpe", lines[:4000], 2000)
encoded = tokenizer(lines[:4000], truncation=True, max_length=63, add_special_tokens=False)["input_ids"]
rows = [{"input_ids": [tokenizer.cls_token_id, *ids]} for ids in encoded]
config = LtgBertConfig(
    vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=3, num_attention_heads=3, intermediate_size=256,
    max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id,
    cls_token_id=tokenizer.cls_token_id, unk_token_id=tokenizer.unk_token_id, sep_token_id=None,
)  # fmt: skip


def train(model, data, collator, folder: str, steps: int, metrics=None) -> dict:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3, warmup_steps=20,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data[:3500], eval_dataset=data[3500:], data_collator=collator,
                      compute_metrics=metrics)  # fmt: skip
    trainer.train()
    return trainer.evaluate()


def pad(batch: list[dict]) -> dict:
    """Rows of different length as one batch."""
    ids = [torch.tensor(row["input_ids"]) for row in batch]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = torch.tensor([row["labels"] for row in batch])
    return {
        "input_ids": padded,
        "attention_mask": (padded != tokenizer.pad_token_id).long(),
        "labels": labels,
    }


with tempfile.TemporaryDirectory() as folder:
    # 1. A masked language model
    masked = LtgBertForMaskedLM(config)
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    loss = train(masked, rows, mask, folder, steps=150)["eval_loss"]
    print(f"masked LM: {loss:.3f} nats per masked token (uniform: {torch.tensor(len(tokenizer)).log():.3f})")
    masked.save_pretrained(f"{folder}/masked")

    # 2. Its backbone under a new head with three classes
    classifier = LtgBertForSequenceClassification.from_pretrained(f"{folder}/masked", num_labels=3)

    # 3. Trained as any classifier
    labelled = [row | {"labels": label(line)} for row, line in zip(rows, lines, strict=False)]
    share = max(sum(row["labels"] == c for row in labelled[3500:]) for c in range(3)) / 500
    right = train(classifier, labelled, pad, folder, steps=100,
                  metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())})  # fmt: skip
    print(f"classifier: accuracy {right['eval_accuracy']:.3f} (most frequent class: {share:.3f})")

    # 4. A folder that loads anywhere with trust_remote_code=True
    classifier.save_pretrained(f"{folder}/classifier")
    tokenizer.save_pretrained(f"{folder}/classifier")
