"""Low-rank adapters (LoRA): small matrices that are trained beside weights that stay.

`peft` puts them into the model itself, which keeps its class and its blocks. Modules that are
trained whole beside them (`lora_modules_to_save`) are trained where they stand: peft would keep a
second copy of each. What is written is what peft writes, and peft opens it.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685);
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA"
(arXiv:2312.03732); Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"
(arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from arguments import LoraArguments
from llm_training.checksums import new_checksum
from llm_training.vocab_padding import PaddedHead, trained_shape
from llm_training.zero_init import whole_shape

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
NAME = "default"  # of the one adapter, in the names of its weights
MARK = "trained_adapters"  # on a model: what `adapters_of` finds
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the names in such a file
# Of large files of weights a block in every so many bytes is read: other training changes all.
BLOCK_BYTES, STRIDE_BYTES = 2**12, 2**20
SMALL_FILE_BYTES = 2**26


class LoraError(ValueError):
    """The model has no place for the adapters asked for; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        config: as peft takes it, with the modules that are trained whole, and writes it.
        base_mark: a checksum of the files that the weights below come from.
        is_merged: whether models are written with the adapters added to their weights.
    """

    config: LoraConfig
    base_mark: str
    is_merged: bool


def add_adapters(model: PreTrainedModel, arguments: LoraArguments) -> list[str]:
    """Puts adapters into `model`, and lets them and what is trained whole be all that is trained.

    Their first weights follow from torch's seed alone, so every rank that has the same draws the
    same; the random state is left as it was. The second of each pair begins as zeros: the model
    computes what it did before.

    Args:
        model: before any backend has seen it; its vocabulary is padded by now, if ever.

    Returns:
        What the log says of it; nothing without `lora_rank`.

    Raises:
        LoraError: nothing fits the names given, or what fits can have no adapter.
    """
    if arguments.lora_rank is None:
        return []
    whole = _modules_named(model, arguments.lora_modules_to_save)
    config = _config_of(model, arguments, whole)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(torch.initial_seed())
        _inject(config, model)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    layers = _adapted_layers(model)
    for layer in layers.values():
        # Autocast casts to the type that matrices are multiplied in; casting before it is in vain.
        layer.cast_input_dtype_enabled = arguments.use_dora
    config = dataclasses.replace(
        config,
        exclude_modules=None,
        modules_to_save=whole or None,
        base_model_name_or_path=_base_path(model),
        revision=getattr(model.config, "_commit_hash", None),
    )
    setattr(model, MARK, Adapters(config, base_mark(model), arguments.merge_adapter))
    return [_line(model, config, len(layers))]


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters that lie somewhere in `model`, if any."""
    found = (module.__dict__.get(MARK) for module in model.modules())
    return next((adapters for adapters in found if adapters is not None), None)


def _config_of(
    model: PreTrainedModel, arguments: LoraArguments, whole: Sequence[str]
) -> LoraConfig:
    """What peft is told, but for the modules that are trained whole, which it would copy."""
    from peft import LoraConfig

    assert arguments.lora_rank is not None
    alpha = arguments.lora_alpha
    alpha = 2 * arguments.lora_rank if alpha is None else alpha
    targets = _find_targets(model, arguments.lora_target_modules, whole)
    settings: dict[str, Any] = {
        "r": arguments.lora_rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": arguments.lora_dropout,
        "target_modules": _in_short(model, targets),
        "exclude_modules": _pattern(whole) if whole else None,
        "use_rslora": arguments.use_rslora,
        "use_dora": arguments.use_dora,
        "fan_in_fan_out": any(isinstance(model.get_submodule(n), Conv1D) for n in targets),
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**settings)


def _pattern(whole: Sequence[str]) -> str:
    """These modules and all inside of them."""
    return rf"({'|'.join(map(re.escape, whole))})($|\..*)"


def _find_targets(model: PreTrainedModel, names: Sequence[str], whole: Sequence[str]) -> list[str]:
    """The modules that get an adapter.

    Raises:
        LoraError: a name fits nothing, or something that is not linear or has its weight from
            another module.
    """
    linear = _linear_modules(model)
    inside_whole = re.compile(_pattern(whole)) if whole else None
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    found: list[str] = []
    for name in names:
        fitting = [key for key in linear if key != head or ALL_LINEAR not in names]
        if name != ALL_LINEAR:
            fitting = [key for key, _ in model.named_modules() if _is_named(key, name)]
        fitting = [k for k in fitting if not (inside_whole and inside_whole.fullmatch(k))]
        if not fitting:
            raise LoraError(
                f"--lora_target_modules {name}: {model.config.model_type} has no such module left"
                f" to adapt. Its linear layers are {_listed(linear)}; {ALL_LINEAR} takes all but"
                " the head."
            )
        if strange := [key for key in fitting if key not in linear]:
            raise LoraError(
                f"--lora_target_modules {name}: {strange[0]} is no linear layer, and only those get"
                f" an adapter: {_listed(linear)}. To train another module whole, name it in"
                " --lora_modules_to_save."
            )
        found += fitting
    _check_shared(model, found)
    return found


def _check_shared(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Makes sure that what gets an adapter has a weight of its own, without rows of padding."""
    for name in names:
        module = model.get_submodule(name)
        if partners := _partners(model, name):
            raise LoraError(
                f"--lora_target_modules: {name} and {partners[0]} are one weight, which an adapter"
                " for one of them would part. Name it in --lora_modules_to_save, which trains both"
                " whole, or leave it out."
            )
        if isinstance(module, PaddedHead):
            raise LoraError(
                f"--lora_target_modules: {name} has rows that only pad the vocabulary, and the"
                " model that the adapter is for has none. Leave it or --pad_vocab_to_multiple_of"
                " out."
            )


def _linear_modules(model: nn.Module) -> list[str]:
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _modules_named(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Full names of the modules to train whole, with those that share their weights.

    Raises:
        LoraError: a name fits none that has weights, or one with rows of padding.
    """
    found: dict[str, None] = {}
    own = [n for n, m in model.named_modules() if n and next(m.parameters(), None) is not None]
    for name in names:
        fitting = [key for key in own if _is_named(key, name)]
        if not fitting:
            raise LoraError(
                f"--lora_modules_to_save {name}: {model.config.model_type} has no such module with"
                f" weights. It has {_listed(own)}."
            )
        for key in fitting:
            found |= dict.fromkeys([key, *_partners(model, key)])
    padded = {id(p) for p in model.parameters() if trained_shape(p) != whole_shape(p)}
    for name in found:
        if padded & {id(p) for p in model.get_submodule(name).parameters()}:
            raise LoraError(
                f"--lora_modules_to_save: {name} has rows that only pad the vocabulary, and the"
                " model that the adapter is for has none. Leave it or --pad_vocab_to_multiple_of"
                " out."
            )
    return list(found)


def _partners(model: nn.Module, name: str) -> list[str]:
    """Other modules that hold a weight of this one (tied embeddings)."""
    mine = {id(p) for p in model.get_submodule(name).parameters()}
    return [
        other
        for other, module in model.named_modules()
        if other != name
        and not other.startswith(f"{name}.")
        and any(id(p) in mine for p in module.parameters(recurse=False))
        and not name.startswith(f"{other}.")
    ]


def _in_short(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The last words of the names where they mean the same modules, else the names."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {key for key, _ in model.named_modules() if key.rpartition(".")[2] in last}
    return sorted(last if meant == {*names} else {*names})


def _is_named(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _listed(names: Sequence[str]) -> str:
    """The last words of module names, each once; numbers are places in lists."""
    last = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return ", ".join(word for word in last if not word.isdigit())


def _inject(config: LoraConfig, model: PreTrainedModel) -> None:
    from peft import inject_adapter_in_model

    with quiet_peft(), ExitStack() as stack:
        if any(isinstance(parameter, FakeTensor) for parameter in model.parameters()):
            # torch cannot move modules without content; all lies in one place anyway.
            stack.enter_context(patch.object(nn.Module, "to", lambda module, *_, **__: module))
        inject_adapter_in_model(config, model, NAME)


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers that have an adapter, by the names that they had before."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _line(model: nn.Module, config: LoraConfig, num_modules: int) -> str:
    sizes = [(trained_shape(p).numel(), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    kind = (", rsLoRA" if config.use_rslora else "") + (", DoRA" if config.use_dora else "")
    whole = f"; {', '.join(config.modules_to_save)} whole" if config.modules_to_save else ""
    return (
        f"LoRA     rank {config.r}, alpha {config.lora_alpha:g}{kind}: {trained:,} of {total:,}"
        f" parameters are trained ({trained / total:.2%}), in {num_modules} modules{whole}"
    )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keeps peft's warnings back: of what they warn, `add_adapters` has seen to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------ which base it is


def base_mark(model: PreTrainedModel) -> str:
    """A checksum of the base's files of weights, of large ones of a part; 12 hex digits.

    Raises:
        LoraError: they are not to be found.
    """
    checksum = new_checksum()
    commit = getattr(model.config, "_commit_hash", None)
    for path in _weight_files(str(model.config.name_or_path), commit):
        size = path.stat().st_size
        checksum.update(f"{path.name} {size}\n".encode())
        is_small = size <= SMALL_FILE_BYTES
        with path.open("rb") as file:
            for start in range(0, size, STRIDE_BYTES):
                file.seek(start)
                checksum.update(file.read(STRIDE_BYTES if is_small else BLOCK_BYTES))
    return str(checksum.hexdigest()[:12])


def _weight_files(name: str, commit: str | None) -> list[Path]:
    folder = Path(name)
    if not name:
        return []  # made from a configuration, to reckon with
    if not folder.is_dir():
        try:  # of a hub id: where its files were put when they were fetched
            config = cached_file(name, "config.json", local_files_only=True, revision=commit)
            folder = Path(str(config)).parent
        except (OSError, ValueError) as error:
            raise LoraError(f"The files of {name} cannot be found: {error}") from error
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []  # a dry run looks before anything is fetched


def _base_path(model: PreTrainedModel) -> str:
    """What an adapter's configuration calls its base; a local folder from the root on."""
    name = str(model.config.name_or_path)
    return os.path.abspath(name) if os.path.isdir(name) else name


# ---------------------------------------------------------------------------------- what is kept


def adapter_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights by the names that they have in files.

    They are those that peft writes, but for DoRA's vectors: to these it gives no `.weight`, and
    reads them with and without; transformers finds them only with it.
    """
    return {
        PREFIX + re.sub(rf"(\.lora_\w+)\.{NAME}\.", r"\1.", name): tensor
        for name, tensor in weights.items()
    }


def write_adapter(adapters: Adapters, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a new folder.

    Args:
        weights: the trained ones, whole and on the CPU, by their names in the model.
    """
    folder.mkdir(parents=True)
    config = adapters.config.to_dict() | {"inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # peft keeps some as sets
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    tensors = {name: t.clone().contiguous() for name, t in adapter_tensors(weights).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def weights_in_opened(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapter that was opened again the weights that `weights` names, where they now lie."""
    found = model.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "modules_to_save") and NAME in module.modules_to_save:
            inside = module.modules_to_save[NAME].state_dict(prefix=f"{name}.")
            found |= inside
    return {name: found[name] for name in weights.keys() & found.keys()}


def merge_weights(
    adapters: Adapters, plain: PreTrainedModel, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of the plain model that computes what base and adapters do together.

    Args:
        plain: that model without content; adapters are put into it.
        weights: of the live model, whole and on the CPU, by their names in it. They stay as they
            are; of those without an adapter the result has the very tensors.
    """
    merged = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in weights.items()
        if f".{NAME}." not in name
    }
    whole = adapters.config.modules_to_save
    exclude = _pattern(whole) if whole else None
    with torch.device("meta"):
        config = dataclasses.replace(
            adapters.config, modules_to_save=None, exclude_modules=exclude, inference_mode=False
        )
        _inject(config, plain)
    for name, layer in _adapted_layers(plain).items():
        own = {key: weights[f"{name}.{key}"] for key in layer.state_dict()}
        layer.load_state_dict(own, assign=True)
        layer.merge(safe_merge=True)  # into a copy
        merged[f"{name}.weight"] = layer.get_base_layer().weight.detach()
        layer.to("meta")  # one of them at a time
    return merged
