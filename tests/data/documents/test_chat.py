"""Proves that of a conversation exactly what the assistant says, and the end of it, is learned.

The templates here are small ones in the manner of those in use; the decoded learned tokens are held
against what was said, and against transformers' own mask where a template has markers for it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from llm_training.data.documents.chat import NO_ANSWER, NOT_TAKEN, Conversations
from llm_training.data.documents.chat_templates import end_of_turn, load_chat_template
from llm_training.data.documents.formats import DocumentFormat
from llm_training.data.documents.messages import EMPTY_TURN, NO_CONVERSATION, read_messages
from llm_training.data.documents.sources import Document, TextFiles, find_files
from llm_training.data.documents.table_rows import BadRow
from llm_training.data.errors import DataError
from llm_training.data.ledger import Ledger
from llm_training.data.tokens.encoding import TextEncoder

EOS = "<|endoftext|>"
SPECIAL = [
    *(EOS, "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin|>"),
    *("[INST]", "[/INST]", "<think>", "</think>", "<|user|>", "<|assistant|>", "<|system|>"),
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set note = messages[0].content + '\n\n' %}"
    "{% else %}{% set turns = messages %}{% set note = '' %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ (note if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The last answer has a thought, even an empty one; those of earlier answers are taken away.
THINKING = (
    "{% for m in messages %}{% set parts = m.content.split('</think>\n\n') %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{{ (parts[0] if parts | length > 1 else '<think>\n') + '</think>\n\n' + parts[-1] }}"
    "{% else %}{{ parts[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No token ends a turn: the line end does, and after the last turn our end-of-text.
PLAIN = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    for i, content in enumerate(contents):
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    return turns


TALKS = [
    say("Hi", "Hello"),
    say("Hi", "Hello there.", "Why?", "Because I can.\n\nIndeed.", system="Be kind."),
    say("Grüße 🤖", "中文 é e\u0301 👩‍🚀", "日本", "🤖"),
    say("a", "b", "c", "d", system=""),
    say("a", "b", "and then"),
    say("Hi", "Hi", "Hi", "Hi", "Hi", "Hi"),
]


@pytest.fixture(scope="module")
def backend() -> str:
    """A byte-level BPE with the special tokens of all templates, as JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    lines = ["Hello there", "user\n", "assistant\n\n", "Because I can.\n\nIndeed.", " system: why"]
    backend.train_from_iterator(lines * 3, trainer)
    return str(backend.to_str())


def tokenizer_with(backend: str, template: str | None, eos: str = EOS) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend),
        eos_token=eos,
        bos_token="<s>",
        name_or_path="tiny",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def messages_of(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Conversations:
    return Conversations(tokenizer, messages_column="messages", **options)


class Part:
    def __init__(self, document: Document):
        self.document = document


def encode(
    tokenizer: PreTrainedTokenizerFast, formatted: Conversations, row: dict[str, Any]
) -> tuple[str, np.ndarray, np.ndarray]:
    """(text, ids, learned) of one row."""
    text, spans = formatted.render(row, "row 7")
    document = Document(text, len(text.encode()), None, "row 7", learned=spans)
    [(_, ids, learned)] = TextEncoder(tokenizer).encode([Part(document)])
    assert learned is not None
    assert tokenizer.decode(ids) == text
    return text, ids, learned


def runs(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, learned: np.ndarray) -> list[str]:
    """The learned tokens, decoded; one text for each run of them."""
    borders = np.flatnonzero(np.diff(learned, prepend=0, append=0))
    pairs = zip(borders[::2], borders[1::2], strict=True)
    return [tokenizer.decode(ids[start:stop]) for start, stop in pairs]


# What is learned


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize(
    ("template", "eos", "before", "after"),
    [
        pytest.param(CHATML, EOS, "", "<|im_end|>", id="chatml"),
        pytest.param(CHATML, "<|im_end|>", "", "<|im_end|>", id="chatml whose end is its eos"),
        pytest.param(LLAMA3, "<|eot_id|>", "", "<|eot_id|>", id="llama 3"),
        pytest.param(LLAMA3, EOS, "", "<|eot_id|>", id="llama 3 base"),
        pytest.param(MISTRAL, "</s>", " ", "</s>", id="mistral"),
        pytest.param(ZEPHYR, "</s>", "", "</s>", id="zephyr"),
        pytest.param(MARKED, EOS, "", "<|im_end|>", id="markers"),
        pytest.param(MARKED, "<|im_end|>", "", "<|im_end|>", id="markers and eos"),
    ],
)
def test_what_the_assistant_says_and_its_end_is_learned(
    backend: str, template: str, eos: str, before: str, after: str, talk: list[dict[str, str]]
) -> None:
    tokenizer = tokenizer_with(backend, template, eos)
    text, ids, learned = encode(tokenizer, messages_of(tokenizer), {"messages": talk})
    answers = [m["content"] for m in talk if m["role"] == "assistant"]
    assert runs(tokenizer, ids, learned) == [before + answer + after for answer in answers]
    # The document is what transformers writes, with one end-of-text at its end.
    written = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text == (written.rstrip() if written.rstrip().endswith(eos) else written + eos)
    assert ids[-1] == tokenizer.eos_token_id
    assert text.count("<s>") == written.count("<s>") <= 1


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, ZEPHYR, THINKING, PLAIN])
def test_borders_of_what_is_learned_are_borders_of_tokens(
    backend: str, template: str, talk: list[dict[str, str]]
) -> None:
    # At inference the prompt is encoded by itself: its tokens must be those of training.
    tokenizer = tokenizer_with(backend, template, "</s>")
    # Line ends stay together, as with the tokenizers of these models. GPT-2's pattern takes the two
    # before Llama 3's answers apart when a word follows: a fault of that pair, in all libraries.
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    _, ids, _ = encode(tokenizer, messages_of(tokenizer), {"messages": talk})
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                talk[:i], add_generation_prompt=True, return_dict=False
            )
            assert ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("eos", [EOS, "<|im_end|>"])
def test_markers_give_the_mask_of_transformers(
    backend: str, eos: str, talk: list[dict[str, str]]
) -> None:
    tokenizer = tokenizer_with(backend, MARKED, eos)
    _, ids, learned = encode(tokenizer, messages_of(tokenizer), {"messages": talk})
    theirs = tokenizer.apply_chat_template(
        talk, return_dict=True, return_assistant_tokens_mask=True
    )
    shared = min(len(ids), len(theirs["input_ids"]))
    assert shared >= len(theirs["input_ids"]) - 1  # ours may lack the last line end
    assert ids[:shared].tolist() == theirs["input_ids"][:shared]
    assert learned[:shared].tolist() == theirs["assistant_masks"][:shared]
    assert not any(learned[shared:])


def test_markers_around_the_line_end_after_a_turn_stay_within_the_document(backend: str) -> None:
    template = MARKED.replace("{% endgeneration %}{% else %}", "\n{% endgeneration %}{% else %}")
    tokenizer = tokenizer_with(
        backend, template.replace("{% endif %}\n{%", "{% endif %}{%"), "<|im_end|>"
    )
    formatted = messages_of(tokenizer)
    text, spans = formatted.render({"messages": say("a", "b")}, "row 7")
    assert spans == ((len(text) - len("b<|im_end|>"), len(text)),)


def test_a_thought_is_learned_where_the_template_keeps_it(backend: str) -> None:
    tokenizer = tokenizer_with(backend, THINKING)
    thought = "<think>\nWell\n</think>\n\n"
    talk = say("Hi", thought + "Hello", "Why?", thought + "So")
    text, ids, learned = encode(tokenizer, messages_of(tokenizer), {"messages": talk})
    assert text.count("Well") == 1
    assert runs(tokenizer, ids, learned) == [
        "Hello<|im_end|>",
        "<think>\nWell\n</think>\n\nSo<|im_end|>",
    ]
    # Without a thought in the data too: the template writes an empty one for the last answer.
    _, ids, learned = encode(
        tokenizer,
        messages_of(tokenizer),
        {"messages": say("a", "e", "b", "x<|im_end|>x", "c", "d")},
    )
    assert runs(tokenizer, ids, learned) == [
        "e<|im_end|>",
        "x<|im_end|>x<|im_end|>",
        "<think>\n</think>\n\nd<|im_end|>",
    ]


def test_end_of_text_is_learned_where_nothing_else_ends_the_last_turn(backend: str) -> None:
    tokenizer = tokenizer_with(backend, PLAIN)
    formatted = messages_of(tokenizer)
    text, ids, learned = encode(tokenizer, formatted, {"messages": say("a", "b", "c", "d")})
    assert text == f"User: a\nAssistant: b\nUser: c\nAssistant: d\n{EOS}"
    assert runs(tokenizer, ids, learned) == [" b\n", f" d\n{EOS}"]
    _, ids, learned = encode(tokenizer, formatted, {"messages": say("a", "b", "c")})
    assert runs(tokenizer, ids, learned) == [" b\n"]


def test_an_end_that_the_template_leaves_to_the_next_message_is_learned(backend: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ eos_token if not loop.first }}"
        "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(backend, template, "</s>")
    text, ids, learned = encode(
        tokenizer, messages_of(tokenizer), {"messages": say("a", "b", "c", "d")}
    )
    assert text == "[INST]a[/INST]b</s>[INST]c[/INST]d</s>"
    assert runs(tokenizer, ids, learned) == ["b</s>", "d</s>"]


def test_a_template_that_writes_no_prompt_has_its_header_learned(backend: str) -> None:
    # The model must write the header itself, as no prompt has it.
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    tokenizer = tokenizer_with(backend, template, "</s>")
    _, ids, learned = encode(tokenizer, messages_of(tokenizer), {"messages": say("a", "b")})
    assert runs(tokenizer, ids, learned) == ["<|assistant|>b</s>"]


# Pairs


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Hi", "Hello"),
        (say("Hi"), say("", "Hello")[1:]),
        ("Hi", say("", "Hello")[1:]),
        (say("Hi", system="Be kind."), "Hello"),
        (say("a", "earlier", "c"), "Hello"),
    ],
)
def test_only_the_completion_of_a_pair_is_learned(
    backend: str, template: str, prompt: Any, completion: Any
) -> None:
    tokenizer = tokenizer_with(backend, template)
    pairs = Conversations(tokenizer, prompt_column="p", completion_column="c")
    assert pairs.columns == ("p", "c")
    text, ids, learned = encode(tokenizer, pairs, {"p": prompt, "c": completion})
    assert runs(tokenizer, ids, learned) == ["Hello<|im_end|>"]
    messages = say(prompt) if isinstance(prompt, str) else prompt
    messages = [*messages, {"role": "assistant", "content": "Hello"}]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False) + EOS


def test_columns_are_of_one_kind(backend: str) -> None:
    tokenizer = tokenizer_with(backend, CHATML)
    formatted: DocumentFormat = messages_of(tokenizer)
    assert formatted.columns == ("messages",)
    for names in (
        {},
        {"prompt_column": "p"},
        {"completion_column": "c"},
        {"messages_column": "m", "completion_column": "c"},
    ):
        with pytest.raises(DataError, match="messages_column or in prompt_column and"):
            Conversations(tokenizer, **names)


# Rows


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"^row 7: 'messages' holds nothing \(null\), but expected is a list of messages"),
        ("Hi", r"^row 7: 'messages' holds 'Hi' \(str\), but expected is a list of messages"),
        ([], r"^row 7: 'messages' holds \[\]"),
        ({"role": ["user"], "content": []}, r"^row 7: 'messages' holds \[\]"),
        (["Hi"], r"^row 7: 'messages', message 1 is 'Hi' \(str\)"),
        ([{"from": "gpt", "value": "x"}], r"message 1: 'role' is nothing .* has 'from', 'value'"),
        ([{"role": "", "content": "x"}], r"message 1: 'role' is '' "),
        ([*say("a"), {"role": "assistant", "content": None}], r"message 2: 'content' is nothing"),
        ([{"role": "user", "content": [{"text": "x"}]}], r"message 1: 'content' is \[\{"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}],
            r"message 1 calls a tool",
        ),
        (say(" \n", "b"), r"^row 7: 'messages', message 1: the user says nothing \(the text is ' "),
        (say("a", "b", "c", ""), r"^row 7: 'messages', message 4: the assistant says nothing"),
        (say("a"), r"^row 7: 'messages' has no message with the role 'assistant' \(but: user\)"),
    ],
)
def test_a_row_without_a_conversation_is_refused(backend: str, value: Any, said: str) -> None:
    formatted = messages_of(tokenizer_with(backend, CHATML))
    with pytest.raises(DataError, match=said) as fault:
        formatted.render({"messages": value}, "row 7")
    assert "skip_bad_documents" in str(fault.value)


def test_a_pair_without_an_answer_is_refused(backend: str) -> None:
    pairs = Conversations(tokenizer_with(backend, CHATML), prompt_column="p", completion_column="c")
    with pytest.raises(DataError, match=r"^row 7: 'c' holds nothing .* expected is a text or a"):
        pairs.render({"p": "x", "c": None}, "row 7")
    with pytest.raises(DataError, match=r"^row 7: 'c' has no message with the role 'assistant'"):
        pairs.render({"p": say("a", "b"), "c": say("c")}, "row 7")
    for row, said in (
        ({"p": "a", "c": " "}, "'c': the assistant"),
        ({"p": "", "c": "b"}, "'p': the u"),
    ):
        with pytest.raises(DataError, match=rf"^row 7: {said}.* says nothing"):
            pairs.render(row, "row 7")


def test_a_system_or_a_tool_may_say_nothing(backend: str) -> None:
    formatted = messages_of(tokenizer_with(backend, CHATML))
    talk = [*say("a", "b", system=""), {"role": "tool", "content": ""}, *say("c", "d")]
    text = formatted.render({"messages": talk}, "row 7").text
    assert text.startswith("<|im_start|>system\n<|im_end|>")
    assert "<|im_start|>tool\n<|im_end|>" in text


def test_messages_as_datasets_may_give_them() -> None:
    expected = say("a", "b")
    nulls = [{**message, "tool_calls": None, "name": None, "weight": 1} for message in expected]
    assert read_messages(nulls, "row 7") == expected
    assert read_messages(tuple(expected), "row 7") == expected
    columns = {"role": ["user", "assistant"], "content": ["a", "b"], "name": None}
    assert read_messages(columns, "row 7") == expected
    thought = {"role": "assistant", "content": "b", "reasoning_content": "t"}
    assert read_messages([thought], "row 7") == [thought]


def test_a_row_that_the_template_refuses_is_named_with_its_reason(backend: str) -> None:
    formatted = messages_of(tokenizer_with(backend, MISTRAL, "</s>"))
    talk = [*say("a", "b"), {"role": "assistant", "content": "c"}]
    with pytest.raises(DataError, match=r"^row 7: .*'tiny'.*\[user, assistant, assistant\].*alter"):
        formatted.render({"messages": talk}, "row 7")


# Of other roles than these two it writes nothing, and says nothing of it.
DEAF = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("role", ["system", "tool", "User"])
def test_a_message_that_the_template_leaves_out_in_silence_is_refused(
    backend: str, role: str
) -> None:
    formatted = messages_of(tokenizer_with(backend, DEAF, "</s>"))
    talk = say("4", "b", "4", "d")
    assert formatted.render({"messages": talk}, "row 7").learned
    # That others say the same makes no difference.
    for content in ("4", "something else"):
        talk[2] = {"role": role, "content": content}
        with pytest.raises(
            BadRow, match=rf"^row 7: .* leaves out what message 3 .* '{role}'"
        ) as fault:
            formatted.render({"messages": talk}, "row 7")
        assert fault.value.reason == NOT_TAKEN
        assert "Give the message a role that the template knows" in str(fault.value)
        assert "skip_bad_documents" in str(fault.value)
    # Also where the question of a pair has it.
    pairs = Conversations(
        tokenizer_with(backend, DEAF, "</s>"), prompt_column="p", completion_column="c"
    )
    with pytest.raises(BadRow, match="leaves out what message 1"):
        pairs.render({"p": [{"role": role, "content": "x"}, *say("a")], "c": "b"}, "row 7")


@pytest.mark.parametrize(
    ("template", "talk"),
    [
        pytest.param(LLAMA3, say(" a ", "\n b\n"), id="strips"),
        pytest.param(MISTRAL, say("a", "b", "c", "d", system="S"), id="moves the system's words"),
        pytest.param(
            THINKING,
            say("a", "<think>\nt\n</think>\n\nb", "c", "<think>\nt\n</think>\n\nd"),
            id="takes thoughts out",
        ),
    ],
)
def test_a_template_may_write_words_in_its_own_way(
    backend: str, template: str, talk: list[dict[str, str]]
) -> None:
    assert messages_of(tokenizer_with(backend, template, "</s>")).render({"messages": talk}, "")


def test_several_turns_of_one_role_are_taken_where_the_template_takes_them(backend: str) -> None:
    tokenizer = tokenizer_with(backend, CHATML)
    turns = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    talk = [{"role": role, "content": content} for role, content in turns]
    _, ids, learned = encode(tokenizer, messages_of(tokenizer), {"messages": talk})
    assert runs(tokenizer, ids, learned) == ["c<|im_end|>", "d<|im_end|>"]


def test_a_question_at_the_end_is_read_and_not_learned(backend: str) -> None:
    tokenizer = tokenizer_with(backend, CHATML)
    text, ids, learned = encode(
        tokenizer, messages_of(tokenizer), {"messages": say("a", "b", "and then")}
    )
    assert text.endswith(f"and then<|im_end|>\n{EOS}")
    assert runs(tokenizer, ids, learned) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("Hi", NO_CONVERSATION),
        ([{"from": "gpt", "value": "x"}], NO_CONVERSATION),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], NO_CONVERSATION),
        (say("a", ""), EMPTY_TURN),
        (say("a"), NO_ANSWER),
        ([*say("a", "b"), {"role": "assistant", "content": "c"}], NOT_TAKEN),
    ],
)
def test_what_is_skipped_is_counted_by_what_is_wrong(
    backend: str, row: Any, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "talks.jsonl"
    lines = [json.dumps({"messages": talk}) + "\n" for talk in (say("a", "b"), row)]
    path.write_text("".join(lines), encoding="utf-8")
    [file] = find_files([str(path)], [], Ledger(), argument="train_file")
    formatted = messages_of(tokenizer_with(backend, MISTRAL, "</s>"))
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, line 2"):
        list(TextFiles([file], formatted).documents(Ledger()))
    ledger = Ledger()
    taken = list(TextFiles([file], formatted, skip_bad_documents=True).documents(ledger))
    assert len(taken) == 1
    assert {name: entry.count for name, entry in ledger.left_out.items()} == {reason: 1}
    assert ledger.lines() == [f"left out: 1 {reason} ({path}, line 2)"]


def test_a_system_turn_that_moves_to_the_last_question_is_refused(backend: str) -> None:
    template = (
        "{% set note = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST]"
        "{% if loop.index0 >= (messages | length) - 2 %}{{ note }}{% endif %}{{ m.content }}"
        "[/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    formatted = messages_of(tokenizer_with(backend, template, "</s>"))
    assert formatted.render({"messages": say("a", "b", "c", "d")}, "row 7").learned
    with pytest.raises(DataError, match=r"^row 7: .*message 3 is not the beginning.*generation %"):
        formatted.render({"messages": say("a", "b", "c", "d", system="S")}, "row 7")


def test_an_answer_that_is_headed_otherwise_while_it_is_the_last_is_refused(backend: str) -> None:
    template = CHATML.replace(
        "{{ m.role }}", "{{ m.role }}{{ '!' if 'odd' in m.content and loop.last }}"
    )
    formatted = messages_of(tokenizer_with(backend, template))
    with pytest.raises(DataError, match=r"^row 7: .*not the beginning of its answer: after .*'!"):
        formatted.render({"messages": say("a", "odd", "b")}, "row 7")


# Templates


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        (CHATML, EOS, "<|im_end|>"),
        (CHATML, "<|im_end|>", "<|im_end|>"),
        (LLAMA3, EOS, "<|eot_id|>"),
        (MISTRAL, "</s>", "</s>"),
        (ZEPHYR, "</s>", "</s>"),
        (MARKED, EOS, "<|im_end|>"),
        (THINKING, EOS, "<|im_end|>"),
        (PLAIN, EOS, None),
        (None, EOS, None),
        ("{{ raise_exception('no') }}", EOS, None),
    ],
)
def test_the_token_that_ends_an_answer(
    backend: str, template: str | None, eos: str, end: str | None
) -> None:
    tokenizer = tokenizer_with(backend, template, eos)
    assert end_of_turn(tokenizer) == (end and tokenizer.convert_tokens_to_ids(end))


def test_no_template_is_refused_and_one_can_be_given(backend: str) -> None:
    tokenizer = tokenizer_with(backend, None)
    with pytest.raises(DataError, match=r"'tiny' has no chat template.*with chat_template"):
        messages_of(tokenizer)
    given = messages_of(tokenizer, chat_template=CHATML)
    own = messages_of(tokenizer_with(backend, CHATML))
    row = {"messages": TALKS[1]}
    assert given.render(row, "") == own.render(row, "")
    assert given.key() == own.key()
    # One that is given comes before the tokenizer's own.
    other = messages_of(tokenizer_with(backend, CHATML), chat_template=LLAMA3)
    assert "<|eot_id|>" in other.render(row, "").text
    assert other.key() != own.key()


def test_special_tokens_that_a_template_writes_are_in_the_key(backend: str) -> None:
    keys = [messages_of(tokenizer_with(backend, ZEPHYR, eos)).key() for eos in (EOS, "</s>")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param(
            "{% for m in messages %}", "for the roles .user, assistant. it fails", id="jinja"
        ),
        pytest.param(
            "{{ messages[0].content }}", "leaves out what message 2 says", id="answers left out"
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            "prompt for message 2 is not the beginning of the whole.*'<think>'",
            id="prompt thinks",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content if loop.last else m.content[::-1] }}</s>"
            "{% endfor %}",
            "prompt for message 2 is not the beginning of the whole",
            id="rewritten",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ '.' if loop.last }}\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "not the beginning of",
            id="last differs",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}"
            "{{ '!' if loop.last and m.role == 'assistant' }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "writes message 2 in another way once others follow",
            id="last answer differs",
        ),
        pytest.param(
            "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
            "{% endfor %}",
            "'Question one', by the user, would be learned",
            id="all marked",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            "markers enclose nothing",
            id="nothing marked",
        ),
        pytest.param(
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
            "{% generation %}{% generation %}{{ m.content }}{% endgeneration %}</s>"
            "{% endgeneration %}{% endif %}{% endfor %}",
            "turns do not follow each other",
            id="markers in markers",
        ),
        pytest.param(
            "{% macro turn(m) %}<|{{ m.role }}|>\n:::::::::::::::::::::::::"
            "{% generation %}{{ m.content }}</s>{% endgeneration %}{% endmacro %}"
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
            "{{ turn(m) }}{% endif %}{% endfor %}",
            "'Answer one', by the assistant, would not be learned",
            id="markers in a macro, of which transformers loses the place",
        ),
    ],
)
def test_a_template_that_does_not_serve_is_refused_before_data_is_read(
    backend: str, template: str, said: str
) -> None:
    with pytest.raises(DataError, match=rf"(?s)^Tokenizer 'tiny'.*{said}") as fault:
        messages_of(tokenizer_with(backend, template, "</s>"))
    assert "{% generation %}" in str(fault.value)
    assert "with chat_template" in str(fault.value)


def test_a_template_for_one_exchange_serves_for_pairs(backend: str) -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('one only') }}{% endif %}" + CHATML
    tokenizer = tokenizer_with(backend, template)
    with pytest.raises(DataError, match="one only"):
        messages_of(tokenizer)
    pairs = Conversations(tokenizer, prompt_column="p", completion_column="c")
    assert pairs.render({"p": "a", "c": "b"}, "").learned


def test_a_tokenizer_written_in_python_is_refused() -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(DataError, match="written in Python"):
        Conversations(Slow(), messages_column="messages", chat_template=CHATML)


def test_a_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML + "{# é #}", encoding="utf-8")
    assert load_chat_template(None) is None
    assert load_chat_template(CHATML) == CHATML
    assert load_chat_template(str(file)) == CHATML + "{# é #}"
    file.write_text("no template", encoding="utf-8")
    with pytest.raises(DataError, match=r"chat_template: .*chat\.jinja' holds no template"):
        load_chat_template(str(file))
    file.write_bytes(b"\xff{{")
    with pytest.raises(DataError, match="not UTF-8"):
        load_chat_template(str(file))
    for value in (str(tmp_path), str(tmp_path / "no.jinja"), "", "chatml", "x" * 5_000):
        with pytest.raises(DataError, match=r"chat_template: .* cannot be read as a file"):
            load_chat_template(value)
