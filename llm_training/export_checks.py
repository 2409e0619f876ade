"""What an exported folder must be: compared with the live model, from its files to its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llm_training.lora import Adapters, adapter_tensors

# Of the logits, in the 2-norm. The fp32 error of deep models with large weights was measured at up
# to 1e-5, and at 6e-7 for usual ones; one matrix with its numbers in the wrong order made 1e-2 and
# more. (The loss would tell less: that matrix changed it by 1e-5 to 1e-2.)
FP32_TOLERANCE = 1e-4
# In bf16 the error depends on the model, 0.3 % to 11 % were measured: it is measured anew each
# time, by computing the opened model in both. DeepSpeed and FSDP2 round more numbers than autocast
# does, and erred up to 5 times as much. The weights are compared bit by bit beside it.
OWN_ERRORS_TOLERATED = 10
# Three small llamas with torchao's emulated fp8 erred 11 to 14 times as much as in bf16.
ERROR_OF_FP8 = 8


class ExportError(ValueError):
    """The folder could not be written, or does not hold the model; the message says what is off."""


@dataclass(frozen=True)
class LiveModel:
    """What the live, prepared model is: the measure of what was written."""

    weights: dict[str, Tensor]  # what is written: whole, on the CPU, without padded rows
    row: Tensor  # (1, T) int64: some tokens
    logits: Tensor  # (1, T, V): what it makes of them


def check_layout(weights: Mapping[str, Tensor], plain: PreTrainedModel) -> None:
    """Makes sure that the gathered weights are all that the architecture has, and tied as there."""
    expected = plain.state_dict(keep_vars=True)
    if off := weights.keys() ^ expected.keys():
        raise ExportError(
            f"The live model and {type(plain).__name__} differ in the weights {listed(off)}."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ExportError(
                f"The live model's {name} was gathered with the shape {list(tensor.shape)}; it"
                f" should have {list(expected[name].shape)}."
            )
    if apart := ties(weights) ^ ties(expected):
        raise ExportError(
            f"The weights {listed(frozenset().union(*apart))} are tied in the live model or by its"
            " configuration (tie_word_embeddings), but not in both."
        )


def weights_in_files(
    weights: Mapping[str, Tensor], form: PreTrainedModel | Adapters
) -> dict[str, Tensor]:
    """What the files must hold, by the names there and without content."""
    stored = {name: tensor.to("meta") for name, tensor in weights.items()}
    if isinstance(form, Adapters):
        return adapter_tensors(stored)
    for name in form.all_tied_weights_keys:  # each stands for another one
        del stored[name]
    # Some files name and cut weights otherwise.
    return dict(revert_weight_conversion(form, stored))


def check_files(written: Path, expected: Mapping[str, Tensor]) -> None:
    """Makes sure from their headers that the files hold every weight once, whole, in float32."""
    found: dict[str, tuple[list[int], str]] = {}
    for file in sorted(written.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118, it is no dict
                part = content.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    if off := found.keys() ^ expected.keys():
        raise ExportError(f"its files and the live model differ in the weights {listed(off)}.")
    for name, (shape, dtype) in found.items():
        whole = list(expected[name].shape)
        if shape != whole or (dtype != "F32" and expected[name].is_floating_point()):
            raise ExportError(f"its files have {name} as {shape} {dtype}, not as {whole} F32.")


def check_weights(found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Makes sure that the opened model has the gathered weights, bit for bit."""
    if off := found.keys() ^ weights.keys():
        raise ExportError(f"opened again, it differs in having the weights {listed(off)}.")
    for name, tensor in weights.items():
        loaded = found[name].cpu()
        if loaded.dtype != tensor.dtype:
            raise ExportError(f"opened again, {name} is {loaded.dtype}, not {tensor.dtype}.")
        if not torch.equal(loaded, tensor):
            by = (loaded.double() - tensor.double()).abs().max()
            raise ExportError(f"opened again, {name} differs from the live model by up to {by:g}.")


def check_logits(accelerator: Accelerator, opened: PreTrainedModel, live: LiveModel) -> None:
    """Makes sure that the opened model computes what the live one does."""
    device, tolerance = opened.device, FP32_TOLERANCE
    row = live.row.to(device)
    expected = opened(input_ids=row, use_cache=False).logits
    if accelerator.mixed_precision != "no" or torch.get_float32_matmul_precision() != "highest":
        with torch.autocast(device.type, torch.bfloat16):
            rounded = opened(input_ids=row, use_cache=False).logits
        own_error = _relative_difference(rounded, expected)
        if accelerator.mixed_precision == "fp8":
            own_error *= ERROR_OF_FP8
        tolerance, expected = max(tolerance, OWN_ERRORS_TOLERATED * own_error), rounded
    difference = _relative_difference(live.logits.to(device), expected)
    if not difference <= tolerance:  # also where it is not a number
        raise ExportError(
            f"opened again, it computes other logits: they differ by {difference:.2g} in relation"
            f" to their size, where rounding explains {tolerance:.2g}."
        )


def _relative_difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def ties(tensors: Mapping[str, Tensor]) -> set[frozenset[str]]:
    """The groups of names that stand for one and the same tensor."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        groups[id(tensor)].append(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def listed(names: Iterable[str], limit: int = 4) -> str:
    """Some of the names, and how many more there are."""
    shown = sorted(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
