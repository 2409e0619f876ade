"""Proves on every backend that a step can be left out, and that the others stay what they were.

Two processes train the same steps twice: by Accelerate's own calls, and by `updates.py` with others
between them that are left out: for a NaN in the loss of one rank, for a broken gradient on one
rank, or because they are not wanted. Losses, norms, weights and optimizer are equal to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import ROOT, LaunchFailed, environment_of, launch
from tests.faults.updates_worker import FAULTS, GOOD_STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# A launch for each of these rows. `sums` is ZeRO-1 in bf16 that adds gradients up in fp32, for
# which DeepSpeed has another optimizer.
FAMILIES = (
    ("ddp", "fsdp", "tp"),
    ("zero1", "zero1_sums"),
    ("zero2", "zero2_offload"),
    ("zero3", "zero3_offload"),
)
BACKENDS = [backend for family in FAMILIES for backend in family]
FP16 = ("zero2", "zero3")
PRECISION = {"zero1_sums": "bf16"}
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LIMIT = 1.5  # some of the good steps are clipped, and some are not


def words(folder: Path, text: Path) -> list[str]:
    """A tiny run of two micro-batches a step on each process."""
    values = {
        "train_file": text,
        "cache_dir": folder.parent / "cache",
        "output_dir": folder,
        "model_type": "llama",
        "config_overrides": json.dumps(SHAPE),
        "tokenizer_name": "byte",
        "block_size": 32,
        "global_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 3e-3,
        "max_grad_norm": LIMIT,
        "eval_steps": "null",
        "save_steps": "null",
        "report_to": "none",
        "device": "cpu",
        "num_threads": 1,
        "seed": 0,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def environment(backend: str, folder: Path) -> dict[str, str]:
    """What the backend's processes are given; offloading with torch's AdamW, which needs no C++."""
    name, _, variant = backend.partition("_")
    found = dict(environment_of(name, 2))
    if variant:
        config = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        if variant == "offload":
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
        else:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        path = folder / f"{backend}.json"
        path.write_text(json.dumps(config))
        found["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    return found


def case(backend: str, action: str, folder: Path, text: Path) -> dict[str, Any]:
    """A case of the worker."""
    given = words(folder / f"{backend}-{action}", text)
    # The worker lets fp16 take the place of auto: the arguments refuse it on a CPU.
    precision = "auto" if action == "overflow" else PRECISION.get(backend, "fp32")
    given += ["--mixed_precision", precision]
    env = environment(backend, folder)
    return {"name": f"{backend} {action}", "env": env, "action": action, "words": given}


Records = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Records:
    """What each run of a backend came to, by action; a family is launched when first asked for."""
    folder = tmp_path_factory.mktemp("updates")
    known: dict[str, dict[str, Any] | LaunchFailed] = {}

    def of_backend(backend: str) -> dict[str, Any]:
        if backend not in known:
            (family,) = (family for family in FAMILIES if backend in family)
            try:
                known.update(run_family(family))
            except LaunchFailed as failure:  # so will the next one
                known.update(dict.fromkeys(family, failure))
        if isinstance(found := known[backend], LaunchFailed):
            raise found
        return found

    def run_family(family: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        actions = [(name, action) for name in family for action in ("plain", "healthy")]
        actions += [(name, "overflow") for name in family if name in FP16]
        actions += [(name, "unseen") for name in family if name in FAMILIES[0]]
        cases = [case(name, action, folder, text_folder) for name, action in actions]
        given, output = folder / "cases.json", folder / "records.json"
        given.write_text(json.dumps(cases))
        script = Path(__file__).with_name("updates_worker.py")
        launch("ddp", script, str(given), str(output), num_processes=2, timeout=240)
        found = json.loads(output.read_text())
        return {
            name: {action: found[f"{name} {action}"] for other, action in actions if other == name}
            for name in family
        }

    return of_backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_between_those_left_out_are_accelerates_to_the_bit(backend, records):
    plain, healthy = records(backend)["plain"], records(backend)["healthy"]
    assert healthy["losses"] == plain["losses"]
    assert healthy["norms"] == plain["norms"]
    assert healthy["states"] == plain["states"]
    for rank in range(2):
        states = healthy["states"][rank]
        assert len(set(states)) == GOOD_STEPS  # the digest notices a step
        assert min(healthy["norms"][rank]) < LIMIT < max(healthy["norms"][rank])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_left_out_changes_nothing(backend, records):
    healthy = records(backend)["healthy"]
    for rank in range(2):
        found = healthy["left_out"][rank]
        faults = FAULTS if backend in FAMILIES[0] else FAULTS[:-1]
        assert [entry["fault"] for entry in found] == list(faults)
        assert [entry["is_applied"] for entry in found] == [False] * len(faults)
        assert [entry["state"] for entry in found] == healthy["states"][rank][: len(faults)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ranks_see_the_fault_of_one(backend, records):
    ranks = records(backend)["healthy"]["left_out"]
    for loss, gradient, unwanted, *flipped in ranks:
        assert not math.isfinite(float(loss["loss"]))
        assert math.isfinite(float(gradient["loss"]))
        assert not math.isfinite(float(gradient["norm"]))
        assert math.isfinite(float(unwanted["norm"]))
        assert gradient["num_broken"] > 0 and unwanted["num_broken"] == 0
        assert [(entry["norm"], entry["num_broken"]) for entry in flipped] in ([], [("nan", 1)])
    seen = [[(entry["loss"], entry["norm"]) for entry in entries] for entries in ranks]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_make_up_the_norm(backend, records):
    healthy, whole = records(backend)["healthy"], records("ddp")["healthy"]
    for rank in range(2):
        for layers, norm in zip(healthy["layers"][rank], healthy["norms"][rank], strict=True):
            squares = sum(layer**2 for layer in layers.values())
            assert math.sqrt(squares) == pytest.approx(norm, rel=1e-5)
        assert healthy["layers"][rank][0] == pytest.approx(
            whole["layers"][0][0], rel=2e-2 if backend in PRECISION else 1e-4
        )
    assert list(whole["layers"][0][0]) == [
        *("model.model.embed_tokens", "model.model.layers.0", "model.model.layers.1"),
        *("model.model.norm", "model.lm_head"),
    ]


@pytest.mark.parametrize("backend", FAMILIES[0])
def test_a_device_that_decides_alone_decides_alike(backend, records):
    healthy, unseen = records(backend)["healthy"], records(backend)["unseen"]
    for name in ("losses", "norms", "states"):
        assert unseen[name] == healthy[name]
    for rank in range(2):
        for entry, other in zip(healthy["left_out"][rank], unseen["left_out"][rank], strict=True):
            same = entry.keys() - {"num_broken"}
            assert {name: other[name] for name in same} == {name: entry[name] for name in same}
            # It knows the layers of a step with a broken loss as well.
            assert (other["num_broken"] > 0) == (entry["fault"] != "unwanted")
        layers = zip(healthy["layers"][rank], unseen["layers"][rank], strict=True)
        for expected, found in layers:
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", FP16)
def test_an_overflow_in_fp16_is_left_to_the_loss_scaler(backend, records):
    found = records(backend)["overflow"]
    for rank in range(2):
        assert found["applied"][rank] == [True, False, False, True]
        assert found["asked"][rank] == [True, False, False, True]
        assert found["norms"][rank][1:3] == [math.inf, math.inf]
        before, kept, lower, after = found["scales"][rank]
        assert before == kept == 2 * lower == 2 * after
