"""Raw text from files: .txt, .jsonl, .parquet, a folder of them, or Python's language reference (`builtin`)."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lib.config import Config
from lib.errors import MissingInput, did_you_mean
from lib.sections.data import DataConfig

KINDS = (".txt", ".jsonl", ".parquet")
BUILTIN = ("builtin", "builtin_small")
SMALL_CHARACTERS = 60_000
PACKED = {
    ".xz": "unxz --keep",
    ".gz": "gunzip --keep",
    ".zip": "unzip",
    ".bz2": "bunzip2 --keep",
    ".zst": "unzstd",
}


class Fault(NamedTuple):
    """Why there is no text. `error`: it was meant to be one; `warning`: it may be there on purpose."""

    kind: str
    found: str
    expected: str
    advice: str
    severity: str = "error"


@dataclass(frozen=True)
class RawText:
    """One text as found, or the fault that stands in its place."""

    document_id: str
    source: str
    location: str
    data: bytes | str | None
    fault: Fault | None = None


def sources(config: Config) -> list[Path]:
    """The files to be read. Raises MissingInput when there are none. Unreadable ones are left to `read`."""
    if config.data.path in BUILTIN:
        from pydoc_data import topics

        return [Path(topics.__file__)]
    return [path for path in _files(config)[0] if os.access(path, os.R_OK)]


def _files(config: Config) -> tuple[list[Path], list[Path]]:
    """(files to be read, other files beside them) of data.path. Raises MissingInput when there are none."""
    path = Path(config.data.path)
    if path.is_dir():
        visible = [p for p in path.rglob("*") if not _is_hidden(p.relative_to(path)) and p.is_file()]
        files = sorted(p for p in visible if p.suffix.lower() in KINDS)
        others = sorted(p for p in visible if p.suffix.lower() not in KINDS)
        if not files:
            packed = [_unpacking(p) for p in others if p.suffix.lower() in PACKED]
            advice = f"; {packed[0]}" if packed else "; give a folder that does, a file, or `builtin`"
            raise MissingInput(f"data.path: the folder {path} holds no {', '.join(KINDS)} file{advice}")
        return files, others
    if not path.exists():
        raise MissingInput(f"data.path: {path} does not exist; give a file or folder, or `builtin`")
    if path.suffix.lower() in PACKED:
        raise MissingInput(f"data.path: {_unpacking(path)}")
    if path.suffix.lower() not in KINDS:
        raise MissingInput(
            f"data.path: {path} has the ending '{path.suffix}'; expected one of {', '.join(KINDS)}"
        )
    return [path], []


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _unpacking(path: Path) -> str:
    return f"{path} is packed; unpack it first: {PACKED[path.suffix.lower()]} {path}"


def read(config: Config) -> Iterator[RawText]:
    """Every text of the sources, one at a time."""
    data = config.data
    if data.path in BUILTIN:
        yield from _builtin(small=data.path == "builtin_small")
        return
    root = Path(data.path)
    files, others = _files(config)
    for path in files:
        kind = path.suffix.lower()
        name = (path.relative_to(root).as_posix() if root.is_dir() else path.name)[: -len(kind)]
        try:
            if kind == ".txt":
                yield RawText(name, str(path), "", path.read_bytes())
            elif kind == ".jsonl":
                yield from _json_lines(path, name, data)
            else:
                yield from _parquet(path, name, data)
        except OSError as error:
            advice = "check the file's rights, or take it out of the folder"
            fault = Fault("unreadable", str(error.strerror or error), "a file to read", advice)
            yield RawText(name, str(path), "", None, fault)
    for path in others:
        packed = path.suffix.lower() in PACKED
        advice = f"{PACKED[path.suffix.lower()]} {path}" if packed else "it is not read"
        found = f"the ending '{path.suffix}'"
        fault = Fault("packed" if packed else "other file", found, ", ".join(KINDS), advice, "warning")
        yield RawText(path.name, str(path), "", None, fault)


def _builtin(small: bool) -> Iterator[RawText]:
    from pydoc_data.topics import topics

    total = 0
    for name, text in topics.items():
        if small and total >= SMALL_CHARACTERS:
            return
        total += len(text)
        yield RawText(name, "pydoc_data.topics", name, text)


def _json_lines(path: Path, name: str, data: DataConfig) -> Iterator[RawText]:
    before = 0  # bytes of the file before this line
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, before = before, before + len(line)
            raw = RawText(f"{name}-{number}", str(path), f"line {number}", None)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield _from_record(json.loads(text), raw, data)
            except UnicodeDecodeError as error:
                yield replace(raw, fault=not_utf8(error, start))
            except (ValueError, RecursionError) as error:
                found = f"{line[:60]!r}: {error}"
                advice = "mend or remove the line"
                yield replace(raw, fault=Fault("not JSON", found, "one JSON object per line", advice))


def not_utf8(error: UnicodeDecodeError, start: int = 0) -> Fault:
    """Which byte of the file is wrong, counted from 0, with what stands around it."""
    data, at = error.object, error.start
    marked = start == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff"))
    advice = f"convert it, such as `iconv -f {'utf-16' if marked else 'latin1'} -t utf-8`"
    return Fault("encoding", f"byte {start + at}: {data[max(0, at - 10) : at + 10]!r}", "UTF-8", advice)


def _from_record(record, raw: RawText, data: DataConfig) -> RawText:
    if not isinstance(record, dict) or data.text_key not in record:
        keys = list(record) if isinstance(record, dict) else []
        found = f"keys {str(keys)[:200]}" if keys else f"{type(record).__name__} {str(record)[:40]}"
        advice = f"set data.text_key{did_you_mean(data.text_key, keys)}" if keys else "mend or remove it"
        return replace(raw, fault=Fault("no text", found, f"a key '{data.text_key}'", advice))
    text = record[data.text_key]
    if not isinstance(text, str):
        found = "no value" if text is None else f"{type(text).__name__} {str(text)[:40]}"
        advice = "mend the value or leave the row out"
        return replace(raw, fault=Fault("not text", found, "a string", advice))
    name = record.get(data.id_key) if data.id_key is not None else None
    return replace(raw, document_id=raw.document_id if name is None else str(name), data=text)


def _parquet(path: Path, name: str, data: DataConfig) -> Iterator[RawText]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        columns = [c for c in (data.text_key, data.id_key) if c]
        missing = [c for c in columns if c not in file.schema_arrow.names]
        if missing:
            hint = did_you_mean(missing[0], file.schema_arrow.names)
            knob = "data.text_key" if missing[0] == data.text_key else "data.id_key"
            found = f"columns {str(file.schema_arrow.names)[:200]}"
            fault = Fault("no text", found, f"a column '{missing[0]}'", f"set {knob}{hint}")
            yield RawText(name, str(path), "", None, fault)
            return
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                raw = RawText(f"{name}-{number}", str(path), f"row {number}", None)
                yield _from_record(record, raw, data)
                number += 1
    except (PermissionError, FileNotFoundError):
        raise  # the caller's business, as for the other kinds
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        fault = Fault("damaged", str(error)[:120], "a Parquet file that can be read", "make the file again")
        yield RawText(name, str(path), f"row {number}", None, fault)
