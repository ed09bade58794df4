"""The token store: the same windows as from a table, whatever the batches; damage is named; sizes beyond 2^31 tokens."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lib import durable, token_store
from lib.errors import BadData
from lib.token_store import TokenStore, TokenStoreWriter, of_table, open_store, token_type
from lib.training import data
from lib.training.data import Windows, first_lengths

SPLITS = ("train", "selection", "held_out")
VOCABULARY = 50


def examples(seed: int, count: int = 400, vocabulary: int = VOCABULARY) -> pa.Table:
    """Random examples of three splits: documents of some passages, some of them empty, and groups that come back."""
    rng, rows, group = np.random.default_rng(seed), [], 0
    while len(rows) < count:
        split = str(rng.choice(SPLITS, p=(0.6, 0.2, 0.2)))
        for number in range(int(rng.integers(1, 12))):
            group = int(rng.integers(0, 40)) if rng.random() < 0.4 else group
            size = int(rng.choice([0, 1, 3, 7, 8, 9, 40]))
            ids = rng.integers(4, vocabulary, size)
            rows.append(
                {"target": "é" * size, "split": split, "group": f"g{group}ü", "continues": number > 0, "token_ids": ids.tolist()}
            )  # fmt: skip
    columns = pa.schema([("target", pa.large_string()), ("split", pa.string()), ("group", pa.string()),
                         ("continues", pa.bool_()), ("token_ids", pa.list_(pa.int32()))])  # fmt: skip
    return pa.Table.from_pylist(rows, columns)


def of_split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pa.array([name == split for name in table["split"].to_pylist()]))


def write(folder: Path, table: pa.Table, rows: int = 37, vocabulary: int = VOCABULARY) -> list[str]:
    """Write the stores of a table in pieces of `rows` rows."""
    with TokenStoreWriter(folder, vocabulary, "abc") as writer:
        for start in range(0, table.num_rows, rows):
            writer.add(table.slice(start, rows))
    return writer.splits


class TableWindows:
    """The windows of a table, held in memory as one array per property: the reference."""

    def __init__(self, table: pa.Table, width: int):
        lists = table["token_ids"].to_pylist()
        self.ids, lengths = np.array([i for row in lists for i in row]), np.array([len(row) for row in lists])
        self.example_starts, self.width = np.cumsum(lengths) - lengths, width
        first = ~table["continues"].to_numpy(zero_copy_only=False)
        first[0] = True
        starts = self.example_starts[first]
        sizes = np.diff(np.append(starts, len(self.ids)))
        self.starts, self.sizes = starts[sizes > 0], sizes[sizes > 0]

    def spans(self, tiled: bool, cut_position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, first token, end) of every window; `cut_position` of every document."""
        windows, shortest, longest = first_lengths(self.sizes, self.width)
        if tiled:
            windows, shortest = -(-self.sizes // self.width), np.minimum(self.sizes, self.width)
            longest = shortest
        found = []
        for d, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            cut = start + shortest[d] + int(np.floor(cut_position[d] * (longest[d] - shortest[d] + 1)))
            edges = [start, *(min(cut + n * self.width, start + size) for n in range(windows[d]))]
            found += [(d, a, b) for a, b in itertools.pairwise(edges)]
        document, first, end = (np.array(column) for column in zip(*found, strict=True))
        return document, first, end


@pytest.mark.parametrize(("block", "rows"), [(256, 37), (4, 1), (1, 400)])
def test_windows_of_a_store_equal_those_of_the_table(tmp_path, monkeypatch, block, rows):
    monkeypatch.setattr(data, "BLOCK", block)
    monkeypatch.setattr(data, "SCAN", 3 * block)
    table = examples(seed=block)
    assert write(tmp_path, table, rows) == sorted(SPLITS)
    for split in SPLITS:
        part = of_split(table, split)
        reference, store = TableWindows(part, 8), open_store(tmp_path / split)
        for windows in (Windows(store, 8, 0), Windows(part, 8, 0)):
            assert windows.documents == len(reference.sizes) > 4
            for tiled in (False, True):
                windows = windows.tiled() if tiled else windows
                index = np.arange(windows.count)
                cuts = windows.cut_positions(5, "m window", index, np.full(len(index), 3))
                of_document = np.zeros(windows.documents)
                of_document[windows.document] = cuts
                document, start, end = reference.spans(tiled, of_document)
                assert windows.document.tolist() == document.tolist()
                order = np.random.default_rng(0).permutation(len(index))  # a batch in any order
                ids, valid = windows.batch(index[order], cuts[order])
                for row, here, at in zip(ids, valid, order, strict=True):
                    assert row[here].tolist() == reference.ids[start[at] : end[at]].tolist()
                assert (ids[~valid] == 0).all()
            assert (
                windows.owner.tolist()
                == (np.searchsorted(reference.example_starts, start, "right") - 1).tolist()
            )
            names = np.asarray(part["group"].to_pylist())[windows.owner]
            every = np.unique(part["group"].to_pylist())
            assert every[windows.groups(index)].tolist() == names.tolist()
        assert store.characters == sum(len(text) for text in part["target"].to_pylist())
        assert store.num_tokens == len(reference.ids) == len(store.tokens)
        assert np.array_equal(store.counts, np.bincount(reference.ids, minlength=VOCABULARY))


def test_the_bytes_of_a_store_do_not_depend_on_the_batches(tmp_path):
    table, hashes = examples(3), set()
    for rows in (1, 7, 400):
        write(tmp_path / str(rows), table, rows)
        hashes.add(durable.sha256_folder(tmp_path / str(rows)))
    assert len(hashes) == 1


def test_ids_take_the_fewest_bytes_that_hold_them(tmp_path):
    assert [token_type(v).name for v in (10, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]
    for vocabulary in (2**16, 2**16 + 1):
        table = pa.table({
            "target": ["x", "y"], "split": ["train"] * 2, "group": ["a", "b"], "continues": [False, False],
            "token_ids": pa.array([[4, vocabulary - 1], [5]], pa.list_(pa.int32())),
        })  # fmt: skip
        write(tmp_path / str(vocabulary), table, vocabulary=vocabulary)
        store = open_store(tmp_path / str(vocabulary) / "train")
        assert store.read(0, 3).tolist() == store.tokens.tolist() == [4, vocabulary - 1, 5]
        assert store.tokens.dtype.itemsize == (2 if vocabulary == 2**16 else 4)


def test_a_text_without_some_groups_is_cut_where_they_were(tmp_path):
    table = examples(8)
    write(tmp_path, table)
    part, store = of_split(table, "train"), open_store(tmp_path / "train")
    left_out = np.array([name.startswith(("g1", "g2")) for name in store.group_names()])
    # The reference: rows are removed, and a row whose predecessor is removed continues nothing
    filled = np.array([len(ids) > 0 for ids in part["token_ids"].to_pylist()])
    documents = np.cumsum(~part["continues"].to_numpy(zero_copy_only=False))[filled]
    part = part.filter(pa.array(filled))
    kept = ~np.array([name.startswith(("g1", "g2")) for name in part["group"].to_pylist()])
    joined = np.append(False, (documents[1:] == documents[:-1]) & kept[:-1])
    expected = Windows(part.set_column(3, "continues", pa.array(joined)).filter(pa.array(kept)), 8, 0)
    found = Windows(store.without(left_out), 8, 0)
    assert 0 < found.documents == expected.documents and found.count == expected.count
    index, cuts = np.arange(found.count), np.full(found.count, 0.6)
    for one, other in zip(found.batch(index, cuts), expected.batch(index, cuts), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.text.counts, np.bincount(expected.ids, minlength=VOCABULARY))
    everything = Windows(store.without(np.zeros(len(left_out), bool)), 8, 0)
    assert everything.count == Windows(store, 8, 0).count


# ----------------------------------------------------------------------------------------------- damage


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "name", ["tokens", "examples", "documents", "groups", "group_names", "group_name_ends", "counts"]
)
def test_a_file_of_another_size_is_named(tmp_path, name):
    write(tmp_path, examples(1))
    path = tmp_path / "train" / f"{name}.bin"
    _cut(path)
    with pytest.raises(
        BadData, match=rf"store is damaged: .*{name}.bin: found [\d,]+ bytes, expected .*--overwrite"
    ):
        open_store(tmp_path / "train")
    path.unlink()
    with pytest.raises(BadData, match=rf"{name}.bin: found no file, expected"):
        open_store(tmp_path / "train")


def test_a_damaged_description_is_named(tmp_path):
    write(tmp_path, examples(1))
    path = tmp_path / "train" / "store.json"
    facts = json.loads(path.read_text())
    for content in ("{", "[]", "{}", json.dumps(facts | {"version": 2})):
        path.write_text(content)
        with pytest.raises(BadData, match=r"store is damaged: .*store.json: found .*, expected"):
            open_store(tmp_path / "train")


def test_a_file_that_is_shortened_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    write(tmp_path, examples(1))
    store = open_store(tmp_path / "train")
    os.truncate(tmp_path / "train" / "tokens.bin", 100)
    with pytest.raises(BadData, match="ends at byte 100, while it is read"):
        store.read(40, 80)


def test_an_error_while_examples_are_made_leaves_no_store(tmp_path):
    table = examples(1)
    with pytest.raises(KeyError), durable.replacing_folder(tmp_path / "tokens") as folder:  # noqa: SIM117
        with TokenStoreWriter(folder, VOCABULARY, "abc") as writer:
            writer.add(table)
            writer.add(table.drop_columns(["group"]))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- large sizes


def sparse(folder: Path, documents: list[int], known: dict[int, list[int]]) -> TokenStore:
    """A store of uint16 tokens that are all 0, except those at some positions. Its file takes little room on the disk."""
    folder.mkdir()
    ends = np.cumsum(documents)
    bounds = np.append(0, ends).astype("<i8")
    with open(folder / "tokens.bin", "wb") as file:
        file.truncate(2 * int(ends[-1]))
        for at, ids in known.items():
            file.seek(2 * at)
            file.write(np.array(ids, "<u2").tobytes())
    names = [f"d{i}" for i in range(len(documents))]
    name_ends = np.cumsum([len(name) for name in names])
    for name in ("examples", "documents", "groups"):
        bounds.tofile(folder / f"{name}.bin")
    name_ends.astype("<i8").tofile(folder / "group_name_ends.bin")
    (folder / "group_names.bin").write_text("".join(names))
    np.array([ends[-1], 0, 0, 0, 0, 1], "<i8").tofile(folder / "counts.bin")
    sizes = dict.fromkeys(("examples", "documents", "groups"), len(documents))
    facts = {"version": 1, "dtype": "uint16", "tokens": int(ends[-1]), "characters": 0, "vocabulary": 6,
             "group_name_bytes": int(name_ends[-1]), **sizes}  # fmt: skip
    (folder / "store.json").write_text(json.dumps(facts))
    return open_store(folder)


def test_a_split_and_a_document_beyond_two_to_the_31_tokens(tmp_path):
    """Nothing is 32 bits wide: windows on both sides of 2^31 and 2^32 tokens have the tokens of their place."""
    big, width = 2**32 + 2**31, 512
    known = {at: [1, 2, 3, 4, 5] for at in (0, 2**31 - 2, 2**32 - 3, 7 + big + 1000 - 5)}
    store = sparse(tmp_path / "train", [7, big, 1000], known)
    assert os.stat(tmp_path / "train" / "tokens.bin").st_blocks * 512 < 2**20
    tiles = Windows(store, width, 9).tiled()
    assert tiles.count == 1 + big // width + 2 and tiles.documents == 3
    for at, ids in known.items():
        inside = 0 if at < 7 else 1 + (at - 7) // width if at < 7 + big else tiles.count - 1
        rows, _ = tiles.batch(np.array([inside, min(inside + 1, tiles.count - 1)]), np.zeros(2))
        start, _ = tiles.spans(np.array([inside]), np.zeros(1))
        assert rows.reshape(-1)[at - start[0] :][:5].tolist() == ids
    assert tiles.groups(np.array([0, 1, tiles.count - 3, tiles.count - 2])).tolist() == [0, 1, 1, 2]

    windows = Windows(store, width, 9)
    last = windows.count - 3  # windows of the last document: 2, of the one before it: all others but one
    start, end = windows.spans(np.array([1, last]), np.array([0.5, 0.5]))
    assert start[0] == 7 and end[1] == 7 + big and 2**32 < start[1] < end[1]
    order = data.Rows(1, "order", windows.count).samples(
        np.arange(3 * windows.count - 50, 3 * windows.count + 50)
    )
    assert len(set(order[:50])) == len(set(order[50:])) == 50 and order.max() > 2**22
    windows.batch(order, np.zeros(len(order)))


def test_a_store_of_a_table_counts_like_the_table():
    table = of_split(examples(4), "train")
    store = of_table(table)
    ids = [i for row in table["token_ids"].to_pylist() for i in row]
    assert store.num_tokens == len(ids) and store.read(3, 9).tolist() == ids[3:9]
    assert token_store.POSITION.itemsize == 8
