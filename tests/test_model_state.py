"""Weights and optimizer state come back from every layout, whole or with a word on what is wrong.

The layouts are written here as Accelerate writes them, in one process; DeepSpeed's, and several
processes, are proven by `distributed/test_resume.py`.
"""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from llm_training.checkpoint_files import check_owner
from llm_training.checkpointing import CheckpointFolder, open_checkpoint
from llm_training.model_state import CheckpointError, StateForm, is_converted, random_state
from llm_training.model_state.form import on_main_process, plain_name
from llm_training.model_state.live import LiveZero
from llm_training.model_state.load import _fitting_optimizer
from llm_training.model_state.readers import read_optimizer, read_weights
from llm_training.state import TrainState

# One process writes what several would.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYOUTS = ("plain", "full", "sharded")
BACKENDS = {"plain": "single", "full": "fsdp", "sharded": "fsdp"}


class Net(nn.Module):
    """A tied head, a norm that is not decayed, a buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.mid = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mid(self.embed(tokens)))).logsumexp(-1).sum()


class Run:
    """A prepared net with its optimizer and the folder of its checkpoints."""

    def __init__(self, folder: Path, *, rate: float = 0.1, seed: int = 0):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        net = Net()
        groups = [
            {"params": [net.mid.weight], "weight_decay": 0.1},
            {"params": [net.embed.weight, *net.norm.parameters(), net.mid.bias]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=True)
        self.model: nn.Module
        self.optimizer: AcceleratedOptimizer
        self.model, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.checkpoints = CheckpointFolder(self.accelerator, folder, None, {})

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randint(5, (4,)))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def save(self, layout: str = "plain") -> Path:
        """Saves at step 3, in that layout."""
        self.model.scale.fill_(7)
        path = self.checkpoints.save(TrainState(seed=1, step=3))
        if layout != "plain":
            rewrite(path, layout, self)
        return path

    def load(self, path: Path, **kwargs: Any) -> list[str]:
        return self.checkpoints.load(open_checkpoint(path), self.model, self.optimizer, **kwargs)


def rewrite(path: Path, layout: str, run: Run) -> None:
    """Puts Accelerate's FSDP2 files in the place of the plain ones."""
    weights = get_model_state_dict(run.model)
    state = get_optimizer_state_dict(run.model, run.optimizer.optimizer)
    (path / "model.safetensors").unlink()
    (path / "optimizer.bin").unlink()
    if layout == "full":
        torch.save(weights, path / "pytorch_model_fsdp.bin")
        torch.save(state, path / "optimizer.bin")
    else:
        dcp.save({"model": weights}, checkpoint_id=path / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": state}, checkpoint_id=path / "optimizer_0", no_dist=True)
    note(path, backend=BACKENDS[layout], layout=layout)


def note(path: Path, *, processes: int | None = None, **form: Any) -> None:
    """Changes what the manifest tells, and makes it list the files as they are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model_state"] |= form
    manifest["num_processes"] = processes or manifest["num_processes"]
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    manifest["files"] = {str(file.relative_to(path)): file.stat().st_size for file in files}
    manifest["format_version"] = 1  # which has sizes only
    (path / "manifest.json").write_text(json.dumps(manifest))


def damage(path: Path) -> None:
    """Breaks a file, or all in a folder, without changing its size."""
    for file in [path] if path.is_file() else path.iterdir():
        content = file.read_bytes()
        half = len(content) // 2
        with file.open("r+b") as opened:
            opened.write(bytes(half) + content[half:][::-1])


def states(run: Run) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    return run.model.state_dict(), run.optimizer.state_dict()["state"]


def assert_same(run: Run, other: Run) -> None:
    (weights, optimizer), (other_weights, other_optimizer) = states(run), states(other)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert optimizer.keys() == other_optimizer.keys()
    for number, values in optimizer.items():
        assert values.keys() == other_optimizer[number].keys()
        assert all(torch.equal(values[k], other_optimizer[number][k]) for k in values)


# ------------------------------------------------------------------------------- the way back


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_bit_for_bit_from_every_layout(tmp_path: Path, layout: str) -> None:
    run = Run(tmp_path / "a")
    run.train(3)
    path = run.save(layout)
    expected = run.train(3)

    again = Run(tmp_path / "b", seed=9)
    lines = again.load(path)
    assert again.train(3) == expected
    assert_same(run, again)
    assert again.model.scale.tolist() == [7, 7]
    assert again.model.head.weight is again.model.embed.weight
    moved = "Continued from 1 process (fsdp) on 1 process (single): weights and optimizer converted"
    assert lines == ([] if layout == "plain" else [moved])


def test_settings_are_those_of_this_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.train(1)
    again = Run(tmp_path / "b", rate=0.025)
    again.load(run.save())
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.025, 0.025]
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.1, 0.0]


def test_a_window_begins_after_a_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.accelerator.step = 3
    path = run.save()
    run.accelerator.step = 5
    run.load(path)
    assert run.accelerator.step == 0


def test_a_state_saved_before_the_first_update_is_a_new_one(tmp_path: Path) -> None:
    run, again = Run(tmp_path / "a"), Run(tmp_path / "b")
    again.train(1)
    again.load(run.save())
    assert states(again)[1] == {}


def test_a_parameter_that_was_never_updated_has_no_state(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        run = Run(tmp_path / layout)
        without_gradient = run.model.mid.bias
        without_gradient.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        run.train(2)
        again = Run(tmp_path / f"{layout}-again")
        again.load(run.save(layout))
        assert_same(run, again)
        assert len(states(again)[1]) == 4


def test_what_was_read_no_longer_hangs_on_the_file(tmp_path: Path) -> None:
    run, again = Run(tmp_path / "a"), Run(tmp_path / "b", seed=9)
    run.train(2)
    path = run.save("full")
    again.load(path)
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        damage(path / name)
    assert_same(run, again)


def test_a_tied_weight_is_found_under_either_name(tmp_path: Path) -> None:
    for name in ("embed.weight", "head.weight"):
        run, again = Run(tmp_path / name), Run(tmp_path / f"{name}-again", seed=9)
        path = run.save("full")
        weights = torch.load(path / "pytorch_model_fsdp.bin")
        del weights[name]
        torch.save(weights, path / "pytorch_model_fsdp.bin")
        note(path)
        again.load(path)
        assert torch.equal(again.model.embed.weight, run.model.embed.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_reads_weights_alone(tmp_path: Path, layout: str) -> None:
    run = Run(tmp_path / "a")
    run.train(2)
    path = run.save(layout)
    for name in ("optimizer.bin", "optimizer_0/.metadata", "random_states_0.pkl"):
        (path / name).unlink(missing_ok=True)
    note(path)
    again = Run(tmp_path / "b", seed=9)
    drawn = torch.get_rng_state()
    again.checkpoints.load(open_checkpoint(path), again.model, None)
    assert torch.equal(again.model.embed.weight, run.model.embed.weight)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert states(again)[1] == {}


def test_checkpoints_without_a_note_are_plain_and_in_the_order_of_the_optimizer(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path / "a")
    run.train(2)
    path = run.save()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["model_state"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    again = Run(tmp_path / "b", seed=9)
    assert again.load(path) == []
    assert_same(run, again)


def test_the_loss_scale_of_fp16_comes_back(tmp_path: Path) -> None:
    run, again = Run(tmp_path / "a"), Run(tmp_path / "b")
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run.accelerator.scaler.scale(torch.ones(1))
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again.load(run.save())
    assert again.accelerator.scaler.state_dict()["scale"] == 8.0


# ------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_broken_optimizer_is_told_and_can_be_left_out(
    tmp_path: Path, layout: str, fault: str
) -> None:
    run = Run(tmp_path / "a")
    run.train(2)
    path = run.save(layout)
    file = path / ("optimizer_0" if layout == "sharded" else "optimizer.bin")
    if fault == "damaged":
        damage(file)
    else:
        file.rename(tmp_path / "gone")
    note(path)
    again = Run(tmp_path / "b", seed=9)
    with pytest.raises(CheckpointError, match=rf"{file.name}.*--reset_optimizer"):
        again.load(path)

    lines = again.load(path, reset_optimizer=True)
    assert lines[-1].startswith("The optimizer starts anew")
    assert torch.equal(again.model.mid.weight, run.model.mid.weight)
    assert states(again)[1] == {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_broken_weights_are_told(tmp_path: Path, layout: str, fault: str) -> None:
    run = Run(tmp_path)
    path = run.save(layout)
    names = ("model.safetensors", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")
    (file,) = [path / name for name in names if (path / name).exists()]
    if fault == "damaged":
        damage(file)
    else:
        file.rename(tmp_path / "gone")
    note(path)
    with pytest.raises(CheckpointError, match=file.name):
        run.load(path)


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = run.save("full")
    weights = torch.load(path / "pytorch_model_fsdp.bin")
    torch.save(weights | {"mid.bias": torch.ones(4)}, path / "pytorch_model_fsdp.bin")
    note(path)
    with pytest.raises(CheckpointError, match=r"mid\.bias with shape \(4,\), the model has \(3,\)"):
        run.load(path)
    del weights["mid.bias"]
    torch.save(weights, path / "pytorch_model_fsdp.bin")
    note(path)
    with pytest.raises(CheckpointError, match=r"no weight mid\.bias, which the model has"):
        run.load(path)


def test_state_of_another_optimizer_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(1)
    path = run.save()
    saved = torch.load(path / "optimizer.bin")
    for values in saved["state"].values():
        del values["exp_avg_sq"]
    torch.save(saved, path / "optimizer.bin")
    note(path)
    with pytest.raises(CheckpointError, match=r"exp_avg_sq missing.*--reset_optimizer"):
        run.load(path)


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "optimizer.bin", "random_states_0.pkl"])
def test_code_in_a_file_of_tensors_is_not_run(tmp_path: Path, name: str) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was-run",)

    run = Run(tmp_path)
    path = run.save("full")
    torch.save({"state": Code()}, path / name)
    note(path)
    with pytest.raises(CheckpointError, match=name):
        run.load(path)
    assert not (tmp_path / "was-run").exists()


def make_foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        os.chown(path, 4242, -1)
    except PermissionError:  # only root can give a file away
        monkeypatch.setattr(os, "geteuid", lambda: 4242)


@pytest.mark.parametrize("fault", ["foreign file", "foreign folder", "open file", "open folder"])
def test_what_could_run_the_code_of_others_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    run = Run(tmp_path)
    path = run.save("sharded")
    run.load(path)
    victim = path / "optimizer_0" / ("" if fault.endswith("folder") else ".metadata")
    if fault.startswith("foreign"):
        make_foreign(victim, monkeypatch)
        problem = "belongs to another user"
    else:
        victim.chmod(victim.stat().st_mode | 0o002)
        problem = "can be changed by every user"
    with pytest.raises(CheckpointError, match=rf"{problem}.* can run code .*{path}; else"):
        run.load(path)


def test_files_that_hold_no_code_may_be_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    path = run.save()
    make_foreign(path / "optimizer.bin", monkeypatch)
    assert run.load(path) == []


def test_what_is_written_without_a_umask_is_closed_to_others(tmp_path: Path) -> None:
    run, before = Run(tmp_path), os.umask(0)
    try:
        path = run.save()
    finally:
        os.umask(before)
    assert (path / "manifest.json").stat().st_mode & 0o022 == 0o020
    check_owner(path)


def test_an_optimizer_without_names_fits_by_number_or_not_at_all(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(1)
    path = run.save()
    note(path, optimizer_parameters=["mid.weight", "embed.weight"])
    with pytest.raises(CheckpointError, match="it has 5 parameters, the model 2"):
        run.load(path)
    form = StateForm(optimizer_parameters=None)
    with pytest.raises(CheckpointError, match="which state belongs to which parameter"):
        read_optimizer(path, form, None, tmp_path)
    order = ["mid.bias", "embed.weight", "norm.weight", "norm.bias", "mid.weight"]
    note(path, optimizer_parameters=order)
    with pytest.raises(CheckpointError, match=r"does not fit the model at mid\.bias"):
        run.load(path)


def test_deepspeed_keeps_one_count_for_all(tmp_path: Path) -> None:
    net = Net()
    engine = SimpleNamespace(
        optimizer=None, module=net, zero_optimization_partition_weights=lambda: False
    )
    moments = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    found = {
        "norm.weight": {"step": torch.tensor(2.0), **moments},
        "norm.bias": {"step": torch.tensor(5.0), **moments},
    }
    with pytest.raises(CheckpointError, match=r"from 2 to 5 times.*--reset_optimizer"):
        _fitting_optimizer(found, LiveZero(engine), tmp_path)


def test_a_deepspeed_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    form = StateForm(backend="deepspeed", layout="deepspeed", zero_stage=2)
    with pytest.raises(CheckpointError, match="has no pytorch_model"):
        read_weights(tmp_path, form)
    with pytest.raises(CheckpointError, match=r"has no pytorch_model\. .*--reset_optimizer"):
        read_optimizer(tmp_path, form, None, tmp_path)


def test_a_failure_on_rank_0_becomes_a_checkpoint_error() -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(CheckpointError, match="cannot be read: ZeroDivisionError"):
        on_main_process(accelerator, lambda: 1 / 0)
    assert on_main_process(accelerator, lambda: 5) == 5


# ------------------------------------------------------------------------------- random state


def test_random_state_comes_back_on_the_same_split(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = run.save()
    expected = (torch.rand(2).tolist(), np.random.rand(2).tolist())
    run.load(path)
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected


@pytest.mark.parametrize(
    "other", [{"processes": 2}, {"tensor_parallel_size": 2}, {"device": "cuda"}]
)
def test_another_split_draws_anew_and_says_so(tmp_path: Path, other: dict[str, Any]) -> None:
    run = Run(tmp_path)
    path = run.save()
    saved = torch.get_rng_state()
    note(path, **other)
    (line,) = run.load(path)
    assert line.endswith("dropout masks differ from there on")
    at_step_3 = torch.get_rng_state()
    assert not torch.equal(at_step_3, saved)
    run.load(path)
    assert torch.equal(torch.get_rng_state(), at_step_3)  # the same each time

    (path / "train_state.json").write_text((path / "train_state.json").read_text())
    manifest = json.loads((path / "manifest.json").read_text()) | {"step": 4}
    (path / "manifest.json").write_text(json.dumps(manifest))
    run.load(path)
    assert not torch.equal(torch.get_rng_state(), at_step_3)  # but not the same masks again


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_broken_random_state_is_an_error(tmp_path: Path, fault: str) -> None:
    run = Run(tmp_path)
    path = run.save()
    if fault == "damaged":
        damage(path / "random_states_0.pkl")
    else:
        (path / "random_states_0.pkl").unlink()
    note(path)
    with pytest.raises(CheckpointError, match=r"random_states_0\.pkl"):
        run.load(path)
    note(path, processes=2)
    run.load(path)  # no file would fit, so none is missed


# --------------------------------------------------------------------------------------- form


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.lm_head.weight", "model.lm_head.weight"),
        ("module.model.lm_head.weight", "model.lm_head.weight"),
        ("model.layers.0._orig_mod.mlp.weight", "model.layers.0.mlp.weight"),
        ("module._orig_mod.model.a_module.weight", "model.a_module.weight"),
    ],
)
def test_names_are_those_without_wrappers(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_form_is_what_the_manifest_keeps_of_it() -> None:
    form = StateForm("tensor_parallel", "sharded", 4, 2, None, "bf16", "cuda", ("a", "b"))
    manifest = {"num_processes": 4, "model_state": json.loads(json.dumps(form.for_manifest()))}
    assert StateForm.of_manifest(manifest) == form
    assert str(form) == "4 processes (tensor parallel)"
    assert StateForm.of_manifest({"num_processes": 2}) == StateForm("ddp", num_processes=2)
    assert str(StateForm("deepspeed", zero_stage=3)) == "1 process (ZeRO-3)"


@pytest.mark.parametrize(
    ("there", "here", "converted"),
    [
        (StateForm("ddp", num_processes=2), StateForm("ddp", num_processes=4), False),
        (StateForm("single"), StateForm("ddp", num_processes=2), True),
        (StateForm("fsdp", "sharded", 2), StateForm("fsdp", "sharded", 4), False),
        (StateForm("fsdp", "sharded"), StateForm("fsdp", "full"), True),
        (zero := StateForm("deepspeed", "deepspeed", 2, 1, 2), zero, False),
        (zero, StateForm("deepspeed", "deepspeed", 4, 1, 2), True),
        (zero, StateForm("deepspeed", "deepspeed", 2, 1, 3), True),
        (zero, StateForm("deepspeed", "deepspeed", 2, 1, 2, "bf16"), True),
    ],
)
def test_what_needs_conversion(there: StateForm, here: StateForm, converted: bool) -> None:
    assert is_converted(there, here) is converted


@pytest.mark.parametrize(("index", "num_there", "taken"), [(0, 8, 0), (3, 8, 3), (1, 1, 0)])
def test_the_random_state_of_a_device_is_found_among_more_or_fewer(
    index: int, num_there: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that saw eight GPUs left a state for each; here it may see one."""
    found: list[Any] = []
    states = {
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
        "torch_cuda_manual_seed": list(range(num_there)),
    }
    monkeypatch.setattr(random_state, "is_same_split", lambda *_: True)
    monkeypatch.setattr(random_state, "load", lambda _: states)
    monkeypatch.setattr(random_state, "random_state_file", lambda _: "random_states_0.pkl")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: found.append(given))
    run: Any = SimpleNamespace(device=torch.device("cuda", index))
    form: Any = None
    random_state.restore_random_state(run, Path(), form, form, seed=0, step=0)
    assert found == [(taken, index)]
