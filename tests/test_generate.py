"""Proves that a model folder speaks in the terminal: the same text as transformers would give.

What cannot speak is refused with what to do: no model, no template, an adapter without its model.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llm_training import generate
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.generate import GenerateError, find_model, main

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'][0] }}:{{ turn['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, with a model of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    tokenizer = train_tokenizer("byte", [], 0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder / "final")
    tokenizer.save_pretrained(folder / "final")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def greedy(folder: Path, prompt: str, length: int) -> str:
    model = GPT2LMHeadModel.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    for _ in range(length):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def test_a_prompt_is_continued_with_the_likeliest_tokens(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, run, "--prompt", "def ", "--temperature", 0, "--max_new_tokens", 9)
    assert text.rstrip("\n") == greedy(run / "final", "def ", 9).rstrip("\n")


def test_a_seed_gives_the_same_text_again_and_another_seed_another(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(seed: int) -> str:
        return said(capsys, run, "--prompt", "a", "--seed", seed, "--max_new_tokens", 12)

    assert drawn(1) == drawn(1) != drawn(2)
    several = said(capsys, run, "--prompt", "a", "--num_samples", 3, "--max_new_tokens", 12)
    assert len({line for line in several.split("\n") if line}) >= 3


def test_a_pipe_is_a_prompt_and_a_long_one_loses_its_beginning(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(100))  # of 32 positions 16 are for the answer
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    out = said(capsys, run, "--temperature", 0, "--max_new_tokens", 500)
    answer = greedy(run / "final", text[-16:], 16)[16:]
    assert out.rstrip("\n") == (text + answer).rstrip("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main([str(run)]) == 1
    assert "nothing to continue" in capsys.readouterr().err


def test_a_chat_goes_on_with_all_that_was_said(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "final")
    tokenizer.chat_template = TEMPLATE
    GPT2LMHeadModel.from_pretrained(run / "final").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked: list[str] = []
    real = generate.continue_once

    def continue_once(model, tokenizer, ids, given):  # type: ignore[no-untyped-def]
        asked.append(tokenizer.decode(ids))
        real(model, tokenizer, ids, given)
        return f"answer {len(asked)}"

    lines = iter(["hello", "and now?", ""])
    monkeypatch.setattr(generate, "continue_once", continue_once)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    said(capsys, tmp_path, "--chat", "--system", "be brief", "--max_new_tokens", 3)
    first = "s:be brief;u:hello;a:"
    assert asked == [first, first + "answer 1;u:and now?;a:"]


def test_the_model_of_a_run_is_found(run: Path, tmp_path: Path) -> None:
    assert find_model(run) == run / "final"
    assert find_model(run / "final") == run / "final"
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    assert find_model(tmp_path) == tmp_path / "best"
    with pytest.raises(GenerateError, match="no model and no final/"):
        find_model(tmp_path, "final")
    (tmp_path / "best" / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(GenerateError, match=r"has not ended.*SAMPLE"):
        find_model(tmp_path)
    with pytest.raises(GenerateError, match="is no folder"):
        find_model(tmp_path / "nowhere")


def test_what_cannot_speak_says_what_to_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--chat", "--prompt", "x"]) == 1
    assert "has no chat template" in capsys.readouterr().err
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/gone"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert main([str(tmp_path), "--prompt", "x"]) == 1
    assert "adapter for org/gone" in capsys.readouterr().err
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")  # a pickle is not read
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text((run / "final" / "config.json").read_text())
    assert main([str(tmp_path), "--prompt", "x"]) == 1
    assert "cannot be opened" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--top_p", "2"], ["--top_k", "0"], ["--temperature", "-1"], ["--num_samples", "x"]]
)
def test_numbers_that_make_no_sense_are_refused(words: list[str], run: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main([str(run), *words])
    assert refused.value.code == 2


# --------------------------------------------------------------------- what does not fit together


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """An adapter for the model of the run, in a folder of its own."""
    model = get_peft_model(
        GPT2LMHeadModel.from_pretrained(run / "final"), LoraConfig(r=2, fan_in_fan_out=True)
    )
    model.peft_config["default"].base_model_name_or_path = str(run / "final")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    assert main([str(folder), "--prompt", "a", "--max_new_tokens", "1"]) == 1
    return capsys.readouterr().err


def put_on(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"n_embd": 32, "n_layer": 1}, "size mismatch"),
        ({"n_embd": 16, "n_layer": 2}, "2 weights of the one have no place in the other"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_both_names(
    sizes: dict[str, int],
    reason: str,
    run: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said(capsys, adapter, "--prompt", "a", "--max_new_tokens", 2).startswith("a")
    GPT2LMHeadModel(GPT2Config(n_head=2, vocab_size=257, **sizes)).save_pretrained(tmp_path / "b")
    put_on(adapter, tmp_path / "b")
    told = refusal(capsys, adapter)
    assert f"adapter in {adapter} does not fit the model in {tmp_path / 'b'}: " in told
    assert reason in told and len(told) < 1000


def test_an_adapter_for_another_kind_or_without_its_file_is_refused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    config = LlamaConfig(num_attention_heads=2, vocab_size=257, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    put_on(adapter, tmp_path / "llama")
    assert "does not fit the model in" in refusal(capsys, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "holds an adapter, but no adapter_model.safetensors" in refusal(capsys, adapter)


def test_a_model_that_is_not_all_there_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "final", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    assert "12 are missing or have another shape (transformer.h.1" in refusal(capsys, tmp_path)


def test_code_beside_a_model_runs_by_consent(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder = tmp_path / "own"
    shutil.copytree(run / "final", folder)
    (folder / "own_code.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n\n\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own_gpt'\n\n\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_gpt", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    assert "needs Python code that lies beside it" in refusal(capsys, folder)
    words = ("--prompt", "def ", "--temperature", 0, "--max_new_tokens", 9)
    text = said(capsys, folder, "--trust_remote_code", *words)
    assert text == said(capsys, run, *words)
