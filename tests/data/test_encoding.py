"""Proves that encoding is plain text to ids: in order, in pieces or whole, with any tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_training.data.encoding import (
    _SPLITS_BEFORE_NEWLINE,
    TextEncoder,
    cut_before_newlines,
    may_cut_before_newline,
)
from llm_training.data.tokenizers import END_OF_TEXT, TRAINED_KINDS, TrainedKind, train_tokenizer

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


@pytest.fixture
def python_text(text_folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(text_folder.glob("*.py"))[:6])


def encode(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[list[int]]:
    return [ids.tolist() for _, ids in TextEncoder(tokenizer).encode(enumerate(texts))]


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
    monkeypatch.setattr("llm_training.data.encoding._BATCH_CHARACTERS", 5_000)
    texts = [python_text[:9_000], "a", AWKWARD, python_text[9_000:40_000]]
    tokenizer = train_tokenizer(kind, texts, 500)
    pairs = list(TextEncoder(tokenizer).encode(zip("abcd", texts, strict=True)))
    assert [key for key, _ in pairs] == list("abcd")
    assert [tokenizer.decode(ids) for _, ids in pairs] == texts


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_pieces_give_the_tokens_of_the_whole(
    kind: TrainedKind, python_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = AWKWARD + python_text + AWKWARD
    tokenizer = train_tokenizer(kind, [text], 900)
    whole = encode(tokenizer, text)
    assert may_cut_before_newline(tokenizer.backend_tokenizer)
    assert len(cut_before_newlines(text, 1)) > 150
    monkeypatch.setattr("llm_training.data.encoding._PIECE_CHARACTERS", 1)
    assert encode(tokenizer, text) == whole


@pytest.mark.parametrize("pattern", sorted(_SPLITS_BEFORE_NEWLINE))
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
    whole = encode(tokenizer, text)
    monkeypatch.setattr("llm_training.data.encoding._PIECE_CHARACTERS", 1)
    assert encode(tokenizer, text) == whole


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
