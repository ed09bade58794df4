"""Tables of the report's pages."""

from html import escape


def table(head: list[str], rows: list[list[str]], classes: list[str] | None = None) -> str:
    """Cells are HTML already. Numbers are set to the right by their look."""
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = ""
    for i, row in enumerate(rows):
        name = f' class="{classes[i]}"' if classes and classes[i] else ""
        body += f"<tr{name}>" + "".join(f'<td class="{_kind(c)}">{c}</td>' for c in row) + "</tr>"
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _kind(cell: str) -> str:
    return "number" if cell[:1].isdigit() or cell[:1] in "-+–" else "text"
