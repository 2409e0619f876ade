"""Proves that nanoGPT's `ckpt.pt` becomes a GPT-2 folder that computes the same, and safely.

The peer is written out here from nanoGPT's formulas and its names of weights; logits are compared
in float64. What is no plain data is not read, and nothing of it runs.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from llm_training.convert import convert_command
from llm_training.nanogpt_checkpoint import NanogptCheckpointError, convert_checkpoint

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 23}


def make_weights(*, bias: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    width, weights = SIZES["n_embd"], dict[str, Tensor]()

    def add(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = torch.randn(*shape) / 3
        if bias and not name.endswith(("wte", "wpe")):
            weights[f"{name}.bias"] = torch.randn(shape[0]) / 3

    add("transformer.wte", SIZES["vocab_size"], width)
    add("transformer.wpe", SIZES["block_size"], width)
    for layer in range(SIZES["n_layer"]):
        block = f"transformer.h.{layer}"
        add(f"{block}.ln_1", width)
        add(f"{block}.attn.c_attn", 3 * width, width)
        add(f"{block}.attn.c_proj", width, width)
        add(f"{block}.ln_2", width)
        add(f"{block}.mlp.c_fc", 4 * width, width)
        add(f"{block}.mlp.c_proj", width, 4 * width)
    add("transformer.ln_f", width)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def peer_logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """(B, T) to (B, T, V), in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    width, heads = SIZES["n_embd"], SIZES["n_head"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width // heads)).transpose(1, 2)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    for layer in range(SIZES["n_layer"]):
        block = f"transformer.h.{layer}"
        parts = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(width, dim=-1)
        seen = F.scaled_dot_product_attention(*map(split, parts), is_causal=True)
        x = x + linear(seen.transpose(1, 2).flatten(-2), f"{block}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(inner, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def save(path: Path, weights: dict[str, Tensor], prefix: str = "", **more: Any) -> Path:
    args = SIZES | {"bias": True, "dropout": 0.0}
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"dataset": "tiny", "compile": True},
    }
    torch.save(checkpoint | more, path)
    return path


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")])
def test_the_folder_computes_what_nanogpt_does(tmp_path: Path, bias: bool, prefix: str) -> None:
    weights = make_weights(bias=bias)
    mask = {"transformer.h.0.attn.bias": torch.tril(torch.ones(1, 1, 12, 12))}
    path = save(tmp_path / "ckpt.pt", weights | mask, prefix)
    line, told = convert_checkpoint(path, tmp_path / "model")
    assert "2,000 steps" in line and "1.4697" in line
    assert "Of its 23 tokens nothing is known" in told
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model").double().eval()
    ids = torch.randint(SIZES["vocab_size"], (3, SIZES["block_size"]))
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, peer_logits(weights, ids), rtol=1e-10, atol=1e-10
        )


def test_characters_give_the_tokenizer_and_the_end_of_text_a_row(tmp_path: Path) -> None:
    characters = [chr(97 + i) for i in range(SIZES["vocab_size"])]
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    itos = dict(enumerate(characters))
    stoi = {character: i for i, character in itos.items()}
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    (tmp_path / "out").mkdir()
    weights = make_weights(bias=True)
    path = save(tmp_path / "out" / "ckpt.pt", weights)
    _, told = convert_checkpoint(path, tmp_path / "model")
    assert "Tokenizer of characters" in told and "<|endoftext|>" in told
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("badw")["input_ids"] == [1, 0, 3, 22]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) == 24
    assert model.config.eos_token_id == tokenizer.eos_token_id == 23
    rows = model.transformer.wte.weight
    torch.testing.assert_close(rows[23], rows[:23].mean(0))
    torch.testing.assert_close(rows[:23], weights["transformer.wte.weight"], rtol=0, atol=0)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


def test_a_file_that_holds_code_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", make_weights(bias=True), config=Evil())
    with pytest.raises(NanogptCheckpointError, match="more than tensors and plain data"):
        convert_checkpoint(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_no_checkpoint_of_nanogpt_is_refused(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(NanogptCheckpointError) as refused:
            convert_checkpoint(path, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        return str(refused.value)

    weights = make_weights(bias=True)
    assert "correct the path" in refusal(tmp_path / "gone.pt")
    (tmp_path / "text.pt").write_text("no zip")
    assert "text.pt" in refusal(tmp_path / "text.pt")
    torch.save(weights, tmp_path / "weights.pt")
    assert "'model' and 'model_args'" in refusal(tmp_path / "weights.pt")
    wider = dict(weights) | {"transformer.ln_f.weight": torch.ones(17)}
    assert "such as transformer.ln_f.weight" in refusal(save(tmp_path / "wide.pt", wider))
    untied = dict(weights) | {"lm_head.weight": torch.randn(23, 16)}
    assert "not tied" in refusal(save(tmp_path / "untied.pt", untied))
    lacking = save(tmp_path / "args.pt", weights, model_args={"n_layer": 2})
    assert "lack n_head" in refusal(lacking)


def test_the_command_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = save(tmp_path / "ckpt.pt", make_weights(bias=True)), tmp_path / "model"
    assert convert_command(["--convert", str(path)]) == 2
    assert "--convert_to FOLDER" in capsys.readouterr().err
    assert convert_command(["--convert", str(path), "--convert_to", str(folder)]) == 0
    assert f"--model_name_or_path {folder}" in capsys.readouterr().out
    assert convert_command(["--convert", str(path), "--convert_to", str(folder)]) == 2
    assert "exists" in capsys.readouterr().err
