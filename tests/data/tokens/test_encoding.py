"""Proves that encoding is text to ids: in order, in pieces or whole, with any tokenizer.

And that of conversations, whose special tokens are read, exactly the tokens of the parts that are
to be learned are marked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_training.data.documents.sources import Document
from llm_training.data.errors import DataError
from llm_training.data.tokens.encoding import (
    TextEncoder,
    cut_anyway,
    cut_before_newlines,
    learned_tokens,
    may_cut_before_newline,
)
from llm_training.data.tokens.tokenizers import (
    END_OF_TEXT,
    TRAINED_KINDS,
    TrainedKind,
    train_tokenizer,
)
from llm_training.data.tokens.words import SPLITS_BEFORE_NEWLINE

# What stands before and after a line end in every way that a pattern may look at.
AWKWARD = """don't

  x1
\t'll'
A
\u0301b
99


   \x20
'
.
\x20
word\x20
 word\r
\r
Ä
中文
z
/
.a
"""


# What might touch its neighbour: spaces, line ends, half a character, a merge, a special token.
SHORT_TEXTS = (
    *(
        " ",
        "\n",
        "  a",
        "a  ",
        "\r\n",
        "'s",
        "he",
        "llo",
        "1",
        "234",
        "e",
        "\u0301a",
        "<|endoftext|>",
    ),
    *("if x:\n", "    return", "\u200d", "中", "文 ", "=", "==\n\n", "a" * 150, "Ä\n", "!", "…"),
)


class Part(NamedTuple):
    """What the encoder takes: anything that has a document."""

    document: Document
    key: str = ""


def part(
    text: str,
    key: str = "",
    *,
    learned: tuple[tuple[int, int], ...] | None = None,
    is_last: bool = True,
) -> Part:
    return Part(Document(text, len(text.encode()), None, "row 7", is_last, learned), key)


@pytest.fixture
def python_text(text_folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(text_folder.glob("*.py"))[:6])


def encode(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[list[int]]:
    return encode_parts(TextEncoder(tokenizer), map(part, texts))


def encode_parts(encoder: TextEncoder, parts: Iterable[Part]) -> list[list[int]]:
    return [ids.tolist() for _, ids, _ in encoder.encode(parts)]


def encode_alone(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[list[int]]:
    """What the tokenizer itself makes of each text, in which no special token is read."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def bpe_with(pre_tokenizer: Any, texts: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_documents_come_back_in_order_and_to_the_letter(
    kind: TrainedKind, python_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_training.data.tokens.encoding._BATCH_CHARACTERS", 5_000)
    texts = [python_text[:9_000], "a", AWKWARD, python_text[9_000:40_000]]
    tokenizer = train_tokenizer(kind, texts, 500)
    results = list(TextEncoder(tokenizer).encode(map(part, texts, "abcd")))
    assert [part.key for part, _, _ in results] == list("abcd")
    assert [tokenizer.decode(ids) for _, ids, _ in results] == texts
    assert all(ids.dtype == np.uint32 and learned is None for _, ids, learned in results)


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_pieces_give_the_tokens_of_the_whole(
    kind: TrainedKind, python_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = AWKWARD + python_text + AWKWARD
    tokenizer = train_tokenizer(kind, [text], 900)
    whole = encode_alone(tokenizer, text)
    assert may_cut_before_newline(tokenizer.backend_tokenizer)
    assert len(cut_before_newlines(text, 1)) > 150
    monkeypatch.setattr("llm_training.data.tokens.encoding._PIECE_CHARACTERS", 1)
    assert encode(tokenizer, text) == whole


@pytest.mark.parametrize("pattern", sorted(SPLITS_BEFORE_NEWLINE))
def test_pieces_are_exact_for_each_known_pattern(
    pattern: str, python_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = AWKWARD + python_text[:30_000] + AWKWARD
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = bpe_with(pre_tokenizers.Sequence([split, byte_level]), [text])
    backend.normalizer = normalizers.NFC()
    assert may_cut_before_newline(backend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    whole = encode_alone(tokenizer, text)
    monkeypatch.setattr("llm_training.data.tokens.encoding._PIECE_CHARACTERS", 1)
    assert encode(tokenizer, text) == whole
    monkeypatch.setattr("llm_training.data.tokens.encoding._PIECE_CHARACTERS", 200)
    assert encode(tokenizer, *SHORT_TEXTS) == encode_alone(tokenizer, *SHORT_TEXTS)


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_short_documents_are_joined_and_give_the_tokens_of_each_alone(
    kind: TrainedKind, python_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_training.data.tokens.encoding._PIECE_CHARACTERS", 200)
    monkeypatch.setattr("llm_training.data.tokens.encoding._BATCH_CHARACTERS", 500)
    tokenizer = train_tokenizer(kind, [python_text, *SHORT_TEXTS], 900)
    separators = "\0", "a\0\n", "\0 b\0"
    texts = [*SHORT_TEXTS, *separators, *SHORT_TEXTS, python_text, *separators, *SHORT_TEXTS]
    assert encode(tokenizer, *texts) == encode_alone(tokenizer, *texts)
    encoder = TextEncoder(tokenizer)
    pieces = list(encoder._pieces([part(text) for text in texts]))
    assert max(len(piece.parts) for piece in pieces) > 5
    assert [len(p.parts) for p in pieces if "\0" in p.text and p.text in separators] == [1] * 6


def test_documents_are_kept_apart_where_a_tokenizer_is_not_known() -> None:
    backend = bpe_with(pre_tokenizers.Metaspace(prepend_scheme="first"), list(SHORT_TEXTS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    assert encode(tokenizer, *SHORT_TEXTS) == encode_alone(tokenizer, *SHORT_TEXTS)
    pieces = TextEncoder(tokenizer)._pieces([part("a"), part("b")])
    assert [piece.text for piece in pieces] == ["a", "b"]


def test_pieces_end_before_newlines_and_lose_nothing(python_text: str) -> None:
    pieces = cut_before_newlines(python_text, 1_000)
    assert "".join(pieces) == python_text
    assert len(pieces) > 10
    assert all(piece[-1].isalnum() for piece in pieces[:-1])
    assert all(piece[0] == "\n" for piece in pieces[1:])
    assert cut_before_newlines("中文。\n" * 1_000, 1_000) == ["中文。\n" * 1_000]


def test_what_is_not_known_is_not_cut() -> None:
    def allowed(
        pre_tokenizer: Any, normalizer: Any = None, added: AddedToken | None = None
    ) -> bool:
        backend = bpe_with(pre_tokenizer, ["some text"])
        backend.normalizer = normalizer
        if added is not None:
            backend.add_tokens([added])
        return may_cut_before_newline(backend)

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert allowed(gpt2)
    assert not allowed(pre_tokenizers.ByteLevel(add_prefix_space=True))
    assert not allowed(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    assert not allowed(pre_tokenizers.Metaspace())
    assert not allowed(pre_tokenizers.Split(Regex(r"\w+\s*"), "isolated"))
    assert not allowed(gpt2, normalizers.Prepend("_"))
    assert not allowed(gpt2, added=AddedToken("end\nof"))
    assert not allowed(gpt2, added=AddedToken("word", rstrip=True))


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_a_special_token_in_the_text_is_text(kind: TrainedKind) -> None:
    text = f"it ends with {END_OF_TEXT} they say"
    tokenizer = train_tokenizer(kind, [text], 300)
    [ids] = encode(tokenizer, text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    # The tokenizer itself still knows its special tokens, for prompts.
    assert tokenizer(END_OF_TEXT).input_ids == [tokenizer.eos_token_id]


def test_truncation_and_padding_of_the_tokenizer_do_not_count() -> None:
    tokenizer = train_tokenizer("byte", [], 0)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=6)
    assert encode(tokenizer, "abcd", "e") == [list(b"abcd"), list(b"e")]
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


class PythonTokenizer(PreTrainedTokenizer):
    """A tokenizer without a fast backend: one id for each character."""

    def __init__(self) -> None:
        super().__init__(eos_token=END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_a_tokenizer_written_in_python_works_too() -> None:
    tokenizer = PythonTokenizer()
    assert not tokenizer.is_fast
    text = f"a b\n{END_OF_TEXT}"
    assert encode(tokenizer, text, "x") == [[ord(c) for c in text], [ord("x")]]


def test_a_conversation_with_a_tokenizer_written_in_python_is_refused() -> None:
    with pytest.raises(DataError, match=r"^row 7: conversations need a fast tokenizer"):
        list(TextEncoder(PythonTokenizer()).encode([part("ab", learned=((1, 2),))]))


# Long texts whose tokenizer is not known, or that have no place to cut surely


def unknown_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, by a pre-tokenizer that we make no promise about."""
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abc \n")} | {"?": 9}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    assert not may_cut_before_newline(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaa bb b\ncc\na", "aaaa bb b"),
        ("aaaa bb b\r\ncc\na", "aaaa bb b"),
        ("aaaaa bb  ccccccccccccc", "aaaaa bb"),
        ("abcabcabcabcabc", "abcabc"),
        ("\n" * 15, "\n" * 6),
        ("ab" * 10 + "\nc d", "ababab"),
    ],
)
def test_long_texts_are_cut_at_line_ends_else_whitespace_else_anywhere(
    text: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_training.data.tokens.encoding._CUT_REACH", 5)
    pieces = cut_anyway(text, 6)
    assert pieces[0] == first
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 6 + 5 for piece in pieces)
    assert cut_anyway(text, len(text)) == [text]


def test_a_text_that_is_cut_unsurely_is_whole_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_training.data.tokens.encoding._WHOLE_CHARACTERS", 50)
    tokenizer = unknown_tokenizer()
    encoder = TextEncoder(tokenizer)
    long, short = "ab c\n" * 60, "abc\n" * 12
    assert encode_parts(encoder, [part(long), part(short), part(long)]) == [
        ["abc \n".index(c) for c in text] for text in (long, short, long)
    ]
    assert encoder.documents_cut_unsure == 2


def test_a_document_in_pieces_is_counted_once_and_gives_one_result_for_each() -> None:
    parts = [part("ab", is_last=False), part("\nba", is_last=False), part("\nc"), part("a")]
    unsure = TextEncoder(unknown_tokenizer())
    assert encode_parts(unsure, parts) == [[0, 1], [4, 1, 0], [4, 2], [0]]
    assert unsure.documents_cut_unsure == 1
    sure = TextEncoder(train_tokenizer("byte", [], 0))
    assert encode_parts(sure, parts) == [list(p.document.text.encode()) for p in parts]
    assert sure.documents_cut_unsure == 0
    # Nobody knows what a tokenizer would have made of the whole word, or of ".\n" and "a".
    for before, after in (("ab", "ba"), ("ab.", "\nba")):
        encode_parts(sure, [part(before, is_last=False), part(after), part("\nc")])
    assert sure.documents_cut_unsure == 2


def test_a_known_tokenizer_does_not_take_a_text_without_line_ends_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm_training.data.tokens.encoding._WHOLE_CHARACTERS", 50)
    monkeypatch.setattr("llm_training.data.tokens.encoding._PIECE_CHARACTERS", 10)
    encoder = TextEncoder(train_tokenizer("byte", [], 0))
    cuttable, chinese = "word\n" * 100, "中文。" * 100
    assert encode_parts(encoder, [part(cuttable)]) == [list(cuttable.encode())]
    assert encoder.documents_cut_unsure == 0
    assert encode_parts(encoder, [part(chinese)]) == [list(chinese.encode())]
    assert encoder.documents_cut_unsure == 1


# Conversations


def test_special_tokens_are_read_in_conversations_only() -> None:
    tokenizer = train_tokenizer("byte", [], 0)
    text = f"ab{END_OF_TEXT}"
    end = tokenizer.eos_token_id
    plain, chat, again = TextEncoder(tokenizer).encode(
        [part(text), part(text, learned=((1, len(text)),)), part(text)]
    )
    assert plain[1].tolist() == again[1].tolist() == list(text.encode())
    assert chat[1].tolist() == [97, 98, end]
    assert chat[2] is not None
    assert chat[2].dtype == np.uint8
    assert chat[2].tolist() == [0, 1, 1]
    assert plain[2] is again[2] is None


def test_conversations_are_never_cut_and_add_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PIECE_CHARACTERS", "_WHOLE_CHARACTERS"):
        monkeypatch.setattr(f"llm_training.data.tokens.encoding.{name}", 3)
    tokenizer = train_tokenizer("byte", [], 0)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, end)]
    )
    text = "ab\nab\nab" + END_OF_TEXT
    encoder = TextEncoder(tokenizer)
    [(_, ids, learned)] = encoder.encode([part(text, learned=())])
    assert ids.tolist() == [*b"ab\nab\nab", end]
    assert learned is not None
    assert learned.tolist() == [0] * 9
    assert encoder.documents_cut_unsure == 0


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_every_byte_of_a_span_is_learned_whatever_the_post_processor(trim_offsets: bool) -> None:
    tokenizer = train_tokenizer("byte", [], 0)
    post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.backend_tokenizer.post_processor = post_processor
    text = "é 🤖x\u0301 中 b"
    for start in range(len(text)):
        if text[start].isspace() or (start and text[start - 1].isspace()):
            continue  # whitespace before is another test's
        for stop in range(start + 1, len(text) + 1):
            [(_, ids, learned)] = TextEncoder(tokenizer).encode(
                [part(text, learned=((start, stop),))]
            )
            assert bytes(ids[learned == 1].astype(np.uint8)).decode() == text[start:stop]


def test_a_token_over_the_border_of_a_span() -> None:
    # "Q: ", then a learned " yes" or "yes", then more.
    text = "Q:  yes.\nQ"
    offsets = [(0, 1), (1, 3), (3, 7), (7, 9), (9, 10)]
    assert learned_tokens(text, offsets, [(3, 8)]).tolist() == [0, 0, 1, 1, 0]
    # Only whitespace stands before the span: the word is its own.
    assert learned_tokens(text, offsets, [(4, 7)]).tolist() == [0, 0, 1, 0, 0]
    # The token ":" + " " is the prompt's, though the span begins in it.
    assert learned_tokens(text, offsets, [(2, 7)]).tolist() == [0, 0, 1, 0, 0]
    # Tokens without characters are nobody's.
    assert learned_tokens("ab", [(0, 0), (0, 2), (2, 2)], [(0, 2)]).tolist() == [0, 1, 0]
    assert learned_tokens("ab", [(0, 1), (1, 2)], []).tolist() == [0, 0]
    assert learned_tokens("", [], []).tolist() == []
