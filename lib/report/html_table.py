"""Tables of the reports."""

import re
from html import escape

_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r"[-+–]?[\d.,]*%?")  # also the dash of a missing number


def table(head: list[str], rows: list[list[str]], classes: list[str] | None = None) -> str:
    """An HTML table that scrolls inside its own box. Columns of numbers are aligned to the right.

    Args:
        head: titles as plain text.
        rows: cells as HTML.
        classes: the CSS class of each row; "" for none.
    """
    kinds = [_kind([row[i] for row in rows]) for i in range(len(head))]
    titles = "".join(f'<th class="{kind}">{escape(h)}</th>' for h, kind in zip(head, kinds, strict=True))
    body = ""
    for i, row in enumerate(rows):
        name = f' class="{classes[i]}"' if classes and classes[i] else ""
        cells = "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(row, kinds, strict=True))
        body += f"<tr{name}>{cells}</tr>"
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def interval(text: str) -> str:
    """A cell with the ends of an interval, in a lighter colour."""
    return f'<span class="interval">{escape(text)}</span>'


def _kind(cells: list[str]) -> str:
    """`number` if all cells with text are numbers, `text` otherwise."""
    texts = [text for cell in cells if (text := _TAG.sub("", cell).strip())]
    return "number" if texts and all(_NUMBER.fullmatch(text) for text in texts) else "text"
