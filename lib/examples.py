"""The examples of stage 01: cut into parts, tokenized part by part, and counted.

To cut documents takes one pass in order, since repeated text and splits depend on all earlier documents. It writes the texts
of every part to a folder, which is removed when the stage is complete. Tokenizing takes longer, and its parts are independent.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib import durable, schema
from lib.config import Config
from lib.errors import BadData
from lib.stage.parts import Parts
from lib.tasks import SHORTENED, Dropped, Example
from lib.tokenization import decode_batch, encode_batch, load_tokenizer
from lib.training.lengths import WholeTexts

MAX_LISTED = 12  # characters in one message
NO_TOKEN = "the tokenizer of pretrained.model has no token for it"
FOLDER = "cut"  # of the cut texts, in the stage's folder


def cut_parts(parts: Parts) -> Parts:
    """Where the texts of the parts are until they are tokenized."""
    return Parts(
        parts.folder / FOLDER, parts.key, {"examples": schema.CUT_EXAMPLES, "dropped": schema.DROPPED}
    )


def cut(config: Config, items: Iterable[Example | Dropped], texts: Parts) -> int:
    """Write the texts of every part that is absent. Returns the number of parts.

    Nothing is read from `items` if all parts are there.
    """
    note = texts.folder / "count.json"
    try:
        known = durable.read_json(note)
        if known["key"] == texts.key and not texts.missing(range(known["count"])):
            return known["count"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    texts.folder.mkdir(exist_ok=True)
    count = 0
    for count, (examples, dropped) in enumerate(groups(items, config.tokenizer.examples_per_part), start=1):
        if texts.manifest(count - 1) is None:
            with texts.writing(count - 1) as part:
                part.write("examples", pa.Table.from_pylist([vars(e) for e in examples], _CUT_COLUMNS))
                part.write("dropped", pa.Table.from_pylist([vars(d) for d in dropped], schema.DROPPED.arrow))
    durable.write_json(note, {"key": texts.key, "count": count})
    return count


_CUT_COLUMNS = schema.CUT_EXAMPLES.arrow


def groups(items: Iterable[Example | Dropped], size: int) -> Iterator[tuple[list[Example], list[Dropped]]]:
    """(examples, dropped) in lists of `size` items together. There is at least one group."""
    examples: list[Example] = []
    dropped: list[Dropped] = []
    is_first = True
    for item in items:
        if isinstance(item, Example):
            examples.append(item)
        else:
            dropped.append(item)
        if len(examples) + len(dropped) >= size:
            yield examples, dropped
            examples, dropped, is_first = [], [], False
    if examples or dropped or is_first:
        yield examples, dropped


@dataclass(frozen=True)
class ExampleWork:
    """Makes the parts of the table of examples from the cut texts.

    Attributes:
        tokenizer: its folder, which each worker loads.
    """

    config: Config
    parts: Parts
    tokenizer: Path

    uses_device = False
    only_here = False

    def open(self, threads: int | None):
        """Load the tokenizer. Returns a function that makes the part of a number."""
        tokenizer = load_tokenizer(self.tokenizer)
        return lambda number: self._make(number, tokenizer)

    def _make(self, number: int, tokenizer: Any) -> None:
        texts = cut_parts(self.parts)
        examples, dropped = (pq.read_table(texts.path(name, number)) for name in ("examples", "dropped"))
        texts = examples["target"].to_pylist()
        ids = encode_batch(tokenizer, texts, self.config.tokenizer.unknown)
        counters = ExampleCounters(WholeTexts.of(self.config), tokenizer.unk_token_id)
        if self.config.pretrained.model is not None:
            has_spans, given = self.config.data.spans_key is not None, texts
            if leaves_out_unknown(self.config):
                texts, ids, counters.unread = without_unknown(tokenizer, texts, ids)
            if self.config.pretrained.text == "normalise" and not all(map(len, ids)):
                kept, examples, dropped = _without_tokens(ids, examples, dropped)
                given, texts = [given[n] for n in kept], [texts[n] for n in kept]
                ids = [ids[n] for n in kept]
            known = as_written(tokenizer, texts, ids, self.config.pretrained.text)
            counters.rewritten = sum(a != b for a, b in zip(given, known, strict=True))
            if has_spans:
                stated = examples["record"].to_pylist()
                records = spans_as_written(tokenizer, stated, texts, known)
                counters.lost_spans = _num_spans(stated) - _num_spans(records)
                examples = _with(examples, "record", records)
            examples = _with(examples, "target", known)
        position = schema.EXAMPLES.arrow.names.index("token_ids")
        column = pa.array(ids, schema.EXAMPLES.arrow.field("token_ids").type)
        table = examples.add_column(position, schema.EXAMPLES.arrow.field("token_ids"), column)
        with self.parts.writing(number) as part:
            part.write("examples", table)
            part.write("dropped", dropped)
            counters.add(table)
            counters.drop(dropped["reason"].to_pylist())
            part.counters = counters.state()


def _num_spans(records: list[str | None]) -> int:
    return sum(len(json.loads(record)["spans"] or ()) for record in records if record is not None)


def _without_tokens(ids: list, examples: pa.Table, dropped: pa.Table) -> tuple[list[int], pa.Table, pa.Table]:
    """(numbers of the examples that have tokens, these examples, the dropped rows with the others)."""
    kept = [n for n, of_text in enumerate(ids) if len(of_text)]
    gone = [n for n, of_text in enumerate(ids) if not len(of_text)]
    names, texts = (examples[name].to_pylist() for name in ("example_id", "target"))
    rows = [{"example_id": names[n], "reason": NO_TOKEN, "text": texts[n]} for n in gone]
    more = pa.Table.from_pylist(rows, dropped.schema)
    behind = {n + 1 for n in gone}  # they continue nothing any more
    continues = [value and n not in behind for n, value in enumerate(examples["continues"].to_pylist())]
    return kept, _with(examples, "continues", continues).take(kept), pa.concat_tables([dropped, more])


def _with(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(
        place, table.schema.field(place), pa.array(values, table.schema.field(place).type)
    )


def leaves_out_unknown(config: Config) -> bool:
    """Whether the models of a run never read [UNK], see `without_unknown`."""
    has_spans = config.data.spans_key is not None
    return has_spans and config.pretrained.model is not None and config.pretrained.text == "normalise"


def without_unknown(tokenizer: Any, texts: list[str], ids: list) -> tuple[list[str], list, int]:
    """(texts, their ids, number of words) with spaces in the place of the words that the tokenizer reads as [UNK].

    A stored [UNK] would be read as ordinary text, and spans would lose their place. All positions in the texts stay the same.
    """
    unknown, words = tokenizer.unk_token_id, 0
    texts, ids = list(texts), list(ids)
    for i, (text, of_text) in enumerate(zip(texts, ids, strict=True)):
        if unknown is None or unknown not in of_text:
            continue
        coded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        characters = list(text)
        for token, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
            if token == unknown:
                characters[start:end] = " " * (end - start)
                words += 1
        texts[i] = "".join(characters)
        ids[i] = encode_batch(tokenizer, [texts[i]], "unk")[0]
    return texts, ids, words


def as_written(tokenizer: Any, texts: list[str], ids: list, policy: str) -> list[str]:
    """The texts as the tokens of their `ids` are decoded.

    Args:
        policy: `exact` refuses any difference, `normalise` accepts it.

    Raises:
        BadData: a text would change, or it has no tokens.
    """
    written = decode_batch(tokenizer, ids)
    if empty := [text for text, i in zip(texts, ids, strict=True) if not len(i)]:
        raise BadData(
            f"the tokenizer of pretrained.model has no token for {len(empty):,} passages, the first one {empty[0][:80]!r}; remove "
            "such text, or give a model with another tokenizer"
        )
    changed = [(a, b) for a, b in zip(texts, written, strict=True) if a != b]
    if changed and policy == "exact":
        text, found = changed[0]
        start = next((i for i, (a, b) in enumerate(zip(text, found, strict=False)) if a != b), len(found))
        raise BadData(
            f"the tokenizer of pretrained.model loses characters: {len(changed):,} of {len(texts):,} passages are not what their "
            f"tokens say. {_lost_characters(changed)} First: {text[max(0, start - 20) : start + 20]!r} becomes "
            f"{found[max(0, start - 20) : start + 20]!r}. Set pretrained.text=normalise to store every passage as the tokenizer "
            "writes it, or give a model with a tokenizer that keeps them, such as byte-level BPE"
        )
    return written


def spans_as_written(
    tokenizer: Any, records: list[str | None], texts: list[str], written: list[str]
) -> list[str | None]:
    """The records of passages that are stored as their tokens are decoded, with the spans on the stored text.

    A span covers the tokens of which it covered a character.

    Raises:
        BadData: the stored text of a passage with spans has other tokens.
    """
    result = list(records)
    for i, (record, before, after) in enumerate(zip(records, texts, written, strict=True)):
        if record is None or before == after or not (content := json.loads(record)).get("spans"):
            continue
        coded = tokenizer(
            [before, after], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        if coded["input_ids"][0] != coded["input_ids"][1]:
            raise BadData(
                f"pretrained.text=normalise stores the passage {before[:80]!r} as {after[:80]!r}, which has other tokens, so its spans "
                "(data.spans_key) have no place there; leave the row out, or give a model whose tokenizer keeps all characters"
            )
        old, new = coded["offset_mapping"]
        spans, free = [], 0  # free: characters before it belong to the span before
        for start, end, kind in content["spans"]:
            covered = [
                n for (a, b), n in zip(old, new, strict=True) if a < end and b > start and n[0] >= free
            ]
            if covered:
                free = covered[-1][1]
                spans.append([covered[0][0], free, kind])
        result[i] = json.dumps(content | {"spans": spans})
    return result


def _lost_characters(changed: list[tuple[str, str]]) -> str:
    """Which characters are fewer in the written texts, for a message."""
    lost: Counter[str] = Counter()
    for text, written in changed:
        lost += Counter(text) - Counter(written)
    names = ", ".join(f"{c!r} (U+{ord(c):04X}) {n:,} times" for c, n in lost.most_common(MAX_LISTED))
    return f"Lost: {names}." if names else "No character is lost, but others are added."


class ExampleCounters:
    """Counts examples per split, and dropped ones per reason, table by table and part by part.

    `whole`: checks that the models of the config can read the examples from their first to their last token.
    `unk_id`: the id of unknown text; None if the tokenizer knows all text.
    """

    def __init__(self, whole: WholeTexts | None, unk_id: int | None = None) -> None:
        self.whole, self.unk_id = whole, unk_id
        self.examples: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.characters = self.unknown = self.unread = self.lost_spans = self.shortened = self.rewritten = 0

    def add(self, table: pa.Table) -> None:
        """Count a table of schema.EXAMPLES."""
        for split in pc.unique(table["split"]).to_pylist():
            part = table.filter(pc.equal(table["split"], split))
            count = pc.sum(pc.list_value_length(part["token_ids"])).as_py() or 0
            _add(self.examples, {split: part.num_rows})
            _add(self.tokens, {split: count})
            if self.whole is not None and split != "reference":
                self.whole.add(part)
        self.shortened += sum(SHORTENED in (tags or ()) for tags in table["tags"].to_pylist())
        self.characters += pc.sum(pc.utf8_length(table["target"])).as_py() or 0
        if self.unk_id is not None:
            self.unknown += pc.sum(pc.equal(pc.list_flatten(table["token_ids"]), self.unk_id)).as_py() or 0

    def drop(self, reasons: Iterable[str]) -> None:
        """Count what was left out, by its reason."""
        for reason in reasons:
            _add(self.dropped, {reason: 1})

    def state(self) -> dict[str, Any]:
        """The counts as JSON can hold them, for `merge`."""
        return vars(self) | {"whole": None if self.whole is None else self.whole.state()}

    def merge(self, state: dict[str, Any]) -> "ExampleCounters":
        """Add the counts of other examples, which come after these."""
        for name in ("examples", "tokens", "dropped"):
            _add(getattr(self, name), state[name])
        for name in ("characters", "unknown", "unread", "lost_spans", "shortened", "rewritten"):
            setattr(self, name, getattr(self, name) + state[name])
        if self.whole is not None:
            self.whole.merge(state["whole"])
        return self

    def check(self, config: Config) -> None:
        """Raises BadData if a split with a share has no examples. `selection` must have some if train has."""
        shares = config.data.fractions | ({"selection": 1.0} if self.examples.get("train") else {})
        empty = [s for s, share in shares.items() if share > 0 and not self.examples.get(s)]
        if empty:
            raise BadData(
                f"no examples in split {', '.join(empty)} (examples per split: {self.examples}; left out: "
                f"{self.left_out()}); {_advice(config)}, or give more data"
            )
        if self.whole is not None:
            self.whole.refuse()

    def summary(self, vocabulary: int) -> dict[str, Any]:
        """Figures for the manifest."""
        total = sum(self.tokens.values())
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "dropped": self.dropped,
            "shortened_prompts": self.shortened,
            "rewritten_passages": self.rewritten,
            "unknown_words_left_out": self.unread,
            "spans_left_out": self.lost_spans,
            "vocabulary": vocabulary,
            "unknown_share": self.unknown / max(total, 1),
            "characters_per_token": self.characters / max(total, 1),
        }

    def line(self, vocabulary: int) -> str:
        """The same figures as a line for the user."""
        splits = ", ".join(f"{s} {n:,} ({self.tokens[s]:,} tokens)" for s, n in self.examples.items())
        line = f"examples: {splits}; vocabulary {vocabulary}; left out: {self.left_out()}"
        if self.shortened:
            line += f"; {self.shortened:,} prompts were shortened to ranker.prompt_tokens"
        if self.rewritten:
            line += f"; {self.rewritten:,} passages are stored as the tokenizer writes them (pretrained.text)"
        if self.unread:
            line += f"; {self.unread:,} words that the tokenizer does not know are left out, because passages have spans"
        if self.lost_spans:
            line += f"; {self.lost_spans:,} spans are left out with them"
        return line

    def left_out(self) -> str:
        return ", ".join(f"{n:,} x {reason}" for reason, n in self.dropped.items()) or "nothing"


def _add(counts: dict[str, int], other: dict[str, int]) -> None:
    for name, count in other.items():
        counts[name] = counts.get(name, 0) + count


def _advice(config: Config) -> str:
    """Settings that give more splits an example."""
    if config.task == "finqa":
        return "set a larger finqa.selection_share or another seed"
    if config.data.keeps_documents_whole:
        return "set another seed"
    unit = "data.split_unit=block and " if config.data.split_unit == "document" else ""
    return f"set {unit}a smaller data.block_characters, another seed"
