"""Values in the rows of a file with candidates: texts, chats, lists and numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from lib.user_files.faults import Fault


class RowFault(Exception):
    """A row cannot be read as the layout says. `fault` says why."""

    def __init__(self, fault: Fault):
        super().__init__(fault.found)
        self.fault = fault


def as_list(value: Any) -> list[Any]:
    """A list of texts or chats; a single one becomes a list of one, and None an empty list."""
    if value is None:
        return []
    if isinstance(value, list | tuple) and not is_chat(value):
        return list(value)
    return [value]


def is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages: {"role": ..., "content": ...}."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(turn, Mapping) and "content" in turn for turn in value)
    )


def chat_text(chat: Sequence[Mapping[str, Any]]) -> str:
    """The text of chat messages: the content of a single message, otherwise a line `role: content` for each."""
    if len(chat) == 1:
        return str(chat[0]["content"])
    return "\n".join(f"{turn.get('role', 'user')}: {turn['content']}" for turn in chat)


def parsed_number(text: str) -> float | str | None:
    """The number that a text states; None for an empty text, and the text itself if it states none."""
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return text


def described(value: Any) -> str:
    """A value in a message: its type and its beginning."""
    return "no value" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
