"""Stage 00 for text: every problem of the raw data, and the documents that are fit to learn from."""

import hashlib
import re
from collections.abc import Iterator

from lib.config import Config
from lib.tasks import Document, Problem
from lib.tasks.text.raw import Fault, RawText, not_utf8, read

# Beside the C0 and C1 codes: marks of byte order inside a text, which nothing shows
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_SPACE = re.compile(r"\s")
# Each pattern matches only what it changes: one match per word of a long text would cost gigabytes
_SQUEEZED = (
    (re.compile(r"[ \t]{2,}|\t"), " "),
    (re.compile(r" \n ?|\n "), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
)
_PIECE = 2**20  # characters looked at together where a whole text would be copied


def check(config: Config) -> Iterator[Document | Problem]:
    """Documents with their line ends mended, and problems: errors where training would be wrong."""
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
        for fault in faults:
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
    faults = []
    data = raw.data
    if isinstance(data, bytes):
        data, fault = _decoded(data)
        if data is None:
            return None, [fault] if fault else []
        faults += [fault] if fault else []
    if "\r" in data:
        found = f"{data.count(chr(13))} carriage returns"
        faults.append(Fault("line ends", found, r"\n", "they were mended", "warning"))
        data = data.replace("\r\n", "\n").replace("\r", "\n")
    control = _CONTROL.findall(data)
    if control:
        found = f"{len(control)}: {', '.join(sorted({f'U+{ord(c):04X}' for c in control}))}"
        faults.append(Fault("control characters", found, "text", "they were removed", "warning"))
        data = _CONTROL.sub("", data)
    halves = len(_HALF_PAIR.findall(data))
    if halves:
        advice = "each became U+FFFD; mend what wrote the file"
        faults.append(Fault("half characters", f"{halves} lone surrogates", "whole ones", advice, "warning"))
        data = _HALF_PAIR.sub("\ufffd", data)
    elif "\ufffd" in data:
        found = f"{data.count(chr(0xFFFD))} x U+FFFD"
        advice = "an earlier conversion lost them; they are kept as they are"
        faults.append(Fault("lost characters", found, "the characters themselves", advice, "warning"))
    return data, faults


def _decoded(data: bytes) -> tuple[str | None, Fault | None]:
    """A file's text without its byte order mark, or what is in the way."""
    head = data[:65536]
    if b"\x00" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        found = f"a zero byte at byte {head.index(0)}"
        if 3 * head.count(0) > len(head):
            return None, Fault("encoding", found, "UTF-8", "if it is UTF-16: `iconv -f utf-16le -t utf-8`")
        return None, Fault("binary", found, "text", "give a text file")
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        return None, not_utf8(error, mark)
    fault = Fault("byte order mark", "EF BB BF", "no mark", "it was removed", "warning")
    return text, fault if mark else None


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
