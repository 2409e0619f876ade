"""How many operations a model's training costs, and how many a device could do: what MFU compares.

Model FLOPs utilization is the share of a device's peak that the arithmetic of the model itself
takes; activations that are computed again, padding and waiting lower it.

Source: Chowdhery et al. 2022, "PaLM" (arXiv:2204.02311), appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llm_training.vocab_padding import trained_shape

# What configurations call the number of experts of a layer.
NUM_EXPERTS_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
# The positions that a token of such a layer looks at, where it is not all of them.
SPAN_FIELDS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


@dataclass(frozen=True)
class Peak:
    """Operations per second of one device, by precision, in 1e12; dense, without sparsity.

    Attributes:
        half: bf16 and fp16 matrices with sums in fp32.
        tf32: fp32 matrices computed in TF32.
        fp32: outside of tensor cores.
        source: where the numbers stand.
    """

    half: float
    tf32: float | None
    fp32: float
    source: str


# By parts of the name that the driver gives the device, all of which must be in it; the first that
# fits counts. Where only numbers with sparsity are published, half of them.
PEAKS: dict[tuple[str, ...], Peak] = {
    ("GB200",): Peak(2500, 1250, 80, "NVIDIA GB200 NVL72 data sheet, per GPU"),
    ("B200",): Peak(2250, 1100, 75, "NVIDIA DGX B200 data sheet, per GPU"),
    ("H200", "NVL"): Peak(835, 417.5, 60, "NVIDIA H200 data sheet"),
    ("GH200",): Peak(989.5, 494.7, 67, "NVIDIA GH200 data sheet"),
    ("H200",): Peak(989.5, 494.7, 67, "NVIDIA H200 data sheet"),
    ("H100", "NVL"): Peak(835, 417.5, 60, "NVIDIA H100 data sheet"),
    ("H100", "PCIe"): Peak(756, 378, 51, "NVIDIA H100 PCIe product brief"),
    ("H100",): Peak(989.5, 494.7, 67, "NVIDIA H100 data sheet, SXM"),
    ("A100",): Peak(312, 156, 19.5, "NVIDIA A100 data sheet"),
    ("A800",): Peak(312, 156, 19.5, "NVIDIA A800 data sheet"),
    ("A40",): Peak(149.7, 74.8, 37.4, "NVIDIA A40 data sheet"),
    ("A30",): Peak(165, 82, 10.3, "NVIDIA A30 data sheet"),
    ("A10G",): Peak(70, 35, 35, "NVIDIA A10G data sheet"),
    ("A10",): Peak(125, 62.5, 31.2, "NVIDIA A10 data sheet"),
    ("L40S",): Peak(362, 183, 91.6, "NVIDIA L40S data sheet"),
    ("L4",): Peak(121, 60, 30.3, "NVIDIA L4 data sheet"),
    ("RTX 4090",): Peak(165.2, 82.6, 82.6, "NVIDIA Ada architecture paper, appendix A"),
    ("RTX 3090",): Peak(71, 35.6, 35.6, "NVIDIA GA102 architecture paper, appendix A"),
    ("V100", "PCIE"): Peak(112, None, 14, "NVIDIA V100 data sheet"),
    ("V100",): Peak(125, None, 15.7, "NVIDIA V100 data sheet, SXM2"),
    ("Tesla T4",): Peak(65, None, 8.1, "NVIDIA T4 data sheet"),
    ("MI300X",): Peak(1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet"),
    ("MI325X",): Peak(1307.4, 653.7, 163.4, "AMD Instinct MI325X data sheet"),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations per second that the device could do at best; None where the device is unknown.

    Args:
        device_name: as the driver gives it, "NVIDIA H100 80GB HBM3" for example.
        precision: "bf16", "fp16", "tf32" or "fp32".
    """
    words = device_name.replace("-", " ").split()
    for parts, peak in PEAKS.items():
        if all(_is_in(part, words) for part in parts):
            value = {"tf32": peak.tf32, "fp32": peak.fp32}.get(precision, peak.half)
            return None if value is None else value * 1e12
    return None


def model_flops_per_token(model: nn.Module, config: Any, block_size: int) -> float | None:
    """Operations that training on one token takes: 6 N + 12 L H Q T, as in PaLM's appendix B.

    N are the parameters that are multiplied: all matrices but embedding tables, a head that is tied
    to one included, and of a mixture of experts as many as a token meets. L layers of H heads with
    Q dimensions attend to T positions; like PaLM and nanoGPT, and unlike some others, this takes
    all T also where a causal mask leaves half of them out. 6 and 12: a multiplication and an
    addition, once forward and twice backward. Weights that adapters leave as they are need no
    gradient: 4 in place of 6.

    Args:
        config: the model's configuration.
        block_size: tokens of a row (T).

    Returns:
        None for models with layers that are neither attention nor matrices (state spaces, ...).
    """
    spans = _attention_spans(config, block_size)
    width = _attention_width(config)
    if spans is None or width is None:
        return None
    all_of_them = count_multiplied(model, config)
    trained = count_multiplied(model, config, only_trained=True)
    return 4 * all_of_them + 2 * trained + 12 * width * sum(spans)


def count_multiplied(model: nn.Module, config: Any, *, only_trained: bool = False) -> float:
    """Parameters that a token is multiplied with, each once; all or those that are trained."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for n, m in model.named_modules() if n.split(".")[-1] == "lm_head"}
    per_token = getattr(config, "num_experts_per_tok", None)
    num_experts = next((n for f in NUM_EXPERTS_FIELDS if (n := getattr(config, f, None))), None)
    met = per_token / num_experts if per_token and num_experts else 1.0
    return sum(
        trained_shape(p).numel() * (met if "experts" in name.split(".") else 1.0)
        for name, p in model.named_parameters()
        if len(trained_shape(p)) >= 2
        and (id(p) in heads or id(p) not in tables)
        and (p.requires_grad or not only_trained)
    )


def utilization(flops_per_token: float | None, peak: float | None) -> float | None:
    """Share of `peak` that one token a second takes; None where either is unknown."""
    return flops_per_token / peak if flops_per_token and peak else None


def _is_in(part: str, words: list[str]) -> bool:
    """Whether the name has the words of `part` in a row: "L4" is not in "L40S"."""
    wanted = part.split()
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def _attention_spans(config: Any, block_size: int) -> list[int] | None:
    """Positions that each layer attends to."""
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is None or hasattr(config, "attention_layers"):  # GPT-Neo's own kind of window
        return None
    window = getattr(config, "sliding_window", None)
    plain = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [plain] * num_layers
    spans = []
    for kind in kinds:
        if kind != "full_attention" and kind not in SPAN_FIELDS:
            return None
        limit = getattr(config, SPAN_FIELDS[kind], None) if kind in SPAN_FIELDS else None
        spans.append(min(block_size, limit or block_size))
    return spans


def _attention_width(config: Any) -> float | None:
    """Dimensions of all heads of a layer together (H x Q)."""
    num_heads = getattr(config, "num_attention_heads", None)
    if not num_heads:
        return None
    if getattr(config, "v_head_dim", None):  # keys and values of different sizes
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
        return num_heads * (keys + config.v_head_dim) / 2
    return num_heads * (getattr(config, "head_dim", None) or config.hidden_size // num_heads)
