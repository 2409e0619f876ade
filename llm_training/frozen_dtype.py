"""The type in which linear layers that are not trained hold their matrices.

A frozen matrix needs no digits that only updates would use. Held in bfloat16 it gives the curve of
float32, bit for bit: autocast rounds a float32 matrix to bfloat16 before each product, and this
rounds it once. In 4 bits (NF4) it is another matrix: each number becomes the nearest of 16 that are
spread like a normal distribution, times the largest of its block of 64.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arguments import Arguments
from llm_training.zero_init import LOGICAL_SHAPE, whole_shape

BLOCK = 64  # numbers with one scale, which takes 8 bits
SCALES = 256  # scales with one of their own, which takes 32


class FrozenDtypeError(ValueError):
    """Frozen matrices cannot be held so; the message says why and what to do."""


def loading_options(arguments: Arguments, device_type: str) -> dict[str, Any]:
    """What `from_pretrained` is told for it: nothing, so that all is loaded in float32.

    What is not held otherwise keeps all digits of its file, and no layer comes with a product of
    another library: that of bitsandbytes packs the matrices of a CPU anew in each evaluation.
    """
    return {}


@torch.no_grad()
def hold_frozen(
    model: PreTrainedModel, arguments: Arguments, *, precision: str, device_type: str
) -> list[str]:
    """Puts the matrices of linear layers that are not trained into `frozen_dtype`.

    Trained weights, embeddings, norms, biases and a head that is tied to the embedding stay in
    float32; beside 4 bits so does every head.

    Args:
        model: with its adapters, and with `requires_grad` as it will be trained.
        precision: bf16, fp16, fp8 or fp32.
        device_type: of the run. Matrices of 4 bits are made there, and lie there from now on.

    Returns:
        What the log says of it.

    Raises:
        FrozenDtypeError: this precision multiplies other types, or no such layer is frozen.
    """
    asked = arguments.frozen_dtype
    if asked == "float32":
        return []
    if asked == "bfloat16" and precision != "bf16":
        raise FrozenDtypeError(
            f"--frozen_dtype bfloat16: this run computes in {precision}, where such a matrix would"
            " meet numbers of another type. Give --mixed_precision bf16, or --frozen_dtype float32."
        )
    layers = frozen_layers(model)
    if asked == "nf4":
        head = model.get_output_embeddings()
        layers = {name: layer for name, layer in layers.items() if layer is not head}
    if not layers:
        raise FrozenDtypeError(
            f"--frozen_dtype {asked}: no linear layer of this {model.config.model_type} stays as"
            " it is with a matrix of its own. Leave it out."
        )
    count = sum(whole_shape(matrix_of(layer)).numel() for layer in layers.values())
    line = f"Frozen   {count:,} parameters in {len(layers)} matrices are held in"
    if asked == "nf4":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for name, layer in layers.items():
            model.set_submodule(name, FourBitLinear(layer, dtype, torch.device(device_type)))
        bits = 8 * held_bytes(model, only_four_bits=True) / count
        return [f"{line} 4 bits (NF4), with their scales {bits:.2f}"]
    exact = [_round(matrix_of(layer)) for layer in layers.values()]
    if None in exact:
        return [f"{line} bfloat16"]
    how = "as they were stored"
    if num_rounded := exact.count(False):
        how = f"{num_rounded} of them rounded, as in each product before; so a whole model has them"
    return [f"{line} bfloat16, {how}"]


def frozen_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers whose matrix is neither trained nor an embedding's, by name."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not module.weight.requires_grad
        and id(module.weight) not in tables
    }


def matrix_of(layer: nn.Module) -> nn.Parameter:
    """The matrix of a linear layer of any kind."""
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def held_bytes(model: nn.Module, *, only_four_bits: bool = False) -> int:
    """Bytes that weights take that are not trained, with the scales of those of 4 bits."""
    layers = [module for module in model.modules() if isinstance(module, FourBitLinear)]
    of_scales = sum(layer.scale_bytes for layer in layers)
    if only_four_bits:
        return of_scales + sum(layer.weight.nbytes for layer in layers)
    return of_scales + sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def hold_alike(opened: PreTrainedModel, network: nn.Module) -> None:
    """Puts into 4 bits in `opened` what `network` holds so: another start from the same files."""
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, FourBitLinear):
                plain = opened.get_submodule(name)
                opened.set_submodule(name, FourBitLinear(plain, layer.dtype, opened.device))


def _round(parameter: nn.Parameter) -> bool | None:
    """Rounds to bfloat16; whether no value changed by it, None where there are no values."""
    if hasattr(parameter, "ds_id"):  # of ZeRO-3, which holds its parts in 16 bits by itself
        return None
    before = parameter.data
    parameter.data = before.to(torch.bfloat16)
    if isinstance(before, FakeTensor):
        return None
    return torch.equal(parameter.data.float(), before)


# ---------------------------------------------------------------------------------------- 4 bits


class FourBitLinear(nn.Module):
    """A linear layer that is not trained, with its matrix in 4 bits; its bias stays.

    The matrix is made anew for each product, and gone after it. Where bitsandbytes has a layer for
    it, this one is in its place because it computes the same in training and evaluation, on every
    device.

    Attributes:
        weight: (N / 2, 1) uint8, two numbers in each; its shape as a matrix is noted on it.
        dtype: in which the matrix is made.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, device: torch.device):
        """Takes the place of `layer`, an `nn.Linear` or `Conv1D`; the result lies on `device`."""
        super().__init__()
        matrix = matrix_of(layer).detach()
        self.dtype, self.is_transposed = dtype, isinstance(layer, nn.Linear)
        self.shape = matrix.shape
        packed, self._scales = _quantize(matrix, device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        setattr(self.weight, LOGICAL_SHAPE, matrix.shape)
        assert layer.bias is None or isinstance(layer.bias, nn.Parameter)
        self.bias = layer.bias

    @property
    def scale_bytes(self) -> int:
        """What the scales take, computed."""
        num_scales = -(-self.shape.numel() // BLOCK)
        return num_scales + 4 * -(-num_scales // SCALES)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., out) of `hidden` (..., in), in autocast's type where it is on."""
        device = hidden.device.type
        is_autocast = torch.is_autocast_enabled(device)
        hidden = hidden.to(torch.get_autocast_dtype(device)) if is_autocast else hidden
        with torch.autocast(device, enabled=False):
            product: Tensor = _Product.apply(hidden, self)
            return product if self.bias is None else product + self.bias.to(product.dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(in, out), as the 4 bits have it."""
        if self._scales is None:
            whole = torch.empty(self.shape, dtype=self.dtype, device=self.weight.device)
        else:
            whole = _bitsandbytes().dequantize_4bit(self.weight, self._scales)
        return (whole.T if self.is_transposed else whole).to(dtype)

    def extra_repr(self) -> str:
        """For a printed model."""
        return f"{list(self.shape)} in NF4"


class _Product(torch.autograd.Function):
    """`hidden @ matrix`; for the way back only the 4 bits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return hidden @ layer.matrix(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.matrix(gradient.dtype).T, None


def _quantize(matrix: Tensor, device: torch.device) -> tuple[Tensor, Any]:
    """A matrix in 4 bits, and its scales, themselves in 8; None in the place of those to reckon."""
    if isinstance(matrix, FakeTensor):
        num_bytes = -(-matrix.numel() // 2)
        return torch.empty((num_bytes, 1), dtype=torch.uint8, device=matrix.device), None
    packed, scales = _bitsandbytes().quantize_4bit(
        matrix.to(device), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return packed, scales


def _bitsandbytes() -> Any:
    """The functions of the package, which runs without 4 bits do not need."""
    return importlib.import_module("bitsandbytes.functional")
