"""Stage 00 for text: the problems of the raw data, and the valid documents."""

import hashlib
import re
from collections.abc import Iterator

from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.tasks import Document, Problem
from lib.tasks.text.raw import RawText, read
from lib.user_files.decoding import clean_text, decode
from lib.user_files.faults import Fault

# Errors that `data.drop` may turn into warnings: the row or the file is then left out
DROPPABLE = ("null text", "not text", "no text", "not JSON", "malformed row", "encoding", "binary", "damaged", "too long",
             "unreadable", "dead link", "no file")  # fmt: skip
_SPACE = re.compile(r"\s")
# Each pattern matches only what it changes: one match per word of a long text would need gigabytes
_SQUEEZE_RULES = (
    (re.compile(r"[ \t]{2,}|\t"), " "),
    (re.compile(r" \n ?|\n "), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
)
_CHUNK = 2**20  # characters that `text_digest` copies at a time


def check(config: Config) -> Iterator[Document | Problem]:
    """Valid documents with clean line ends, and problems. A problem is an error if training on it would be wrong.

    Kinds that `data.drop` names are left out with a warning. Raises BadConfig for a kind that it cannot name.
    """
    drop = frozenset(config.data.drop)
    for kind in sorted(drop - set(DROPPABLE)):
        raise BadConfig(
            f"data.drop: '{kind}' is not a kind of problem that can be dropped{did_you_mean(kind, DROPPABLE)}"
        )
    known_texts: dict[bytes, str] = {}  # digest of a text -> the document that has it
    name_counts: dict[str, int] = {}
    num_characters = num_documents = num_errors = 0
    for raw in read(config):
        text, faults = _text_of(raw)
        if text is not None and config.data.whitespace == "squeeze":
            text = squeeze(text)
        if text is not None:
            digest, length = text_digest(text)
            fault = _reason_to_drop(digest, length, config, known_texts)
            if fault is None:
                document_id, fault = _unique_name(_printable(raw.document_id), name_counts)
                known_texts.setdefault(digest, document_id)
                num_documents, num_characters = num_documents + 1, num_characters + len(text)
                yield Document(document_id, text, _printable(raw.source))
            faults += [fault] if fault is not None else []
        for fault in (_with_drop(fault, drop) for fault in faults):
            num_errors += fault.severity == "error"
            yield _problem(fault, raw.source, raw.location)
    # With errors, the amount of text is known only after they are fixed
    for fault in [] if num_errors else _too_little_text(config, num_characters, num_documents):
        yield _problem(fault, config.data.path, "")


def _problem(fault: Fault, source: str, location: str) -> Problem:
    words = (fault.severity, fault.kind, source, location, fault.found, fault.expected, fault.advice)
    return Problem(*(_printable(word) for word in words))


def _printable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot hold. File names and keys may contain that."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text_of(raw: RawText) -> tuple[str | None, list[Fault]]:
    """(clean text, faults). The text is None if there is none."""
    if raw.fault is not None or raw.data is None:
        return None, [raw.fault] if raw.fault is not None else []
    if isinstance(raw.data, str):
        return clean_text(raw.data)
    text, fault = decode(raw.data)
    faults = [fault] if fault is not None else []
    if text is None:
        return None, faults
    text, more = clean_text(text)
    return text, faults + more


def _with_drop(fault: Fault, drop: frozenset[str]) -> Fault:
    """The fault as a warning if `data.drop` names its kind."""
    if fault.kind not in drop or fault.severity != "error":
        return fault
    return fault._replace(severity="warning", advice="it is left out; see data.drop")


def squeeze(text: str) -> str:
    """The text without indentation, with one space between words and at most one blank line."""
    for pattern, replacement in _SQUEEZE_RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def text_digest(text: str) -> tuple[bytes, int]:
    """(digest, length) of the text with each run of white space as one space. Memory does not grow with the text."""
    total, length, start = hashlib.blake2b(digest_size=16), 0, 0
    while start < len(text):
        space = _SPACE.search(text, start + _CHUNK)
        end = space.start() if space else len(text)
        words = " ".join(text[start:end].split())
        if words:
            total.update((" " + words if length else words).encode("utf-8", "surrogatepass"))
            length += len(words) + (1 if length else 0)
        start = end
    return total.digest(), length


def _reason_to_drop(
    digest: bytes, length: int, config: Config, known_texts: dict[bytes, str]
) -> Fault | None:
    """Why a document of this digest and length is left out; None if it is kept."""
    min_length = config.data.min_document_characters
    if not length:
        return Fault("empty", "no text", "text", "it is left out", "warning")
    if length < min_length:
        advice = "it is left out; see data.min_document_characters"
        return Fault("too short", f"{length} characters", f"at least {min_length}", advice, "warning")
    if config.data.deduplicate != "none" and digest in known_texts:
        found = f"the same text as {known_texts[digest]}"
        advice = "it is left out; see data.deduplicate"
        return Fault("duplicate", found, "another text", advice, "warning")
    return None


def _unique_name(name: str, counts: dict[str, int]) -> tuple[str, Fault | None]:
    """A name that no other document has, and a warning if it is not the given one."""
    unique = name
    while unique in counts:
        counts[name] += 1
        unique = f"{name}~{counts[name]}"
    counts[unique] = 1
    if unique == name:
        return unique, None
    advice = f"it is called {unique} here; give unique values in data.id_key"
    return unique, Fault("repeated id", name, "a unique name", advice, "warning")


def _too_little_text(config: Config, num_characters: int, num_documents: int) -> Iterator[Fault]:
    """An error if the text is too little for every split with a share to get some."""
    data = config.data
    shares = [fraction for fraction in data.fractions.values() if fraction > 0]
    unit = data.passage_characters if data.split == "contiguous" else data.block_characters
    need = int(2 * unit / min(shares))
    if data.split == "hash" and data.split_unit == "document":
        if num_documents < 2 * len(shares):
            expected = f"at least {2 * len(shares)} documents for {len(shares)} splits"
            advice = "set data.split_unit=block, or give more documents"
            yield Fault("too little text", f"{num_documents} documents", expected, advice)
    elif num_characters < need:
        expected = f"at least {need} for {len(shares)} splits"
        advice = "give more text, or set smaller data.block_characters and data.passage_characters"
        yield Fault("too little text", f"{num_characters} characters", expected, advice)
