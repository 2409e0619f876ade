"""nanoGPT's `ckpt.pt` as a GPT-2 folder that transformers, and `model_name_or_path`, open.

The file is a pickle; torch reads tensors and plain data from it and refuses all else, so nothing of
it is run. The weights are the same numbers: nanoGPT keeps its matrices as (out, in), GPT-2 in
transformers as (in, out); biases that it left out are zeros. Its optimizer state is left behind.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2Config, GPT2LMHeadModel

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# As torch.compile names what it wraps, and DDP.
PREFIX = re.compile(r"^(_orig_mod\.|module\.)+")
# Matrices that transformers keeps the other way round.
TURNED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# The causal mask, which older versions saved as if it were a weight.
MASK = re.compile(r"\.attn\.(bias|masked_bias)$")


class NanogptCheckpointError(ValueError):
    """The file cannot be converted; the message says why and what to do."""


def convert_checkpoint(path: Path, folder: Path) -> list[str]:
    """Writes the model of a `ckpt.pt` to a new folder; returns what there is to say of it.

    A `meta.pkl` of characters, looked for beside the checkpoint and in nanoGPT's data folder, gives
    the tokenizer.

    Raises:
        NanogptCheckpointError: it is no such checkpoint, or the folder exists.
    """
    if folder.exists():
        raise NanogptCheckpointError(f"{folder} exists: name a new folder")
    checkpoint = _read(path)
    sizes = _sizes(checkpoint, path)
    model = _build(sizes, _weights(checkpoint["model"], sizes, path))
    tokenizer, told = _tokenizer(path, checkpoint, sizes["vocab_size"])
    folder.mkdir(parents=True)
    if tokenizer is not None:
        told += _embed_new_tokens(model, len(tokenizer))
        model.config.bos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    step = checkpoint.get("iter_num")
    loss = checkpoint.get("best_val_loss")
    after = f" after {step:,} steps" if isinstance(step, int) else ""
    judged = f", best validation loss {float(loss):.4f}" if loss is not None else ""
    return [f"{folder}: GPT-2 with {count:,} parameters{after}{judged}", told]


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise NanogptCheckpointError(f"{path}: {error.strerror}; correct the path") from None
    except pickle.UnpicklingError:
        raise NanogptCheckpointError(
            f"{path} holds more than tensors and plain data. To read the rest would run code of the"
            " file's author, so nothing of it is read. In nanoGPT, save it again with"
            " torch.save({k: checkpoint[k] for k in ('model', 'model_args')}, 'plain.pt')."
        ) from None
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        raise NanogptCheckpointError(f"{path} is no file of torch.save: {told}") from None
    is_nanogpt = isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys()
    if not is_nanogpt:
        raise NanogptCheckpointError(
            f"{path} is no checkpoint of nanoGPT, which holds 'model' and 'model_args'"
        )
    return dict(checkpoint)


def _sizes(checkpoint: Mapping[str, Any], path: Path) -> dict[str, int]:
    given = checkpoint["model_args"]
    missing = [name for name in SIZES if type(given.get(name)) is not int]
    if missing:
        raise NanogptCheckpointError(f"{path}: its model_args lack {', '.join(missing)}")
    return {name: given[name] for name in SIZES}


def _weights(saved: Mapping[str, Tensor], sizes: Mapping[str, int], path: Path) -> dict[str, Any]:
    """The weights by transformers' names and in its layout."""
    import torch

    weights = {}
    for name, tensor in saved.items():
        plain = PREFIX.sub("", name)
        if MASK.search(plain):
            continue
        tensor = tensor.float()
        weights[plain] = tensor.t().contiguous() if TURNED.search(plain) else tensor.clone()
    expected = _config(sizes)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in _empty(expected).state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith(".bias") and name not in weights:
            weights[name] = torch.zeros(shape)  # trained with bias=False
    if "lm_head.weight" not in weights and "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    wrong = [name for name in shapes if weights.get(name, torch.empty(0)).shape != shapes[name]]
    wrong += [name for name in weights if name not in shapes]
    if wrong:
        raise NanogptCheckpointError(
            f"{path}: {len(wrong)} weights are missing, unknown or of another shape than its"
            f" model_args say, such as {wrong[0]}: the model's code was changed"
        )
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise NanogptCheckpointError(
            f"{path}: its head is not tied to its embedding, as nanoGPT's is: the model's code was"
            " changed"
        )
    return weights


def _config(sizes: Mapping[str, int]) -> GPT2Config:
    from transformers import GPT2Config

    return GPT2Config(
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        n_embd=sizes["n_embd"],
        n_positions=sizes["block_size"],
        vocab_size=sizes["vocab_size"],
        activation_function="gelu",  # the exact one, as torch.nn.GELU() computes it
        bos_token_id=None,
        eos_token_id=None,
    )


def _empty(config: GPT2Config) -> GPT2LMHeadModel:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(config)


def _build(sizes: Mapping[str, int], weights: Mapping[str, Tensor]) -> GPT2LMHeadModel:
    model = _empty(_config(sizes))
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _tokenizer(path: Path, checkpoint: Mapping[str, Any], vocab_size: int) -> tuple[Any, str]:
    """The tokenizer of characters, where nanoGPT's data folder says them, and what to say of it."""
    from llm_training.data.errors import DataError
    from llm_training.data.tokens.nanogpt_meta import build_char_tokenizer, read_nanogpt_meta

    config = checkpoint.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    places = [path.parent, path.parent.parent / "data" / str(dataset)]
    for place in places:
        try:
            meta = read_nanogpt_meta(place)
        except DataError as error:
            raise NanogptCheckpointError(str(error)) from None
        if meta is not None and meta.tokens is not None:
            tokenizer = build_char_tokenizer(meta.tokens)
            if tokenizer is not None and len(meta.tokens) == vocab_size:
                return tokenizer, f"Tokenizer of characters, from {meta.path}"
    if vocab_size in (50257, 50304):
        return None, "It was trained on GPT-2's tokens: give --tokenizer_name gpt2, or its folder"
    return None, f"Of its {vocab_size:,} tokens nothing is known: give --tokenizer_name a folder"


def _embed_new_tokens(model: GPT2LMHeadModel, num_tokens: int) -> str:
    """Gives tokens that nanoGPT did not have (the end of a text) the mean of all others.

    Returns:
        What to say of it; empty where there is none.
    """
    import torch

    num_old = model.config.vocab_size
    if num_tokens <= num_old:
        return ""
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        rows = model.transformer.wte.weight
        rows[num_old:] = rows[:num_old].mean(0)
    return f"; {num_tokens - num_old} token was added, <|endoftext|>, which ends documents here"


def checkpoint_command(path: str, folder: str | None) -> int:
    """`--convert ckpt.pt --convert_to FOLDER`; returns the exit status: 0, or 2 for a refusal."""
    try:
        if folder is None:
            raise NanogptCheckpointError("name the new model's folder with --convert_to FOLDER")
        lines = convert_checkpoint(Path(path), Path(folder))
    except NanogptCheckpointError as error:
        print(f"--convert {path}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    print(f"To train it on: python train_llm.py run.json --model_name_or_path {folder}")
    return 0
