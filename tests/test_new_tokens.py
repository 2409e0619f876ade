"""Proves that an existing model learns new tokens: rows where it has none, and never wrong ids.

`tests/distributed/test_existing_weights.py` grows an embedding in every backend.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from arguments import Arguments
from llm_training.data.tokens.tokenizers import load_tokenizer, train_tokenizer
from llm_training.modeling import (
    ModelError,
    build_model,
    fit_config,
    fit_vocab,
    load_config,
    model_fingerprint,
)
from tests.small_runs import curve, open_place, train_small, weights

NEW = ["<|user|>", "<|assistant|>", "<|tool|>"]
GPT2 = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=257)
LLAMA_SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
EXISTING: dict[str, Any] = {
    "model_type": None,
    "config_overrides": {},
    "tokenizer_name": None,
    "special_tokens": NEW,
}
TABLES = {
    "gpt2": ("transformer.wte.weight",) * 2,
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
}
each_kind = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two models of 257 rows for 257 tokens, and one with 64 rows more."""
    llama = LlamaConfig(vocab_size=257, **LLAMA_SIZES)
    roomy = LlamaConfig(vocab_size=321, **LLAMA_SIZES)
    for name, config in {"gpt2": GPT2, "llama": llama, "roomy": roomy}.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        train_tokenizer("byte", [], 0).save_pretrained(tmp_path / name)
    return open_place(tmp_path, monkeypatch)


def fit(
    model: str, tokenizer: str | None = None, **settings: Any
) -> tuple[Any, Arguments, list[str]]:
    """The configuration after the tokens were fitted, and what was said."""
    arguments = Arguments(model_name_or_path=model, tokenizer_name=tokenizer, **settings)
    used = load_tokenizer(tokenizer or model, special_tokens=arguments.special_tokens)
    config, lines = load_config(arguments, used), []
    fit_config(config, arguments, len(used), 32, tokenizer=used, say=lines.append)
    return config, arguments, lines


def grown(kind: str, **settings: Any) -> Any:
    config, arguments, _ = fit(kind, special_tokens=NEW, **settings)
    return build_model(config, arguments)


def write_chats() -> dict[str, Any]:
    """Conversations whose turns begin with new tokens, and the settings to train on them."""
    turns = [
        [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}."}]
        for i in range(99)
    ]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    Path("chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("chats.jinja").write_text(
        "{% for turn in messages %}{{ '<|' + turn.role + '|>' + turn.content }}{% endfor %}"
    )
    return {
        "train_file": "chats.jsonl",
        "messages_column": "messages",
        "chat_template": "chats.jinja",
        "learning_rate": 1e-2,
        "dropout": None,
    }


def save_tokenizer(name: str, special_tokens: list[str]) -> None:
    train_tokenizer("byte", [], 0, special_tokens=special_tokens).save_pretrained(name)


# ------------------------------------------------------------------------------------ which rows


@each_kind
def test_each_new_row_is_the_mean_of_the_old_and_these_stay(kind: str, place: Path) -> None:
    before, random_state = load_file(f"{kind}/model.safetensors"), torch.get_rng_state()
    model = grown(kind)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in TABLES[kind]:
        table = model.get_parameter(name)
        assert table.shape == (260, 16) and table.requires_grad
        assert torch.equal(table[:257], before[name])
        torch.testing.assert_close(table[257:], before[name].mean(0).expand(3, -1))
    assert model.config.vocab_size == 260
    assert model.get_output_embeddings().out_features == 260
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == (kind == "gpt2")


def test_a_bias_of_the_head_grows_too(place: Path) -> None:
    from transformers import PhiConfig

    config = PhiConfig(vocab_size=257, **LLAMA_SIZES | {"num_key_value_heads": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained("phi")
    train_tokenizer("byte", [], 0).save_pretrained("phi")
    model = grown("phi")
    assert model.lm_head.bias.shape == (260,)
    assert model(torch.arange(250, 260)[None]).logits.shape == (1, 10, 260)


def test_what_is_new_is_said(place: Path) -> None:
    line = (
        "Tokens   3 new (<|user|>, <|assistant|>, <|tool|>): the embedding grows from 257 to 260"
        " rows, each new one the mean of the old"
    )
    assert fit("gpt2", special_tokens=NEW)[2] == [line]
    save_tokenizer("longer", NEW)
    assert fit("gpt2", "longer")[2] == [line]
    assert fit("gpt2")[2] == []
    assert fit("gpt2", special_tokens=["<|endoftext|>"])[2] == []


def test_rows_that_are_spare_are_taken_first(place: Path) -> None:
    config, _, lines = fit("roomy", special_tokens=NEW)
    assert config.vocab_size == 321
    assert lines == [
        "Tokens   3 new (<|user|>, <|assistant|>, <|tool|>) take rows 257 to 259, which the"
        " embedding of 321 has to spare"
    ]


def test_a_token_that_the_vocabulary_has_becomes_a_special_one(place: Path) -> None:
    config, _, lines = fit("gpt2", special_tokens=["a"])
    assert (config.vocab_size, lines) == (257, [])
    assert load_tokenizer("gpt2", special_tokens=["a"]).convert_ids_to_tokens(97) == "a"


def test_tokens_on_top_of_the_models_own_vocabulary_get_rows(place: Path) -> None:
    save_tokenizer("gpt2", ["<pad>"])  # a tokenizer that was saved with one more than the model
    config, _, lines = fit("gpt2")
    assert config.vocab_size == 258 and "1 new (<pad>)" in lines[0]


# ------------------------------------------------------------------------------------- wrong ids


def test_another_vocabulary_is_refused_where_it_is_larger(place: Path) -> None:
    train_tokenizer("char", [chr(i) for i in range(1000, 1400)], 0).save_pretrained("other")
    message = (
        "vocabulary of 402 tokens, but the model embeds only 257, and its ids mean something else:"
        " id 0 is '\u03e8', and '\u0100' in the model's tokenizer"
    )
    with pytest.raises(ModelError, match=message):
        fit("gpt2", "other")
    for file in Path("gpt2").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"402 tokens, but the model embeds only 257\. Use"):
        fit("gpt2", "other")


def test_a_vocabulary_that_is_no_tokens_more_is_refused(place: Path) -> None:
    arguments = Arguments(model_name_or_path="gpt2", special_tokens=NEW)
    used = load_tokenizer("gpt2", special_tokens=NEW)
    config = load_config(arguments, used)
    with pytest.raises(ModelError, match="vocabulary of 300 tokens, but the model embeds only 257"):
        fit_config(config, arguments, 300, 32, tokenizer=used)
    assert config.vocab_size == 257


def test_another_vocabulary_that_fits_is_warned_of(place: Path) -> None:
    train_tokenizer("char", ["abc"], 0).save_pretrained("other")
    (line,) = fit("gpt2", "other")[2]
    assert line.startswith("WARNING: the tokenizer other is not the model's: id 0 is 'a', and 'Ā'")


# ----------------------------------------------------------------------------------- whole runs


@each_kind
@pytest.mark.parametrize("changes", [{}, {"chunked_loss": True, "pad_vocab_to_multiple_of": 64}])
def test_a_run_trains_the_new_rows_and_leaves_a_plain_model(
    kind: str, changes: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_small(place, model_name_or_path=kind, **EXISTING | write_chats() | changes)
    assert "the embedding grows from 257 to 260 rows" in capsys.readouterr().out
    opened = AutoModelForCausalLM.from_pretrained(run / "final")
    first, last = (opened.get_parameter(name) for name in TABLES[kind])
    assert opened.config.vocab_size == 260 and first.shape == last.shape == (260, 16)
    tied = opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    assert tied == (kind == "gpt2")
    start = grown(kind)
    moved = (first - start.get_parameter(TABLES[kind][0])).abs().amax(1)
    assert moved[257] > 1e-3 and moved[258] > 1e-3  # these are in the data
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer(NEW[1]).input_ids == [258]
    assert {NEW[0], NEW[2]} <= {t.content for t in tokenizer.added_tokens_decoder.values()}


def test_the_tokens_are_part_of_the_data(place: Path) -> None:
    few = EXISTING | {"model_name_or_path": "gpt2", "max_steps": 1, "eval_steps": None}
    marks = []
    for name, tokens in (("none", []), ("some", NEW), ("more", [*NEW, "<|x|>"])):
        run = train_small(place, name, **few | {"special_tokens": tokens})
        noted = json.loads((run / "provenance.json").read_text())
        marks.append(noted["data_fingerprint"])
    assert len({*marks}) == 3


def test_a_grown_run_goes_on_bit_for_bit(place: Path) -> None:
    settings = EXISTING | {"model_name_or_path": "gpt2", "lr_scheduler_type": "constant"}
    whole = train_small(place, "whole", **settings)
    half = train_small(place, "half", **settings | {"max_steps": 2})
    train_small(place, "half", **settings)
    assert [line["train/loss"] for line in curve(half)] == [
        line["train/loss"] for line in curve(whole)
    ]
    assert weights(half) == weights(whole)


def test_the_identity_of_a_model_tells_how_large_it_has_grown(place: Path) -> None:
    marks = {model_fingerprint(grown("gpt2")), model_fingerprint(build_model(*fit("gpt2")[:2]))}
    assert len(marks) == 2


def test_a_dry_run_and_an_evaluation_build_the_same_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EXISTING | {"model_name_or_path": "llama", "dropout": None}
    train_small(place, "run", **settings)
    trained = capsys.readouterr().out
    count = next(line for line in trained.splitlines() if line.startswith("Model    llama"))
    train_small(place, "dry", dry_run=True, **settings)
    told = capsys.readouterr().out
    assert "the embedding grows from 257 to 260 rows" in told
    assert count.partition(" parameters")[0] in told
    train_small(place, "run", eval_only=True, validation_file="text.txt", **settings)
    assert "Evaluating run/checkpoints" in capsys.readouterr().out


def test_padding_goes_on_top(place: Path) -> None:
    config, arguments, _ = fit("gpt2", special_tokens=NEW, pad_vocab_to_multiple_of=64)
    model = build_model(config, arguments)
    (line,) = fit_vocab(model, arguments)
    assert line.startswith("Vocabulary 260 tokens, embedding padded to 320 rows")


# -------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"lora_modules_to_save": ["wte"]}),
        ("gpt2", {"merge_adapter": True}),
        ("llama", {"merge_adapter": True, "lora_modules_to_save": ["embed_tokens"]}),
    ],
)
def test_adapters_that_would_lose_the_new_rows_are_refused(
    kind: str, changes: dict[str, Any], place: Path
) -> None:
    message = r"--lora_rank 2 with 3 new tokens .*--lora_modules_to_save \((wte|embed_tokens) and l"
    with pytest.raises(ModelError, match=message):
        fit(kind, special_tokens=NEW, lora_rank=2, **changes)


@pytest.mark.parametrize(
    ("kind", "whole"), [("gpt2", ["wte"]), ("llama", ["embed_tokens", "lm_head"])]
)
def test_adapters_that_are_merged_keep_the_new_rows(
    kind: str, whole: list[str], place: Path
) -> None:
    settings = EXISTING | write_chats() | {"model_name_or_path": kind}
    adapters = {"lora_rank": 2, "lora_modules_to_save": whole, "merge_adapter": True}
    run = train_small(place, **settings | adapters)
    opened = AutoModelForCausalLM.from_pretrained(run / "final")
    table = opened.get_parameter(TABLES[kind][0])
    assert table.shape == (260, 16)
    moved = (table - grown(kind).get_parameter(TABLES[kind][0])).abs().amax(1)
    assert moved[257] > 1e-3 and moved[258] > 1e-3


def test_adapters_may_use_rows_that_are_spare(place: Path) -> None:
    assert fit("roomy", special_tokens=NEW, lora_rank=2)[0].vocab_size == 321
