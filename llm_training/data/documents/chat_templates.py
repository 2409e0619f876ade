"""Chat templates: what one makes of a conversation, and where the assistant's words stand in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llm_training.data.documents.formats import Rendered
from llm_training.data.documents.messages import ASSISTANT, USER, Message
from llm_training.data.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE: list[Message] = [
    {"role": USER, "content": "Question one"},
    {"role": ASSISTANT, "content": "Answer one"},
    {"role": USER, "content": "Question two"},
    {"role": ASSISTANT, "content": "Answer two"},
]
_MARK_IT = (
    "Give a template that writes {% generation %} before and {% endgeneration %} after what the"
    " assistant says, with chat_template."
)
_FIT_IT = "Mend the conversation, or give a template that takes it with chat_template."
_NAME_IT = (
    "Give the message a role that the template knows, take it out, or give a template that writes"
    " it with chat_template."
)


class Refused(Exception):
    """Why a template does not serve for a conversation, as a clause without a full stop.

    Attributes:
        way_out: what to do, in sentences.
    """

    def __init__(self, why: str, way_out: str = _MARK_IT):
        super().__init__(why)
        self.way_out = way_out


class ChatTemplate:
    """A template of one tokenizer, and where the assistant's words stand in what it writes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None, *, num_exchanges: int
    ):
        """
        Args:
            num_exchanges: 1 or 2 questions and answers that the template is tried on; 0: none.

        Raises:
            DataError: there is no template, or it does not serve for the trial.
        """
        self.name: str = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise DataError(
                f"Tokenizer {self.name!r} is written in Python and cannot say which characters a"
                " token stands for, as conversations need. Use a fast tokenizer (one that has a"
                " tokenizer.json)."
            )
        self._text = template or _own_template(tokenizer, self.name)
        self._has_markers = _MARKER.search(self._text) is not None
        self._names: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._eos = cast(str, tokenizer.eos_token)
        self._special_tokens = tuple(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if (token.special or token.content == self._eos) and token.content.strip()
        )
        # Sequences of roles that are known to be written whole.
        self._whole: set[str] = set()
        try:
            self._closing = self._find_closing()
            if num_exchanges:
                self._try(_PROBE[: 2 * num_exchanges])
        except Refused as refusal:
            raise DataError(
                f"Tokenizer {self.name!r}: its chat template, tried on {num_exchanges} question(s)"
                f" and answer(s), does not serve for training: {refusal}. {_MARK_IT}"
            ) from None

    @property
    def end_token(self) -> str | None:
        """The special token that ends an answer; None where text does, or what follows it."""
        fitting = (token for token in self._special_tokens if self._closing.endswith(token))
        return max(fitting, key=len, default=None)

    def key(self) -> Any:
        return {"text": self._text, "names": {k: str(v) for k, v in self._names.items()}}

    def render(self, messages: Sequence[Message], num_given: int = 0) -> Rendered:
        """The text, ending in end-of-text, and what of it is learned.

        Learned are the assistant's turns after the first `num_given` messages: from where the
        prompt for an answer ends, to the token that ends the turn, but not the whitespace after
        that token. A template's own {% generation %} markers are taken as they are.

        Raises:
            Refused: the template does not take these messages or leaves one of them out, or what is
                learned is not clear.
        """
        if self._has_markers:
            text, spans = self._marked(messages, num_given)
        else:
            text, _ = self._write(messages)
            spans = [
                self._turn(text, messages, i)
                for i in range(num_given, len(messages))
                if messages[i]["role"] == ASSISTANT
            ]
        _check_ascending(spans, text)
        self._check_whole(messages)
        return self._with_end(text, spans)

    def _write(
        self, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """What the template makes of `messages`, and the character spans of its markers.

        Not by `apply_chat_template`, which keeps these spans to itself.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[list(messages)],
                chat_template=self._text,
                return_assistant_tokens_mask=self._has_markers,
                add_generation_prompt=prompt,
                **self._names,
            )
        # Templates are programs: they raise what they like.
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages) or "no message"
            said = one_line(error).rstrip(".")
            why = f"for the roles [{roles:.100}] it fails with {said!r}"
            raise Refused(why, _FIT_IT) from None
        return texts[0], spans[0] if self._has_markers else []

    def _check_whole(self, messages: Sequence[Message]) -> None:
        """Raises Refused where the template leaves out in silence what some message says.

        Tried once for each sequence of roles, with words of our own in the place of what is said: a
        template may take thoughts out of that, strip it or move it, and another message may say the
        same.
        """
        shape = repr([(message["role"], sorted(message)) for message in messages])
        if shape in self._whole:
            return
        said = [f"said in message {i} here" for i in range(len(messages))]
        others = [{**message, "content": s} for message, s in zip(messages, said, strict=True)]
        text, _ = self._write(others)
        for i, message in enumerate(messages):
            if said[i] not in text:
                raise Refused(
                    f"it leaves out what message {i + 1} says, whose role is {message['role']!r}",
                    _NAME_IT,
                )
        self._whole.add(shape)

    def _marked(self, messages: Sequence[Message], num_given: int) -> tuple[str, list[Span]]:
        text, spans = self._write(messages)
        if any(message["role"] == ASSISTANT for message in messages[:num_given]):
            _, given = self._write(messages[:num_given])
            spans = spans[len(given) :]
        spans = [span for span in spans if span[0] < span[1]]
        if not spans:
            raise Refused("its {% generation %} markers enclose nothing")
        return text, spans

    def _turn(self, text: str, messages: Sequence[Message], i: int) -> Span:
        """The part of `text`, written for all messages, that answers the first `i` of them."""
        before, _ = self._write(messages[:i], prompt=True)
        if not text.startswith(before):
            raise Refused(
                f"the prompt for message {i + 1} is not the beginning of the whole conversation:"
                f" {_difference(before, text)}"
            )
        through = text if i == len(messages) - 1 else self._write(messages[: i + 1])[0]
        if not through.startswith(before):
            raise Refused(
                f"the prompt for message {i + 1} is not the beginning of its answer:"
                f" {_difference(before, through)}"
            )
        if text.startswith(through):
            turn = through[len(before) :]
            # Some leave the end of a turn to the message that follows.
            if text.startswith(self._eos, len(through)) and not self._ends_turn(turn.rstrip()):
                turn += self._eos
            stop = len(before) + len(self._trim_after_end(turn))
        else:
            stop = self._rewritten_end(text, through, len(before), i)
        return len(before), stop

    def _rewritten_end(self, text: str, through: str, start: int, i: int) -> int:
        """Where turn `i` ends in `text`, which has it without its beginning, such as a thought.

        Sound because the turn, up to the token that ends it, is the end of the same turn as it is
        written while it is the last one. Nothing else of `text` can be that.
        """
        turn = through[start:].rstrip()
        end, stop = 0, start
        while self._closing and (found := text.find(self._closing, stop)) >= 0:
            stop = found + len(self._closing)
            if stop - start > len(turn):
                break
            if turn.endswith(text[start:stop]):
                end = stop
        if not end:
            raise Refused(
                f"it writes message {i + 1} in another way once others follow:"
                f" {_difference(through, text)}"
            )
        return end

    def _trim_after_end(self, turn: str) -> str:
        """`turn` without the whitespace after the token that ends it, which nobody generates.

        Without such a token the whitespace itself may be what ends the turn, and is kept.
        """
        return stripped if self._ends_turn(stripped := turn.rstrip()) else turn

    def _ends_turn(self, text: str) -> bool:
        return text.endswith(self._special_tokens)

    def _with_end(self, text: str, spans: list[Span]) -> Rendered:
        """`text` with exactly one end-of-text after the last turn.

        Where the template ends in it, only the whitespace that follows is dropped. Where it is
        appended, it is learned if it is what ends the last turn: if no other token does.
        """
        stripped = text.rstrip()
        if stripped.endswith(self._eos):
            clipped = [(start, min(stop, len(stripped))) for start, stop in spans]
            return Rendered(stripped, tuple(span for span in clipped if span[0] < span[1]))
        start, stop = spans[-1]
        if not text[stop:].strip() and not self._ends_turn(text[start:stop].rstrip()):
            spans = [*spans, (len(text), len(text) + len(self._eos))]
        return Rendered(text + self._eos, tuple(span for span in spans if span[0] < span[1]))

    def _find_closing(self) -> str:
        """What the template writes after an answer, to the token that ends it; "" if none does."""
        text, _ = self._write(_PROBE[:2])
        closing = text.rpartition(_PROBE[1]["content"])[2].rstrip()
        return closing if self._ends_turn(closing) else ""

    def _try(self, messages: Sequence[Message]) -> None:
        """Raises Refused unless exactly the answers of `messages` are learned."""
        text, spans = self.render(messages)
        learned = [text[start:stop] for start, stop in spans or ()]
        for message in messages:
            is_learned = any(message["content"] in part for part in learned)
            if is_learned != (message["role"] == ASSISTANT):
                raise Refused(
                    f"{message['content']!r}, by the {message['role']}, would"
                    f" {'' if is_learned else 'not '}be learned. The text is {text!r:.400} and"
                    f" learned of it {learned!r:.200}"
                )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token with which an answer ends, by the tokenizer's own chat template.

    None without a template, and where the template ends answers by no special token.
    """
    try:
        token = ChatTemplate(tokenizer, None, num_exchanges=0).end_token
    except DataError:
        return None
    return None if token is None else cast(int, tokenizer.convert_tokens_to_ids(token))


def load_chat_template(value: str | None) -> str | None:
    """The text of a template, given as a file or as the text itself.

    Raises:
        DataError: it is neither, or the file holds no template.
    """
    if value is None or _is_template(value):
        return value
    path = Path(value).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(
            f"chat_template: {value!r:.200} cannot be read as a file ({said}; looked from"
            f" {Path.cwd()}), and is no template, which would hold {{{{ or {{%."
            " Give the path of a Jinja template, or its text."
        ) from None
    if not _is_template(text):
        raise DataError(
            f"chat_template: {str(path)!r} holds no template: there is no {{{{ or {{% in it."
            " Give the path of a Jinja template, or its text."
        )
    return text


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _own_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    try:
        return tokenizer.get_chat_template()
    # It has none, or several and none is the default one.
    except ValueError:
        raise DataError(
            f"Tokenizer {name!r} has no chat template (or no default one), which conversations"
            " are written with. Give a file that holds one with chat_template, or use a tokenizer"
            " that has one, such as that of an instruction-tuned model."
        ) from None


def _check_ascending(spans: Sequence[Span], text: str) -> None:
    borders = [0, *(border for span in spans for border in span), len(text)]
    if borders != sorted(borders):
        raise Refused(f"the assistant's turns do not follow each other in the text: {spans}")


def _difference(expected: str, found: str) -> str:
    """Where two texts part, in words."""
    pairs = zip(expected, found, strict=False)
    shared = min(len(expected), len(found))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
    return (
        f"after {expected[max(0, at - 30) : at]!r} the one has {expected[at : at + 40]!r}, the"
        f" other {found[at : at + 40]!r}"
    )
