"""The token store: the tokens of one split in flat files. Language models read windows of them, so memory stays flat.

Stage 01 writes one folder per split. All numbers are little-endian. Positions count tokens from the start of the split.

    tokens.bin           the token ids, one after the other: uint16 if the vocabulary fits, otherwise uint32
    examples.bin         int64, first token of every example, then the number of tokens
    documents.bin        int64, first token of every document that has tokens, then the number of tokens
    groups.bin           int64, first token of every run of examples of one group, then the number of tokens
    group_names.bin      the names of these runs in UTF-8, one after the other
    group_name_ends.bin  int64, where each name ends
    counts.bin           int64, how often each token id occurs
    store.json           version, types and sizes; with it a reader finds files that are damaged

A document is a run of examples that continue each other, and no token lies between them. Names of groups may repeat.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib import durable
from lib.errors import BadData

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
POSITION = np.dtype("<i8")
SCAN = 2**20  # numbers that a scan of a file holds in memory
_POSITIONS = ("examples", "documents", "groups")


def token_type(vocabulary: int) -> np.dtype:
    """The smallest type that holds the ids of a vocabulary of this size."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


# ----------------------------------------------------------------------------------------------- write


class TokenStoreWriter:
    """Writes the stores of all splits below one folder, while the examples are made. Memory does not grow with them.

    As a context manager, it completes the stores when the block ends without an error. `durable.replacing_folder` then
    syncs the files.

    Args:
        vocabulary: number of token ids.
        tokenizer_sha256: hash of the tokenizer; token ids mean nothing without it.
    """

    def __init__(self, folder: Path, vocabulary: int, tokenizer_sha256: str):
        self.folder, self.vocabulary, self.tokenizer_sha256 = folder, vocabulary, tokenizer_sha256
        self._splits: dict[str, _SplitWriter] = {}

    def add(self, table: "pa.Table") -> None:
        """Append a table of schema.EXAMPLES: each row to the store of its split, in order."""
        import pyarrow.compute as pc

        for split in pc.unique(table["split"]).to_pylist():
            if split not in self._splits:
                self._splits[split] = _SplitWriter(self.folder / split, self.vocabulary)
            self._splits[split].add(table.filter(pc.equal(table["split"], split)))

    @property
    def splits(self) -> list[str]:
        """The splits that have examples."""
        return sorted(self._splits)

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for writer in self._splits.values():
            writer.close_files() if kind else writer.complete(self.tokenizer_sha256)


class _SplitWriter:
    def __init__(self, folder: Path, vocabulary: int):
        folder.mkdir(parents=True)
        self.folder, self.type = folder, token_type(vocabulary)
        names = ("tokens", *_POSITIONS, "group_names", "group_name_ends")
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in names}  # noqa: SIM115 - see `close_files`
        self._counts = np.zeros(vocabulary, POSITION)
        self._sizes: dict[str, int] = dict.fromkeys(("tokens", *_POSITIONS, "characters"), 0)
        self._name_end, self._group = 0, None
        self._is_pending = True  # a document has begun, and none of its tokens was written

    def add(self, table: "pa.Table") -> None:
        import pyarrow.compute as pc

        ids, lengths = flatten(table["token_ids"])
        starts = self._sizes["tokens"] + np.cumsum(lengths) - lengths  # (E,)
        self._append("tokens", ids.astype(self.type))
        self._append("examples", starts)
        self._append("documents", self._document_starts(table["continues"], starts, lengths))
        self._add_groups(table["group"].to_pylist(), starts)
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self._sizes["characters"] += pc.sum(pc.utf8_length(table["target"])).as_py() or 0

    def _document_starts(self, continues: Any, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """First token of every document that begins in this table. A document without tokens has none."""
        begins = ~continues.to_numpy(zero_copy_only=False)
        number = np.cumsum(begins)  # (E,) of the document of each example; 0 belongs to an earlier table
        filled = np.flatnonzero(lengths)
        numbers, first = np.unique(number[filled], return_index=True)
        found = starts[filled[first[(numbers > 0) | self._is_pending]]]
        if len(number):
            has_tokens = len(numbers) > 0 and numbers[-1] == number[-1]
            self._is_pending = not has_tokens and (self._is_pending or number[-1] > 0)
        return found

    def _add_groups(self, names: list[str], starts: np.ndarray) -> None:
        for name, start in zip(names, starts.tolist(), strict=True):
            if name == self._group:
                continue
            self._group, text = name, name.encode("utf-8")
            self._name_end += len(text)
            self._files["group_names"].write(text)
            self._append("groups", np.array([start]))
            self._files["group_name_ends"].write(np.array([self._name_end], POSITION).tobytes())

    def _append(self, name: str, values: np.ndarray) -> None:
        values = values if name == "tokens" else values.astype(POSITION)
        self._files[name].write(np.ascontiguousarray(values).data)
        self._sizes[name] += len(values)

    def complete(self, tokenizer_sha256: str) -> None:
        for name in _POSITIONS:
            self._files[name].write(np.array([self._sizes["tokens"]], POSITION).tobytes())
        self.close_files()
        self._counts.tofile(self.folder / "counts.bin")
        facts = {
            "version": VERSION,
            "dtype": self.type.name,
            **self._sizes,
            "vocabulary": len(self._counts),
            "group_name_bytes": self._name_end,
            "tokenizer_sha256": tokenizer_sha256,
        }
        durable.write_json(self.folder / "store.json", facts)

    def close_files(self) -> None:
        for file in self._files.values():
            file.close()


# ------------------------------------------------------------------------------------------------ read


@dataclass(frozen=True)
class TokenStore:
    """The tokens of one split, or a part of them. The arrays of `open_store` are memory maps.

    Attributes:
        tokens: (N,) ids. `read` copies a part of them.
        examples: (E + 1,) first token of every example, then N.
        document_starts, document_ends: (D,) first token of every document, and the end of it.
        group_starts: (R + 1,) first token of every run of examples of one group, then N.
        names: the names of the runs; None if they are not known.
        counts: (V,) how often each id occurs in the documents.
        characters: length of the text.
        file: descriptor of tokens.bin; None if the tokens are in memory.
    """

    tokens: np.ndarray
    examples: np.ndarray
    document_starts: np.ndarray
    document_ends: np.ndarray
    group_starts: np.ndarray
    names: Iterable[str] | None
    counts: np.ndarray
    characters: int
    file: "_File | None" = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the documents."""
        return int(self.counts.sum())

    def document_sizes(self, first: int, last: int) -> np.ndarray:
        """(last - first,) tokens of some documents."""
        return np.asarray(self.document_ends[first:last]) - np.asarray(self.document_starts[first:last])

    def read(self, start: int, end: int) -> np.ndarray:
        """(end - start,) a copy of some tokens.

        It reads the file instead of its memory map. The pages of a map that was read count as memory of the process.
        """
        if self.file is None:
            return self.tokens[start:end]
        return np.frombuffer(self.file.read(start, end), self.tokens.dtype)

    def group_names(self) -> Iterator[str]:
        """The name of every run of examples of one group, (R,)."""
        if self.names is None:
            raise ValueError("the groups of this text are not known")
        return iter(self.names)

    @cached_property
    def group_labels(self) -> np.ndarray:
        """(R,) int64, number of the group of each run, in the order of the sorted names. It holds all names once."""
        number = {name: i for i, name in enumerate(sorted(set(self.group_names())))}
        return np.fromiter((number[name] for name in self.group_names()), np.int64)

    def groups_at(self, tokens: np.ndarray) -> np.ndarray:
        """(B,) number of the group that each token belongs to; see `group_labels`."""
        return self.group_labels[np.searchsorted(self.group_starts, tokens, side="right") - 1]

    def without(self, left_out: np.ndarray) -> "TokenStore":
        """The text without some runs of groups, (R,) bool. A document is cut where a run is missing.

        It holds the documents and the ends of the runs, 8 bytes each, in memory.
        """
        # 1. Segments: stretches of one document and one run
        edges = np.union1d(np.asarray(self.document_starts), np.asarray(self.group_starts))
        starts, ends = edges[:-1], edges[1:]
        run = np.searchsorted(self.group_starts, starts, side="right") - 1
        kept = ~np.asarray(left_out)[run]

        # 2. A document of the result begins where one began, or after a segment that is left out
        begins = np.isin(starts, self.document_starts)
        begins[1:] |= ~kept[:-1]
        first = begins & kept
        last = kept & np.append(begins[1:] | ~kept[1:], True)
        return replace(
            self,
            document_starts=starts[first],
            document_ends=ends[last],
            counts=self._counted(starts[first], ends[last]),
        )

    def _counted(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(self.counts), np.int64)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            for at in range(start, end, SCAN):
                counts += np.bincount(self.read(at, min(at + SCAN, end)), minlength=len(counts))
        return counts


class _File:
    """A file of numbers that is read at positions. Several threads may read at the same time."""

    def __init__(self, path: Path, item_bytes: int):
        self._file, self._item_bytes = open(path, "rb", buffering=0), item_bytes  # noqa: SIM115 - open as long as the store

    def read(self, start: int, end: int) -> bytearray:
        data = bytearray((end - start) * self._item_bytes)
        view, at = memoryview(data), start * self._item_bytes
        while view:
            count = os.preadv(self._file.fileno(), [view], at)
            if not count:
                raise BadData(
                    f"{self._file.name} ends at byte {at:,}, while it is read; it was shortened. "
                    "Run `python 01_prepare_dataset.py --overwrite` again"
                )
            view, at = view[count:], at + count
        return data


class _Names:
    """Names in a file, read one after the other."""

    def __init__(self, folder: Path, ends: np.ndarray):
        self._path, self._ends = folder / "group_names.bin", ends

    def __iter__(self) -> Iterator[str]:
        with open(self._path, "rb") as file:
            before = 0
            for at in range(0, len(self._ends), SCAN):
                for end in self._ends[at : at + SCAN].tolist():
                    yield file.read(end - before).decode("utf-8")
                    before = end


def open_store(folder: Path) -> TokenStore:
    """The store in a folder, with its files mapped into memory.

    Raises:
        BadData: a file is missing or has another size than store.json says, or another version wrote the store.
    """
    facts = _facts(folder)
    dtype = np.dtype(facts["dtype"]).newbyteorder("<")
    tokens = _mapped(folder, "tokens", dtype, facts["tokens"])
    documents = _mapped(folder, "documents", POSITION, facts["documents"] + 1)
    ends = _mapped(folder, "group_name_ends", POSITION, facts["groups"])
    _check_size(folder / "group_names.bin", facts["group_name_bytes"])
    return TokenStore(
        tokens,
        _mapped(folder, "examples", POSITION, facts["examples"] + 1),
        documents[:-1],
        documents[1:],
        _mapped(folder, "groups", POSITION, facts["groups"] + 1),
        _Names(folder, ends),
        np.fromfile(_checked(folder, "counts", POSITION, facts["vocabulary"]), POSITION),
        facts["characters"],
        _File(folder / "tokens.bin", dtype.itemsize),
    )


def of_table(table: "pa.Table") -> TokenStore:
    """A store in memory, for small data: columns token_ids and continues and, if there are any, target and group."""
    import pyarrow.compute as pc

    ids, lengths = flatten(table["token_ids"])
    starts = np.cumsum(lengths) - lengths
    first = ~table["continues"].to_numpy(zero_copy_only=False)
    first[:1] = True
    documents = np.append(starts[first], len(ids))
    documents = documents[np.append(np.diff(documents) > 0, True)]
    groups = table["group"].to_pylist() if "group" in table.column_names else None
    characters = pc.sum(pc.utf8_length(table["target"])).as_py() if "target" in table.column_names else 0
    examples = np.append(starts, len(ids))
    counts = np.bincount(ids[ids >= 0]) if len(ids) else np.zeros(1, np.int64)
    return TokenStore(ids, examples, documents[:-1], documents[1:], examples, groups, counts, characters or 0)


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "store.json"
    try:
        facts = durable.read_json(path)
        version = facts["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}", "a description of the store") from None
    if version != VERSION:
        raise _damaged(path, f"version {version}", f"version {VERSION}")
    numbers = ("tokens", *_POSITIONS, "group_name_bytes", "vocabulary", "characters")
    wrong = [key for key in numbers if not isinstance(facts.get(key), int) or facts[key] < 0]
    if wrong or facts.get("dtype") not in ("uint16", "uint32"):
        raise _damaged(path, f"{(wrong or ['dtype'])[0]} is missing or wrong", "sizes of the files")
    return facts


def _mapped(folder: Path, name: str, dtype: np.dtype, count: int) -> np.ndarray:
    path = _checked(folder, name, dtype, count)
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)


def _checked(folder: Path, name: str, dtype: np.dtype, count: int) -> Path:
    path = folder / f"{name}.bin"
    _check_size(path, count * dtype.itemsize)
    return path


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise _damaged(path, "no file" if found is None else f"{found:,} bytes", f"{size:,} bytes")


def _damaged(path: Path, found: str, expected: str) -> BadData:
    return BadData(
        f"the token store is damaged: {path}: found {found}, expected {expected}; "
        "run `python 01_prepare_dataset.py --overwrite` again"
    )


def flatten(column: "pa.ChunkedArray") -> tuple[np.ndarray, np.ndarray]:
    """(all values, int64 lengths) of a list column."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    lengths = [np.diff(chunk.offsets.to_numpy()).astype(np.int64) for chunk in chunks]
    return (values[0] if len(values) == 1 else np.concatenate(values)), np.concatenate(lengths)
