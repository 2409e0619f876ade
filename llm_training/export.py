"""The finished model as a plain Hugging Face folder, opened again and checked before it counts.

However the live model is wrapped, compiled or split over ranks, the folder holds its whole float32
master weights under transformers' own names, tied ones once, without rows that only pad the
vocabulary, and a configuration without a trace of the split.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from llm_training.durable import replace_folder
from llm_training.vocab_padding import cut_padding, num_tokens_of
from llm_training.zero_init import whole_models

# What wrappers put in front of the names of weights; torch.compile puts its own anywhere.
WRAPPER_PREFIX = re.compile(r"^(module\.)*model\.")
COMPILED = "_orig_mod."

ROW_LENGTH = 64
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
MEMORY_MARGIN = 1.2  # of the weights' size
UNFINISHED, FAILED = ".tmp", ".failed_check"  # behind the folder's name


class ExportError(ValueError):
    """The folder could not be written, or does not hold the model; the message says what is off."""


@dataclass(frozen=True)
class LiveModel:
    """What the live, prepared model is: the measure of what was written."""

    weights: dict[str, Tensor]  # whole, on the CPU, without padding of the vocabulary
    row: Tensor  # (1, T) int64: some tokens
    logits: Tensor  # (1, T, V): what it makes of them


@torch.no_grad()
def export_model(
    accelerator: Accelerator,
    model: nn.Module,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> PreTrainedModel | None:
    """Writes weights, configuration, generation configuration and tokenizer into `folder`.

    `AutoModelForCausalLM.from_pretrained(folder)` opens the result. It is written beside, opened
    again, compared with the live model weight by weight and by its output, and only then renamed,
    so `folder` is at no time half a model or a wrong one. Random state and training mode are left
    as they were. Every rank must call this.

    Args:
        model: the prepared `CausalLMWithLoss`, from which the weights are gathered.
        network: the Hugging Face model inside it, which knows how they are stored.

    Returns:
        On rank 0 the model as it was opened again, in evaluation mode, on the accelerator's device
        if that has room for it and else on the CPU. None on the other ranks, and where memory was
        too short to open it: then only names, shapes and ties were checked, and a line says so.

    Raises:
        ExportError: on every rank. What was in `folder` before is still there; a folder that
            failed its check lies beside it as `<folder>.failed_check`.
    """
    opened, problem, cause = None, None, None
    with _undisturbed(accelerator, model):
        row = _probe_row(network).to(accelerator.device)
        weights = cut_padding(gather_weights(model, keep=accelerator.is_main_process), network)
        live = LiveModel(weights, row, model(row)[0][..., : num_tokens_of(network)])
        if accelerator.is_main_process:
            try:
                with whole_models():
                    plain = _plain_twin(network)
                    written = _write(live, plain, tokenizer, folder)
                    opened = _check(accelerator, live, plain, network, written)
                replace_folder(written, folder)
            except Exception as error:  # the others wait for word, whatever it is
                opened, problem, cause = None, _explain(error, folder), error
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise ExportError(problem) from cause
    return opened


def gather_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The whole weights and persistent buffers; floating ones in float32, on the CPU.

    Weight by weight, so that at most one is whole on ranks that keep none. Every rank must call
    this.

    Args:
        model: the prepared `CausalLMWithLoss`.
        keep: whether this rank wants them.

    Returns:
        The tensors by the names they have in the Hugging Face model, empty without `keep`. Names
        of one tied weight share one tensor.
    """
    gathered: dict[str, Tensor] = {}
    seen: dict[int, Tensor | None] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            whole = _whole(tensor)
            if whole.is_floating_point():
                whole = whole.float()
            seen[id(tensor)] = whole.detach().cpu() if keep else None
        if (kept := seen[id(tensor)]) is not None:
            gathered[WRAPPER_PREFIX.sub("", name.replace(COMPILED, ""))] = kept
    return gathered


def _whole(tensor: Tensor) -> Tensor:
    """One weight, put together from the parts that the ranks hold."""
    if isinstance(tensor, DTensor):  # FSDP2, tensor parallel
        return tensor.full_tensor()
    is_partitioned = hasattr(tensor, "ds_id")  # ZeRO-3
    if is_partitioned or hasattr(tensor, "_hp_mapping"):  # ZeRO-1 and 2
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        # The weights that are trained; those of the forward pass are their 16-bit copies.
        if (master := safe_get_full_fp32_param(tensor)) is not None:
            return master
        if is_partitioned:  # not trained, so there is no other
            with zero.GatheredParameters([tensor]):
                return tensor.clone()
    return tensor


def _probe_row(network: PreTrainedModel) -> Tensor:
    """A row (1, T) int64 of up to 64 tokens from all over the vocabulary."""
    config = network.config.get_text_config()
    last_token = num_tokens_of(network) - 1
    positions = getattr(config, "max_position_embeddings", None) or ROW_LENGTH
    length = min(ROW_LENGTH, positions) if positions > 0 else ROW_LENGTH  # -1: without an end
    return torch.linspace(0, last_token, length).long()[None]


# -------------------------------------------------------------------------------- on rank 0 alone


def _write(
    live: LiveModel,
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> Path:
    """Writes all files into a folder beside `folder`, and returns that."""
    _check_layout(live.weights, plain)
    written = folder.with_name(folder.name + UNFINISHED)
    for leftover in (written, folder.with_name(folder.name + FAILED)):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        plain.save_pretrained(written, state_dict=dict(live.weights))
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)  # a full disk needs the room
        raise
    return written


def _check(
    accelerator: Accelerator,
    live: LiveModel,
    plain: PreTrainedModel,
    network: PreTrainedModel,
    written: Path,
) -> PreTrainedModel | None:
    """Opens what was written, and compares it with the live model.

    Raises:
        ExportError: they differ; the folder then has a name that says so.
    """
    try:
        _check_files(written, live.weights, plain)
        opened = _open(accelerator, live, network, written)
        if opened is not None:
            _check_weights(opened, live.weights)
            _check_logits(accelerator, opened, live)
    except Exception as error:
        failed = written.with_name(written.name.removesuffix(UNFINISHED) + FAILED)
        os.replace(written, failed)
        what = str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}."
        raise ExportError(
            f"The exported model did not pass its check: {what} It lies in {failed}; what was"
            " trained is in the checkpoints."
        ) from error
    return opened


def _plain_twin(network: PreTrainedModel) -> PreTrainedModel:
    """The architecture without its weights, and without what a backend has done to it.

    `network` itself would exchange parts with the other ranks when it is saved, and describe
    weights that it holds in 16 bits.
    """
    # In this form the configuration does not say how the model is split over ranks.
    config = type(network.config).from_dict(network.config.to_dict())
    config.get_text_config().vocab_size = num_tokens_of(network)
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.generation_config = network.generation_config
    if hasattr(network, "_weight_conversions"):  # how the names in the files it came from differ
        plain._weight_conversions = network._weight_conversions
    return plain


def _open(
    accelerator: Accelerator, live: LiveModel, network: PreTrainedModel, written: Path
) -> PreTrainedModel | None:
    """The written model on the accelerator's device or the CPU; None where memory is too short."""
    unique = {id(tensor): tensor for tensor in live.weights.values()}.values()
    needed = MEMORY_MARGIN * sum(tensor.nbytes for tensor in unique)
    free = _free_bytes(torch.device("cpu"))
    if free < needed:
        accelerator.print(
            "Of the exported model only the names, shapes and ties of its weights were checked: to"
            f" open it again takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are"
            " free.",
            flush=True,
        )
        return None
    device, kernel = accelerator.device, network.config._attn_implementation
    if device.type != "cpu" and _free_bytes(device) < needed:
        device, kernel = torch.device("cpu"), None  # which may not have that kernel
    found: Any = AutoModelForCausalLM.from_pretrained(
        written, local_files_only=True, attn_implementation=kernel, output_loading_info=True
    )
    opened: PreTrainedModel = found[0]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := found[1][kind]:
            raise ExportError(f"opened again, it has {kind}: {_listed(map(str, names))}.")
    opened.to(device)
    return opened.eval()


def _free_bytes(device: torch.device) -> int:
    """Memory that is to be had on a device; a CPU's is the machine's."""
    if device.type in ("cpu", "mps"):
        return int(psutil.virtual_memory().available)
    free, _ = torch.accelerator.get_memory_info(device)
    reserved = torch.accelerator.memory_reserved(device)  # by torch, in part for later
    return free + reserved - torch.accelerator.memory_allocated(device)


def _check_layout(weights: Mapping[str, Tensor], plain: PreTrainedModel) -> None:
    """Makes sure that the gathered weights are all that the architecture has, and tied as there."""
    expected = plain.state_dict(keep_vars=True)
    if off := weights.keys() ^ expected.keys():
        raise ExportError(
            f"The live model and {type(plain).__name__} differ in the weights {_listed(off)}."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ExportError(
                f"The live model's {name} was gathered with the shape {list(tensor.shape)}; it"
                f" should have {list(expected[name].shape)}."
            )
    if apart := _ties(weights) ^ _ties(expected):
        raise ExportError(
            f"The weights {_listed(frozenset().union(*apart))} are tied in the live model or by its"
            " configuration (tie_word_embeddings), but not in both."
        )


def _check_files(written: Path, weights: dict[str, Tensor], plain: PreTrainedModel) -> None:
    """Makes sure from their headers that the files hold every weight once, whole, in float32."""
    stored = {name: tensor.to("meta") for name, tensor in weights.items()}
    for name in plain.all_tied_weights_keys:  # each stands for another one
        del stored[name]
    expected = revert_weight_conversion(plain, stored)  # some files name and cut weights otherwise
    found: dict[str, tuple[list[int], str]] = {}
    for file in sorted(written.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118, it is no dict
                part = content.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    if off := found.keys() ^ expected.keys():
        raise ExportError(f"its files and the live model differ in the weights {_listed(off)}.")
    for name, (shape, dtype) in found.items():
        whole = list(expected[name].shape)
        if shape != whole or (dtype != "F32" and expected[name].is_floating_point()):
            raise ExportError(f"its files have {name} as {shape} {dtype}, not as {whole} F32.")


def _check_weights(opened: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Makes sure that the opened model has the gathered weights, bit for bit, and their ties."""
    found = opened.state_dict(keep_vars=True)
    if off := found.keys() ^ weights.keys():
        raise ExportError(f"opened again, it differs in having the weights {_listed(off)}.")
    for name, tensor in weights.items():
        loaded = found[name].cpu()
        if loaded.dtype != tensor.dtype:
            raise ExportError(f"opened again, {name} is {loaded.dtype}, not {tensor.dtype}.")
        if not torch.equal(loaded, tensor):
            by = (loaded.double() - tensor.double()).abs().max()
            raise ExportError(f"opened again, {name} differs from the live model by up to {by:g}.")
    if apart := _ties(found) ^ _ties(weights):
        raise ExportError(f"opened again, it ties {_listed(frozenset().union(*apart))} otherwise.")


def _check_logits(accelerator: Accelerator, opened: PreTrainedModel, live: LiveModel) -> None:
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


def _ties(tensors: Mapping[str, Tensor]) -> set[frozenset[str]]:
    """The groups of names that stand for one and the same tensor."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        groups[id(tensor)].append(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def _listed(names: Iterable[str], limit: int = 4) -> str:
    """Some of the names, and how many more there are."""
    shown = sorted(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _explain(error: Exception, folder: Path) -> str:
    """What the ranks are told."""
    if isinstance(error, ExportError):
        return str(error)
    free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
    return (
        f"The model could not be written to {folder}: {type(error).__name__}: {error}. Its disk has"
        f" {free / 1e9:.1f} GB free. What was there before is untouched, and so are the"
        " checkpoints: mend the cause, and start the same command again."
    )


# ------------------------------------------------------------------------------------ on any rank


@contextmanager
def _undisturbed(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards mode and random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    device = accelerator.device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
