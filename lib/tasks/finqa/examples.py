"""Stage 01 for FinQA: a record becomes an example with a prompt (the question) and a target (the gold program).

FinQA's splits are kept: `train.json` is train, `dev.json` is held_out, `test.json` is test. Without `dev.json`, a share
of the training groups is held out. Another share is the split `selection`, which chooses the best step of a training
run, so that the held-out questions are unseen until the end. A group is a page, or a report with all its pages. Groups
that contain the same page under two file names are one group.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from lib.config import Config
from lib.randomness import hash_fraction
from lib.tasks import SHORTENED, Document, Dropped, Example
from lib.tasks.finqa.cross_record_checks import page_digest
from lib.tasks.finqa.page_text import serialise, whole_page
from lib.tasks.finqa.program import ProgramError, execute, parse
from lib.tasks.finqa.record import Record

SPLIT_OF = {"train": "train", "dev": "held_out", "test": "test"}
SEEN_REPORT, NEW_REPORT = "report seen in training", "report new"


def prepare(config: Config, documents: Iterable[Document]) -> Iterator[Example | Dropped]:
    """An example for each record, or why there is none. Iterates over the documents several times."""
    groups = groups_of(_records(documents), config)
    splits = {r.id: split_of(r, groups[r.id], config) for r in _records(documents)}
    if "held_out" not in splits.values():
        splits = {name: _held_out_or(split, groups[name], config) for name, split in splits.items()}
    train_reports = {r.report for r in _records(documents) if splits[r.id] == "train"}
    count_tokens = token_counter(config)
    for record in _records(documents):
        try:
            value = execute(record.program or "", record.table)
            steps = len(parse(record.program or ""))
        except ProgramError as error:
            yield Dropped(record.id, f"program cannot run: {error.what}", record.program or "")
            continue
        if not record.question.strip():
            yield Dropped(record.id, "the question is empty", record.program or "")
            continue
        tags = ["1 step" if steps == 1 else f"{steps} steps" if steps < 4 else "4 or more steps"]
        if splits[record.id] in ("held_out", "test"):
            tags.append(SEEN_REPORT if record.report in train_reports else NEW_REPORT)
        prompt = prompt_of(record, config, count_tokens)
        if config.ranker.prompt == "question_page" and not prompt.endswith(whole_page(record)):
            tags.append(SHORTENED)
        yield Example(
            example_id=record.id,
            prompt=prompt,
            target=f"{record.program} = {format_value(value)}",
            split=splits[record.id],
            group=groups[record.id],
            record=record.to_json(),
            tags=tags,
        )


def _records(documents: Iterable[Document]) -> Iterator[Record]:
    for document in documents:
        yield Record.from_json(document.content)


def groups_of(records: Iterable[Record], config: Config) -> dict[str, str]:
    """Question id -> the unit that stays in one split: the page, or the whole report.

    Pages or reports with an equal page have one name, the first of theirs in alphabetical order.
    """
    own: dict[str, str] = {}  # question id -> its page or report
    earlier: dict[str, str] = {}  # page or report -> one that it is the same as, at last itself
    first: dict[bytes, str] = {}  # digest of a page -> the first page or report that has it

    def final(name: str) -> str:
        while earlier.setdefault(name, name) != name:
            name = earlier[name]
        return name

    for record in records:
        own[record.id] = name = record.filename if config.finqa.group == "page" else record.report
        low, high = sorted((final(name), final(first.setdefault(page_digest(record), name))))
        earlier[high] = low
    return {question: final(name) for question, name in own.items()}


def split_of(record: Record, group: str, config: Config) -> str:
    """The split of a record. A share of the training groups is for selection."""
    split = SPLIT_OF[record.split]
    if split == "train" and hash_fraction(config.seed, "selection", group) < config.finqa.selection_share:
        return "selection"
    return split


def _held_out_or(split: str, group: str, config: Config) -> str:
    share = config.data.fractions["held_out"]
    drawn = hash_fraction(config.seed, "held out", group)
    return "held_out" if split in ("train", "selection") and drawn < share else split


def prompt_of(record: Record, config: Config, count_tokens: Callable[[str], int]) -> str:
    """The question. With `ranker.prompt: question_page` also as much of the page as `ranker.prompt_tokens` allows."""
    question = " ".join(record.question.split())
    if config.ranker.prompt == "question":
        return question
    room = config.ranker.prompt_tokens - count_tokens(question) - SPARE
    page = serialise(record, question, room, count_tokens)
    return f"{question}\n{page}" if page else question


SPARE = 4  # tokens that a tokenizer may add around a prompt


def token_counter(config: Config) -> Callable[[str], int]:
    """Counts the tokens of a text for the ranker's encoder, or its words where the tokenizer is not trained yet."""
    encoder = config.ranker.encoder
    if encoder is None or config.ranker.prompt == "question":
        return lambda text: len(text.split())
    from lib.models.encoders import configured, open_tokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = open_tokenizer(*configured(encoder))
    return partial(_count, tokenizer)


def _count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def format_value(value: float | str) -> str:
    """A value as text: at most five decimals, no trailing zeros."""
    if isinstance(value, str):
        return value
    text = f"{value:.5f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
