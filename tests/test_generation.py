"""A sample begins with its prompt, repeats with its seed, and disturbs nothing."""

import pytest
import torch
from pytest import MonkeyPatch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.generation import generate_sample


@pytest.fixture(scope="module")
def parts() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    tokenizer = train_tokenizer("byte", ["abc"], 300)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=len(tokenizer), n_positions=32,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, resid_pdrop=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train(), tokenizer


def sample(parts: tuple, prompt: str = "def f", **changes: float) -> str:
    settings = {"max_new_tokens": 10, "temperature": 1.0, "seed": 1} | changes
    return generate_sample(*parts, prompt, **settings)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_sample(parts: tuple) -> None:
    assert sample(parts).startswith("def f")
    assert sample(parts) == sample(parts) != sample(parts, seed=2)


def test_temperature_zero_rolls_no_dice(parts: tuple) -> None:
    assert sample(parts, temperature=0.0) == sample(parts, temperature=0.0, seed=2)


def test_the_temperature_counts_and_not_the_models_own_settings(parts: tuple) -> None:
    settings = parts[0].generation_config
    try:
        settings.update(do_sample=True, temperature=5.0)
        assert sample(parts, temperature=0.0) == sample(parts, temperature=0.0, seed=2)
    finally:
        settings.update(do_sample=None, temperature=None)


def test_random_state_and_mode_are_left_alone(parts: tuple) -> None:
    before = torch.get_rng_state()
    sample(parts)
    assert torch.equal(torch.get_rng_state(), before)
    assert parts[0].training


def test_it_ends_where_the_positions_end(parts: tuple) -> None:
    text = sample(parts, prompt="x" * 100, max_new_tokens=500, temperature=0.0)
    assert text.startswith("x" * 31)
    assert len(parts[1](text).input_ids) <= 32 * 3  # bytes that are no UTF-8 decode to three


def test_some_models_have_no_end_of_positions(parts: tuple, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(parts[0].config, "n_positions", -1)
    assert sample(parts, prompt="def f(x):", temperature=0.0).startswith("def f(x):")
