"""Stage 01 for text: divide documents into passages and assign them to splits. No text is in two splits.

All positions are spans (start, end) of the document. Repeated paragraphs are removed. The remaining stretches are cut into
blocks, each of one split, and the blocks into passages. A passage `continues` the previous one if it starts where that one
ended, in the same split.

The fraction `data.selection_fraction` of train becomes the split `selection`, which chooses the best step of every model.
With hashed splits, a separate hash selects whole groups, so that a new document changes no other document's split. With
contiguous splits, `selection` is the end of train, and the borders of train and held_out stay. Even with little data,
`selection` has at least one group (or one passage, with contiguous splits) if train has more than that.

A passage of a document with labels carries the document's label and its own part of the spans, as JSON in `record`.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lib import randomness
from lib.config import Config
from lib.digest_table import DigestTable, digest
from lib.sections.data import DataConfig
from lib.tasks import Document, Dropped, Example

Span = tuple[int, int]

_PARAGRAPH_END = re.compile(r"\n(?:[ \t]*\n)+")  # indentation belongs to the next paragraph
_SPACE = re.compile(r"\s+")
MIN_REPEATED_CHARACTERS = 40  # shorter paragraphs, such as headings, may be repeated
_ORDER = ("train", "held_out", "reference")


def prepare(config: Config, documents: Iterable[Document]) -> Iterator[Example | Dropped]:
    """Passages of every document in order, with their splits and groups, and what was left out with the reason.

    `documents` is iterated over twice: first for the total length (contiguous splits) or for the threshold of the split
    `selection` (hashed splits).
    """
    data = config.data
    assert not isinstance(documents, Iterator), "an iterator can be read only once"
    total = sum(len(d.content) for d in documents) if data.split == "contiguous" else 0
    threshold = 0.0 if total else _selection_threshold(config, documents)
    offset, place = 0, _Place()
    with DigestTable() as paragraphs, DigestTable() as split_of_passage:
        for document in documents:
            text, name = document.content, document.document_id
            if not document.piece:
                place = _Place()
            stretches, repeated = _without_repeats(text, data, paragraphs)
            for a, b in repeated:
                yield Dropped(f"{name}@{place.start + a}", "repeated paragraph", text[a:b])
            for span in (s for stretch in stretches for s in _blocks(text, stretch, data)):
                group = _group(document, place.blocks, data)
                place.blocks += 1
                for a, b, is_passage in _passages(text, span, data):
                    at = f"{name}@{place.start + a}"
                    if not is_passage:
                        reason = "tail of a paragraph longer than data.passage_characters"
                        yield Dropped(at, reason, text[a:b])
                        continue
                    split = (
                        _contiguous(data, offset + a, total) if total else _hashed(config, group, threshold)
                    )
                    if _is_in_other_split(text[a:b], split, split_of_passage, data):
                        yield Dropped(at, "the same passage is in another split", text[a:b])
                        continue
                    continues = place.start + a == place.end and split == place.split
                    full_group = f"{group}/{split}" if total else group
                    behind_space = a > 0 and text[a - 1 : a + 1].strip() != text[a - 1 : a + 1]
                    record = _labels(document, place.start + a, place.start + b, behind_space)
                    yield Example(
                        f"{name}:{place.examples}", "", text[a:b], split, full_group, continues, record
                    )
                    place.examples, place.end, place.split = place.examples + 1, place.start + b, split
            offset, place.start = offset + len(text), place.start + len(text)


@dataclass
class _Place:
    """Where `prepare` is in a document, which may come in several pieces.

    Attributes:
        start: characters of the earlier pieces.
        blocks, examples: how many there were in the document until now.
        end, split: of the last example.
    """

    start: int = 0
    blocks: int = 0
    examples: int = 0
    end: int = -1
    split: str = ""


def _spans_of_paragraphs(text: str, span: Span) -> Iterator[Span]:
    """Paragraphs with the blank lines after them. Together they cover the whole span."""
    start = span[0]
    for match in _PARAGRAPH_END.finditer(text, *span):
        yield start, match.end()
        start = match.end()
    if start < span[1]:
        yield start, span[1]


def _without_repeats(text: str, data: DataConfig, known: DigestTable) -> tuple[list[Span], list[Span]]:
    """(stretches of text between repeated paragraphs, repeated paragraphs). `known` has the digests of earlier ones."""
    if data.deduplicate != "paragraph":
        return [(0, len(text))], []
    stretches: list[Span] = []
    repeated: list[Span] = []
    for a, b in _spans_of_paragraphs(text, (0, len(text))):
        normal = _SPACE.sub(" ", text[a:b]).strip()
        if len(normal) >= MIN_REPEATED_CHARACTERS and not known.add(digest(normal)):
            repeated.append((a, b))
            continue
        if stretches and stretches[-1][1] == a:
            stretches[-1] = (stretches[-1][0], b)
        else:
            stretches.append((a, b))
    return stretches, repeated


def _blocks(text: str, stretch: Span, data: DataConfig) -> Iterator[Span]:
    """Blocks of about `block_characters`, cut at the last paragraph end in their second half.

    If there is none, the cut is inside a paragraph. With `data.passages: paragraph` the block is longer instead. A document
    with labels is one block.
    """
    start, end = stretch
    if data.has_labels:  # a document is one block, so all of its windows have equal lengths
        if start < end:
            yield start, end
        return
    size = data.block_characters
    while end - start > size:
        limit = start + size
        if data.passages == "paragraph":
            cut = _paragraph_end(text, start + size // 2, limit, end)
        else:
            ends = (m.end() for m in _PARAGRAPH_END.finditer(text, start + size // 2, limit))
            cut = max(ends, default=limit)
        yield start, cut
        start = cut
    if start < end:
        yield start, end


def _paragraph_end(text: str, first: int, limit: int, end: int) -> int:
    """The last paragraph end in (first, limit]; if there is none, the next one; if there is none, `end`."""
    cut = 0
    for match in _PARAGRAPH_END.finditer(text, first, end):
        if match.end() > limit:
            return cut or match.end()
        cut = match.end()
    return cut or end


def _passages(text: str, span: Span, data: DataConfig) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether it is a passage) for all parts of a block."""
    size = data.passage_characters
    if data.passages == "fixed":
        cuts = [*range(span[0], span[1], size), span[1]]
        if data.has_labels:  # windows of equal length: a label of the document fits a short rest badly
            count = len(cuts) - 1
            cuts = [span[0] + (span[1] - span[0]) * i // count for i in range(count + 1)]
        if len(cuts) > 2 and not text[cuts[-2] : cuts[-1]].strip():
            # The last passage would be only white space: divide the last two evenly
            cuts[-2] = (cuts[-3] + cuts[-1]) // 2
        yield from ((start, end, True) for start, end in itertools.pairwise(cuts))
        return
    begin = end = span[0]
    for a, b in _spans_of_paragraphs(text, span):
        if end > begin and b - begin > size:
            yield begin, end, True
            begin = a
        end = b
        if end - begin > size:  # one paragraph that is longer than a passage
            yield begin, begin + size, True
            if text[begin + size : end].strip():
                yield begin + size, end, False
            begin = end
    if end > begin:
        yield begin, end, True


def _hashed(config: Config, group: str, threshold: float) -> str:
    """The split of a group. Groups of train whose selection hash is at most `threshold` are in `selection`."""
    split = _split_at(config.data, randomness.hash_fraction(config.seed, "split", group))
    return "selection" if split == "train" and _selection_hash(config, group) <= threshold else split


def _selection_hash(config: Config, group: str) -> float:
    return randomness.hash_fraction(config.seed, "selection of text", group)


def _selection_threshold(config: Config, documents: Iterable[Document]) -> float:
    """Groups of train with a selection hash up to this number are in `selection`.

    It is data.selection_fraction if any group has a smaller hash, otherwise the smallest hash.
    """
    data, smallest, block = config.data, 1.0, -1
    with DigestTable() as paragraphs:
        for document in documents:
            text, block = document.content, block if document.piece else -1
            stretches, _ = _without_repeats(text, data, paragraphs)
            for span in (s for stretch in stretches for s in _blocks(text, stretch, data)):
                block += 1
                group = _group(document, block, data)
                if not any(is_passage for *_, is_passage in _passages(text, span, data)):
                    continue
                if _hashed(config, group, -1.0) == "train":
                    smallest = min(smallest, _selection_hash(config, group))
                    if smallest <= data.selection_fraction:
                        return data.selection_fraction
    return smallest


def _group(document: Document, block: int, data: DataConfig) -> str:
    if data.split_unit == "document":
        return document.document_id if document.group is None else f"group {document.group}"
    return f"{document.document_id}:{block}"


def _labels(document: Document, start: int, end: int, behind_space: bool) -> str | None:
    """The labels of the passage [start, end) of a document, as JSON for `Example.record`; None without labels.

    `behind_space`: white space is at the border to the passage before, which a pretrained tokenizer may drop on both sides.
    """
    if document.label is None and document.spans is None:
        return None
    spans = None
    if document.spans is not None:
        spans = [
            [max(s["start"], start) - start, min(s["end"], end) - start, s["class"]]
            for s in document.spans
            if s["start"] < end and s["end"] > start
        ]
    return json.dumps(
        {"label": document.label, "spans": spans} | ({"behind_space": True} if behind_space else {})
    )


def _contiguous(data: DataConfig, start: int, total: int) -> str:
    """The split of a passage by its start in the concatenated text. The last part of train is `selection`."""
    split = _split_at(data, start / total)
    if split != "train":
        return split
    end = data.fractions["train"] * total
    length = max(data.selection_fraction * end, data.passage_characters)  # at least one passage starts there
    return "selection" if start >= end - length else "train"


def _split_at(data: DataConfig, position: float) -> str:
    """The split at a position in [0, 1) when the splits follow each other."""
    edge, last = 0.0, "train"
    for split in _ORDER:
        share = data.fractions.get(split, 0.0)
        if share <= 0:
            continue
        edge, last = edge + share, split
        if position < edge:
            return split
    return last


def _is_in_other_split(passage: str, split: str, split_of: DigestTable, data: DataConfig) -> bool:
    """Whether the same passage occurred in another split. Short passages may."""
    if data.deduplicate != "paragraph" or len(passage) < MIN_REPEATED_CHARACTERS:
        return False
    key = digest(_SPACE.sub(" ", passage).strip())
    return not split_of.add(key, split) and split_of.get(key) != split
