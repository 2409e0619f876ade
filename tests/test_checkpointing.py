"""A checkpoint is whole or not there; retention keeps what it must; foreign ones are refused."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import xxhash
from accelerate import Accelerator
from torch import nn

from llm_training.checkpointing import (
    CheckpointError,
    CheckpointFolder,
    SaveError,
    agree_on_checkpoint,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
)
from llm_training.state import TrainState

IDENTITY = {"model": "abc", "seed": 1}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    return CheckpointFolder(accelerator, tmp_path / "checkpoints", 2, dict(IDENTITY))


def save(folder: CheckpointFolder, *steps: int, best: int | None = None) -> None:
    for step in steps:
        folder.save(TrainState(seed=1, step=step, samples=step * 8), is_best=step == best)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(p.name for p in folder.folder.iterdir())


def test_weights_optimizer_and_random_state_come_back(folder: CheckpointFolder) -> None:
    (model,), (optimizer,) = folder.accelerator._models, folder.accelerator._optimizers
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save(folder, 3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.rand(3)
    with torch.no_grad():
        model.weight.zero_()
    optimizer.state.clear()

    checkpoint, _ = find_checkpoint(folder.folder, "auto")
    assert checkpoint is not None
    lines = folder.load(checkpoint, model, optimizer)
    state = checkpoint.read_state()
    assert (state.step, state.samples) == (3, 24)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert all("exp_avg" in values for values in optimizer.state.values())
    assert torch.equal(torch.rand(3), drawn)
    assert lines == []


def test_the_manifest_tells_how_the_state_was_written(folder: CheckpointFolder) -> None:
    save(folder, 1)
    manifest = open_checkpoint(folder.folder / "last").manifest
    assert manifest["num_processes"] == 1
    assert manifest["model_state"] == {
        "backend": "single",
        "layout": "plain",
        "tensor_parallel_size": 1,
        "zero_stage": None,
        "precision": "fp32",
        "device": "cpu",
        "optimizer_parameters": ["weight", "bias"],
    }


def test_what_a_killed_conversion_left_is_cleared_away(folder: CheckpointFolder) -> None:
    (folder.folder / "step-abc.tmp").mkdir(parents=True)  # as `load` names its scratch folders
    save(folder, 1)
    assert names(folder) == ["last", "step-00000001"]


def test_the_newest_are_kept_and_the_best(folder: CheckpointFolder) -> None:
    save(folder, 1, 2, 3, 4, best=1)
    assert names(folder) == [
        "best", "last", "step-00000001", "step-00000003", "step-00000004",
    ]  # fmt: skip
    assert (folder.folder / "last").resolve().name == "step-00000004"
    assert open_checkpoint(folder.folder / "best").step == 1


def test_without_a_limit_all_are_kept(folder: CheckpointFolder) -> None:
    folder.total_limit = None
    save(folder, 1, 2, 3, 4)
    assert len(list_checkpoints(folder.folder)) == 4


def test_retention_leaves_alone_what_it_did_not_write(folder: CheckpointFolder) -> None:
    theirs = folder.folder / "step-00000000"
    theirs.mkdir(parents=True)
    (theirs / "notes.txt").write_text("mine")
    save(folder, 1, 2, 3, 4)
    assert (theirs / "notes.txt").read_text() == "mine"


def test_retention_never_removes_what_the_run_went_on_from(folder: CheckpointFolder) -> None:
    folder.total_limit = 1
    save(folder, 1, 2)
    prepared = (folder.accelerator._models[0], folder.accelerator._optimizers[0])
    folder.load(open_checkpoint(folder.folder / "last"), *prepared)
    save(folder, 3, 4)
    assert names(folder) == ["last", "step-00000002", "step-00000004"]


def test_what_is_in_the_way_is_neither_taken_for_a_checkpoint_nor_removed(
    folder: CheckpointFolder,
) -> None:
    theirs = folder.folder / "step-00000002"
    theirs.mkdir(parents=True)
    with pytest.raises(SaveError, match=r"step-00000002 is in the way: .* Move it away"):
        save(folder, 2)
    assert names(folder) == ["step-00000002"]


def test_a_checkpoint_knows_its_size(folder: CheckpointFolder) -> None:
    save(folder, 1)
    path = folder.folder / "step-00000001"
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    del sizes["manifest.json"]
    assert open_checkpoint(path).num_bytes == sum(sizes.values()) > 0


def test_the_manifest_has_checksums_and_what_was_consumed(folder: CheckpointFolder) -> None:
    folder.about = {"versions": {"torch": "2"}}
    folder.save(TrainState(seed=1, step=1, samples=8, sample_hash="ab"))
    manifest = open_checkpoint(folder.folder / "last").manifest
    weights = (folder.folder / "last" / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "xxh3_128": xxhash.xxh3_128(weights).hexdigest(),
    }
    assert list(manifest["files"]) == [
        "model.safetensors", "optimizer.bin", "random_states_0.pkl", "train_state.json",
    ]  # fmt: skip
    assert (manifest["format_version"], manifest["sample_hash"]) == (3, "ab")
    assert manifest["run"] == {"versions": {"torch": "2"}}


def test_manifests_with_older_checksums_are_read(folder: CheckpointFolder) -> None:
    save(folder, 1)
    path = folder.folder / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format_version"] = 2
    for name, note in manifest["files"].items():
        del note["xxh3_128"]
        note["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    open_checkpoint(path)
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*another sha256"):
        open_checkpoint(path)


FAULTS = {
    "no manifest": "has no manifest.json",
    "torn manifest": r"manifest\.json cannot be read",
    "manifest of something else": r"manifest\.json is damaged",
    "newer version": "was written by a newer version of train_llm.py",
    "older than any": "no checkpoint format 0",
    "truncated": r"model\.safetensors is damaged: \d+ bytes were written, it is \d+ bytes",
    "flipped byte": r"model\.safetensors is damaged: .*another xxh3_128",
    "missing file": r"model\.safetensors is missing",
    "torn state": r"train_state\.json cannot be read",
}


def spoil(path: Path, fault: str) -> None:
    weights, manifest = path / "model.safetensors", path / "manifest.json"
    content = bytearray(weights.read_bytes())
    noted = json.loads(manifest.read_text())
    if fault == "no manifest":
        manifest.unlink()
    elif fault == "torn manifest":
        manifest.write_text('{"format_version": 1, "fil')
    elif fault == "manifest of something else":
        manifest.write_text(json.dumps(noted | {"files": ["model.safetensors"]}))
    elif fault in ("newer version", "older than any"):
        version = 4 if fault == "newer version" else 0
        manifest.write_text(json.dumps(noted | {"format_version": version}))
    elif fault == "truncated":
        weights.write_bytes(content[:-1])
    elif fault == "flipped byte":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif fault == "missing file":
        weights.unlink()
    else:
        state = path / "train_state.json"
        state.write_bytes(bytes(state.stat().st_size))


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_ones_are_passed_over_with_a_word(folder: CheckpointFolder, fault: str) -> None:
    save(folder, 1, 2)
    newest = folder.folder / "step-00000002"
    spoil(newest, fault)

    checkpoint, passed_over = find_checkpoint(folder.folder, "auto")
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(passed_over) == 1
    assert re.search(f"^Passed over: .*step-00000002.*{FAULTS[fault]}", passed_over[0])
    with pytest.raises(CheckpointError, match=f"step-00000002.*{FAULTS[fault]}"):
        find_checkpoint(folder.folder, str(newest))  # one given by name is never replaced
    agreed = agree_on_checkpoint(folder.accelerator, folder.folder, "auto")
    assert agreed == (checkpoint, passed_over)

    folder.set_aside_newer(checkpoint)
    save(folder, 2)
    found, passed_over = find_checkpoint(folder.folder, "auto")
    assert found is not None
    assert (found.step, passed_over) == (2, [])


def test_a_run_that_goes_back_finds_the_best_before_it(folder: CheckpointFolder) -> None:
    folder.total_limit = None
    save(folder, 1, best=1)
    save(folder, 2)
    save(folder, 3, best=3)
    (folder.folder / "last").unlink()
    folder.set_aside_newer(open_checkpoint(folder.folder / "step-00000002"))
    assert (folder.folder / "best").resolve().name == "step-00000001"
    assert (folder.folder / "last").resolve().name == "step-00000002"
    assert (folder.folder / "step-00000003.superseded").is_dir()


def test_checkpoints_that_noted_sizes_only_are_still_read(folder: CheckpointFolder) -> None:
    save(folder, 1)
    path = folder.folder / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: note["bytes"] for name, note in manifest["files"].items()}
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    checkpoint = open_checkpoint(path)
    prepared = (folder.accelerator._models[0], folder.accelerator._optimizers[0])
    assert folder.load(checkpoint, *prepared) == []
    assert checkpoint.num_bytes == sum(manifest["files"].values())
    spoil(path, "truncated")
    with pytest.raises(CheckpointError, match=FAULTS["truncated"]):
        open_checkpoint(path)


def test_nothing_but_damaged_ones_is_an_error(folder: CheckpointFolder) -> None:
    save(folder, 1)
    (folder.folder / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        find_checkpoint(folder.folder, "auto")


def test_none_refuses_a_folder_that_has_some(folder: CheckpointFolder) -> None:
    assert find_checkpoint(folder.folder, "none") == (None, [])
    assert find_checkpoint(folder.folder, "auto") == (None, [])
    save(folder, 1)
    for find in (find_checkpoint, partial(agree_on_checkpoint, folder.accelerator)):
        with pytest.raises(CheckpointError, match="another --output_dir"):
            find(folder.folder, "none")
        found, _ = find(folder.folder, str(folder.folder / "last"))
        assert found is not None
        assert found.path == folder.folder / "step-00000001"


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(
    folder: CheckpointFolder,
) -> None:
    save(folder, 5)
    checkpoint = open_checkpoint(folder.folder / "last")
    folder.check(checkpoint, total_steps=5)
    folder.identity |= {"model": "xyz", "seed": 2}
    with pytest.raises(CheckpointError, match="model: abc there, xyz here; seed: 1 there, 2 here"):
        folder.check(checkpoint)


def test_what_is_allowed_may_differ_and_is_said(folder: CheckpointFolder) -> None:
    save(folder, 5)
    checkpoint = open_checkpoint(folder.folder / "last")
    assert folder.check(checkpoint, allowed=["seed"]) == []
    folder.identity["seed"] = 2
    with pytest.raises(CheckpointError, match="or --allow_resume_change seed"):
        folder.check(checkpoint, allowed=["data"])
    (line,) = folder.check(checkpoint, allowed=["data", "seed"])
    assert line == "Allowed  seed: 1 there, 2 here: the curve is another one from here"
    folder.identity["model"] = "xyz"
    with pytest.raises(CheckpointError) as caught:
        folder.check(checkpoint, allowed=["seed"])
    assert "allow_resume_change" not in str(caught.value)  # no permit makes another model fit


def test_one_beyond_the_end_is_refused(folder: CheckpointFolder) -> None:
    save(folder, 5)
    with pytest.raises(CheckpointError, match="at step 5, beyond the 4 steps asked for"):
        folder.check(open_checkpoint(folder.folder / "last"), total_steps=4)


def test_a_missing_random_state_is_an_error(folder: CheckpointFolder) -> None:
    save(folder, 1)
    checkpoint = open_checkpoint(folder.folder / "last")
    (checkpoint.path / "random_states_0.pkl").unlink()
    prepared = (folder.accelerator._models[0], folder.accelerator._optimizers[0])
    with pytest.raises(CheckpointError, match=r"has no random_states_0\.pkl"):
        folder.load(checkpoint, *prepared)
