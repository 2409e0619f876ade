"""What is hashed while it is written lies on the disk; a staged copy makes the same file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from llm_training.model_state import SaveError, StagingMemory, staging, tensor_files
from llm_training.model_state.tensor_files import HashedFile, write_tensor_files


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few kilobytes take every turn that gigabytes do."""
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(tensor_files, "SYNC_BYTES", 2500)


def tree() -> dict[str, Any]:
    """Of every kind that a checkpoint can hold."""
    tied = torch.randn(30, 40)
    return {
        "tied": tied,
        "twice": tied,
        "head": tied.detach(),  # the same memory
        "groups": [{"lr": 0.1, "params": [0, 1]}],
        "state": {
            0: {
                "step": torch.tensor(3.0),
                "turned": torch.randn(20, 30).t(),
                "wide": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
                "half": torch.randn(7, dtype=torch.bfloat16),
                "none": torch.zeros(0, 3),
                "flags": torch.tensor([True, False]),
            }
        },
    }


@pytest.mark.usefixtures("small_blocks")
def test_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    types = list(tensor_files.SAFETENSORS_DTYPES)[::-1]
    tensors = {f"{i % 2}é{i}": torch.randn(i, 50).to(kind) for i, kind in enumerate(types)}
    tensors["scalar"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    notes = write_tensor_files(tmp_path, {"ours.safetensors": tensors})
    content = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours.safetensors").read_bytes() == content
    digest = xxhash.xxh3_128(content).hexdigest()
    assert notes == {"ours.safetensors": {"bytes": len(content), "xxh3_128": digest}}


@pytest.mark.usefixtures("small_blocks")
def test_the_notes_are_of_what_lies_on_the_disk(tmp_path: Path) -> None:
    trees = {name: tree() for name in ("one.bin", "two.bin")}
    for name, note in write_tensor_files(tmp_path, trees).items():
        content = (tmp_path / name).read_bytes()
        assert note == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
        found = torch.load(tmp_path / name)
        assert torch.equal(found["state"][0]["turned"], trees[name]["state"][0]["turned"])


@pytest.mark.usefixtures("small_blocks")
def test_what_is_written_may_change_at_once(tmp_path: Path) -> None:
    data = bytearray(os.urandom(10_000))
    digest = xxhash.xxh3_128(data).hexdigest()
    with HashedFile(tmp_path / "file") as file:
        file.write(memoryview(data))
        data[:] = bytes(len(data))
        assert file.checksum == digest
    assert xxhash.xxh3_128((tmp_path / "file").read_bytes()).hexdigest() == digest


@pytest.mark.usefixtures("small_blocks")
def test_a_disk_that_takes_a_part_gets_the_rest(tmp_path: Path) -> None:
    data = os.urandom(10_000)
    with HashedFile(tmp_path / "file") as file:
        write = file._file.write

        class Narrow:
            fileno, close = file._file.fileno, file._file.close

            def write(self, block: memoryview) -> int | None:
                return write(block[:300])

        file._file = Narrow()  # type: ignore[assignment]
        assert file.write(data) == len(data)
    assert (tmp_path / "file").read_bytes() == data


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"rank 0 could not write no/two\.bin: .*No such file"):
        write_tensor_files(tmp_path, {"one.bin": tree(), "no/two.bin": tree()})


def test_a_staged_copy_makes_the_same_file(tmp_path: Path) -> None:
    live = tree()
    staged = StagingMemory().copy("file", live)
    notes = write_tensor_files(tmp_path, {"live": live, "staged": staged})
    assert notes["live"] == notes["staged"]
    live["tied"].zero_()
    live["state"][0]["wide"].zero_()
    live["groups"][0]["params"].append(2)
    assert write_tensor_files(tmp_path, {"later": staged})["later"] == notes["staged"]


def test_memory_is_kept_for_the_next_one_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = StagingMemory()
    first = memory.copy("file", {"a": torch.ones(1000), "b": torch.ones(10)})
    again = memory.copy("file", {"a": torch.zeros(500)})
    other = memory.copy("other", [torch.ones(500)])
    assert again["a"].data_ptr() == first["a"].data_ptr() != other[0].data_ptr()
    assert torch.equal(memory.copy("file", {"a": torch.ones(10**6)})["a"], torch.ones(10**6))
    monkeypatch.setattr(staging, "free_memory", lambda: 10**6)
    memory.copy("file", {"a": torch.ones(10**6)})
    with pytest.raises(SaveError, match="needs 8,000,000 bytes of memory for file, and 1,000,000"):
        memory.copy("file", {"a": torch.ones(2 * 10**6)})
