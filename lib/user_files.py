"""Files that users bring: found in folders, unpacked, decoded, cut into rows, with every fault named.

| ending             | rows                                                          |
|--------------------|---------------------------------------------------------------|
| .txt               | none: the whole file is one text                              |
| .jsonl             | one JSON value per line                                       |
| .json              | one list of JSON values                                       |
| .csv, .tsv         | lines below a header; the delimiter is a comma, ; or a tab    |
| .parquet           | rows of the table                                             |

All but .parquet may be packed with gzip (`.txt.gz`). Text is UTF-8; a byte order mark at its start is no part of it.

Knows bytes, encodings and formats; not what a row means.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from lib.errors import did_you_mean

PACKABLE = (".txt", ".jsonl", ".json", ".csv", ".tsv")
KINDS = (*PACKABLE, ".parquet")
KINDS_IN_WORDS = f"{', '.join(KINDS)} (all but .parquet also as .gz)"
LONGEST = 2**28  # bytes of a packed text, and of a line or field: what is unpacked must fit in memory
HEAD = 2**16  # bytes by which a file's encoding is known


class Fault(NamedTuple):
    """Why there is no text. `error`: it was meant to be one; `warning`: it may be there on purpose, or was mended."""

    kind: str
    found: str
    expected: str
    advice: str
    severity: str = "error"


class Faulty(Exception):
    """The rest of a file cannot be read."""

    def __init__(self, fault: Fault):
        super().__init__(f"{fault.kind}: {fault.found}; expected {fault.expected}; {fault.advice}")
        self.fault = fault


class Row(NamedTuple):
    """One row as found, or the fault that stands in its place. `number`: of the line from 1, of the row from 0."""

    number: int
    location: str
    value: Any = None
    fault: Fault | None = None


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, in lower case, such as `.jsonl` or `.csv.gz`; empty for other files."""
    name = path.name.lower()
    packed = ".gz" if name.endswith(".gz") else ""
    plain = name.removesuffix(".gz")
    kind = next((k for k in (PACKABLE if packed else KINDS) if plain.endswith(k)), "")
    return kind + packed if kind else ""


# --------------------------------------------------------------------------------------------- folders


@dataclass
class Found:
    """What a folder holds: files to read, other files, and what is neither, each with the reason."""

    files: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    faults: list[tuple[Path, Fault]] = field(default_factory=list)


def find_files(root: Path) -> Found:
    """All files below a folder, in the order of their paths. Linked folders are entered, each folder once.

    Names that begin with a dot are not read. Whatever is not read has a fault.
    """
    found = Found()
    seen: dict[tuple[int, int], Path] = {}  # (device, inode) of a folder: where it was entered
    linked: deque[Path] = (
        deque()
    )  # entered after the real folders, so that a text keeps the name of its real place
    pending = deque([root])
    while pending or linked:
        folder = pending.popleft() if pending else linked.popleft()
        try:
            status = folder.stat()
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first is not folder:
                fault = Fault("repeated folder", f"a link to {first}", "a folder of its own", "it is read once", "warning")  # fmt: skip
                found.faults.append((folder, fault))
                continue
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            found.faults.append((folder, _unreadable(error, "a folder to read")))
            continue
        for name in names:
            path = folder / name
            if name.startswith("."):
                fault = Fault("hidden", "a name that begins with a dot", "another name", "it is not read", "warning")  # fmt: skip
                found.faults.append((path, fault))
            else:
                _sort_in(path, found, pending, linked)
    found.files.sort()
    found.others.sort()
    found.faults.sort()
    return found


def _sort_in(path: Path, found: Found, pending: deque[Path], linked: deque[Path]) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        found.faults.append((path, _unreadable(error, "a file or folder", path)))
        return
    if stat.S_ISDIR(mode):
        (linked if path.is_symlink() else pending).append(path)
    elif not stat.S_ISREG(mode):
        severity = "error" if kind_of(path) else "warning"
        what = "a socket, pipe or device"
        found.faults.append((path, Fault("no file", what, "a file", "take it out of the folder", severity)))
    else:
        (found.files if kind_of(path) else found.others).append(path)


def _unreadable(error: OSError, expected: str, path: Path | None = None) -> Fault:
    if path is not None and os.path.islink(path) and not os.path.exists(path):
        # A link whose name says that it is neither a text nor a folder is none that anyone misses
        severity = "error" if kind_of(path) or not path.suffix else "warning"
        advice = "mend the link, or take it out of the folder"
        return Fault("dead link", f"a link to {os.readlink(path)}", expected, advice, severity)
    advice = "check its rights, or take it out of the folder"
    return Fault("unreadable", str(error.strerror or error), expected, advice)


# ------------------------------------------------------------------------------------- bytes and encodings


@contextlib.contextmanager
def opened(path: Path) -> Iterator[gzip.GzipFile | IO[bytes]]:
    """The file's bytes, unpacked. Raises OSError, and Faulty for damaged gzip data or what is no text at all."""
    try:
        with gzip.open(path, "rb") if kind_of(path).endswith(".gz") else open(path, "rb") as file:
            if fault := not_text(file.read(HEAD)):
                raise Faulty(fault)
            file.seek(0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Faulty(
            Fault("damaged", str(error)[:120], "gzip data that can be unpacked", "pack the file again")
        ) from None


def whole(path: Path) -> bytes:
    """All bytes of a file. Raises as `opened`, and Faulty for a packed text that is too long for memory."""
    with opened(path) as file:
        if not kind_of(path).endswith(".gz"):
            return file.read()
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise Faulty(_too_long("unpacked"))
    return data


def _too_long(what: str) -> Fault:
    found = f"more than {LONGEST:,} bytes {what}"
    return Fault("too long", found, f"at most {LONGEST:,} in one piece", "divide it into several texts")


_FORMATS = (
    (b"\x1f\x8b", "gzip data", "let its name end in .gz"),
    (b"PAR1\x15", "a Parquet file", "let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive, such as .docx or .xlsx", "save it as text"),
    (b"%PDF-1", "a PDF file", "save it as text"),
)


def not_text(head: bytes) -> Fault | None:
    """What a file is instead of UTF-8 text, by its first bytes; None if it may be text."""
    for mark, found, advice in _FORMATS:
        if head.startswith(mark):
            return Fault("binary", found, "text", advice)
    encoding = wide_encoding(head)
    if encoding is not None:
        zero = head.find(b"\x00")
        marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
        found = f"byte 0: {head[:10]!r}" if marked else f"a zero byte at byte {zero}"
        return Fault("encoding", found, "UTF-8", f"convert it: `iconv -f {encoding} -t utf-8`")
    if b"\x00" in head:
        return Fault("binary", f"a zero byte at byte {head.index(0)}", "text", "give a text file")
    return None


def wide_encoding(head: bytes) -> str | None:
    """The name by which iconv knows UTF-16 or UTF-32 text, from its mark or the places of its zero bytes.

    Latin letters have every second byte zero in UTF-16: the first of each pair in utf-16be, the second in utf-16le.
    Letters of other scripts have few zero bytes, but that same byte of each pair has few values.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) and _decodes(head, "utf-32"):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\x00" not in head:
        return None
    for name in ("utf-32le", "utf-32be"):
        if _decodes(head, name):
            return name
    first, second = head[0::2], head[1::2]
    zeros = first.count(0), second.count(0)
    name = "utf-16be" if zeros[0] > zeros[1] else "utf-16le"
    high, low = (first, second) if zeros[0] > zeros[1] else (second, first)
    latin = 3 * max(zeros) > 2 * len(high) and not min(zeros)
    few_scripts = 2 * len(set(high)) <= len(set(low))
    return name if (latin or few_scripts) and _decodes(head, name) else None


def _decodes(head: bytes, encoding: str) -> bool:
    """Whether bytes, perhaps cut in mid-character, are text of an encoding: no U+0000, hardly any control character."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    readable = sum(c.isprintable() or c.isspace() for c in text[:4096])
    return "\x00" not in text and 10 * readable > 9 * len(text[:4096])


def decoded(data: bytes) -> tuple[str | None, Fault | None]:
    """A whole file's text without its byte order mark, or None; and what is wrong, or was."""
    if fault := not_text(data[:HEAD]):
        return None, fault
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        return None, not_utf8(error, mark)
    fault = Fault("byte order mark", "EF BB BF", "no mark", "it was removed", "warning")
    return text, fault if mark else None


def not_utf8(error: UnicodeDecodeError, start: int = 0) -> Fault:
    """Which byte of the file is wrong, counted from 0, with what stands around it. `start`: the bytes before."""
    data, at = error.object, error.start
    around = data[max(0, at - 2**15) : at + 2**15]
    advice = f"convert it, such as `iconv -f {_eight_bit(around)} -t utf-8`"
    text = around.decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    if sum(c > "\x7f" for c in text) - wrong > wrong:
        advice = "the text around it is UTF-8: mend these bytes, and do not convert the whole"
    found = f"byte {start + at}: {bytes(data[max(0, at - 10) : at + 10])!r}"
    return Fault("encoding", found, "UTF-8", advice)


def _eight_bit(data: bytes) -> str:
    """latin1 or cp1252 (Windows): bytes 80 to 9F are letters and quotes in the second, nothing in the first."""
    between = {byte for byte in data if 0x80 <= byte <= 0x9F}
    return "cp1252" if between and not between & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "latin1"


def _undecodable(path: Path) -> Fault:
    """The first place of a file that is not UTF-8."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(path) as file:
        for piece in itertools.chain(iter(lambda: file.read(HEAD), b""), [b""]):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                return not_utf8(error, before - pending)
            before += len(piece)
    raise AssertionError(f"{path} is UTF-8")


# ----------------------------------------------------------------------------------------- characters

# Beside the C0 and C1 codes: marks of byte order inside a text, which nothing shows
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_WHITE = {"\x0b": "\n", "\x0c": "\n", "\x1c": "\n", "\x1d": "\n", "\x1e": "\n", "\x1f": " ", "\x85": "\n"}
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")


def mended(text: str) -> tuple[str, list[Fault]]:
    """The text in clean characters and line ends, with a warning for each kind of change.

    Line ends become line feeds. Control characters that part words (form feed, vertical tab, NEL, the separators
    U+001C to U+001F) become line ends or a space; others are removed. U+2028 and U+2029 stay.
    """
    faults = []
    if "\r" in text:
        found = f"{text.count(chr(13))} carriage returns"
        faults.append(Fault("line ends", found, r"\n", "they were mended", "warning"))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    control = _CONTROL.findall(text)
    white = [c for c in control if c in _WHITE]
    other = [c for c in control if c not in _WHITE]
    for characters, expected, advice in (
        (white, "line ends and spaces", "they became white space"),
        (other, "text", "they were removed"),
    ):
        if characters:
            names = ", ".join(sorted({f"U+{ord(c):04X}" for c in characters}))
            found = f"{len(characters)}: {names}"
            faults.append(Fault("control characters", found, expected, advice, "warning"))
    if control:
        text = _CONTROL.sub(lambda match: _WHITE.get(match[0], ""), text)
    halves = len(_HALF_PAIR.findall(text))
    if halves:
        advice = "each became U+FFFD; mend what wrote the file"
        faults.append(Fault("half characters", f"{halves} lone surrogates", "whole ones", advice, "warning"))
        text = _HALF_PAIR.sub("\ufffd", text)
    elif "\ufffd" in text:
        found = f"{text.count(chr(0xFFFD))} x U+FFFD"
        advice = "an earlier conversion lost them; they are kept as they are"
        faults.append(Fault("lost characters", found, "the characters themselves", advice, "warning"))
    return text, faults


# ----------------------------------------------------------------------------------------------- rows


def rows(path: Path, columns: Mapping[str, str] | None = None, wanted: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, one at a time; faults stand in their places.

    Args:
        columns: of tables: the columns that are read and must be there, each with the setting that names it;
            None: all that there are. Values of other formats are whole, whatever they are.
        wanted: names by which the delimiter of a .csv is known, beside those.

    Raises:
        OSError: the file cannot be opened.
    """
    kind = kind_of(path).removesuffix(".gz")
    count = 0
    try:
        if kind == ".jsonl":
            found = _json_lines(path)
        elif kind == ".json":
            found = _json_list(path)
        elif kind == ".parquet":
            found = _parquet(path, columns)
        else:
            found = _delimited(path, columns, (*(columns or ()), *wanted))
        for row in found:
            yield row
            count += 1
    except Faulty as faulty:
        yield Row(count, f"after {count:,} rows" if count else "", fault=faulty.fault)
        return
    if not count:
        fault = Fault("empty", "no rows", "rows of text", "it is left out", "warning")
        yield Row(0, "", fault=fault)


def _json_lines(path: Path) -> Iterator[Row]:
    before = 0  # bytes of the file before this line
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            if len(line) > LONGEST:
                raise Faulty(_too_long(f"in line {number}"))
            start, before = before, before + len(line)
            row = Row(number, f"line {number}")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield row._replace(value=json.loads(text))
            except UnicodeDecodeError as error:
                yield row._replace(fault=not_utf8(error, start))
            except (ValueError, RecursionError) as error:
                fault = Fault("not JSON", f"{text[:60]!r}: {error}", "one JSON object per line", "mend or remove the line")  # fmt: skip
                yield row._replace(fault=fault)


def _json_list(path: Path) -> Iterator[Row]:
    text, fault = decoded(whole(path))
    if text is None:
        raise Faulty(fault or Fault("encoding", "bytes", "UTF-8", "convert it"))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Faulty(Fault("not JSON", str(error)[:120], "a list of records", "mend the file")) from None
    if not isinstance(values, list):
        advice = "give one list of records, [{...}, ...], or one record per line in a .jsonl file"
        raise Faulty(Fault("no list", f"{type(values).__name__} {str(values)[:40]}", "a list of records", advice))  # fmt: skip
    for number, value in enumerate(values):
        yield Row(number, f"record {number}", value)


def _delimited(path: Path, columns: Mapping[str, str] | None, wanted: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    last = 0  # line on which the row before ended
    with opened(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        try:
            top = [_line(text)]
            while top[-1].isspace():
                top.append(_line(text))
            if not top[-1]:
                return
            lines = itertools.chain(top, iter(lambda: _line(text), ""))
            reader = csv.reader(lines, delimiter=_delimiter(top[-1], wanted), strict=True)
            filled = (fields for fields in reader if fields)  # a blank line is no row
            header = [name.strip() for name in next(filled)]
            _require(columns, header)
            last = reader.line_num
            for number, fields in enumerate(filled):
                place, last = f"row {number}, line {last + 1}", reader.line_num
                if len(fields) < len(header) or any(fields[len(header) :]):
                    found = f"{len(fields)} fields, {str(fields)[:60]}"
                    advice = "a text with a delimiter in it wants double quotes around it"
                    fault = Fault("malformed row", found, f"{len(header)} fields as in the header", advice)
                    yield Row(number, place, fault=fault)
                else:
                    yield Row(number, place, dict(zip(header, fields, strict=False)))
        except UnicodeDecodeError:
            raise Faulty(_undecodable(path)) from None
        except csv.Error as error:
            advice = "mend it there; nothing after it was read"
            raise Faulty(Fault("damaged", f"line {last + 1}: {error}", "delimited text", advice)) from None
        finally:
            with contextlib.suppress(ValueError):
                text.detach()  # the file is closed by who opened it


def _line(text: io.TextIOWrapper) -> str:
    line = text.readline(LONGEST + 1)
    if len(line) > LONGEST:
        raise Faulty(_too_long("in a line"))
    return line


def _delimiter(header: str, wanted: Sequence[str]) -> str:
    """The one of comma, semicolon and tab that finds most of the wanted names in the header; then the most fields."""

    def found(delimiter: str) -> tuple[int, int]:
        fields = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        return sum(name in fields for name in wanted), len(fields)

    return max(",;\t", key=found)


def _require(columns: Mapping[str, str] | None, names: Sequence[str]) -> None:
    """Raises Faulty unless a table has the columns, each once."""
    for name, setting in (columns or {}).items():
        if name not in names:
            fault = Fault(
                "no text" if setting == "data.text_key" else "no column",
                f"columns {str(list(names))[:200]}",
                f"a column '{name}'",
                f"set {setting}{did_you_mean(name, names)}",
            )
            raise Faulty(fault)
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        found = f"{', '.join(repeated)} more than once"
        raise Faulty(Fault("repeated column", found, "a name of its own for each column", "rename them"))


def _parquet(path: Path, columns: Mapping[str, str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        _require(columns, file.schema_arrow.names)
        chosen = None if columns is None else list(columns)
        for batch in file.iter_batches(batch_size=1024, columns=chosen):
            for record in batch.to_pylist():
                yield Row(number, f"row {number}", record)
                number += 1
    except (PermissionError, FileNotFoundError):
        raise  # the caller's business, as for the other kinds
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        fault = Fault("damaged", str(error)[:120], "a Parquet file that can be read", "make the file again")
        yield Row(number, f"row {number}", fault=fault)
