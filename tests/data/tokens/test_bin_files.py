"""Proves that token files are used where they lie, and checked against what is known of them."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arguments import DataArguments
from llm_training.data import DataError, PreparedData, prepare_data
from llm_training.data.documents.sources import find_files
from llm_training.data.ledger import Ledger
from llm_training.data.tokens.bin_files import _remembered_scan, prepare_bin_files
from llm_training.data.tokens.nanogpt_meta import write_nanogpt_meta
from llm_training.data.tokens.store_meta import StoreMeta
from llm_training.data.tokens.store_writer import TokenStoreWriter
from llm_training.data.tokens.token_files import name_token_files
from llm_training.data.tokens.token_store import TokenStore
from llm_training.data.tokens.tokenizers import tokenizer_fingerprint, train_tokenizer

TEXT = "first line\nsecond line\n" * 20


def write_ids(path: Path, ids: list[int]) -> Path:
    np.array(ids, "<u2").tofile(path)
    return path


def prepare(folder: Path, source: str | None = None, **settings: Any) -> PreparedData:
    arguments = DataArguments(cache_dir=str(folder / "cache"), **settings)
    return prepare_data(arguments, tokenizer_source=source, say=lambda _: None)


def prepare_named(
    folder: Path, *train: Path, validation: tuple[Path, ...] = (), **settings: Any
) -> PreparedData:
    """What `prepare_bin_files` makes of entries of train_file and validation_file."""
    files = []
    for argument, entries in (("train_file", train), ("validation_file", validation)):
        names = name_token_files(list(map(str, entries)), argument=argument, say=lambda _: None)
        files.append(find_files(names, [], Ledger(), argument=argument))
    defaults = {"share": Fraction(1, 10), "tokenizer_name": None, "tokenizer_source": None}
    return prepare_bin_files(
        *files, cache_dir=folder / "cache", say=lambda _: None, **{**defaults, **settings}
    )


def write_char_folder(folder: Path) -> Path:
    """As nanoGPT's data/shakespeare_char/prepare.py does."""
    folder.mkdir()
    characters = sorted(set(TEXT))
    stoi = {character: i for i, character in enumerate(characters)}
    write_ids(folder / "train.bin", [stoi[character] for character in TEXT])
    write_ids(folder / "val.bin", [stoi[character] for character in TEXT[:30]])
    meta = {"vocab_size": len(stoi), "itos": dict(enumerate(characters)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "input.txt").write_text(TEXT)
    return folder


def test_the_last_tokens_are_validation(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "ids.bin", list(range(100)))
    data = prepare(tmp_path, train_file=[str(path)], validation_split_percentage=10)
    assert data.train is not None
    assert data.validation is not None
    assert data.train.path == data.validation.path == path
    assert data.train.tokens.tolist() == list(range(90))
    assert data.validation.tokens.tolist() == list(range(90, 100))
    assert (data.vocab_size, data.tokenizer) == (100, None)
    assert data.ledger.splits["train"].tokens == 90


def test_the_file_beside_is_validation(tmp_path: Path) -> None:
    train = write_ids(tmp_path / "train.bin", [1, 2, 3])
    write_ids(tmp_path / "val.bin", [4, 500])
    data = prepare(tmp_path, train_file=[str(train)])
    assert data.validation is not None
    assert data.validation.tokens.tolist() == [4, 500]
    assert data.vocab_size == 501
    other = write_ids(tmp_path / "other.bin", [6])
    data = prepare(tmp_path, train_file=[str(train)], validation_file=[str(other)])
    assert data.validation is not None
    assert data.validation.tokens.tolist() == [6]
    data = prepare(tmp_path, train_file=[str(train)], validation_split_percentage=0)
    assert data.validation is None


def test_evaluation_alone_needs_no_training_file(tmp_path: Path) -> None:
    data = prepare(tmp_path, validation_file=[str(write_ids(tmp_path / "a.bin", [1, 2]))])
    assert data.train is None
    assert data.validation is not None


def test_our_own_store_brings_its_type_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    made = prepare(tmp_path, train_file=[str(tmp_path / "a.txt")], tokenizer_name="byte")
    assert made.train is not None
    again = prepare(tmp_path, train_file=[str(made.train.path)])
    assert again.train == made.train
    assert again.validation == made.validation
    assert again.vocab_size == 257
    assert again.tokenizer is not None
    assert again.tokenizer.decode(again.train.tokens[:9]) == "some text"
    # The tokenizer was saved and read again, its content is the same.
    assert again.fingerprint == made.fingerprint


def test_ids_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    train_tokenizer("byte", [], 0).save_pretrained(tmp_path / "tok")
    path = write_ids(tmp_path / "ids.bin", list(range(258)))
    settings: dict[str, Any] = {"train_file": [str(path)], "tokenizer_name": str(tmp_path / "tok")}
    with pytest.raises(
        DataError, match=r"token id 257, its largest, .* the tokenizer .* only 257 tokens"
    ):
        prepare(tmp_path, **settings)
    write_ids(path, [1, 2, 3] * 20)
    assert prepare(tmp_path, **settings).vocab_size == 257


def test_a_model_without_tokenizer_will_do(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = write_ids(tmp_path / "ids.bin", [1] * 40)
    data = prepare(tmp_path, source=str(tmp_path / "model"), train_file=[str(path)])
    assert data.tokenizer is None


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        (["a.bin", "a.txt"], {}, "cannot be mixed"),
        (["a.bin", "b.bin"], {}, "must be the only one"),
        (["a.bin"], {"validation_file": ["a.txt"]}, "validation_file names a.txt"),
        (["a.bin"], {"tokenizer_name": "bpe"}, "makes a tokenizer from text"),
        (["a.bin"], {"validation_split_percentage": 5}, "only 3 tokens, too few"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    settings: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    write_ids(tmp_path / "a.bin", [1, 2, 3])
    write_ids(tmp_path / "b.bin", [1, 2, 3])
    with pytest.raises(DataError, match=words):
        prepare(tmp_path, train_file=files, **settings)


def test_a_foreign_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ids(tmp_path / "ids.bin", list(range(100)))
    first = prepare(tmp_path, train_file=[str(path)])

    def read_again(*_: object) -> None:
        raise AssertionError("it is read again")

    monkeypatch.setattr("llm_training.data.tokens.bin_files.scan_tokens", read_again)
    assert prepare(tmp_path, train_file=[str(path)]).fingerprint == first.fingerprint
    write_ids(path, list(range(101)))
    with pytest.raises(AssertionError, match="read again"):
        prepare(tmp_path, train_file=[str(path)])


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"cache folder .* cannot be written"):
        prepare(tmp_path, train_file=[str(write_ids(tmp_path / "ids.bin", [1] * 40))])


def test_what_was_read_is_remembered_by_where_the_ids_begin(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "ids.bin", [9, 1, 2])
    scan = _remembered_scan(tmp_path / "cache", lambda _: None)
    assert [scan(path, np.dtype("<u2"), start).max_id for start in (0, 2, 0)] == [9, 2, 9]


def test_npy_files_are_used_where_they_lie(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.arange(100, 200, dtype=np.uint32))
    data = prepare_named(tmp_path, tmp_path)
    assert data.train is not None
    assert data.validation is not None
    assert data.train.path == data.validation.path == tmp_path / "train.npy"
    assert data.train.tokens.tolist() == list(range(100, 190))
    assert data.validation.tokens.tolist() == list(range(190, 200))
    # The header was not taken for ids.
    assert (data.train.max_id, data.vocab_size, data.train.dtype) == (199, 200, np.dtype("<u4"))
    np.save(tmp_path / "val.npy", np.arange(7, dtype=np.uint16))
    data = prepare_named(tmp_path, tmp_path)
    assert data.validation is not None
    assert data.validation.tokens.tolist() == list(range(7))


def test_the_same_ids_are_the_same_data_in_both_formats(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "ids.bin", list(range(50)))
    np.save(tmp_path / "ids.npy", np.arange(50, dtype=np.uint16))
    plain = prepare_named(tmp_path, path)
    assert prepare_named(tmp_path, path.with_suffix(".npy")).fingerprint == plain.fingerprint


def test_a_folder_that_nanogpt_made(tmp_path: Path) -> None:
    folder = write_char_folder(tmp_path / "shakespeare_char")
    data = prepare_named(tmp_path, folder)
    assert data.train is not None
    assert data.validation is not None
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.train.tokens) == TEXT
    assert data.tokenizer.decode(data.validation.tokens) == TEXT[:30]
    assert data.tokenizer(TEXT).input_ids == data.train.tokens.tolist()
    # The end-of-text token came after the last.
    assert data.vocab_size == len(data.tokenizer) == len(set(TEXT)) + 1
    # It is in none of the files, so nothing tells documents apart.
    assert data.train.eos_token_id is None
    assert data.ledger.splits["validation"].tokens == 30


def test_validation_of_a_folder(tmp_path: Path) -> None:
    folder = write_char_folder(tmp_path / "made")
    data = prepare_named(tmp_path, validation=(folder,))
    assert data.train is None
    assert data.validation is not None
    assert data.validation.path == folder / "val.bin"


def test_ids_above_the_vocabulary_that_is_claimed(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "train.bin", [1, 70, 2, 99, 99, 3] * 20)
    (tmp_path / "meta.json").write_text('{"vocab_size": 65}')
    with pytest.raises(
        DataError,
        match=r"train\.bin holds token id 99, its largest, first at token 3 .*"
        r"meta\.json says a vocabulary of 65 ",
    ):
        prepare_named(tmp_path, path)
    (tmp_path / "meta.json").write_text('{"vocab_size": 128}')
    data = prepare_named(tmp_path, path)
    assert data.vocab_size == 128
    assert data.train is not None
    assert data.train.vocab_size == 128


def test_validation_ids_are_checked_too(tmp_path: Path) -> None:
    folder = write_char_folder(tmp_path / "made")
    write_ids(folder / "val.bin", [1, 2, 500])
    with pytest.raises(
        DataError, match=r"val\.bin holds token id 500, its largest, first at token 2"
    ):
        prepare_named(tmp_path, folder)


def test_a_negative_number_is_no_id(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([5, 1, -100, 3] * 10, np.int32))
    with pytest.raises(DataError, match=r"first at token 2 .* stored as int32"):
        prepare_named(tmp_path, tmp_path / "ids.npy")


def test_a_large_vocabulary_means_uint32(tmp_path: Path) -> None:
    ids = np.arange(100_000, dtype="<u4")
    ids.tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 100_000}))
    data = prepare_named(tmp_path, tmp_path, share=Fraction(0))
    assert data.train is not None
    assert (data.train.tokens == ids).all()
    assert (data.vocab_size, data.tokenizer) == (100_000, None)


def test_uint32_is_not_taken_for_uint16(tmp_path: Path) -> None:
    np.arange(100, dtype="<u4").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"seems to hold uint32.*meta\.json"):
        prepare_named(tmp_path, tmp_path)
    for dtype, num_tokens in (("uint32", 90), ("uint16", 180)):
        (tmp_path / "meta.json").write_text(json.dumps({"dtype": dtype}))
        data = prepare_named(tmp_path, tmp_path)
        assert data.train is not None
        assert data.train.num_tokens == num_tokens


def test_a_bin_cut_short(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 50 + b"\1")
    with pytest.raises(DataError, match="101 bytes, no multiple of 2"):
        prepare_named(tmp_path, tmp_path)


@pytest.mark.parametrize("said_by", ["meta.json", "tokenizer"])
def test_the_end_of_a_document_is_known(tmp_path: Path, said_by: str) -> None:
    write_ids(tmp_path / "train.bin", [5, 6, 256, 7, 256, 8, 9, 9])
    write_ids(tmp_path / "val.bin", [1, 2, 3])
    settings = {}
    if said_by == "meta.json":
        (tmp_path / "meta.json").write_text('{"eos_token_id": 256}')
    else:
        train_tokenizer("byte", [], 0).save_pretrained(tmp_path / "tok")
        settings["tokenizer_name"] = str(tmp_path / "tok")
    data = prepare_named(tmp_path, tmp_path, **settings)
    assert data.train is not None
    assert data.validation is not None
    assert np.array(data.train.ends).tolist() == [3, 5, 8]
    assert np.array(data.validation.ends).tolist() == [3]


def test_an_end_that_is_in_no_file_tells_nothing(tmp_path: Path) -> None:
    train_tokenizer("byte", [], 0).save_pretrained(tmp_path / "tok")
    path = write_ids(tmp_path / "ids.bin", [5, 6, 7] * 20)
    data = prepare_named(tmp_path, path, tokenizer_name=str(tmp_path / "tok"))
    assert data.train is not None
    assert data.train.ends is None


def test_the_tokenizer_that_meta_json_names(tmp_path: Path) -> None:
    train_tokenizer("byte", [], 0).save_pretrained(tmp_path / "tok")
    np.array(list(b"some text"), "<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text('{"tokenizer": "tok"}')
    data = prepare_named(tmp_path, tmp_path, share=Fraction(0))
    assert data.train is not None
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.train.tokens) == "some text"


@pytest.mark.parametrize("meta", [{"itos": ["the", "of"]}, {"vocab_size": 2}])
def test_the_tokenizer_of_the_model_is_not_taken_for_other_tokens(
    tmp_path: Path, meta: dict[str, Any]
) -> None:
    train_tokenizer("byte", [], 0).save_pretrained(tmp_path / "model")
    write_ids(tmp_path / "train.bin", [0, 1] * 30)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    data = prepare_named(tmp_path, tmp_path, tokenizer_source=str(tmp_path / "model"))
    assert (data.tokenizer is None) == ("itos" in meta)


def test_our_own_files_are_known_by_their_meta_json(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    folder.mkdir()
    tokenizer = train_tokenizer("char", [TEXT], 0)
    end = tokenizer.eos_token_id
    with TokenStoreWriter(folder / "train.bin", len(tokenizer), end) as writer:
        for text in ("first", "line"):
            writer.write(np.array(tokenizer(text).input_ids, np.uint32))
    mark = tokenizer_fingerprint(tokenizer)
    StoreMeta(
        dtype="uint16",
        vocab_size=len(tokenizer),
        eos_token_id=end,
        tokenizer={"name": "char", "folder": "tokenizer", "fingerprint": mark},
        splits={"train": writer.meta()},
        fingerprint="",
        source_key="",
        ledger={},
    ).write(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_nanogpt_meta(folder, tokenizer)

    data = prepare_named(tmp_path, folder, share=Fraction(0))
    assert data.train == TokenStore.open(folder / "train.bin")
    assert data.train.num_documents == 2
    assert data.tokenizer is not None
    assert tokenizer_fingerprint(data.tokenizer) == mark

    # Without our meta.json, meta.pkl gives the same tokens and documents.
    (folder / "meta.json").unlink()
    again = prepare_named(tmp_path, folder, share=Fraction(0))
    assert again.train is not None
    assert again.train.fingerprint == data.train.fingerprint
    assert np.array(again.train.ends).tolist() == np.array(data.train.ends).tolist()
    assert again.tokenizer is not None
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
