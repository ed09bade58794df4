"""Texts that are longer than what is held in memory: read, cleaned and cut in pieces."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib.user_files.decoding import MARK_FAULT, Cleaner, decoded_pieces
from lib.user_files.faults import Fault

PIECE_CHARACTERS = 2**22  # the longest text that is one piece
_PARAGRAPH = re.compile(r"\n(?:[ \t]*\n)+(?=\S)")
_BYTE_ORDER_MARK = "\ufeff"


class LongText:
    """The text of a .txt file that is longer than one piece. It is read again each time it is iterated over.

    Attributes:
        faults: what was changed in it; complete after the first pass.
    """

    def __init__(self, path: Path):
        self.path = path
        self.faults: list[Fault] = []

    def __iter__(self) -> Iterator[str]:
        """Clean text, in pieces as they are read. Raises OSError, and UnreadableFile."""
        cleaner, marked = Cleaner(), False
        for number, text in enumerate(decoded_pieces(self.path)):
            if not number:
                marked, text = text.startswith(_BYTE_ORDER_MARK), text.removeprefix(_BYTE_ORDER_MARK)
            yield cleaner.clean(text, is_last=False)
        yield cleaner.clean("", is_last=True)
        self.faults = [MARK_FAULT] * marked + cleaner.faults()


def cut(texts: Iterable[str], size: int | None = None) -> Iterator[str]:
    """The text as pieces of at most `size` characters, PIECE_CHARACTERS by default.

    A piece ends at a paragraph end in its second half or, without one, behind the last white space there. Text without
    white space is cut anywhere. No run of white space is cut, except one that is longer than half a piece.
    """
    size = size or PIECE_CHARACTERS
    waiting = ""
    for text in texts:
        waiting += text
        while len(waiting) > size:
            end = _end_of_piece(waiting, size)
            yield waiting[:end]
            waiting = waiting[end:]
    if waiting:
        yield waiting


def _end_of_piece(text: str, size: int) -> int:
    end = 0
    for match in _PARAGRAPH.finditer(text, size // 2, size):
        end = match.end()
    if end:
        return end
    for end in range(size, size // 2, -1):
        if text[end - 1].isspace() and not text[end].isspace():
            return end
    end = size  # it may be in a run of white space that goes on behind it
    while end > size // 2 and text[end - 1].isspace() and text[end].isspace():
        end -= 1
    return end if end > size // 2 else size
