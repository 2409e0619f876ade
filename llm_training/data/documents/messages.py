"""The messages of a conversation as a column holds them, and what is no conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_training.data.documents.table_rows import BadRow

Message = dict[str, str]

USER, ASSISTANT = "user", "assistant"
NO_CONVERSATION = "rows without a usable conversation"
EMPTY_TURN = "conversations in which a user or assistant says nothing"
MEND = "Mend or remove such rows, or leave them out with skip_bad_documents."


def read_messages(value: Any, where: str, *, or_text: bool = False) -> list[Message]:
    """The messages that a column holds, with their role, content and whatever else is text.

    An empty message of the system is taken as it is: many tables write one for none. So is one of
    a tool, which may have nothing to say.

    Args:
        value: a list of messages, or one list for each of their fields, as `datasets` may have it.
        where: names the column in messages.
        or_text: whether a text would have served too, for the message.

    Raises:
        BadRow: it is something else, asks for what is not supported, or has a silent turn.
    """
    if isinstance(value, Mapping):
        value = list(_transposed(value))
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(
            NO_CONVERSATION,
            f"{where} holds {_describe(value)}, but expected is {'a text or ' if or_text else ''}"
            "a list of messages, each like"
            f' {{"role": "user", "content": "a text"}}. {MEND}',
        )
    return [_message(message, f"{where}, message {n}") for n, message in enumerate(value, 1)]


def _transposed(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    columns = {name: column for name, column in fields.items() if isinstance(column, list | tuple)}
    if columns and len({len(column) for column in columns.values()}) == 1:
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(
            NO_CONVERSATION,
            f"{where} is {_describe(message)}, but expected is an object with 'role' and"
            f" 'content'. {MEND}",
        )
    for name in ("role", "content"):
        if not isinstance(message.get(name), str) or not (message[name] or name == "content"):
            raise BadRow(
                NO_CONVERSATION,
                f"{where}: {name!r} is {_describe(message.get(name))}, but must be a text; the"
                f" message has {', '.join(map(repr, message))}. {MEND}",
            )
    if message.get("tool_calls"):
        raise BadRow(
            NO_CONVERSATION,
            f"{where} calls a tool ('tool_calls'), which is not supported. {MEND}",
        )
    refuse_silence(message["role"], message["content"], where)
    return {name: value for name, value in message.items() if isinstance(value, str)}


def refuse_silence(role: str, content: str, where: str) -> None:
    """Raises BadRow where user or assistant say nothing: to learn from that is to end at once."""
    if role in (USER, ASSISTANT) and not content.strip():
        raise BadRow(
            EMPTY_TURN, f"{where}: the {role} says nothing (the text is {content!r:.60}). {MEND}"
        )


def _describe(value: Any) -> str:
    return "nothing (null)" if value is None else f"{value!r:.60} ({type(value).__name__})"
