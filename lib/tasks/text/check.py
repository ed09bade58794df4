"""Stage 00 for text: every problem of the raw data, and the documents that are fit to learn from."""

import hashlib
import re
from collections.abc import Iterator

from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.tasks import Document, Problem
from lib.tasks.text.raw import RawText, read
from lib.user_files import Fault, decoded, mended

# Errors that `data.drop` may turn into warnings: the row, or the file, is left out
DROPPABLE = ("null text", "not text", "no text", "not JSON", "malformed row", "encoding", "binary", "damaged", "too long",
             "unreadable", "dead link", "no file")  # fmt: skip
_SPACE = re.compile(r"\s")
# Each pattern matches only what it changes: one match per word of a long text would cost gigabytes
_SQUEEZED = (
    (re.compile(r"[ \t]{2,}|\t"), " "),
    (re.compile(r" \n ?|\n "), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
)
_PIECE = 2**20  # characters looked at together where a whole text would be copied


def check(config: Config) -> Iterator[Document | Problem]:
    """Documents with their line ends mended, and problems: errors where training would be wrong.

    What `data.drop` names is left out and a warning. Raises BadConfig for a kind that it cannot name.
    """
    drop = frozenset(config.data.drop)
    for kind in sorted(drop - set(DROPPABLE)):
        raise BadConfig(
            f"data.drop: '{kind}' is no problem that can be dropped{did_you_mean(kind, DROPPABLE)}"
        )
    seen: dict[bytes, str] = {}  # digest of a text: the document that has it
    names: dict[str, int] = {}  # how often a name was asked for
    characters = kept = errors = 0
    for raw in read(config):
        text, faults = _text_of(raw)
        if text is not None and config.data.whitespace == "squeeze":
            text = squeeze(text)
        if text is not None:
            mark, length = digest(text)
            fault = _unfit(mark, length, config, seen)
            if fault is None:
                document_id, fault = _fresh_name(_printable(raw.document_id), names)
                seen.setdefault(mark, document_id)
                kept, characters = kept + 1, characters + len(text)
                yield Document(document_id, text, _printable(raw.source))
            faults += [fault] if fault is not None else []
        for fault in (_judged(fault, drop) for fault in faults):
            errors += fault.severity == "error"
            yield _problem(fault, raw.source, raw.location)
    # With errors, how much text there is shows only when they are mended
    for fault in [] if errors else _enough(config, characters, kept):
        yield _problem(fault, config.data.path, "")


def _problem(fault: Fault, source: str, location: str) -> Problem:
    words = (fault.severity, fault.kind, source, location, fault.found, fault.expected, fault.advice)
    return Problem(*(_printable(w) for w in words))


def _printable(text: str) -> str:
    """File names and keys may hold what UTF-8 cannot: it is shown as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text_of(raw: RawText) -> tuple[str | None, list[Fault]]:
    """The text in clean characters and line ends, with what was wrong."""
    if raw.fault is not None or raw.data is None:
        return None, [raw.fault] if raw.fault is not None else []
    if isinstance(raw.data, str):
        return mended(raw.data)
    text, fault = decoded(raw.data)
    faults = [fault] if fault is not None else []
    if text is None:
        return None, faults
    text, more = mended(text)
    return text, faults + more


def _judged(fault: Fault, drop: frozenset[str]) -> Fault:
    """As a warning where the config says that such rows are to be left out."""
    if fault.kind not in drop or fault.severity != "error":
        return fault
    return fault._replace(severity="warning", advice="it is left out; see data.drop")


def squeeze(text: str) -> str:
    """No indentation, one space between words, at most one blank line."""
    for pattern, replacement in _SQUEEZED:
        text = pattern.sub(replacement, text)
    return text.strip()


def digest(text: str) -> tuple[bytes, int]:
    """(digest, length) of the text with every run of white space taken as one space, in flat memory."""
    total, length, start = hashlib.blake2b(digest_size=16), 0, 0
    while start < len(text):
        space = _SPACE.search(text, start + _PIECE)
        end = space.start() if space else len(text)
        words = " ".join(text[start:end].split())
        if words:
            total.update((" " + words if length else words).encode("utf-8", "surrogatepass"))
            length += len(words) + (1 if length else 0)
        start = end
    return total.digest(), length


def _unfit(mark: bytes, length: int, config: Config, seen: dict[bytes, str]) -> Fault | None:
    """Why a document of this digest and length is left out; None if it is kept."""
    least = config.data.min_document_characters
    if not length:
        return Fault("empty", "no text", "text", "it is left out", "warning")
    if length < least:
        advice = "it is left out; see data.min_document_characters"
        return Fault("too short", f"{length} characters", f"at least {least}", advice, "warning")
    if config.data.deduplicate != "none" and mark in seen:
        found = f"the same text as {seen[mark]}"
        advice = "it is left out; see data.deduplicate"
        return Fault("duplicate", found, "a text of its own", advice, "warning")
    return None


def _fresh_name(name: str, names: dict[str, int]) -> tuple[str, Fault | None]:
    """A name that no other document has, and the fault if it had to be made."""
    fresh = name
    while fresh in names:
        names[name] += 1
        fresh = f"{name}~{names[name]}"
    names[fresh] = 1
    if fresh == name:
        return fresh, None
    advice = f"it is called {fresh} here; give unique values in data.id_key"
    return fresh, Fault("repeated id", name, "a name of its own", advice, "warning")


def _enough(config: Config, characters: int, documents: int) -> Iterator[Fault]:
    """Every split with a share must get text."""
    data = config.data
    shares = [f for f in data.fractions.values() if f > 0]
    unit = data.passage_characters if data.split == "contiguous" else data.block_characters
    need = int(2 * unit / min(shares))
    if data.split == "hash" and data.split_unit == "document":
        if documents < 2 * len(shares):
            expected = f"at least {2 * len(shares)} documents for {len(shares)} splits"
            advice = "set data.split_unit=block, or give more documents"
            yield Fault("too little text", f"{documents} documents", expected, advice)
    elif characters < need:
        expected = f"at least {need} for {len(shares)} splits"
        advice = "give more text, or set smaller data.block_characters and data.passage_characters"
        yield Fault("too little text", f"{characters} characters", expected, advice)
