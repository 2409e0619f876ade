"""Rows that hold a conversation into text, and which parts of it are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_training.data.documents.chat_templates import ChatTemplate, Refused
from llm_training.data.documents.formats import Rendered
from llm_training.data.documents.messages import (
    ASSISTANT,
    MEND,
    USER,
    Message,
    read_messages,
    refuse_silence,
)
from llm_training.data.documents.table_rows import BadRow
from llm_training.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ANSWER = "conversations without an assistant"
NOT_TAKEN = "conversations that the chat template does not take"
# Of what is refused and how it is written: a store of other rules is made anew.
_RULES = 2


class Conversations:
    """Rows that hold a conversation: a list of messages, or a prompt and its completion.

    Every assistant turn of `messages_column` is learned. Of a pair, only those of the completion
    are. A prompt that is a text is a user turn, a completion an assistant turn; each may also be a
    list of messages.

    Everything is as the template has it at inference too: special tokens that somebody spells out
    are read as such, and what the template takes from earlier turns (Qwen3: thoughts) is gone.
    """

    gives_conversations = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        messages_column: str | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        chat_template: str | None = None,
    ):
        """Tries the template on a small conversation, so that no data is read for nothing.

        Args:
            tokenizer: a fast one, for the places of its tokens in the text.
            messages_column: either this one, or both of the following.
            chat_template: the text of a template; None takes the tokenizer's own.

        Raises:
            DataError: there is no template, or it does not show what is to be learned.
        """
        if messages_column is not None and prompt_column is None and completion_column is None:
            self.columns: tuple[str, ...] = (messages_column,)
        elif messages_column is None and prompt_column and completion_column:
            self.columns = (prompt_column, completion_column)
        else:
            raise DataError(
                "Conversations stand either in messages_column or in prompt_column and"
                f" completion_column, but the names given are {messages_column!r},"
                f" {prompt_column!r} and {completion_column!r}. Give the one or the other two."
            )
        self._template = ChatTemplate(
            tokenizer, chat_template, num_exchanges=2 if len(self.columns) == 1 else 1
        )

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        """The conversation of one row, ending in end-of-text; earlier turns as the template has it.

        Raises:
            BadRow: the row holds no conversation that an assistant takes part in, somebody says
                nothing in it, or the template does not serve for it.
        """
        messages, num_given = self._messages(row, where)
        if all(message["role"] != ASSISTANT for message in messages[num_given:]):
            roles = ", ".join(message["role"] for message in messages[num_given:])
            raise BadRow(
                NO_ANSWER,
                f"{where}: {self.columns[-1]!r} has no message with the role 'assistant' (but:"
                f" {roles:.60}), so nothing of it could be learned. {MEND}",
            )
        try:
            return self._template.render(messages, num_given)
        except Refused as refusal:
            raise BadRow(
                NOT_TAKEN,
                f"{where}: the chat template of tokenizer {self._template.name!r} does not serve"
                f" for this conversation: {refusal}. {refusal.way_out} Or leave out such rows with"
                " skip_bad_documents.",
            ) from None

    def _messages(self, row: Mapping[str, Any], where: str) -> tuple[list[Message], int]:
        """The messages, and how many of them are given rather than learned."""
        if len(self.columns) == 1:
            return read_messages(row[self.columns[0]], f"{where}: {self.columns[0]!r}"), 0
        given, learned = (
            _read_turns(row[column], role, f"{where}: {column!r}")
            for column, role in zip(self.columns, (USER, ASSISTANT), strict=True)
        )
        return given + learned, len(given)

    def key(self) -> Any:
        return {
            "conversations": list(self.columns),
            "template": self._template.key(),
            "rules": _RULES,
        }


def _read_turns(value: Any, role: str, where: str) -> list[Message]:
    """The messages of one half of a pair; a text is one of them, by `role`."""
    if not isinstance(value, str):
        return read_messages(value, where, or_text=True)
    refuse_silence(role, value, where)
    return [{"role": role, "content": value}]
