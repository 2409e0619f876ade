"""A checkpoint is whole or not there; retention keeps what it must; foreign ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from llm_training.checkpointing import (
    CheckpointError,
    CheckpointFolder,
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


def test_a_save_that_fails_leaves_the_old_one_and_no_new_one(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.total_limit = 1
    save(folder, 1)

    def fail(path: str) -> None:
        (Path(path) / "half").write_bytes(b"x")
        raise OSError("No space left on device")

    monkeypatch.setattr(folder.accelerator, "save_state", fail)
    with pytest.raises(OSError, match="No space"):
        save(folder, 2)
    checkpoint, passed_over = find_checkpoint(folder.folder, "auto")
    assert checkpoint is not None
    assert (checkpoint.step, passed_over) == (1, [])
    monkeypatch.undo()
    save(folder, 3)
    assert names(folder) == ["last", "step-00000003"]  # and the half one is cleared away


@pytest.mark.parametrize("fault", ["no manifest", "torn manifest", "truncated", "missing file"])
def test_damaged_ones_are_passed_over_with_a_word(folder: CheckpointFolder, fault: str) -> None:
    save(folder, 1, 2)
    newest = folder.folder / "step-00000002"
    weights = newest / "model.safetensors"
    if fault == "no manifest":
        (newest / "manifest.json").unlink()
    elif fault == "torn manifest":
        (newest / "manifest.json").write_text('{"format_version": 1, "fil')
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.unlink()

    checkpoint, passed_over = find_checkpoint(folder.folder, "auto")
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(passed_over) == 1
    assert "step-00000002" in passed_over[0]
    with pytest.raises(CheckpointError, match="step-00000002"):
        find_checkpoint(folder.folder, str(newest))  # one given by name is never replaced

    folder.set_aside_newer(checkpoint)
    save(folder, 2)
    found, passed_over = find_checkpoint(folder.folder, "auto")
    assert found is not None
    assert (found.step, passed_over) == (2, [])


def test_nothing_but_damaged_ones_is_an_error(folder: CheckpointFolder) -> None:
    save(folder, 1)
    (folder.folder / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        find_checkpoint(folder.folder, "auto")


def test_none_refuses_a_folder_that_has_some(folder: CheckpointFolder) -> None:
    assert find_checkpoint(folder.folder, "none") == (None, [])
    assert find_checkpoint(folder.folder, "auto") == (None, [])
    save(folder, 1)
    with pytest.raises(CheckpointError, match="another --output_dir"):
        find_checkpoint(folder.folder, "none")


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


def test_a_format_from_the_future_is_told(folder: CheckpointFolder) -> None:
    save(folder, 1)
    path = folder.folder / "step-00000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 1"):
        open_checkpoint(path.parent)


def test_a_missing_random_state_is_an_error(folder: CheckpointFolder) -> None:
    save(folder, 1)
    checkpoint = open_checkpoint(folder.folder / "last")
    (checkpoint.path / "random_states_0.pkl").unlink()
    prepared = (folder.accelerator._models[0], folder.accelerator._optimizers[0])
    with pytest.raises(CheckpointError, match=r"has no random_states_0\.pkl"):
        folder.load(checkpoint, *prepared)
