"""Stage 00 for text: every problem of the raw data, and the documents that are fit to learn from."""

import hashlib
import re
from collections.abc import Iterator

from lib.config import Config
from lib.tasks import Document, Problem
from lib.tasks.text.raw import RawText, read

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SPACE = re.compile(r"\s+")
_SQUEEZED = ((re.compile(r"[ \t]+"), " "), (re.compile(r" ?\n ?"), "\n"), (re.compile(r"\n{3,}"), "\n\n"))


def check(config: Config) -> Iterator[Document | Problem]:
    """Documents with their line ends mended, and problems: errors where training would be wrong."""
    seen: dict[bytes, str] = {}
    names: set[str] = set()
    characters = kept = 0
    for raw in read(config):
        if raw.fault is not None:
            kind, found, expected, advice = raw.fault
            yield Problem("error", kind, raw.source, raw.location, found, expected, advice)
            continue
        text, problems = _text_of(raw)
        yield from problems
        if text is None:
            continue
        if config.data.whitespace == "squeeze":
            text = squeeze(text)
        reason = _unfit(text, config, seen, raw)
        if reason is not None:
            yield reason
            continue
        document_id = _fresh_name(raw.document_id, names)
        if document_id != raw.document_id:
            advice = f"it is called {document_id} here; give unique values in data.id_key"
            yield Problem(
                "warning",
                "repeated id",
                raw.source,
                raw.location,
                raw.document_id,
                "a name of its own",
                advice,
            )
        kept, characters = kept + 1, characters + len(text)
        yield Document(document_id, text, raw.source)
    yield from _enough(config, characters, kept)


def _text_of(raw: RawText) -> tuple[str | None, list[Problem]]:
    """The text in clean characters and line ends, with what was wrong."""

    def problem(severity: str, kind: str, found: str, expected: str, advice: str) -> Problem:
        return Problem(severity, kind, raw.source, raw.location, found, expected, advice)

    problems = []
    data = raw.data or ""
    if isinstance(data, bytes):
        if b"\x00" in data[:65536] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            where = data.index(b"\x00")
            return None, [
                problem("error", "binary", f"a zero byte at byte {where}", "text", "give a text file")
            ]
        if data.startswith(b"\xef\xbb\xbf"):
            problems.append(problem("warning", "byte order mark", "EF BB BF", "no mark", "it was removed"))
            data = data[3:]
        try:
            data = data.decode("utf-8")
        except UnicodeDecodeError as error:
            around = error.object[max(0, error.start - 10) : error.start + 10]
            found = f"byte {error.start}: {around!r}"
            advice = "convert it, such as `iconv -f latin1 -t utf-8`"
            return None, [problem("error", "encoding", found, "UTF-8", advice)]
    if "\r" in data:
        problems.append(
            problem(
                "warning", "line ends", f"{data.count(chr(13))} carriage returns", r"\n", "they were mended"
            )
        )
        data = data.replace("\r\n", "\n").replace("\r", "\n")
    control = _CONTROL.findall(data)
    if control:
        shown = ", ".join(sorted({f"U+{ord(c):04X}" for c in control})[:10])
        problems.append(
            problem("warning", "control characters", f"{len(control)}: {shown}", "text", "they were removed")
        )
        data = _CONTROL.sub("", data)
    return data, problems


def squeeze(text: str) -> str:
    """No indentation, one space between words, at most one blank line."""
    for pattern, replacement in _SQUEEZED:
        text = pattern.sub(replacement, text)
    return text.strip()


def _unfit(text: str, config: Config, seen: dict[bytes, str], raw: RawText) -> Problem | None:
    """Why a document is left out; None if it is kept."""
    normal = _SPACE.sub(" ", text).strip()
    least = config.data.min_document_characters
    if not normal:
        return Problem("warning", "empty", raw.source, raw.location, "no text", "text", "it is left out")
    if len(normal) < least:
        found = f"{len(normal)} characters"
        return Problem(
            "warning",
            "too short",
            raw.source,
            raw.location,
            found,
            f"at least {least}",
            "it is left out; see data.min_document_characters",
        )
    digest = hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    first = seen.setdefault(digest, f"{raw.source} {raw.location}".strip())
    if first != f"{raw.source} {raw.location}".strip() and config.data.deduplicate != "none":
        return Problem(
            "warning",
            "duplicate",
            raw.source,
            raw.location,
            f"the same text as {first}",
            "a text of its own",
            "it is left out; see data.deduplicate",
        )
    return None


def _fresh_name(name: str, names: set[str]) -> str:
    fresh, number = name, 2
    while fresh in names:
        fresh, number = f"{name}~{number}", number + 1
    names.add(fresh)
    return fresh


def _enough(config: Config, characters: int, documents: int) -> Iterator[Problem]:
    """Every split with a share must get text."""
    data = config.data
    shares = [f for f in data.fractions.values() if f > 0]
    unit = data.passage_characters if data.split == "contiguous" else data.block_characters
    need = int(2 * unit / min(shares))
    if data.split == "hash" and data.split_unit == "document":
        if documents < 2 * len(shares):
            found = f"{documents} documents"
            yield Problem(
                "error",
                "too little text",
                data.path,
                "",
                found,
                f"at least {2 * len(shares)} documents for {len(shares)} splits",
                "set data.split_unit=block, or give more documents",
            )
    elif characters < need:
        advice = "give more text, or set smaller data.block_characters and data.passage_characters"
        yield Problem(
            "error",
            "too little text",
            data.path,
            "",
            f"{characters} characters",
            f"at least {need} for {len(shares)} splits",
            advice,
        )
