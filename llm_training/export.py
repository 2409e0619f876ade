"""The finished model as a Hugging Face folder, opened again and checked before it counts.

However the live model is wrapped, compiled or split over ranks, the folder holds its whole float32
master weights under transformers' own names, tied ones once, without rows that only pad the
vocabulary, and a configuration without a trace of the split. Of a model with adapters it holds
these alone, as peft writes them, or the model with them added to its weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_training.durable import replace_folder
from llm_training.export_checks import (
    ExportError,
    LiveModel,
    check_files,
    check_layout,
    check_logits,
    check_weights,
    listed,
    ties,
    weights_in_files,
)
from llm_training.frozen_dtype import hold_alike
from llm_training.lora import (
    Adapters,
    adapters_of,
    merge_weights,
    quiet_peft,
    weights_in_opened,
    write_adapter,
)
from llm_training.vocab_padding import cut_padding, num_tokens_of
from llm_training.zero_init import whole_models, whole_shape

# What wrappers put in front of the names of weights; torch.compile puts its own anywhere.
WRAPPER_PREFIX = re.compile(r"^(module\.)*model\.")
COMPILED = "_orig_mod."

ROW_LENGTH = 64
MEMORY_MARGIN = 1.2  # of the weights' size
UNFINISHED, FAILED = ".tmp", ".failed_check"  # behind the folder's name


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
    adapters, is_main = adapters_of(network), accelerator.is_main_process
    is_adapter = adapters is not None and not adapters.is_merged
    form: PreTrainedModel | Adapters
    with _undisturbed(accelerator, model):
        row = _probe_row(network).to(accelerator.device)
        gathered = gather_weights(model, keep=is_main, only_trained=is_adapter)
        weights = gathered if is_adapter else cut_padding(gathered, network)
        live = LiveModel(weights, row, model(row)[0][..., : num_tokens_of(network)])
        if is_main:
            try:
                with whole_models():
                    form = _plain_twin(network)
                    if adapters is not None and adapters.is_merged:
                        merged = merge_weights(adapters, _plain_twin(network), weights)
                        live = replace(live, weights=merged)
                    elif adapters is not None:
                        form = adapters
                    written = _write(live, form, tokenizer, folder)
                    opened = _check(accelerator, live, form, network, written)
                replace_folder(written, folder)
            except Exception as error:  # the others wait for word, whatever it is
                opened, problem, cause = None, _explain(error, folder), error
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise ExportError(problem) from cause
    return opened


def gather_weights(
    model: nn.Module, *, keep: bool, only_trained: bool = False
) -> dict[str, Tensor]:
    """The whole weights and persistent buffers; floating ones in float32, on the CPU.

    Weight by weight, so that at most one is whole on ranks that keep none. Every rank must call
    this.

    Args:
        model: the prepared `CausalLMWithLoss`.
        keep: whether this rank wants them.
        only_trained: leaves out what adapters are trained beside, and buffers.

    Returns:
        The tensors by the names they have in the Hugging Face model, empty without `keep`. Names
        of one tied weight share one tensor.
    """
    gathered: dict[str, Tensor] = {}
    seen: dict[int, Tensor | None] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if only_trained and not tensor.requires_grad:
            continue
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
    form: PreTrainedModel | Adapters,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> Path:
    """Writes all files into a folder beside `folder`, and returns that.

    Args:
        form: the model that is written, without content; or the adapters that are.
    """
    if isinstance(form, PreTrainedModel):
        check_layout(live.weights, form)
    written = folder.with_name(folder.name + UNFINISHED)
    for leftover in (written, folder.with_name(folder.name + FAILED)):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        if isinstance(form, PreTrainedModel):
            form.save_pretrained(written, state_dict=dict(live.weights))
        else:
            write_adapter(form, live.weights, written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)  # a full disk needs the room
        raise
    return written


def _check(
    accelerator: Accelerator,
    live: LiveModel,
    form: PreTrainedModel | Adapters,
    network: PreTrainedModel,
    written: Path,
) -> PreTrainedModel | None:
    """Opens what was written, and compares it with the live model.

    Args:
        form: as `_write` has it.

    Raises:
        ExportError: they differ; the folder then has a name that says so.
    """
    try:
        check_files(written, weights_in_files(live.weights, form))
        opened = _open(accelerator, network, written)
        if opened is not None:
            found = opened.state_dict(keep_vars=True)
            if isinstance(form, Adapters):
                found = weights_in_opened(opened, live.weights)
            elif apart := ties(found) ^ ties(live.weights):
                names = listed(frozenset().union(*apart))
                raise ExportError(f"opened again, it ties {names} otherwise.")
            check_weights(found, live.weights)
            check_logits(accelerator, opened, live)
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
    if network.is_remote_code():
        config.name_or_path = network.config.name_or_path  # where its code lies
    elif hasattr(config, "auto_map"):
        del config.auto_map  # names code that did not run, and will not lie beside what is written
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=network.is_remote_code()
        )
    plain.generation_config = network.generation_config
    if hasattr(network, "_weight_conversions"):  # how the names in the files it came from differ
        plain._weight_conversions = network._weight_conversions
    return plain


def _open(
    accelerator: Accelerator, network: PreTrainedModel, written: Path
) -> PreTrainedModel | None:
    """The written model on the accelerator's device or the CPU; None where memory is too short."""
    needed = MEMORY_MARGIN * 4 * sum(whole_shape(p).numel() for p in network.parameters())
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
    with quiet_peft():
        found: Any = AutoModelForCausalLM.from_pretrained(
            written,
            local_files_only=True,
            attn_implementation=kernel,
            output_loading_info=True,
            trust_remote_code=network.is_remote_code(),  # it ran already
            dtype=torch.float32,  # also of a base that adapters are opened with
        )
    opened: PreTrainedModel = found[0]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := found[1][kind]:
            raise ExportError(f"opened again, it has {kind}: {listed(map(str, names))}.")
    opened.to(device)
    hold_alike(opened, network)
    return opened.eval()


def _free_bytes(device: torch.device) -> int:
    """Memory that is to be had on a device; a CPU's is the machine's."""
    if device.type in ("cpu", "mps"):
        return int(psutil.virtual_memory().available)
    free, _ = torch.accelerator.get_memory_info(device)
    reserved = torch.accelerator.memory_reserved(device)  # by torch, in part for later
    return free + reserved - torch.accelerator.memory_allocated(device)


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
