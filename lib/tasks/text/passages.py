"""Stage 01 for text: documents to passages in splits, with nothing repeated across splits.

A document is a string; everything here is a span (start, end) of it. Repeated paragraphs are taken out, what is left
is cut into blocks, each of one split, and the blocks into passages. A passage `continues` the one before it when it
starts where that one ended, in the same split.

A share of train, `data.selection_fraction`, is the split `selection`, which chooses the best step of every model: with
hashed splits whole groups by a hash of their own, so that a document more changes no other's split; with contiguous ones
the end of train, so that train and held_out begin where they always did. However small the data, one group is there,
or with contiguous splits one passage, if train has more than that.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator

from lib import randomness
from lib.config import Config
from lib.sections.data import DataConfig
from lib.tasks import Document, Dropped, Example

Span = tuple[int, int]

_PARAGRAPH_END = re.compile(r"\n(?:[ \t]*\n)+")  # indentation belongs to the paragraph that follows
_SPACE = re.compile(r"\s+")
FEWEST_REPEATED = 40  # characters; shorter paragraphs, such as headings, may stand twice
_ORDER = ("train", "held_out", "reference")


def prepare(config: Config, documents: Iterable[Document]) -> Iterator[Example | Dropped]:
    """Passages of every document in order, each with its split and group, and what was left out with the reason.

    Contiguous splits need the whole length first, hashed ones the first group for selection: `documents` is gone over
    twice.
    """
    data = config.data
    assert not isinstance(documents, Iterator), "an iterator can be read once only"
    total = sum(len(d.content) for d in documents) if data.split == "contiguous" else 0
    drawn = 0.0 if total else _selection_below(config, documents)
    paragraphs: set[bytes] = set()
    passages: dict[bytes, str] = {}
    offset = 0
    for document in documents:
        text, name = document.content, document.document_id
        stretches, repeated = _without_repeats(text, data, paragraphs)
        for a, b in repeated:
            yield Dropped(f"{name}@{a}", "repeated paragraph", text[a:b])
        number, end_before, split_before = 0, -1, ""
        for block, span in enumerate(s for stretch in stretches for s in _blocks(text, stretch, data)):
            group = _group(name, block, data)
            for a, b, fits in _passages(text, span, data):
                if not fits:
                    yield Dropped(
                        f"{name}@{a}", "tail of a paragraph longer than data.passage_characters", text[a:b]
                    )
                    continue
                split = _contiguous(data, offset + a, total) if total else _hashed(config, group, drawn)
                if _elsewhere(text[a:b], split, passages, data):
                    yield Dropped(f"{name}@{a}", "the same passage stands in another split", text[a:b])
                    continue
                continues = a == end_before and split == split_before
                yield Example(
                    f"{name}:{number}",
                    "",
                    text[a:b],
                    split,
                    f"{group}/{split}" if total else group,
                    continues,
                )
                number, end_before, split_before = number + 1, b, split
        offset += len(text)


def _spans_of_paragraphs(text: str, span: Span) -> Iterator[Span]:
    """Paragraphs with the blank lines behind them: together they are the whole span."""
    start = span[0]
    for match in _PARAGRAPH_END.finditer(text, *span):
        yield start, match.end()
        start = match.end()
    if start < span[1]:
        yield start, span[1]


def _without_repeats(text: str, data: DataConfig, seen: set[bytes]) -> tuple[list[Span], list[Span]]:
    """(stretches of text with nothing left out inside, repeated paragraphs). `seen` holds digests of paragraphs."""
    if data.deduplicate != "paragraph":
        return [(0, len(text))], []
    stretches: list[Span] = []
    repeated: list[Span] = []
    for a, b in _spans_of_paragraphs(text, (0, len(text))):
        normal = _SPACE.sub(" ", text[a:b]).strip()
        if len(normal) >= FEWEST_REPEATED:
            digest = _digest(normal)
            if digest in seen:
                repeated.append((a, b))
                continue
            seen.add(digest)
        if stretches and stretches[-1][1] == a:
            stretches[-1] = (stretches[-1][0], b)
        else:
            stretches.append((a, b))
    return stretches, repeated


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _blocks(text: str, stretch: Span, data: DataConfig) -> Iterator[Span]:
    """Blocks of about `block_characters`, cut at the last paragraph end that fits in their second half.

    If none fits, the cut is in mid-text; passages that must start at paragraphs get a longer block instead.
    """
    start, end = stretch
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
    """The last paragraph end in (first, limit], or else the next one, or else the end of the text."""
    cut = 0
    for match in _PARAGRAPH_END.finditer(text, first, end):
        if match.end() > limit:
            return cut or match.end()
        cut = match.end()
    return cut or end


def _passages(text: str, span: Span, data: DataConfig) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether it is a passage) over a block."""
    size = data.passage_characters
    if data.passages == "fixed":
        cuts = [*range(span[0], span[1], size), span[1]]
        if len(cuts) > 2 and not text[cuts[-2] : cuts[-1]].strip():
            cuts[-2] = (
                cuts[-3] + cuts[-1]
            ) // 2  # no passage of white space alone: halve the last two together
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


def _hashed(config: Config, group: str, drawn: float) -> str:
    """The split of a group. `drawn`: groups of train whose hash for selection is not above it are taken out of train."""
    split = _split_at(config.data, randomness.hash_fraction(config.seed, "split", group))
    return "selection" if split == "train" and _selection_hash(config, group) <= drawn else split


def _selection_hash(config: Config, group: str) -> float:
    return randomness.hash_fraction(config.seed, "selection of text", group)


def _selection_below(config: Config, documents: Iterable[Document]) -> float:
    """The hash for selection up to which groups of train are taken: the configured share, or the lowest one that there
    is when none lies below it. Ends at the first group that does."""
    data, lowest = config.data, 1.0
    paragraphs: set[bytes] = set()
    for document in documents:
        text = document.content
        stretches, _ = _without_repeats(text, data, paragraphs)
        for block, span in enumerate(s for stretch in stretches for s in _blocks(text, stretch, data)):
            group = _group(document.document_id, block, data)
            if not any(fits for *_, fits in _passages(text, span, data)):
                continue
            if _hashed(config, group, -1.0) == "train":
                lowest = min(lowest, _selection_hash(config, group))
                if lowest <= data.selection_fraction:
                    return data.selection_fraction
    return lowest


def _group(document: str, block: int, data: DataConfig) -> str:
    return document if data.split_unit == "document" else f"{document}:{block}"


def _contiguous(data: DataConfig, start: int, total: int) -> str:
    """The split of a passage that starts at a character of all text; the last part of train is for selection."""
    split = _split_at(data, start / total)
    if split != "train":
        return split
    end = data.fractions["train"] * total
    length = max(data.selection_fraction * end, data.passage_characters)  # one passage starts there at least
    return "selection" if start >= end - length else "train"


def _split_at(data: DataConfig, place: float) -> str:
    """The split at a place in [0, 1) when the splits lie behind each other."""
    edge, last = 0.0, "train"
    for split in _ORDER:
        share = data.fractions.get(split, 0.0)
        if share <= 0:
            continue
        edge, last = edge + share, split
        if place < edge:
            return split
    return last


def _elsewhere(passage: str, split: str, seen: dict[bytes, str], data: DataConfig) -> bool:
    """Whether the same passage was seen in another split. Short ones may be."""
    if data.deduplicate != "paragraph" or len(passage) < FEWEST_REPEATED:
        return False
    return seen.setdefault(_digest(_SPACE.sub(" ", passage).strip()), split) != split
