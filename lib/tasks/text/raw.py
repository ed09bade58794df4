"""Raw text from files: .txt, .jsonl, .parquet, a folder of them, or Python's language reference (`builtin`)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.config import Config, DataConfig
from lib.errors import MissingInput, did_you_mean

KINDS = (".txt", ".jsonl", ".parquet")
BUILTIN = ("builtin", "builtin_small")
SMALL_CHARACTERS = 60_000
PACKED = {".xz": "unxz", ".gz": "gunzip", ".zip": "unzip", ".bz2": "bunzip2", ".zst": "unzstd"}


@dataclass(frozen=True)
class RawText:
    """One text as found. `fault` says why there is none: (kind, found, expected, advice)."""

    document_id: str
    source: str
    location: str
    data: bytes | str | None
    fault: tuple[str, str, str, str] | None = None


def sources(config: Config) -> list[Path]:
    """The files to be read. Raises MissingInput when there are none."""
    if config.data.path in BUILTIN:
        from pydoc_data import topics

        return [Path(topics.__file__)]
    path = Path(config.data.path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
        if not files:
            raise MissingInput(f"data.path: the folder {path} holds no {', '.join(KINDS)} file")
        return files
    if not path.exists():
        raise MissingInput(f"data.path: {path} does not exist; give a file or folder, or `builtin`")
    if path.suffix in PACKED:
        raise MissingInput(
            f"data.path: {path} is packed; unpack it first (`{PACKED[path.suffix]} {path.name}`)"
        )
    if path.suffix not in KINDS:
        raise MissingInput(
            f"data.path: {path} has the ending '{path.suffix}'; expected one of {', '.join(KINDS)}"
        )
    return [path]


def read(config: Config) -> Iterator[RawText]:
    """Every text of the sources, one at a time."""
    data = config.data
    if data.path in BUILTIN:
        yield from _builtin(small=data.path == "builtin_small")
        return
    root = Path(data.path)
    for path in sources(config):
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        try:
            if path.suffix == ".txt":
                yield RawText(name.removesuffix(".txt"), str(path), "", path.read_bytes())
            elif path.suffix == ".jsonl":
                yield from _json_lines(path, name.removesuffix(".jsonl"), data)
            else:
                yield from _parquet(path, name.removesuffix(".parquet"), data)
        except OSError as error:
            advice = "check the file's rights, or leave it out"
            yield RawText(
                name, str(path), "", None, ("unreadable", str(error.strerror), "a file to read", advice)
            )


def _builtin(small: bool) -> Iterator[RawText]:
    from pydoc_data.topics import topics

    total = 0
    for name, text in topics.items():
        if small and total >= SMALL_CHARACTERS:
            return
        total += len(text)
        yield RawText(name, "pydoc_data.topics", name, text)


def _json_lines(path: Path, name: str, data: DataConfig) -> Iterator[RawText]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where, document_id = f"line {number}", f"{name}-{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                fault = (
                    "not JSON",
                    f"{line[:60]!r}: {error}",
                    "one JSON object per line",
                    "mend or remove the line",
                )
                yield RawText(document_id, str(path), where, None, fault)
                continue
            yield _from_record(record, document_id, str(path), where, data)


def _from_record(record, document_id: str, source: str, where: str, data: DataConfig) -> RawText:
    if not isinstance(record, dict) or data.text_key not in record:
        keys = list(record) if isinstance(record, dict) else []
        hint = did_you_mean(data.text_key, keys)
        fault = (
            "no text",
            f"keys {keys}" if keys else type(record).__name__,
            f"a key '{data.text_key}'",
            f"set data.text_key{hint}",
        )
        return RawText(document_id, source, where, None, fault)
    text = record[data.text_key]
    if not isinstance(text, str):
        fault = (
            "not text",
            f"{type(text).__name__} {str(text)[:40]}",
            "a string",
            "mend the value or leave the row out",
        )
        return RawText(document_id, source, where, None, fault)
    if data.id_key is not None:
        document_id = str(record.get(data.id_key, document_id))
    return RawText(document_id, source, where, text)


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
            fault = (
                "no text",
                f"columns {file.schema_arrow.names}",
                f"a column '{missing[0]}'",
                f"set data.text_key or data.id_key{hint}",
            )
            yield RawText(name, str(path), "", None, fault)
            return
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                yield _from_record(record, f"{name}-{number}", str(path), f"row {number}", data)
                number += 1
    except (pa.ArrowException, OSError) as error:
        fault = ("damaged", str(error)[:120], "a Parquet file", "make the file again")
        yield RawText(name, str(path), f"row {number}", None, fault)
