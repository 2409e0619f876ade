"""What an NVIDIA GPU computes faster, without changing what a model is: TF32, attention, Liger."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

# What configurations call the dropout of attention weights.
ATTENTION_DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


Kernel = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


class LigerError(ValueError):
    """liger-kernel cannot compute this model; the message says why and what to do."""


# ------------------------------------------------------------------------------------------- TF32


def set_tf32(asked: bool | None, *, precision: str, device_type: str) -> list[str]:
    """Lets the GPU round what it multiplies in float32 to TF32, or not; elsewhere does nothing.

    Call it once the Accelerator is there: with compiled code in fp32 that turns TF32 on unasked.

    Args:
        asked: `--tf32`; None: beside 16 and 8 bits, not with fp32.
        precision: of the run, "fp32" for example.

    Returns:
        What the log says of it, a line or none.
    """
    if device_type != "cuda":
        return []
    is_on = precision != "fp32" if asked is None else asked
    # By the older of torch's two names. The newer (fp32_precision) makes reading the older raise,
    # which torch.compile and torch.get_float32_matmul_precision do; this one sets both.
    torch.backends.cuda.matmul.allow_tf32 = is_on
    torch.backends.cudnn.allow_tf32 = is_on
    if is_on and torch.cuda.get_device_capability() < (8, 0):
        return ["TF32     on, but this GPU has none: float32 is multiplied in full"]
    return ["TF32     on: float32 is multiplied with 10 bits" if is_on else "TF32     off"]


# -------------------------------------------------------------------------------------- attention


def choose_attention(
    asked: Kernel | None,
    config: PretrainedConfig,
    *,
    is_masked: bool,
    precision: str,
    device_type: str,
) -> tuple[Kernel | None, list[str]]:
    """The attention kernel for rows of several documents on a GPU; elsewhere what was asked for.

    Without it transformers takes sdpa, which under a document mask needs a mask of T x T numbers
    for each row, and then its slower kernels. Flash attention is told where documents begin, flex
    attention leaves out the blocks between them.

    Args:
        asked: `--attn_implementation`; None: free to choose.
        config: of the model.
        is_masked: whether documents in a row must not see each other.
        precision: of the run, "bf16" for example.

    Returns:
        The kernel, None for what transformers takes; and what the log says of it.
    """
    if asked is not None or not is_masked or device_type != "cuda":
        return asked, []
    kernel, reason = _kernel_for_documents(config, precision)
    return kernel, [f"Kernel   {kernel} attention, for documents apart: {reason}"]


def _kernel_for_documents(config: PretrainedConfig, precision: str) -> tuple[Kernel, str]:
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_16_bit = precision != "fp32"
    if is_16_bit and getattr(kind, "_supports_flash_attn", False):
        if is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == 9:
            return "flash_attention_3", "its package is installed"
        if is_flash_attn_2_available():
            return "flash_attention_2", "its package is installed"
    if not getattr(kind, "_supports_flex_attn", False):
        return "sdpa", f"{config.model_type} has neither flash attention here nor flex attention"
    if any(getattr(config, name, 0.0) for name in ATTENTION_DROPOUT_FIELDS):
        return "sdpa", "flex attention has no dropout (--dropout 0 would allow it)"
    return "flex_attention", "no package for flash attention" if is_16_bit else "fp32"


# ------------------------------------------------------------------------------------------ Liger


def use_liger_kernel(model: PreTrainedModel) -> str:
    """Has liger-kernel compute norms, rotary positions and gated MLPs of `model`, in place.

    Its losses stay out: `CausalLMWithLoss` has its own. Names and shapes of weights stay as they
    are. What the package replaces for all models of the kind is put back, so that the exported
    model is opened with the functions of transformers, against which it is compared.

    Returns:
        What the log says of it.

    Raises:
        LigerError: the package cannot be imported or does not know this type of model.
    """
    try:
        patching = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise LigerError(
            f"--use_liger_kernel: the package liger-kernel cannot be imported ({error}). Install it"
            " with pip install liger-kernel, or leave --use_liger_kernel out."
        ) from error
    kind, known = model.config.model_type, patching.MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:
        raise LigerError(
            f"--use_liger_kernel: liger-kernel knows no {kind}. Leave it out, or use one of"
            f" {', '.join(sorted(known))}."
        )
    code = sys.modules[type(model).__module__]
    before = dict(vars(code))
    patching._apply_liger_kernel_to_instance(
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )
    _put_back(code, before)
    return f"Liger    norms, rotary positions and MLPs of {kind}, as far as liger-kernel has them"


def _put_back(code: ModuleType, before: dict[str, Any]) -> None:
    """Undoes what was replaced in a module of transformers, but for functions on a GPU's tensors.

    The model's parts already hold their new methods; only functions are looked up at each call.
    """
    for name, original in before.items():
        new = getattr(code, name)
        if new is original:
            continue
        is_function = isinstance(original, FunctionType)
        setattr(code, name, _on_gpu(new, original) if is_function else original)


def _on_gpu(new: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`new` where the first argument lies on a GPU, else `original`."""

    @functools.wraps(original)
    def choose(first: torch.Tensor, *others: Any, **named: Any) -> Any:
        return (new if first.is_cuda else original)(first, *others, **named)

    return choose
