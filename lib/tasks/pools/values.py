"""Values in the rows of a file with candidates: texts, chats, lists and numbers."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from lib.user_files.faults import Fault

# A turn of a chat that is one text, as in the data set HH-RLHF of Anthropic
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


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
        return _content(chat[0])
    return "\n".join(f"{turn.get('role', 'user')}: {_content(turn)}" for turn in chat)


def _content(turn: Mapping[str, Any]) -> str:
    """The text of a message, which may be a list of parts. Raises RowFault if it is no text."""
    content = turn["content"]
    parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    for part in parts:
        said = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if not isinstance(said, str) or not isinstance(part, Mapping):
            kind = "null text" if said is None else "not text"
            where = "under 'content' of a message"
            raise RowFault(Fault(kind, f"{described(said)} {where}", f"a text {where}", "fix the row"))
    return "".join(part["text"] for part in parts)


def turns_of(text: str) -> list[dict[str, str]] | None:
    """The turns of a chat that is one text, "Human: ...", an empty line, "Assistant: ..."; None if it is no such text."""
    before, *parts = _SPEAKER.split(text.strip())
    if before or parts[:1] != ["Human"] or "Assistant" not in parts[2::2]:
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": said.strip()} for speaker, said in turns]


def without_shared_turns(prompt: str | None, sides: list[list[Any]]) -> tuple[str | None, list[list[Any]]]:
    """(prompt, sides) where the turns that all chats of the sides begin with are the prompt, as in TRL's implicit prompts.

    A prompt that the row states stays where it holds these turns, is replaced where it is only one of several, and else stands
    before them. Sides that are not chats stay as they are, and so do chats that continue the prompt with a turn of the
    assistant.
    """
    read: list[list[Any]] = [[(isinstance(v, str) and turns_of(v)) or v for v in side] for side in sides]
    chats = [chat for side in read for chat in side]
    if not all(read) or not all(is_chat(chat) for chat in chats):
        return prompt, sides
    shared = 0
    while all(len(chat) > shared + 1 and chat[shared] == chats[0][shared] for chat in chats):
        shared += 1
    turns = chats[0][:shared]
    if not turns or (prompt is not None and turns[0].get("role") == "assistant"):
        return prompt, read
    if prompt is None or any(prompt.strip() == _content(turn).strip() for turn in turns):
        prompt = chat_text(turns)
    elif not all(_content(turn).strip() in prompt for turn in turns):
        prompt = f"{prompt}\n{chat_text(turns)}"
    return prompt, [[chat[shared:] for chat in side] for side in read]


def is_visible(text: str) -> bool:
    """Whether a text has a character that tokenizers keep: none of controls, formats, white space and lone marks.

    Nor the sign that stands for a damaged character.
    """
    return any(unicodedata.category(c)[0] not in "CZM" and c != "\ufffd" for c in text)


def identity(text: str) -> str:
    """What two candidates have in common if they are the same: the text without white space at the ends of its lines.

    Other white space counts, since the indentation of code has a meaning.
    """
    return "\n".join(line.rstrip() for line in text.strip().split("\n"))


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
