"""Token surfaces: the text of each token of a Hugging Face tokenizer, and the spaces around it.

Tokenizers mark spaces in one of four ways:

- a space inside the token: byte-level BPE, `▁` of SentencePiece;
- a prefix of tokens that continue a word: `##` of WordPiece;
- a suffix of tokens that end a word: `</w>`;
- no mark at all: tokenizers of characters or of whole words.

`Surfaces` describes all four in the same way.

Legend: V ids, from 0 to the largest of the vocabulary.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CLOSING = frozenset(".,;:!?%…")  # no space before these, nor before closing brackets and quotes
RESERVED = re.compile(r"[\[<]\W*(unused|extra_id|reserved|dummy)\w*\W*[\]>]|madeupword\d+")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Surfaces:
    """The surfaces of all V ids.

    Attributes:
        cores: the bytes of each token without a space in front. None for special, added and reserved tokens, and for ids
            without a token: these are never generated.
        begins: (V,) bool, a space precedes the token.
        ends: (V,) bool, a space follows it.
        opens: (V,) bool, no space follows it.
        blank: (V,) bool, the token is only white space.
        writable: (V,) bool, the token has visible text and no white space other than single spaces between words.
        partial: (V,) bool, its bytes are not whole characters.
        writes_spaces: the space before a word is part of its token.
        says_spaces: tokens determine where spaces are; False for tokenizers of characters and of whole words.
    """

    cores: list[bytes | None]
    begins: np.ndarray
    ends: np.ndarray
    opens: np.ndarray
    blank: np.ndarray
    writable: np.ndarray
    partial: np.ndarray
    writes_spaces: bool
    says_spaces: bool
    _readable: dict[frozenset[str], np.ndarray] = field(default_factory=dict, repr=False)  # cache

    @classmethod
    def of(cls, tokenizer: Any) -> "Surfaces":
        """The surfaces of a fast tokenizer, cached on it."""
        if not hasattr(tokenizer, "_remask_surfaces"):
            tokenizer._remask_surfaces = cls._read(tokenizer)
        return tokenizer._remask_surfaces

    @classmethod
    def _read(cls, tokenizer: Any) -> "Surfaces":
        marks = _SpaceMarks.of(json.loads(tokenizer.backend_tokenizer.to_str()))
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        closed = closed_ids(tokenizer)
        size = max(vocabulary.values()) + 1
        cores: list[bytes | None] = [None] * size
        begins, ends, opens, blank, writable, partial = np.zeros((6, size), bool)
        for token, i in vocabulary.items():
            if i in closed or RESERVED.fullmatch(token):
                continue
            core, begins[i], ends[i] = marks.read(token)
            cores[i] = core
            text = core.decode("utf-8", "replace")
            partial[i] = core.decode("utf-8", "ignore").encode() != core
            blank[i] = not partial[i] and not text.strip()
            opens[i] = marks.prefix is not None and _is_opening(text)
            writable[i] = partial[i] or _is_readable(text)
        return cls(
            cores, begins, ends, opens, blank, writable, partial,
            writes_spaces=marks.byte_level or marks.space is not None,
            says_spaces=marks.byte_level or any(m is not None for m in (marks.space, marks.prefix, marks.suffix)),
        )  # fmt: skip

    def readable_by(self, characters: frozenset[str] | None) -> np.ndarray:
        """(V,) bool, the writable ids that consist of these characters; None: of any characters."""
        if characters is None:
            return self.writable
        if characters not in self._readable:
            readable = self.writable.copy()
            for i in np.flatnonzero(readable & ~self.partial):
                core = self.cores[i]
                readable[i] = core is not None and characters.issuperset(core.decode())
            self._readable[characters] = readable
        return self._readable[characters]

    def write(self, ids: list[int]) -> str | None:
        """The text of consecutive tokens without the space in front; None if their bytes are not whole characters."""
        parts: list[bytes] = []
        for number, i in enumerate(ids):
            core = self.cores[i]
            if core is None:
                return None
            if number and (self.begins[i] or self.ends[ids[number - 1]]) and not self.opens[ids[number - 1]]:
                parts.append(b" ")
            parts.append(core)
        try:
            return b"".join(parts).decode("utf-8")
        except UnicodeDecodeError:
            return None


def closed_ids(tokenizer: Any) -> set[int]:
    """Ids of special and added tokens, which no text contains."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


@dataclass(frozen=True)
class _SpaceMarks:
    """How a tokenizer represents spaces and bytes in its tokens."""

    byte_level: bool
    byte_fallback: bool
    space: str | None  # the character that represents a space
    prefix: str | None  # of tokens that continue a word
    suffix: str | None  # of tokens that end one

    @classmethod
    def of(cls, state: dict[str, Any]) -> "_SpaceMarks":
        model = state["model"]
        parts = [p for name in ("decoder", "pre_tokenizer", "normalizer") for p in _parts(state.get(name))]
        types = {part["type"] for part in parts}
        byte_level = "ByteLevel" in types
        spaces = [p["replacement"] for p in parts if p["type"] == "Metaspace"]
        spaces += [
            p["content"]
            for p in parts
            if p["type"] == "Replace" and p["pattern"] == {"String": " "} and p["content"]
        ]
        decoder = {p["type"]: p for p in _parts(state.get("decoder"))}
        prefix = model.get("continuing_subword_prefix") or decoder.get("WordPiece", {}).get("prefix")
        suffix = model.get("end_of_word_suffix") or decoder.get("BPEDecoder", {}).get("suffix")
        return cls(
            byte_level,
            bool(model.get("byte_fallback")) or "ByteFallback" in types,
            spaces[0] if spaces and not byte_level else None,
            None if byte_level or spaces else prefix or None,
            None if byte_level or spaces or prefix else suffix or None,
        )

    def read(self, token: str) -> tuple[bytes, bool, bool]:
        """(bytes without the space in front, whether a space precedes, whether a space follows)."""
        if self.byte_level and all(c in _BYTES for c in token):
            return _without_space(bytes(_BYTES[c] for c in token))
        if self.byte_fallback and (found := _BYTE.fullmatch(token)):
            return _without_space(bytes([int(found[1], 16)]))
        if self.space is not None:
            return _without_space(token.replace(self.space, " ").encode())
        if self.prefix is not None:
            continues = token.startswith(self.prefix) and token != self.prefix
            core = token[len(self.prefix) :] if continues else token
            return core.encode(), not continues and not _is_closing(core), False
        if self.suffix is not None and token.endswith(self.suffix):
            return token[: -len(self.suffix)].encode(), False, True
        return token.encode(), False, False


def _without_space(surface: bytes) -> tuple[bytes, bool, bool]:
    return (surface[1:], True, False) if surface.startswith(b" ") else (surface, False, False)


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """All components of a part of a tokenizer, including those of sequences."""
    if isinstance(node, dict):
        if "type" in node:
            yield node
        for value in node.values():
            yield from _parts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _parts(value)


def _is_closing(text: str) -> bool:
    return len(text) == 1 and (text in CLOSING or unicodedata.category(text) in ("Pe", "Pf"))


def _is_opening(text: str) -> bool:
    return len(text) == 1 and unicodedata.category(text) in ("Ps", "Pi")


def _is_readable(text: str) -> bool:
    """Whether a text has a visible character and no white space other than single spaces between words."""
    if " ".join(text.split()) != text or "\ufffd" in text:
        return False
    return any(not unicodedata.category(c).startswith("C") for c in text if c != " ")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token represents (GPT-2). Printable characters represent themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_alphabet()
