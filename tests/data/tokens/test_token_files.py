"""Proves that other programs' token files are found, and what is said of them understood."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_training.data.errors import DataError
from llm_training.data.tokens.store_meta import SplitMeta, StoreMeta
from llm_training.data.tokens.token_files import (
    Claims,
    TokenFolder,
    find_token_folder,
    name_token_files,
    read_claims,
    read_layout,
    validation_beside,
)

NOTHING = Claims(said_by="nothing")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("folder", [".", "processed"])
@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train.bin", "val.bin"),
        ("train.npy", "val.npy"),
        ("train.bin", "validation.bin"),
        ("train.bin", None),
        (None, "val.bin"),
    ],
)
def test_a_folder_with_token_files(
    tmp_path: Path, folder: str, train: str | None, validation: str | None
) -> None:
    touch(tmp_path / "input.txt", tmp_path / "meta.pkl", tmp_path / "other.bin")
    expected = [tmp_path / folder / name if name else None for name in (train, validation)]
    touch(*filter(None, expected))
    assert find_token_folder(tmp_path) == TokenFolder(*expected)


def test_other_folders_hold_none(tmp_path: Path) -> None:
    touch(tmp_path / "a.bin", tmp_path / "sub" / "train.bin", tmp_path / "a.txt")
    (tmp_path / "train.bin").mkdir()
    assert find_token_folder(tmp_path) is None
    assert find_token_folder(tmp_path / "a.txt") is None
    assert find_token_folder(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "names",
    [
        ("train.bin", "train.npy"),
        ("train.bin", "processed/train.bin"),
        ("val.bin", "validation.bin"),
    ],
)
def test_two_to_choose_from_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    paths = [tmp_path / name for name in names]
    touch(*paths)
    with pytest.raises(DataError, match=f"{paths[0]}, {paths[1]}. Name the one"):
        find_token_folder(tmp_path)


def test_validation_beside_the_training_file(tmp_path: Path) -> None:
    touch(tmp_path / "val.npy")
    assert validation_beside(tmp_path / "train.npy") == tmp_path / "val.npy"
    assert validation_beside(tmp_path / "other.npy") is None
    touch(tmp_path / "val.bin")
    with pytest.raises(DataError, match="more than one token file"):
        validation_beside(tmp_path / "train.npy")


def test_folders_give_the_file_of_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(Path("both/train.bin"), Path("both/val.bin"), Path("one/train.npy"), Path("text/a.txt"))
    entries = ["both", "one", "text", "*.txt", "both/train.bin"]
    lines: list[str] = []
    assert name_token_files(entries, argument="train_file", say=lines.append) == [
        "both/train.bin",
        "one/train.npy",
        *entries[2:],
    ]
    assert len(lines) == 2
    assert "train_file: both holds token files, of which both/train.bin is read" in lines[0]
    named = name_token_files(entries, argument="validation_file", say=lines.append)
    assert named == ["both/val.bin", *entries[1:]]


def test_a_meta_json_of_another_program(tmp_path: Path) -> None:
    content = {"vocab_size": 70_000, "dtype": "uint32", "eos_token_id": 0, "by": ["a", "b"]}
    (tmp_path / "meta.json").write_text(json.dumps({**content, "tokenizer": "someone/some"}))
    assert read_claims(tmp_path / "train.bin") == Claims(
        str(tmp_path / "meta.json"), "<u4", 70_000, 0, "someone/some"
    )
    # A folder beside it is meant before a hub id.
    (tmp_path / "someone/some").mkdir(parents=True)
    claims = read_claims(tmp_path / "train.bin")
    assert claims is not None
    assert claims.tokenizer == str(tmp_path / "someone/some")


def test_nothing_beside_says_nothing(tmp_path: Path) -> None:
    assert read_claims(tmp_path / "train.bin") == NOTHING
    (tmp_path / "meta.json").write_text("{}")
    claims = read_claims(tmp_path / "train.bin")
    assert claims == Claims(str(tmp_path / "meta.json"))


def test_the_parent_of_processed_counts(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"vocab_size": 3, "dtype": "uint32"}')
    (tmp_path / "processed").mkdir()
    (tmp_path / "made").mkdir()
    claims = read_claims(tmp_path / "processed" / "train.bin")
    assert claims is not None
    assert (claims.vocab_size, claims.dtype) == (3, "<u4")
    assert read_claims(tmp_path / "made" / "train.bin") == NOTHING
    (tmp_path / "processed" / "meta.pkl").write_bytes(pickle.dumps({"itos": ["a", "b", "c"]}))
    claims = read_claims(tmp_path / "processed" / "train.bin")
    assert claims is not None
    assert (claims.dtype, claims.tokens) == ("<u4", ("a", "b", "c"))
    (tmp_path / "processed" / "meta.json").write_text('{"vocab_size": 3}')
    claims = read_claims(tmp_path / "processed" / "train.bin")
    assert claims is not None
    assert claims.dtype is None


def test_two_metas_that_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"vocab_size": 4}')
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 5}))
    with pytest.raises(DataError, match=r"a vocab_size of 4, but .*meta\.pkl says 5"):
        read_claims(tmp_path / "train.bin")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be used"),
        ("\xff", "cannot be used"),
        ("[" * 100_000, "cannot be used"),
        ("[1]", "it holds a list"),
        ('{"vocab_size": 0}', "vocab_size is 0"),
        ('{"vocab_size": 1.5}', r"vocab_size is 1\.5"),
        ('{"vocab_size": true}', "vocab_size is True"),
        ('{"eos_token_id": [1]}', r"eos_token_id is \[1\]"),
        ('{"eos_token_id": 7, "vocab_size": 7}', "eos_token_id is 7, no whole number from 0 to 6"),
        ('{"dtype": "int64"}', "says dtype 'int64', but token files are read as uint16, uint32"),
        ('{"dtype": 16}', "says dtype 16"),
    ],
)
def test_nonsense_in_meta_json(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "meta.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=words):
        read_claims(tmp_path / "train.bin")


@pytest.mark.parametrize(
    ("claims", "tokenizer_size", "dtype", "id_limit", "is_stated"),
    [
        (NOTHING, None, "<u2", 2**16, False),
        (NOTHING, 2**16, "<u2", 2**16, False),
        (NOTHING, 2**16 + 1, "<u4", 2**32, False),
        (Claims("", vocab_size=2**16 + 1), 10, "<u4", 2**32, False),
        (Claims("", vocab_size=10), 2**17, "<u2", 2**16, False),
        (Claims("", dtype="<u4", vocab_size=10), None, "<u4", 2**32, True),
        (Claims("", dtype="<i4"), None, "<u4", 2**31, True),
    ],
)
def test_the_type_of_a_bin(
    claims: Claims, tokenizer_size: int | None, dtype: str, id_limit: int, is_stated: bool
) -> None:
    layout = read_layout(Path("train.bin"), claims, tokenizer_size)
    assert layout.dtype == np.dtype(dtype)
    assert (layout.id_limit, layout.header_bytes, layout.is_stated) == (id_limit, 0, is_stated)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize(("stored", "read_as"), [("<u2", "<u2"), ("<u4", "<u4"), ("<i4", "<u4")])
def test_the_header_of_an_npy(
    tmp_path: Path, version: tuple[int, int], stored: str, read_as: str
) -> None:
    path = tmp_path / "train.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.arange(5, dtype=stored), version)
    layout = read_layout(path, Claims("", dtype="<u2"), None)
    assert (layout.dtype, layout.is_stated) == (np.dtype(read_as), True)
    assert np.fromfile(path, read_as, offset=layout.header_bytes).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.arange(5), "holds <i8 of shape"),
        (np.arange(5, dtype=np.int16), "holds <i2"),
        (np.arange(5, dtype=">u2"), "holds >u2"),
        (np.zeros((2, 3), np.uint16), r"of shape \(2, 3\), but only one row"),
        (np.uint16(3), r"of shape \(\)"),
        (np.zeros(5, np.float32), "holds float32, but token ids are whole numbers"),
        (np.array([{}, []], dtype=object), "holds object"),
        (np.zeros(5, bool), "holds bool"),
    ],
)
def test_an_npy_that_cannot_be_used(tmp_path: Path, array: Any, words: str) -> None:
    path = tmp_path / "train.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(DataError, match=words) as caught:
        read_layout(path, NOTHING, None)
    # The conversion that the message gives is right.
    if command := re.search(r'python -c "(.*)"', str(caught.value)):
        new = tmp_path / "new.npy"
        exec(command.group(1).replace("new.npy", str(new)), {})
        layout = read_layout(new, NOTHING, None)
        assert np.fromfile(new, layout.dtype, offset=layout.header_bytes).tolist() == [
            int(x) for x in np.ravel(array)
        ]


@pytest.mark.parametrize("change", [b"", b"text, and no array", b"\x93NUMPY\x09\x00", -1, 1])
def test_a_damaged_npy(tmp_path: Path, change: bytes | int) -> None:
    path = tmp_path / "train.npy"
    np.save(path, np.arange(5, dtype=np.uint16))
    whole = path.read_bytes()
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_bytes(whole[:-1] if change < 0 else whole + b"\0")
    with pytest.raises(
        DataError, match=r"no \.npy file that can be read|its header says 5 of 2 bytes"
    ):
        read_layout(path, NOTHING, None)


def test_an_npy_with_a_damaged_header(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    np.save(path, np.arange(5, dtype=np.uint16))
    whole = bytearray(path.read_bytes())
    for place in range(128):
        for value in (0, ord("("), ord("'"), 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            # Some changes leave it whole; no other exception may come out.
            with contextlib.suppress(DataError):
                read_layout(path, NOTHING, None)


def test_the_meta_of_our_store_speaks_of_its_own_files(tmp_path: Path) -> None:
    split = SplitMeta("train.bin", tokens=1, documents=1, sha256="", max_id=0)
    StoreMeta("uint16", 3, 2, {}, {"train": split}, "", "", {}).write(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3}))
    assert read_claims(tmp_path / "train.bin") is None
    assert read_claims(tmp_path / "other.bin") == NOTHING
