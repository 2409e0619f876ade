"""Proves that made tokenizers lose no text, are deterministic and open offline; and the faults."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_training.data.errors import DataError
from llm_training.data.tokens.tokenizers import (
    END_OF_TEXT,
    TRAINED_KINDS,
    TrainedKind,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

TEXT = "def größe(x):\n\treturn x  # don't , 😀 . !\r\n\n   end\x0c"


@pytest.fixture
def python_texts(text_folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(text_folder.glob("*.py"))[:8]]


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_a_made_one_opens_offline_and_loses_no_text(kind: TrainedKind, tmp_path: Path) -> None:
    train_tokenizer(kind, [TEXT * 3], 300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.bos_token == END_OF_TEXT
    # Nothing is put around the text.
    assert tokenizer.eos_token_id not in ids


def test_char_has_every_character_and_an_unknown_one() -> None:
    tokenizer = train_tokenizer("char", ["ba", "\nc"], 0)
    assert tokenizer("abc\n").input_ids == [1, 2, 3, 0]
    assert tokenizer("a?é").input_ids == [1, tokenizer.unk_token_id, tokenizer.unk_token_id]
    assert len(tokenizer) == 4 + 2


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = train_tokenizer("byte", [], 0)
    text = "".join(map(chr, range(0x250))) + "😀"
    assert tokenizer(text).input_ids == list(text.encode())
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)


def test_bpe_has_the_size_asked_for(python_texts: list[str]) -> None:
    tokenizer = train_tokenizer("bpe", python_texts, 600)
    assert len(tokenizer) == 600
    assert len(tokenizer(python_texts[0]).input_ids) < len(python_texts[0]) / 2


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_special_tokens_are_one_token_each_and_survive_the_disk(
    kind: TrainedKind, tmp_path: Path
) -> None:
    names = ["<|user|>", "<|end|>"]
    made = train_tokenizer(kind, [TEXT], 300, special_tokens=names)
    made.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name in names:
        (token,) = tokenizer(name).input_ids
        assert tokenizer.decode([token], skip_special_tokens=True) == ""
        assert token != tokenizer.eos_token_id
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_a_bpe_vocabulary_holds_its_special_tokens(python_texts: list[str]) -> None:
    tokenizer = train_tokenizer("bpe", python_texts, 400, special_tokens=["<|a|>", "<|b|>"])
    assert len(tokenizer) == 400
    with pytest.raises(DataError, match="the 2 special_tokens, so 259 or more"):
        train_tokenizer("bpe", python_texts, 258, special_tokens=["<|a|>", "<|b|>"])


def test_rare_pairs_become_no_token() -> None:
    texts = ["as often often often as rare"]
    often = train_tokenizer("bpe", texts, 300, min_frequency=3)
    assert len(often(" often").input_ids) == 1
    assert len(often(" rare").input_ids) == len(" rare")
    assert len(train_tokenizer("bpe", texts, 300)(" rare").input_ids) == 1


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_the_same_data_gives_the_same_tokenizer(kind: TrainedKind, python_texts: list[str]) -> None:
    first, second = (
        tokenizer_fingerprint(train_tokenizer(kind, iter(python_texts), 600)) for _ in range(2)
    )
    assert first == second


def test_the_fingerprint_follows_the_vocabulary_and_the_end() -> None:
    marks = [
        tokenizer_fingerprint(train_tokenizer("char", [text], 0)) for text in ("ab", "ba", "abc")
    ]
    assert marks[0] == marks[1] != marks[2]
    changed = train_tokenizer("char", ["ab"], 0)
    changed.eos_token = "a"
    assert tokenizer_fingerprint(changed) != marks[0]


def test_settings_that_cannot_be_met() -> None:
    with pytest.raises(DataError, match=r"vocab_size 256 is too small.*257 or more"):
        train_tokenizer("bpe", ["text"], 256)
    with pytest.raises(DataError, match="no character"):
        train_tokenizer("char", [], 0)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no end-of-text token.*Set eos_token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        load_tokenizer("./nowhere")
    with pytest.raises(DataError, match=r"cannot be loaded.*local folder.*hub is reachable"):
        load_tokenizer(str(tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(DataError, match="'some/name' cannot be loaded: We couldn't connect"):
        load_tokenizer("some/name")


def test_a_model_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    # transformers makes a tokenizer with no vocabulary from this, and does not complain.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(DataError, match="empty vocabulary"):
        load_tokenizer(str(tmp_path))


def test_an_existing_tokenizer_gets_the_special_tokens_that_it_lacks(tmp_path: Path) -> None:
    old = AddedToken("<old>", special=True, normalized=False, rstrip=True)
    made = train_tokenizer("byte", [], 0)
    made.add_tokens([old], special_tokens=True)
    made.save_pretrained(tmp_path)
    plain = load_tokenizer(str(tmp_path))
    more = load_tokenizer(str(tmp_path), special_tokens=["<old>", "<new>", "a"])
    assert len(plain) == 258 and len(more) == 259
    assert more("<old><new>a", add_special_tokens=False).input_ids == [257, 258, 97]
    assert plain("<new>", add_special_tokens=False).input_ids == [*b"<new>"]
    assert more.decode([98, 258, 97], skip_special_tokens=True) == "b"
    assert tokenizer_fingerprint(more) != tokenizer_fingerprint(plain)
    same = load_tokenizer(str(tmp_path), special_tokens=["<old>", "<|endoftext|>"])
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(plain)


def test_code_that_comes_with_a_tokenizer_runs_by_consent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = tmp_path / "own"
    train_tokenizer("byte", [], 0).save_pretrained(folder)
    (folder / "own_words.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    its_own = True\n"
    )
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own_words.OwnTokenizer"]},
    }
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"needs Python code .*allow it with --trust_remote_code"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), trust_remote_code=True).its_own
