"""Rewrite text with a masked LM whose tokenizer differs from the run's tokenizer.

The tokenizer of the masked LM divides the text into units (lib/tasks/text/units.py). Some units are masked and filled, and
only their characters are replaced. White space is never masked or generated; a generated token only decides whether a
single space precedes it. Then the run's tokenizer encodes the new text. Each token with a generated character has the
label "predicted". Texts that are longer than the model's context are filled in consecutive windows.
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

MIN_WIDTH = 16  # tokens of the narrowest window; the other widths are powers of two
UNKNOWN, UNREADABLE = "unknown units", "unreadable units"
_NEXT_WINDOW = 0x1E3779B97F4A7C15  # difference between the keys of consecutive windows of a text


@dataclass(frozen=True)
class Rewritten:
    """One rewritten candidate.

    Attributes:
        token_ids: (T,) ids in the run's tokenizer.
        labels: (T,) 2 for tokens with a generated character, even if it equals the original; otherwise 0.
        differs: (T,) bool, tokens with a character that differs from the original.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    differs: np.ndarray
    text: str


def rewrite_with_other_tokenizer(
    texts: list[str], ratio: np.ndarray, rows: np.ndarray, context: CandidateContext
) -> list[Rewritten]:
    """Each text with a fraction `ratio` of its units rewritten. `context.counts` is updated."""
    engine = context.engines[0]
    reader = Reader.of(engine.tokenizer)
    read = reader.read(texts)
    masked = _draw_mask(read, ratio, rows, context)  # (U,)
    filled = _fill(read, masked, rows, reader, context)  # (M,)
    composer = _Composer(read, texts, masked, filled, reader, characters_of(context.tokenizer))
    results = [composer.text(row) for row in range(len(texts))]
    context.counts.update(composer.counts)
    context.counts.update(
        {
            "rewritten": len(texts),
            "without a unit to mask": len(texts) - len(np.unique(read.text_of_unit[masked])),
            "units": len(read.text_of_unit),
            UNKNOWN: int((~read.known).sum()),
            "masked units": int(masked.sum()),
            "read in windows": int(
                (np.bincount(read.text_of_token, minlength=len(texts)) > capacity(engine, reader)).sum()
            ),
        }
    )
    return _encode_results(results, context)


def review(counts: Counter[str]) -> dict[str, int]:
    """The counts of a whole run, for its manifest; also printed. Raises BadData if nothing could be rewritten."""
    if not counts["masked units"]:
        raise BadData(
            f"the masked LM's tokenizer knows none of the {counts['units']:,} words and signs of "
            f"{counts['rewritten']:,} passages, so nothing can be rewritten; set generator.checkpoint to a model of the "
            "texts' language, or to null to train one"
        )
    say(
        f"rewritten with the masked LM's tokenizer: {counts['masked units']:,} of {counts['units']:,} units masked. "
        f"Unchanged: {counts[UNKNOWN]:,} units that this tokenizer does not know, and {counts[UNREADABLE]:,} for which the "
        f"generated tokens are incomplete characters or unknown to the run's tokenizer. "
        f"{counts['without a unit to mask']:,} of {counts['rewritten']:,} passages had no unit to mask; "
        f"{counts['read in windows']:,} are longer than the model's context and were filled in windows"
    )
    return dict(counts)


def _draw_mask(read: Reading, ratio: np.ndarray, rows: np.ndarray, context: CandidateContext) -> np.ndarray:
    """(U,) bool, the units to mask. A text without a known unit, such as only white space, is unchanged."""
    masked = np.zeros(len(read.text_of_unit), bool)
    eligible = read.by_text(read.known)
    some = np.flatnonzero(eligible.any(1))
    if len(some):
        drawn = np.zeros(eligible.shape, bool)
        drawn[some] = context.draw_mask(
            eligible[some], ratio[some], rows[some], lambda: read.by_text(read.line_ends)[some]
        )
        masked = drawn[read.text_of_unit, read.index_in_text]
    return masked


def capacity(engine: MaskedLMEngine, reader: Reader) -> int:
    """The number of tokens of a text that fit into the model's context. Raises BadData if it is 0."""
    room = engine.width - len(reader.prefix) - len(reader.suffix)
    if room < 1:
        raise BadData(
            f"the masked LM has a context of {engine.width} tokens, and its tokenizer adds "
            f"{len(reader.prefix) + len(reader.suffix)} special tokens to a text; set generator.checkpoint to a model with a "
            "longer context"
        )
    return room


def _fill(read: Reading, masked: np.ndarray, rows: np.ndarray, reader: Reader, context: CandidateContext):
    """(M,) token ids, generated for masked units and unchanged for the others."""
    engine, filled = context.engines[0], read.ids.copy()
    hidden = np.append(masked, False)[read.unit_of_token]  # (M,)
    if not hidden.any():
        return filled
    alone = np.append(read.is_single_token, False)[read.unit_of_token]

    # 1. Divide each text into as few windows as possible, of equal length
    lengths = np.bincount(read.text_of_token, minlength=len(read.bounds) - 1)
    windows = -(-lengths // capacity(engine, reader))
    size = -(-lengths // np.maximum(windows, 1))
    position = np.arange(len(read.ids)) - (np.cumsum(lengths) - lengths)[read.text_of_token]
    number, column = np.divmod(position, np.maximum(size, 1)[read.text_of_token])
    window = (np.cumsum(windows) - windows)[read.text_of_token] + number  # (M,)
    text_of = np.repeat(np.arange(len(lengths)), windows)  # (W,)
    keys = rows[text_of] + (np.arange(len(text_of)) - (np.cumsum(windows) - windows)[text_of]) * _NEXT_WINDOW

    # 2. Pad each window to a width that depends on this window alone, so that it is filled the same way in any batch
    count = np.bincount(window, minlength=len(text_of))
    needed = count + len(reader.prefix) + len(reader.suffix)
    widths = np.minimum(np.maximum(MIN_WIDTH, 2 ** np.ceil(np.log2(needed)).astype(np.int64)), engine.width)
    used = np.bincount(window, hidden, minlength=len(text_of)) > 0
    never = ~reader.surfaces.readable_by(characters_of(context.tokenizer))
    if never.all():
        raise BadData(
            "the masked LM's tokenizer has no token that the run's tokenizer can read; set another generator.checkpoint, or "
            "tokenizer.kind=bpe, which reads all characters"
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


class _Composer:
    """Puts generated units into the texts.

    Attributes:
        counts: units that stay because the generated bytes are not whole characters, or characters that the run's tokenizer
            does not know.
    """

    def __init__(
        self, read: Reading, texts: list[str], masked: np.ndarray, filled: np.ndarray, reader: Reader,
        characters: frozenset[str] | None,
    ):  # fmt: skip
        self.read, self.texts, self.reader, self.filled = read, texts, reader, filled
        self.masked, self.characters = masked.copy(), characters
        self.counts: Counter[str] = Counter({UNREADABLE: 0})
        visible = read.unit_of_token >= 0
        changed = np.zeros(len(read.text_of_unit), bool)
        changed[read.unit_of_token[visible & (filled != read.ids)]] = True
        self.words = {
            int(u): word for u in np.flatnonzero(changed) if (word := self._word(int(u))) is not None
        }
        # Masked units, and units after a changed one: the space before these may change
        after_changed = np.append(False, changed)[:-1]
        self.active = np.flatnonzero(masked | after_changed)
        self.texts_of_active = np.searchsorted(read.text_of_unit[self.active], np.arange(len(texts) + 1))
        self.first_units = np.searchsorted(read.text_of_unit, np.arange(len(texts)))

    def _word(self, unit: int) -> str | None:
        """The generated text of a unit. If it is not valid text, the unit counts as not masked, and the result is None."""
        inside = slice(self.read.first[unit], self.read.last[unit] + 1)
        ids = self.filled[inside][self.read.unit_of_token[inside] == unit]
        word = self.reader.surfaces.write([int(i) for i in ids])
        if word is None or (self.characters is not None and not self.characters.issuperset(word)):
            self.masked[unit] = False
            self.counts[UNREADABLE] += 1
            return None
        return word

    def text(self, row: int) -> tuple[str, np.ndarray, np.ndarray]:
        """(new text, (C,) bool generated characters, (C,) bool characters that differ from the original)."""
        read, text, base = self.read, self.texts[row], int(self.read.bounds[row])
        pieces: list[str] = []
        flags: list[tuple[int, bool, bool]] = []  # (characters, generated, new)

        def put(piece: str, generated: bool, new: bool) -> None:
            pieces.append(piece)
            flags.append((len(piece), generated, new))

        done, first = 0, int(self.first_units[row])
        writes_spaces = self.reader.surfaces.writes_spaces
        for unit in self.active[slice(*self.texts_of_active[row : row + 2])].tolist():
            is_masked = bool(self.masked[unit])
            start, end = int(read.start[unit]) - base, int(read.end[unit]) - base
            before = int(read.end[unit - 1]) - base if unit > first else 0
            put(text[done:before], False, False)
            gap = text[before:start]
            if unit > first:
                space = self._gap(unit, gap, text)
                owned = is_masked and writes_spaces and space == " " and not read.space_token_before[unit]
                put(space, space != gap or owned, space != gap)
            else:
                put(gap, False, False)
            word = self.words.get(unit, text[start:end])
            put(word, is_masked, word != text[start:end])
            done = end
        put(text[done:], False, False)
        lengths = [length for length, _, _ in flags]
        generated = np.repeat([g for _, g, _ in flags], lengths)
        new = np.repeat([n for _, _, n in flags], lengths)
        return "".join(pieces), generated, new

    def _gap(self, unit: int, gap: str, text: str) -> str:
        """The text between a unit and the previous one, of which at least one is active."""
        read, surfaces = self.read, self.reader.surfaces
        if unit not in self.words and unit - 1 not in self.words:
            return gap
        if not surfaces.says_spaces or read.space_token_before[unit]:
            space = bool(read.space_before[unit])
        else:
            left, right = read.last[unit - 1], read.first[unit]
            ids = [
                int((self.filled if u in self.words else read.ids)[i])
                for u, i in ((unit - 1, left), (unit, right))
            ]
            space = bool(self.reader.space_between(*ids))
        if gap == " " and read.space_before[unit] and not space:
            return ""
        if gap == "" and space:
            base = int(read.bounds[read.text_of_unit[unit]])
            ends = self.words.get(unit - 1) or text[: int(read.end[unit - 1]) - base]
            begins = self.words.get(unit) or text[int(read.start[unit]) - base :]
            if not read.space_before[unit] or self.reader.is_one_word(ends[-1], begins[0]):
                return " "
        return gap


def _encode_results(results: list, context: CandidateContext) -> list[Rewritten]:
    """The results of `_Composer.text`, encoded by the run's tokenizer."""
    texts = [text for text, _, _ in results]
    ids = encode_batch(context.tokenizer, texts, context.config.tokenizer.unknown)
    offsets = context.tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )["offset_mapping"]
    found = []
    for (text, generated, new), token_ids, spans in zip(results, ids, offsets, strict=True):
        bounds = np.asarray(spans, np.int64).reshape(-1, 2)
        labels = np.where(_any_in(generated, bounds), 2, 0).astype(np.int8)
        found.append(Rewritten(token_ids, labels, _any_in(new, bounds), text))
    return found


def _any_in(characters: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """(T,) bool, which of the (T, 2) spans contain a character that is True."""
    before = np.append(0, np.cumsum(characters))
    return before[spans[:, 1]] > before[spans[:, 0]]
