"""From the bytes of a file to clean text."""

import codecs
import contextlib
import gzip
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lib.user_files.faults import Fault, UnreadableFile, kind_of

MAX_BYTES = 2**28  # of a decompressed text, and of a line or field: it must fit in memory
HEAD_BYTES = 2**16  # read to recognise the format and the encoding of a file
PIECE_BYTES = 2**20  # of a long text that is read at a time

# ----------------------------------------------------------------------------------------------- bytes


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[gzip.GzipFile | IO[bytes]]:
    """The decompressed bytes of a file. Raises OSError, and UnreadableFile for damaged gzip data and for other formats."""
    try:
        with gzip.open(path, "rb") if kind_of(path).endswith(".gz") else open(path, "rb") as file:
            if fault := format_fault(file.read(HEAD_BYTES)):
                raise UnreadableFile(fault)
            file.seek(0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnreadableFile(
            Fault("damaged", str(error)[:120], "valid gzip data", "compress the file again")
        ) from None


def read_bytes(path: Path) -> bytes:
    """All bytes of a file. Raises as `open_bytes`, and UnreadableFile if a compressed text is too long for memory."""
    with open_bytes(path) as file:
        if not kind_of(path).endswith(".gz"):
            return file.read()
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UnreadableFile(length_fault("after decompression"))
    return data


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, decompressed. Raises as `open_bytes`."""
    with open_bytes(path) as file:
        return file.read(count)


def length_fault(where: str) -> Fault:
    found = f"more than {MAX_BYTES:,} bytes {where}"
    return Fault("too long", found, f"at most {MAX_BYTES:,} in one piece", "divide it into several texts")


_FORMATS = (
    (b"\x1f\x8b", "gzip data", "let its name end in .gz"),
    (b"PAR1\x15", "a Parquet file", "let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive, such as .docx or .xlsx", "save it as text"),
    (b"%PDF-1", "a PDF file", "save it as text"),
)


def format_fault(head: bytes) -> Fault | None:
    """The fault of a file that is not UTF-8 text, judged by its first bytes. None if it may be text."""
    for signature, found, advice in _FORMATS:
        if head.startswith(signature):
            return Fault("binary", found, "text", advice)
    encoding = wide_encoding(head)
    if encoding is not None:
        has_mark = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
        zero = head.find(b"\x00")
        found = f"byte 0: {head[:10]!r}" if has_mark else f"a zero byte at byte {zero}"
        return Fault(
            "encoding", found, "UTF-8", f"convert it, for example with `iconv -f {encoding} -t utf-8`"
        )
    if b"\x00" in head:
        return Fault("binary", f"a zero byte at byte {head.index(0)}", "text", "give a text file")
    return None


# ------------------------------------------------------------------------------------------- encodings


def wide_encoding(head: bytes) -> str | None:
    """The name that iconv uses for UTF-16 or UTF-32 text, found by its byte order mark or its zero bytes.

    In UTF-16, every second byte of Latin letters is zero: the first of each pair in utf-16be, the second in utf-16le.
    Letters of other scripts have few zero bytes, but that same byte of each pair takes few values.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) and _is_text_in(head, "utf-32"):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\x00" not in head:
        return None
    for name in ("utf-32le", "utf-32be"):
        if _is_text_in(head, name):
            return name
    first, second = head[0::2], head[1::2]
    zeros = first.count(0), second.count(0)
    name = "utf-16be" if zeros[0] > zeros[1] else "utf-16le"
    high, low = (first, second) if zeros[0] > zeros[1] else (second, first)
    latin = 3 * max(zeros) > 2 * len(high) and not min(zeros)
    few_scripts = 2 * len(set(high)) <= len(set(low))
    return name if (latin or few_scripts) and _is_text_in(head, name) else None


def _is_text_in(head: bytes, encoding: str) -> bool:
    """Whether bytes are text in an encoding: no U+0000 and few control characters. The last character may be cut."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    readable = sum(c.isprintable() or c.isspace() for c in text[:4096])
    return "\x00" not in text and 10 * readable > 9 * len(text[:4096])


def decode(data: bytes) -> tuple[str | None, Fault | None]:
    """(text without its byte order mark, fault) of a whole file. The text is None if the bytes cannot be decoded."""
    if fault := format_fault(data[:HEAD_BYTES]):
        return None, fault
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        return None, utf8_fault(error, mark)
    return text, MARK_FAULT if mark else None


MARK_FAULT = Fault("byte order mark", "EF BB BF", "no mark", "it was removed", "warning")


def decoded_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces, with its byte order mark. Raises as `read_bytes`, and if it is not UTF-8."""
    decoder, size = codecs.getincrementaldecoder("utf-8")(), 0
    with open_bytes(path) as file:
        for chunk in itertools.chain(iter(lambda: file.read(PIECE_BYTES), b""), [b""]):
            size += len(chunk)
            if size > MAX_BYTES and kind_of(path).endswith(".gz"):
                raise UnreadableFile(length_fault("after decompression"))
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                raise UnreadableFile(first_utf8_fault(path)) from None


def utf8_fault(error: UnicodeDecodeError, offset: int = 0) -> Fault:
    """The fault of bytes that are not UTF-8. It names the wrong byte, counted from 0, and the bytes around it.

    `offset`: position of the decoded bytes in the file.
    """
    data, position = error.object, error.start
    around = data[max(0, position - 2**15) : position + 2**15]
    advice = f"convert it, for example with `iconv -f {_eight_bit_encoding(around)} -t utf-8`"
    text = around.decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    if sum(c > "\x7f" for c in text) - wrong > wrong:
        advice = "the text around it is UTF-8: fix these bytes, and do not convert the whole file"
    found = f"byte {offset + position}: {bytes(data[max(0, position - 10) : position + 10])!r}"
    return Fault("encoding", found, "UTF-8", advice)


def _eight_bit_encoding(data: bytes) -> str:
    """latin1 or cp1252 (Windows). In cp1252, bytes 80 to 9F are letters and quotes; in latin1 they are unused."""
    between = {byte for byte in data if 0x80 <= byte <= 0x9F}
    return "cp1252" if between and not between & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "latin1"


def first_utf8_fault(path: Path) -> Fault:
    """The fault of the first bytes in a file that are not UTF-8. The file must have some."""
    decoder, decoded_bytes = codecs.getincrementaldecoder("utf-8")(), 0
    with open_bytes(path) as file:
        for chunk in itertools.chain(iter(lambda: file.read(HEAD_BYTES), b""), [b""]):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return _fault_at(file, decoded_bytes - pending + error.start)
            decoded_bytes += len(chunk)
    raise AssertionError(f"{path} is UTF-8")


def _fault_at(file: gzip.GzipFile | IO[bytes], position: int) -> Fault:
    """The fault of a byte that is not UTF-8, judged by the text around it."""
    first = max(0, position - 2**15)
    file.seek(first)
    around = file.read(2**16)
    error = UnicodeDecodeError("utf-8", around, position - first, position - first + 1, "invalid byte")
    return utf8_fault(error, first)


# ----------------------------------------------------------------------------------------- characters

# The C0 and C1 codes, and byte order marks inside a text, which are invisible
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_WHITE = {"\x0b": "\n", "\x0c": "\n", "\x1c": "\n", "\x1d": "\n", "\x1e": "\n", "\x1f": " ", "\x85": "\n"}
SURROGATE = re.compile(r"[\ud800-\udfff]")


def clean_text(text: str) -> tuple[str, list[Fault]]:
    """The text with normal line ends and without control characters, and a warning for each kind of change.

    Line ends become line feeds. Control characters that separate words (form feed, vertical tab, NEL, the separators
    U+001C to U+001F) become line ends or a space; others are removed. U+2028 and U+2029 stay.
    """
    cleaner = Cleaner()
    return cleaner.clean(text, is_last=True), cleaner.faults()


class Cleaner:
    """`clean_text` for a text that comes in pieces. The faults are those of all pieces together."""

    def __init__(self) -> None:
        self._returns = self._surrogates = self._replacements = 0
        self._control: Counter[str] = Counter()
        self._held = ""  # a carriage return at the end of a piece: a line feed may follow

    def clean(self, text: str, is_last: bool) -> str:
        """The next piece, clean. A carriage return at its end belongs to the next one, unless this is the last."""
        text = self._held + text
        self._held = "\r" if text.endswith("\r") and not is_last else ""
        text = text.removesuffix(self._held)
        if "\r" in text:
            self._returns += text.count("\r")
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        control = Counter(_CONTROL.findall(text))
        if control:
            self._control += control
            text = _CONTROL.sub(lambda match: _WHITE.get(match[0], ""), text)
        self._replacements += text.count("\ufffd")
        surrogates = len(SURROGATE.findall(text))
        if surrogates:
            self._surrogates += surrogates
            text = SURROGATE.sub("\ufffd", text)
        return text

    def faults(self) -> list[Fault]:
        """A warning for each kind of change, after the last piece."""
        faults = []
        if self._returns:
            found = f"{self._returns} carriage returns"
            faults.append(Fault("line ends", found, r"\n", "they were converted", "warning"))
        white = {c: n for c, n in self._control.items() if c in _WHITE}
        other = {c: n for c, n in self._control.items() if c not in _WHITE}
        for characters, expected, advice in (
            (white, "line ends and spaces", "they became white space"),
            (other, "text", "they were removed"),
        ):
            if characters:
                names = ", ".join(sorted(f"U+{ord(c):04X}" for c in characters))
                found = f"{sum(characters.values())}: {names}"
                faults.append(Fault("control characters", found, expected, advice, "warning"))
        if self._surrogates:
            advice = "each became U+FFFD; fix the program that wrote the file"
            found = f"{self._surrogates} lone surrogates"
            faults.append(Fault("lone surrogates", found, "whole characters", advice, "warning"))
        elif self._replacements:
            found = f"{self._replacements} x U+FFFD"
            advice = "an earlier conversion lost them; they are kept as they are"
            faults.append(
                Fault("replacement characters", found, "the original characters", advice, "warning")
            )
        return faults
