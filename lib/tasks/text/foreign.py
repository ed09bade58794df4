"""Rewriting text with a masked LM whose tokenizer is not the run's own.

The other tokenizer cuts the text into units (lib/tasks/text/units.py), some are masked and filled, and only their
characters are replaced. White space is never masked and never written; a written token only decides whether a single
space stands in front of it. The run's tokenizer then reads the new text, and each of its tokens that touches a written
character is labelled predicted. Texts longer than the model are read in consecutive windows.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lib.errors import BadData
from lib.log import say
from lib.synthetic import ForbiddenIds, MaskedLMEngine, MaskedRows
from lib.tasks import CandidateContext
from lib.tasks.text.units import Reader, Reading
from lib.tokenization import characters_of, encode_batch

NARROWEST = 16  # tokens of the narrowest window; wider ones are powers of two
UNKNOWN, UNREADABLE = "unknown units", "unreadable units"
_NEXT_WINDOW = 0x1E3779B97F4A7C15  # between the keys of windows of one text


@dataclass(frozen=True)
class Rewritten:
    """One candidate.

    Attributes:
        token_ids: (T,) in the run's own tokens.
        labels: (T,) 2 for tokens that touch what the model wrote, also where that is what had been there.
        differs: (T,) bool, tokens that touch what is not as it had been.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    differs: np.ndarray
    text: str


def rewrite_with_other_tokenizer(
    texts: list[str], ratio: np.ndarray, rows: np.ndarray, context: CandidateContext
) -> list[Rewritten]:
    """Each text with the share `ratio` of its units rewritten; `context.counts` says what became of them."""
    engine = context.engines[0]
    reader = Reader.of(engine.tokenizer)
    read = reader.read(texts)
    masked = _draw_mask(read, ratio, rows, context)  # (U,)
    filled = _fill(read, masked, rows, reader, context)  # (M,)
    written = _Writing(read, texts, masked, filled, reader, characters_of(context.tokenizer))
    results = [written.text(row) for row in range(len(texts))]
    context.counts.update(written.counts)
    context.counts.update(
        {
            "rewritten": len(texts),
            "without a unit to mask": len(texts) - len(np.unique(read.home[masked])),
            "units": len(read.home),
            UNKNOWN: int((~read.known).sum()),
            "masked units": int(masked.sum()),
            "read in windows": int(
                (np.bincount(read.owner, minlength=len(texts)) > capacity(engine, reader)).sum()
            ),
        }
    )
    return _in_own_tokens(results, context)


def review(counts: Counter[str]) -> dict[str, int]:
    """The counts of a whole run for its manifest, said in a line. Raises BadData if nothing could be rewritten."""
    if not counts["masked units"]:
        raise BadData(
            f"the masked LM's tokenizer knows none of the {counts['units']:,} words and signs of "
            f"{counts['rewritten']:,} passages, so nothing can be rewritten; give generator.checkpoint a model of the "
            "texts' language, or null to train one"
        )
    say(
        f"rewritten with the masked LM's own tokenizer: {counts['masked units']:,} of {counts['units']:,} units masked; "
        f"{counts[UNKNOWN]:,} stayed because it does not know them, {counts[UNREADABLE]:,} because what was written is no "
        f"whole character or none that the run's tokenizer reads; {counts['without a unit to mask']:,} of "
        f"{counts['rewritten']:,} passages had nothing to mask, such as white space alone; "
        f"{counts['read in windows']:,} are longer than the model and were read in windows"
    )
    return dict(counts)


def _draw_mask(read: Reading, ratio: np.ndarray, rows: np.ndarray, context: CandidateContext) -> np.ndarray:
    """(U,) bool. A text with nothing that may be masked, such as white space alone, stays as it is."""
    masked = np.zeros(len(read.home), bool)
    eligible = read.by_text(read.known)
    some = np.flatnonzero(eligible.any(1))
    if len(some):
        drawn = np.zeros(eligible.shape, bool)
        drawn[some] = context.draw_mask(
            eligible[some], ratio[some], rows[some], lambda: read.by_text(read.line_ends)[some]
        )
        masked = drawn[read.home, read.number]
    return masked


def capacity(engine: MaskedLMEngine, reader: Reader) -> int:
    """Tokens of a text that the model reads at once. Raises BadData if there is room for none."""
    room = engine.width - len(reader.prefix) - len(reader.suffix)
    if room < 1:
        raise BadData(
            f"the masked LM reads {engine.width} tokens, and its tokenizer puts {len(reader.prefix) + len(reader.suffix)} "
            "special ones around a text; give generator.checkpoint a longer model"
        )
    return room


def _fill(read: Reading, masked: np.ndarray, rows: np.ndarray, reader: Reader, context: CandidateContext):
    """(M,) ids with those of masked units written."""
    engine, filled = context.engines[0], read.ids.copy()
    hidden = np.append(masked, False)[read.unit_of]  # (M,)
    if not hidden.any():
        return filled
    alone = np.append(read.lone, False)[read.unit_of]

    # 1. Texts of n tokens go in windows of equal length, as few as there can be
    lengths = np.bincount(read.owner, minlength=len(read.bounds) - 1)
    windows = -(-lengths // capacity(engine, reader))
    size = -(-lengths // np.maximum(windows, 1))
    place = np.arange(len(read.ids)) - (np.cumsum(lengths) - lengths)[read.owner]
    number, column = np.divmod(place, np.maximum(size, 1)[read.owner])
    window = (np.cumsum(windows) - windows)[read.owner] + number  # (M,)
    text_of = np.repeat(np.arange(len(lengths)), windows)  # (W,)
    keys = rows[text_of] + (np.arange(len(text_of)) - (np.cumsum(windows) - windows)[text_of]) * _NEXT_WINDOW

    # 2. A window is padded to a width of its own, so that it is filled the same way in any company
    count = np.bincount(window, minlength=len(text_of))
    needed = count + len(reader.prefix) + len(reader.suffix)
    widths = np.minimum(np.maximum(NARROWEST, 2 ** np.ceil(np.log2(needed)).astype(np.int64)), engine.width)
    used = np.bincount(window, hidden, minlength=len(text_of)) > 0
    never = ~reader.surfaces.readable_by(characters_of(context.tokenizer))
    if never.all():
        raise BadData(
            "the masked LM's tokenizer has no token that the run's tokenizer can read; give another generator.checkpoint, or "
            "set tokenizer.kind=bpe, which reads all characters"
        )
    for width in np.unique(widths[used]):
        chosen = np.flatnonzero(used & (widths == width))
        row_of = np.full(len(text_of), -1)
        row_of[chosen] = np.arange(len(chosen))
        mine = np.flatnonzero(row_of[window] >= 0)
        at = row_of[window[mine]], column[mine] + len(reader.prefix)
        ids = np.full((len(chosen), width), engine.tokenizer.pad_token_id, np.int64)
        ids[:, : len(reader.prefix)] = reader.prefix
        ids[at] = read.ids[mine]
        for offset, special in enumerate(reader.suffix):
            ids[np.arange(len(chosen)), len(reader.prefix) + count[chosen] + offset] = special
        valid = np.arange(width) < needed[chosen][:, None]
        mask, whole = np.zeros((2, *ids.shape), bool)
        mask[at], whole[at] = hidden[mine], alone[mine]
        forbidden = ForbiddenIds(never, reader.surfaces.partial, whole)
        masked_rows = MaskedRows(ids, valid, mask, keys[chosen])
        new = engine.fill(masked_rows, context.config.candidates, context.seed, forbidden, int(width))
        filled[mine] = np.where(hidden[mine], new[at], read.ids[mine])
    return filled


class _Writing:
    """Puts written units into the texts.

    Attributes:
        counts: units that stayed because what was written is no whole character, or none that the run knows.
    """

    def __init__(
        self, read: Reading, texts: list[str], masked: np.ndarray, filled: np.ndarray, reader: Reader,
        characters: frozenset[str] | None,
    ):  # fmt: skip
        self.read, self.texts, self.reader, self.filled = read, texts, reader, filled
        self.masked, self.characters = masked.copy(), characters
        self.counts: Counter[str] = Counter({UNREADABLE: 0})
        shown = read.unit_of >= 0
        changed = np.zeros(len(read.home), bool)
        changed[read.unit_of[shown & (filled != read.ids)]] = True
        self.words = {
            int(u): word for u in np.flatnonzero(changed) if (word := self._word(int(u))) is not None
        }
        # Units that differ, and those behind one: the space in front of these may change
        behind = np.append(False, changed)[:-1]
        self.active = np.flatnonzero(masked | behind)
        self.texts_of_active = np.searchsorted(read.home[self.active], np.arange(len(texts) + 1))
        self.first_units = np.searchsorted(read.home, np.arange(len(texts)))

    def _word(self, unit: int) -> str | None:
        """What was written in place of a unit; None, and no longer masked, if that cannot stand in the text."""
        inside = slice(self.read.first[unit], self.read.last[unit] + 1)
        ids = self.filled[inside][self.read.unit_of[inside] == unit]
        word = self.reader.surfaces.write([int(i) for i in ids])
        if word is None or (self.characters is not None and not self.characters.issuperset(word)):
            self.masked[unit] = False
            self.counts[UNREADABLE] += 1
            return None
        return word

    def text(self, row: int) -> tuple[str, np.ndarray, np.ndarray]:
        """(new text, (C,) bool characters that the model wrote, (C,) bool characters that are new)."""
        read, text, base = self.read, self.texts[row], int(self.read.bounds[row])
        pieces: list[str] = []
        touched: list[tuple[int, bool, bool]] = []  # (characters, written, new)

        def put(piece: str, written: bool, new: bool) -> None:
            pieces.append(piece)
            touched.append((len(piece), written, new))

        done, first = 0, int(self.first_units[row])
        writes_spaces = self.reader.surfaces.writes_spaces
        for unit in self.active[slice(*self.texts_of_active[row : row + 2])].tolist():
            mine = bool(self.masked[unit])
            start, end = int(read.start[unit]) - base, int(read.end[unit]) - base
            before = int(read.end[unit - 1]) - base if unit > first else 0
            put(text[done:before], False, False)
            gap = text[before:start]
            if unit > first:
                space = self._gap(unit, gap, text)
                owned = mine and writes_spaces and space == " " and not read.held[unit]
                put(space, space != gap or owned, space != gap)
            else:
                put(gap, False, False)
            word = self.words.get(unit, text[start:end])
            put(word, mine, word != text[start:end])
            done = end
        put(text[done:], False, False)
        lengths = [n for n, _, _ in touched]
        written = np.repeat([w for _, w, _ in touched], lengths)
        new = np.repeat([n for _, _, n in touched], lengths)
        return "".join(pieces), written, new

    def _gap(self, unit: int, gap: str, text: str) -> str:
        """What stands between a unit and the one before it, of which one was written."""
        read, surfaces = self.read, self.reader.surfaces
        if unit not in self.words and unit - 1 not in self.words:
            return gap
        if not surfaces.says_spaces or read.held[unit]:
            apart = bool(read.apart[unit])
        else:
            left, right = read.last[unit - 1], read.first[unit]
            ids = [
                int((self.filled if u in self.words else read.ids)[i])
                for u, i in ((unit - 1, left), (unit, right))
            ]
            apart = bool(self.reader.apart(*ids))
        if gap == " " and read.apart[unit] and not apart:
            return ""
        if gap == "" and apart:
            base = int(read.bounds[read.home[unit]])
            ends = self.words.get(unit - 1) or text[: int(read.end[unit - 1]) - base]
            begins = self.words.get(unit) or text[int(read.start[unit]) - base :]
            if not read.apart[unit] or self.reader.fuses(ends[-1], begins[0]):
                return " "
        return gap


def _in_own_tokens(results: list, context: CandidateContext) -> list[Rewritten]:
    """Texts and their characters as the run's own tokenizer reads them."""
    texts = [text for text, _, _ in results]
    ids = encode_batch(context.tokenizer, texts, context.config.tokenizer.unknown)
    offsets = context.tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )["offset_mapping"]
    found = []
    for (text, written, new), own, spans in zip(results, ids, offsets, strict=True):
        bounds = np.asarray(spans, np.int64).reshape(-1, 2)
        labels = np.where(_touches(written, bounds), 2, 0).astype(np.int8)
        found.append(Rewritten(own, labels, _touches(new, bounds), text))
    return found


def _touches(characters: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """(T,) bool, spans (T, 2) that hold a marked character."""
    before = np.append(0, np.cumsum(characters))
    return before[spans[:, 1]] > before[spans[:, 0]]
