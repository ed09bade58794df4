"""Stage 00 for text: the problems of the raw data, and the valid documents."""

import hashlib
import re
from collections.abc import Iterable, Iterator

from lib.config import Config
from lib.digest_table import DigestTable
from lib.digest_table import digest as digest_of
from lib.errors import BadConfig, did_you_mean
from lib.tasks import Document, Problem
from lib.tasks.text.labelled import LabelledTexts, TextLabels, read_labels
from lib.tasks.text.raw import RawText, read, unreadable
from lib.user_files.decoding import clean_text, decode
from lib.user_files.faults import Fault, UnreadableFile
from lib.user_files.long_text import LongText, cut

# Errors that `data.drop` may turn into warnings: the row or the file is then left out
DROPPABLE = ("null text", "not text", "no text", "not JSON", "malformed row", "encoding", "binary", "damaged", "too long",
             "unreadable", "dead link", "no file", "no label", "unknown class")  # fmt: skip
# Each pattern matches only what it changes: one match per word of a long text would need gigabytes
_SQUEEZE_RULES = (
    (re.compile(r"[ \t]{2,}|\t"), " "),
    (re.compile(r" \n ?|\n "), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
)
_CHUNK = 2**20  # characters that `text_digest` divides into words at a time


def check(config: Config, keeps_unlabelled: bool = False) -> Iterator[Document | Problem]:
    """Valid documents with clean line ends, and problems. A problem is an error if training on it would be wrong.

    `keeps_unlabelled`: a document whose label is missing or wrong is kept without it, and labels need not agree. Kinds that `data.drop` names are left out with a warning. Raises BadConfig for a kind that it cannot name.
    """
    drop = frozenset(config.data.drop)
    for kind in sorted(drop - set(DROPPABLE)):
        raise BadConfig(
            f"data.drop: '{kind}' is not a kind of problem that can be dropped{did_you_mean(kind, DROPPABLE)}"
        )
    num_characters = num_documents = num_errors = 0
    with DigestTable() as known_texts, DigestTable() as name_counts, DigestTable() as known_labels:
        labelled = LabelledTexts(config.data, known_labels)
        for raw in read(config):
            text, faults = _text_of(raw, squeezed=config.data.whitespace == "squeeze")
            labels, wrong = _labels_of(raw, text, config)
            faults += wrong
            if text is not None and (keeps_unlabelled or not wrong):
                digest, length = text_digest(text)
                fault = (
                    labelled.contradiction(digest, raw.source, raw.location or raw.document_id, labels)
                    if length and not keeps_unlabelled
                    else None
                )
                fault = fault or _reason_to_drop(digest, length, config, known_texts)
                if fault is None:
                    has_id = config.data.id_key is not None and raw.labels is not None
                    advice = "give unique values in data.id_key" if has_id else "rename one of the files"
                    document_id, fault = _unique_name(_printable(raw.document_id), name_counts, advice)
                    known_texts.add(digest, document_id)
                    labelled.count(labels)
                    num_documents += 1
                    for piece, content in enumerate(cut(text)):
                        num_characters += len(content)
                        yield _document(document_id, content, raw, piece, labels)
                faults += [fault] if fault is not None else []
            for fault in (_with_drop(fault, drop) for fault in faults):
                num_errors += fault.severity == "error"
                yield _problem(fault, raw.source, raw.location)
        # With errors, the amount of text is known only after they are fixed
        missing = [] if num_errors or keeps_unlabelled else [*labelled.absent_classes()]
    for fault in (
        missing if num_errors or missing else _too_little_text(config, num_characters, num_documents)
    ):
        yield _problem(fault, config.data.path, "")


def _labels_of(raw: RawText, text: "Iterable[str] | None", config: Config) -> tuple[TextLabels, list[Fault]]:
    """(labels beside the text, their faults). A text without labels that needs some has a fault."""
    if text is None or not (config.data.has_labels or config.data.group_key):
        return TextLabels(), []
    clean = "".join(text) if config.data.spans_key and raw.labels is not None else ""
    return read_labels(raw.labels, raw.data, clean, config.data)


def _document(name: str, content: str, raw: RawText, piece: int, labels: TextLabels) -> Document:
    spans = labels.spans
    listed = None
    if spans is not None:
        listed = [{"start": start, "end": end, "class": kind} for start, end, kind in spans]
    group = None if labels.group is None else _printable(labels.group)
    return Document(name, content, _printable(raw.source), piece, group, labels.label, listed)


def _problem(fault: Fault, source: str, location: str) -> Problem:
    words = (fault.severity, fault.kind, source, location, fault.found, fault.expected, fault.advice)
    return Problem(*(_printable(word) for word in words))


def _printable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot hold. File names and keys may contain that."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text_of(raw: RawText, squeezed: bool) -> tuple["Iterable[str] | None", list[Fault]]:
    """(clean text in pieces, faults). The text is None if there is none; otherwise it can be iterated over again."""
    if raw.fault is not None or raw.data is None:
        return None, [raw.fault] if raw.fault is not None else []
    if isinstance(raw.data, LongText):
        return _long_text_of(raw.data, squeezed)
    data, faults = raw.data, []
    if isinstance(data, bytes):
        data, fault = decode(data)
        faults = [fault] if fault is not None else []
        if data is None:
            return None, faults
    text, more = clean_text(data)
    return [squeeze(text) if squeezed else text], faults + more


def _long_text_of(text: LongText, squeezed: bool) -> tuple["Iterable[str] | None", list[Fault]]:
    """As `_text_of`. The text is read once here, for its faults, and again when it is iterated over."""
    try:
        for _ in text:
            pass
    except UnreadableFile as error:
        return None, [error.fault]
    except OSError as error:
        return None, [unreadable(error)]
    return _SqueezedPieces(text) if squeezed else text, text.faults


class _SqueezedPieces:
    """A long text as `squeeze` changes it. `cut` divides no run of white space, so each piece is changed alone."""

    def __init__(self, text: Iterable[str]):
        self.text = text

    def __iter__(self) -> Iterator[str]:
        is_first, waiting = True, ""  # white space at the end of a piece: it stays if text follows
        for piece in cut(self.text):
            piece = squeeze_inside(piece)
            piece = waiting + (piece.lstrip() if is_first else piece)
            is_first = is_first and not piece
            ink = piece.rstrip()
            waiting = piece[len(ink) :]
            yield ink


def _with_drop(fault: Fault, drop: frozenset[str]) -> Fault:
    """The fault as a warning if `data.drop` names its kind."""
    if fault.kind not in drop or fault.severity != "error":
        return fault
    return fault._replace(severity="warning", advice="it is left out; see data.drop")


def squeeze(text: str) -> str:
    """The text without indentation, with one space between words and at most one blank line."""
    return squeeze_inside(text).strip()


def squeeze_inside(text: str) -> str:
    """As `squeeze`, but white space at both ends stays."""
    for pattern, replacement in _SQUEEZE_RULES:
        text = pattern.sub(replacement, text)
    return text


def text_digest(pieces: Iterable[str]) -> tuple[bytes, int]:
    """(digest, length) of the text with each run of white space as one space. Memory does not grow with the text."""
    total, length, in_word = hashlib.blake2b(digest_size=16), 0, False
    for piece in pieces:
        for start in range(0, len(piece), _CHUNK):
            chunk = piece[start : start + _CHUNK]
            words = " ".join(chunk.split())
            if words:
                if length and not (in_word and not chunk[0].isspace()):
                    words = " " + words
                total.update(words.encode("utf-8", "surrogatepass"))
                length += len(words)
            in_word = not chunk[-1].isspace()
    return total.digest(), length


def _reason_to_drop(digest: bytes, length: int, config: Config, known_texts: DigestTable) -> Fault | None:
    """Why a document of this digest and length is left out; None if it is kept."""
    min_length = config.data.min_document_characters
    if not length:
        return Fault("empty", "no text", "text", "it is left out", "warning")
    if length < min_length:
        advice = "it is left out; see data.min_document_characters"
        return Fault("too short", f"{length} characters", f"at least {min_length}", advice, "warning")
    if config.data.deduplicate != "none" and (known := known_texts.get(digest)) is not None:
        found = f"the same text as {known}"
        advice = "it is left out; see data.deduplicate"
        return Fault("duplicate", found, "another text", advice, "warning")
    return None


def _unique_name(name: str, counts: DigestTable, advice: str) -> tuple[str, Fault | None]:
    """A name that no other document has, and a warning with the advice if it is not the given one."""
    unique, key = name, digest_of(name)
    while not counts.add(digest_of(unique), 1):
        number = int(counts.get(key) or 0) + 1
        counts.set(key, number)
        unique = f"{name}~{number}"
    if unique == name:
        return unique, None
    return unique, Fault(
        "repeated id", name, "a unique name", f"it is called {unique} here; {advice}", "warning"
    )


def _too_little_text(config: Config, num_characters: int, num_documents: int) -> Iterator[Fault]:
    """An error if the text is too little for every split with a share to get some."""
    data = config.data
    shares = [fraction for fraction in data.fractions.values() if fraction > 0]
    unit = data.passage_characters if data.split == "contiguous" else data.block_characters
    need = int(2 * unit / min(shares))
    if data.split == "hash" and data.split_unit == "document":
        if num_documents < 2 * len(shares):
            expected = f"at least {2 * len(shares)} documents for {len(shares)} splits"
            advice = "" if data.keeps_documents_whole else "set data.split_unit=block, or "
            advice += "give more documents"
            yield Fault("too little text", f"{num_documents} documents", expected, advice)
    elif num_characters < need:
        expected = f"at least {need} for {len(shares)} splits"
        advice = "give more text, or set smaller data.block_characters and data.passage_characters"
        yield Fault("too little text", f"{num_characters} characters", expected, advice)
