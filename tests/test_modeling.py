"""Models are made as asked for, fitted to the data, or refused with the reason."""

from pathlib import Path

import pytest
import torch

from arguments import Arguments, ModelArguments
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.losses import row_losses, shift_labels, token_loss_sum
from llm_training.modeling import (
    ModelError,
    build_model,
    check_row_split,
    count_parameters,
    fit_config,
    load_config,
    model_fingerprint,
)

TINY = {"n_layer": 2, "n_embd": 16, "n_head": 2}
TINY_LLAMA = {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def make(model_type: str = "gpt2", vocab_size: int = 50, block_size: int | None = 8, **changes):
    overrides = {"gpt2": TINY, "llama": TINY_LLAMA}[model_type]
    arguments = Arguments(model_type=model_type, config_overrides=overrides, **changes)
    config = load_config(arguments, None)
    block_size = fit_config(config, arguments, vocab_size, block_size)
    torch.manual_seed(0)
    return build_model(config, arguments), block_size


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_new_model_is_as_large_as_the_data_needs(model_type: str) -> None:
    model, block_size = make(model_type)
    assert block_size == 8
    assert model.config.vocab_size == 50
    assert model.config.max_position_embeddings == 8
    assert model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_models_without_a_longest_row_get_none() -> None:
    overrides = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    arguments = ModelArguments(model_type="mamba", config_overrides=overrides)
    config = load_config(arguments, None)
    assert fit_config(config, arguments, 50, None) == 1024
    assert fit_config(config, arguments, 50, 4096) == 4096
    assert "max_position_embeddings" not in config.to_dict()


def test_parameters_are_counted_once_where_tied() -> None:
    model, _ = make()
    total, outside = count_parameters(model)
    assert total == sum(p.numel() for p in model.parameters())
    assert total - outside == 50 * 16 + 8 * 16


def test_dropout_reaches_every_kind() -> None:
    model, _ = make(dropout=0.3)
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.3}
    assert model.config.attn_pdrop == 0.3
    llama, _ = make("llama", dropout=0.2)
    assert llama.config.attention_dropout == 0.2
    bloom = load_config(ModelArguments(model_type="bloom", dropout=0.1), None)
    assert bloom.attention_dropout == bloom.hidden_dropout == 0.1


def test_activations_are_computed_again_where_asked_for() -> None:
    assert make(gradient_checkpointing=True)[0].is_gradient_checkpointing
    assert not make()[0].is_gradient_checkpointing


def test_the_wrapper_returns_the_summed_loss() -> None:
    model, _ = make(dropout=0.0)
    ids = torch.arange(16).view(2, 8)
    loss, nothing = CausalLMWithLoss(model)(ids, ids)
    assert torch.equal(loss, token_loss_sum(model(ids).logits, shift_labels(ids)))
    assert nothing is None


def test_the_wrapper_judges_rows_and_tells_the_likeliest_tokens() -> None:
    model, _ = make(dropout=0.0)
    ids = torch.arange(16).view(2, 8)
    logits = model(ids).logits
    losses, guesses = CausalLMWithLoss(model)(ids, ids, per_row=True, with_guesses=True)
    assert torch.equal(losses, row_losses(logits, shift_labels(ids)))
    assert torch.equal(guesses, logits.argmax(-1))
    losses, nothing = CausalLMWithLoss(model)(ids, next_tokens=ids, per_row=True)
    assert torch.equal(losses, row_losses(logits, ids))
    assert nothing is None


def test_equal_models_have_equal_fingerprints() -> None:
    assert model_fingerprint(make()[0]) == model_fingerprint(make()[0])
    assert model_fingerprint(make()[0]) != model_fingerprint(make(vocab_size=51)[0])


def test_weights_from_a_folder_are_kept(tmp_path: Path) -> None:
    model, _ = make()
    model.save_pretrained(tmp_path)
    arguments = Arguments(model_name_or_path=str(tmp_path))
    config = load_config(arguments, None)
    assert fit_config(config, arguments, 50, None) == 8
    loaded = build_model(config, arguments)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    with pytest.raises(ModelError, match="vocabulary of 51 tokens, but the model embeds only 50"):
        fit_config(config, arguments, 51, 8)
    with pytest.raises(ModelError, match="--block_size 9 is longer than the model's 8 positions"):
        fit_config(config, arguments, 50, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ModelArguments(model_type="gtp2"), "Did you mean gpt2"),
        (
            ModelArguments(model_type="gpt2", config_overrides={"n_layers": 2}),
            "a gpt2 configuration has no n_layers. Closest: n_layer",
        ),
        (ModelArguments(model_name_or_path="/nowhere/at/all"), "has no model that transformers"),
        (ModelArguments(model_type="mamba", dropout=0.1), "has no dropout"),
    ],
)
def test_what_cannot_be_had_is_refused(arguments: ModelArguments, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_config(arguments, None)


def test_a_model_that_its_own_code_refuses_is_told() -> None:
    arguments = Arguments(model_type="gpt2", config_overrides=TINY | {"n_head": 3})
    with pytest.raises(ModelError, match="No model could be made from a gpt2 configuration"):
        build_model(load_config(arguments, None), arguments)


def test_rows_are_shared_by_ranks_only_where_attention_can_be_split() -> None:
    llama, _ = make("llama")
    check_row_split(llama, 60, 1)
    check_row_split(llama, 64, 4)
    with pytest.raises(ModelError, match=r"--block_size 60 .* multiple of 8"):
        check_row_split(llama, 60, 4)
    eager, _ = make("llama", attn_implementation="eager")
    with pytest.raises(ModelError, match=r"--attn_implementation eager: .* need sdpa"):
        check_row_split(eager, 64, 2)
    with pytest.raises(ModelError, match="cannot be shared by ranks in gpt2"):
        check_row_split(make("gpt2")[0], 64, 2)


def test_a_model_without_a_plan_is_not_split() -> None:
    arguments = Arguments(model_type="gpt2", config_overrides=TINY)
    with pytest.raises(ModelError, match="transformers has no plan for gpt2"):
        build_model(load_config(arguments, None), arguments, tp_size=2)


def test_a_model_with_a_tied_head_is_not_split() -> None:
    overrides = TINY_LLAMA | {"tie_word_embeddings": True}
    arguments = Arguments(model_type="llama", config_overrides=overrides)
    with pytest.raises(ModelError, match=r"tied to the embedding.* tie_word_embeddings=false"):
        build_model(load_config(arguments, None), arguments, tp_size=2)
