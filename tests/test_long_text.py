"""Texts that are read in pieces: the same findings and the same text as in one piece, and no run of spaces is cut."""

import gzip
import hashlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.config import load_config
from lib.digest_table import DigestTable, digest
from lib.errors import CannotWrite
from lib.tasks import Document, Dropped, Example
from lib.tasks.text import check, prepare
from lib.tasks.text.check import squeeze, squeeze_inside, text_digest
from lib.user_files import decoding, long_text
from lib.user_files.decoding import Cleaner, clean_text
from lib.user_files.long_text import cut

raw = sys.modules["lib.tasks.text.raw"]
ODD = st.text(alphabet="ab \n\t\r\x07\x0b\x85\ufeff\ufffd\ud800é", max_size=120)
WORDS = st.text(alphabet="ab \n\t", max_size=400)
SENTENCE = "Sentence {} of a text that is long enough to be read in several pieces.\n"


def divided(text: str, at: list[int]) -> list[str]:
    edges = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]  # noqa: RUF007 - pieces may be empty


@given(ODD, st.lists(st.integers(0, 200), max_size=4))
def test_a_text_is_cleaned_alike_in_any_pieces(text, at):
    cleaner = Cleaner()
    pieces = [cleaner.clean(piece, is_last=False) for piece in divided(text, at)]
    found = "".join([*pieces, cleaner.clean("", is_last=True)])
    assert (found, cleaner.faults()) == clean_text(text)


@given(WORDS, st.lists(st.integers(0, 400), max_size=4))
def test_the_digest_is_the_same_in_any_pieces(text, at):
    normal = " ".join(text.split())
    expected = hashlib.blake2b(normal.encode(), digest_size=16).digest(), len(normal)
    assert text_digest(divided(text, at)) == text_digest([text]) == expected


@given(WORDS, st.integers(8, 40), st.lists(st.integers(0, 400), max_size=4))
def test_a_cut_text_is_whole_and_its_pieces_end_behind_white_space(text, size, at):
    pieces = list(cut(divided(text, at), size))
    assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces)
    for piece, following in zip(pieces[:-1], pieces[1:], strict=True):  # noqa: RUF007
        half = piece[size // 2 :]
        if any(a.isspace() and not b.isspace() for a, b in zip(half, half[1:] + following[0], strict=True)):
            assert piece[-1].isspace() and not following[0].isspace()
        elif not half.isspace():
            assert not (piece[-1].isspace() and following[0].isspace())


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=9), max_size=60), st.randoms(use_true_random=False)
)
def test_pieces_are_squeezed_like_the_whole_text(words, random):
    spaces = [" ", "  ", "\t", "\n", " \n  ", "\n\n\n", "\n \n\t\n", "\n\n"]  # shorter than half a piece
    text = "".join(word + random.choice(spaces) for word in words)
    pieces = list(cut([text], 24))
    assert "".join(squeeze_inside(piece) for piece in pieces).strip() == squeeze(text)


# ------------------------------------------------------------------------------------- stage 00


def findings(path: Path, **data) -> tuple[dict[str, str], list]:
    """(name -> text, problems) of a file or folder."""
    base = load_config()
    config = base.model_copy(update={"data": base.data.model_copy(update={"path": str(path)} | data)})
    texts, problems = {}, []
    for item in check(config):
        if isinstance(item, Document):
            pieces = texts.setdefault(item.document_id, [])
            assert item.piece == len(pieces)
            pieces.append(item.content)
        else:
            problems.append(item)
    return {name: "".join(pieces) for name, pieces in texts.items()}, problems


def in_small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(raw, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(decoding, "PIECE_BYTES", 97)


PROSE = "".join(SENTENCE.format(i) + "\n" * (i % 4) + "  " * (i % 3) for i in range(400))
CONTENTS = {
    "plain": PROSE.encode(),
    "mark": b"\xef\xbb\xbf" + PROSE.encode(),
    "unix": PROSE.replace("\n", "\r\n").encode(),
    "control": PROSE.replace("text", "te\x07xt\x0c").encode(),
    "lost": PROSE.replace("of", "\ufffd").encode(),
    "letters": PROSE.replace("e", "é").encode(),
    "latin": PROSE.replace("e", "é").encode("latin1"),
    "one byte": (PROSE.encode() + b"\x93 " + PROSE.encode()),
    "cut letter": (PROSE + "é").encode()[:-1],
    "zero": PROSE.encode()[:500] + b"\x00" + PROSE.encode(),
    "wide": PROSE.encode("utf-16"),
    "white": b" \n" * 2000,
    "no white": b"x" * 5000,
    "front": b"\n \n" * 900 + PROSE.encode() + b"  \n" * 900,
}


@pytest.mark.parametrize("whitespace", ["keep", "squeeze"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_long_text_has_the_same_findings_as_in_one_piece(tmp_path, monkeypatch, name, whitespace):
    (tmp_path / "a.txt").write_bytes(CONTENTS[name])
    (tmp_path / "b.txt").write_text(PROSE.replace("Sentence", "Other"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(CONTENTS[name]))  # a repeated text
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(PROSE.encode())[:-9])
    texts, problems = findings(tmp_path, whitespace=whitespace)
    in_small_pieces(monkeypatch)
    found, same = findings(tmp_path, whitespace=whitespace)
    assert found == texts and same == problems and "b" in texts
    assert name in ("latin", "one byte", "cut letter", "zero", "wide", "white") or "a" in texts


def test_long_rows_come_in_pieces_too(tmp_path, monkeypatch):
    import json

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": PROSE}))
    whole, _ = findings(tmp_path / "a.jsonl")
    in_small_pieces(monkeypatch)
    assert findings(tmp_path / "a.jsonl")[0] == whole


def test_a_packed_text_beyond_the_limit_is_still_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(PROSE.encode()))
    monkeypatch.setattr(decoding, "MAX_BYTES", 20_000)
    in_small_pieces(monkeypatch)
    _, problems = findings(tmp_path / "a.txt.gz")
    assert "too long" in [p.kind for p in problems]


# ------------------------------------------------------------------------------------- stage 01


def prepared(pieces: list[str], **data) -> tuple[list[Example], list[Dropped]]:
    base = load_config()
    config = base.model_copy(update={"data": base.data.model_copy(update=data)})
    items = list(prepare(config, [Document("d", piece, "f", number) for number, piece in enumerate(pieces)]))
    return [i for i in items if isinstance(i, Example)], [i for i in items if isinstance(i, Dropped)]


SIZES = {"block_characters": 400, "passage_characters": 64}


@pytest.mark.parametrize("data", [
    {"passages": "fixed"}, {"passages": "paragraph"}, {"split": "contiguous"}, {"split_unit": "document"},
    {"deduplicate": "none"},
], ids=str)  # fmt: skip
def test_a_document_in_pieces_is_one_document(data):
    """Every character is in one example or left out; blocks, names and `continues` go on across the pieces."""
    text = PROSE + PROSE[:3000]  # some paragraphs are repeated
    pieces = list(cut([text], 1000))
    assert len(pieces) > 20
    examples, dropped = prepared(pieces, **SIZES, **data)
    assert len({e.example_id for e in examples}) == len(examples)
    assert [e.example_id for e in examples] == [f"d:{i}" for i in range(len(examples))]

    # The spans of all parts cover the text once, each at the place that its name or its predecessor says
    at, previous, covered, left = 0, None, [], {int(d.example_id[2:]): d.text for d in dropped}
    for example in examples:
        while not example.continues and at in left:
            covered.append(left.pop(at))
            at += len(covered[-1])
        assert text[at : at + len(example.target)] == example.target
        if previous is not None and example.continues:
            assert previous.split == example.split
        covered.append(example.target)
        at, previous = at + len(example.target), example
    while at in left:
        covered.append(left.pop(at))
        at += len(covered[-1])
    assert "".join(covered) == text and not left
    # A group is a block of the document, and no block is in two groups
    if "split_unit" not in data:
        numbers = [int(e.group.split(":")[1].split("/")[0]) for e in examples]
        assert numbers == sorted(numbers) and len(set(numbers)) > 30
    # A piece that goes on in the same split continues the one before it
    edges = {sum(map(len, pieces[:i])) for i in range(1, len(pieces))}
    starts = dict(zip([sum(map(len, covered[:i])) for i in range(len(covered))], covered, strict=True))
    if data.get("split") == "contiguous" or "split_unit" in data:
        first = [e for e in examples if e.continues and any(starts.get(edge) == e.target for edge in edges)]
        assert len(first) > len(edges) // 2


def test_one_piece_is_what_it_has_always_been():
    examples, _ = prepared([PROSE], **SIZES)
    again, _ = prepared(list(cut([PROSE])), **SIZES)
    assert examples == again


# ------------------------------------------------------------------------------------- digests


def test_a_digest_table_keeps_the_first_value():
    with DigestTable() as table:
        assert table.get(digest("a")) is None and table.add(digest("a"), "first")
        assert not table.add(digest("a"), "second") and table.get(digest("a")) == "first"
        table.set(digest("a"), 7)
        assert table.get(digest("a")) == 7
        new = [table.add(digest(str(i % 1000))) for i in range(3000)]
        assert sum(new) == 1000 and all(new[:1000])


def test_a_digest_table_that_cannot_be_written_says_what_to_do(monkeypatch, tmp_path):
    import lib.digest_table as module

    monkeypatch.setattr(module, "CACHE_BYTES", 2**12)
    with (
        DigestTable() as table,
        pytest.raises(CannotWrite, match="make room in the folder of temporary files"),
    ):
        table._database.execute("PRAGMA max_page_count = 8")
        for i in range(10_000):
            table.add(digest(str(i)))
