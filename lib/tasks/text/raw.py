"""Raw text from files: those that lib/user_files/ reads, a folder of them, or Python's own documentation (`builtin`).

`builtin_labelled` is made from that documentation, with labels: see lib/tasks/text/builtin_labelled.py.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lib.config import Config
from lib.errors import MissingInput, did_you_mean
from lib.sections.data import DataConfig
from lib.tasks.text.builtin_labelled import labelled_documents
from lib.tasks.text.labelled import RawLabels, raw_labels
from lib.user_files import decoding
from lib.user_files.faults import KINDS_IN_WORDS, Fault, UnreadableFile, kind_of
from lib.user_files.folders import FolderContents, find_files
from lib.user_files.long_text import PIECE_CHARACTERS, LongText
from lib.user_files.rows import read_rows

BUILTIN = ("builtin", "builtin_small", "builtin_labelled")
LABELLED_DOCUMENTS = 400
SMALL_CHARACTERS = 60_000
UNPACK_COMMANDS = {
    ".xz": "unxz --keep",
    ".gz": "gunzip --keep",
    ".zip": "unzip",
    ".bz2": "bunzip2 --keep",
    ".zst": "unzstd",
}
MAX_LISTED = 3


@dataclass(frozen=True)
class RawText:
    """One text as it was found, or the fault that it has. A `LongText` is read when it is iterated over.

    `labels`: what stands beside the text; None for a text without a row.
    """

    document_id: str
    source: str
    location: str
    data: bytes | str | LongText | None
    fault: Fault | None = None
    labels: RawLabels | None = None


def sources(config: Config) -> list[Path]:
    """The files that are read. Raises MissingInput when there are none. Unreadable files are left to `read`."""
    if config.data.path in BUILTIN:
        from pydoc_data import topics

        return [Path(topics.__file__)]
    return [path for path in _find(config).files if os.access(path, os.R_OK)]


def _find(config: Config) -> FolderContents:
    """What data.path holds. Raises MissingInput when there is no file that can be read."""
    path = Path(config.data.path)
    if path.is_dir():
        contents = find_files(path)
        if not contents.files:
            packed = [_how_to_unpack(p) for p in contents.others if p.suffix.lower() in UNPACK_COMMANDS]
            faults = [
                f"{p}: {f.kind}, {f.found}" for p, f in contents.faults[:MAX_LISTED] if f.kind != "hidden"
            ]
            advice = f"; {packed[0]}" if packed else "; give a folder that has some, a file, or `builtin`"
            advice += f" (it also holds: {'; '.join(faults)})" if faults else ""
            raise MissingInput(f"data.path: the folder {path} holds no {KINDS_IN_WORDS} file{advice}")
        return contents
    if path.is_symlink() and not path.exists():
        raise MissingInput(f"data.path: {path} is a link to {os.readlink(path)}, which does not exist")
    if not path.exists():
        raise MissingInput(f"data.path: {path} does not exist; give a file or folder, or `builtin`")
    if not kind_of(path):
        if path.suffix.lower() in UNPACK_COMMANDS:
            raise MissingInput(f"data.path: {_how_to_unpack(path)}")
        raise MissingInput(
            f"data.path: {path} has the ending '{path.suffix}'; expected one of {KINDS_IN_WORDS}"
        )
    if not path.is_file():
        raise MissingInput(f"data.path: {path} is a socket, pipe or device; give a file")
    return FolderContents([path])


def _how_to_unpack(path: Path) -> str:
    return f"{path} is packed; unpack it first: {UNPACK_COMMANDS[path.suffix.lower()]} {path}"


def read(config: Config) -> Iterator[RawText]:
    """Every text of the sources, one at a time, and the faults of files that give no text."""
    data = config.data
    if data.path in BUILTIN:
        labelled = data.path == "builtin_labelled"
        yield from _builtin_labelled() if labelled else _builtin(small=data.path == "builtin_small")
        return
    root = Path(data.path)
    contents = _find(config)
    in_folder = root.is_dir()
    for path in contents.files:
        name = path.relative_to(root).as_posix() if in_folder else path.name
        name = name[: -len(kind_of(path))] or name
        try:
            for raw in _texts(path, name, data):
                if in_folder and raw.fault is not None and raw.fault.kind == "no list":
                    raw = replace(raw, fault=other_file("JSON that is not a list of records"))
                yield raw
        except OSError as error:
            yield RawText(name, str(path), "", None, unreadable(error))
    for path, fault in faults_of_folder(contents):
        yield RawText(path.name, str(path), "", None, fault)


def faults_of_folder(contents: FolderContents) -> Iterator[tuple[Path, Fault]]:
    """What a folder holds beside the files of known endings, with the reason why it is not read."""
    for path in contents.others:
        fault = other_file(f"the ending '{path.suffix}'")
        if command := UNPACK_COMMANDS.get(path.suffix.lower()):
            fault = fault._replace(kind="packed", advice=f"{command} {path}")
        yield path, fault
    yield from contents.faults


def unreadable(error: OSError) -> Fault:
    advice = "check the file's permissions, or remove it from the folder"
    return Fault("unreadable", str(error.strerror or error), "a file that can be read", advice)


def other_file(found: str, expected: str = KINDS_IN_WORDS) -> Fault:
    return Fault("other file", found, expected, "it is not read", "warning")


def _builtin(small: bool) -> Iterator[RawText]:
    from pydoc_data.topics import topics

    total = 0
    for name, text in topics.items():
        if small and total >= SMALL_CHARACTERS:
            return
        total += len(text)
        yield RawText(name, "pydoc_data.topics", name, text)


def _builtin_labelled() -> Iterator[RawText]:
    from pydoc_data.topics import topics

    for name, text, label, spans in labelled_documents(topics, LABELLED_DOCUMENTS):
        yield RawText(name, "pydoc_data.topics", name, text, None, RawLabels(label, spans, name))


def _texts(path: Path, name: str, data: DataConfig) -> Iterator[RawText]:
    """The texts of one file."""
    if kind_of(path).startswith(".txt"):
        try:
            yield RawText(name, str(path), "", _bytes_or_long_text(path))
        except UnreadableFile as error:
            yield RawText(name, str(path), "", None, error.fault)
        return
    settings = ("text_key", "id_key", "label_key", "spans_key", "group_key")
    columns = {key: f"data.{name}" for name in settings if (key := getattr(data, name)) is not None}
    for row in read_rows(path, columns):
        raw = RawText(f"{name}-{row.number}", str(path), row.location, None, row.fault)
        yield raw if row.fault is not None else _from_record(row.value, raw, data)


def _bytes_or_long_text(path: Path) -> bytes | LongText:
    limit = min(PIECE_CHARACTERS, decoding.MAX_BYTES)  # a text has at most as many characters as bytes
    data = decoding.first_bytes(path, limit + 1)
    return LongText(path) if len(data) > limit else data


def _from_record(record, raw: RawText, data: DataConfig) -> RawText:
    """`raw` with the text and the id of a record, or with a fault."""
    if not isinstance(record, dict) or data.text_key not in record:
        keys = list(record) if isinstance(record, dict) else []
        found = f"keys {str(keys)[:200]}" if keys else f"{type(record).__name__} {str(record)[:40]}"
        advice = f"set data.text_key{did_you_mean(data.text_key, keys)}" if keys else "fix or remove it"
        return replace(raw, fault=Fault("no text", found, f"a key '{data.text_key}'", advice))
    text = record[data.text_key]
    if text is None or text != text:  # NaN stands for null in tables
        advice = "give a text, leave the row out, or set data.drop=[null text]"
        return replace(raw, fault=Fault("null text", "no value", f"a string under '{data.text_key}'", advice))
    if not isinstance(text, str):
        found = f"{type(text).__name__} {str(text)[:40]}"
        advice = "fix the value, leave the row out, or set data.drop=[not text]"
        return replace(raw, fault=Fault("not text", found, f"a string under '{data.text_key}'", advice))
    name = record.get(data.id_key) if data.id_key is not None else None
    labels = raw_labels(record, data, in_cells=kind_of(Path(raw.source)).startswith((".csv", ".tsv")))
    return replace(raw, document_id=raw.document_id if name is None else str(name), data=text, labels=labels)
