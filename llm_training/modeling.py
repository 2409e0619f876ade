"""The model: loaded or made from a configuration, and fitted to the data and the device."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from arguments import Arguments, ModelArguments
from llm_training.chunked_loss import (
    is_worth_chunking,
    positions_per_chunk,
    why_not_chunked,
)
from llm_training.lora import adapters_of
from llm_training.new_tokens import fit_tokens, grow_embedding
from llm_training.parameter_patterns import frozen_base
from llm_training.pretrained import (
    ModelError,
    check_direction,
    check_weights,
    load_existing,
    read_config,
    stored_config,
)
from llm_training.vocab_padding import PaddedHead, pad_vocab, trained_shape, why_not_padded
from llm_training.zero_init import whole_models, whole_shape

# Probabilities that configurations name in many ways; those of heads we never train stay.
DROPOUT_FIELD = re.compile(r"^(?!classifier|summary|layer)\w*(dropout|pdrop)(_prob)?$")
DEFAULT_BLOCK_SIZE = 1024
# What new models are padded to by themselves: rows of 128 bytes in 16 bits, as tensor cores like.
# Of a smaller vocabulary the head takes too little of a step for it.
VOCAB_MULTIPLE = 64
LARGE_VOCAB = 16384

Say = Callable[[str], None]


def say_nothing(line: str) -> None:
    """For who does not care what is said."""


def load_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The model's configuration, before anything that depends on the data is known.

    Raises:
        ModelError: unknown type, unknown override, or a model that cannot be found.
    """
    if arguments.model_name_or_path is not None:
        config = read_config(arguments)
    else:
        config = _make_config(str(arguments.model_type), arguments.config_overrides)
        check_direction(config, f"--model_type {arguments.model_type}")
        if tokenizer is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
    if arguments.dropout is not None:
        _set_dropout(config, arguments.dropout)
    return config


def fit_config(
    config: PretrainedConfig,
    arguments: ModelArguments,
    vocab_size: int,
    block_size: int | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Say = say_nothing,
) -> int:
    """Fits a model's vocabulary and positions to the data: a new one's, or an existing one's.

    Args:
        tokenizer: of the data; an existing model gets rows for the tokens that it adds to its own.
        say: takes lines that tell how an existing model's tokens fit.

    Returns:
        The block size: as asked for, or the model's longest row up to 1024 tokens.

    Raises:
        ModelError: the vocabulary or the rows are too large for the model.
    """
    if arguments.model_type is not None:
        if "vocab_size" not in arguments.config_overrides:
            config.vocab_size = vocab_size
        is_chosen = {"n_positions", "max_position_embeddings"} & set(arguments.config_overrides)
        if hasattr(config, "max_position_embeddings") and not is_chosen:
            config.max_position_embeddings = block_size or DEFAULT_BLOCK_SIZE
    if arguments.model_name_or_path is not None:
        for line in fit_tokens(config, arguments, tokenizer, vocab_size):
            say(line)
    elif config.vocab_size < vocab_size:
        raise ModelError(
            f"The data uses a vocabulary of {vocab_size} tokens, but the model embeds only"
            f" {config.vocab_size}: leave vocab_size out of --config_overrides, or make it larger."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if block_size is None:
        return min(positions or DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE)
    if positions is not None and block_size > positions:
        raise ModelError(
            f"--block_size {block_size} is longer than the model's {positions} positions."
            f" Use --block_size {positions} or less, or a model with more positions."
        )
    return block_size


def check_existing(config: PretrainedConfig, arguments: ModelArguments) -> list[str]:
    """`check_weights` of an existing model whose files are at hand; fetches and builds nothing."""
    if arguments.model_name_or_path is None:
        return []
    return check_weights(config, arguments, fetch=False)


def build_model(
    config: PretrainedConfig,
    arguments: Arguments,
    *,
    tp_size: int = 1,
    device_type: str = "cpu",
    say: Say = say_nothing,
) -> PreTrainedModel:
    """The model in float32 (the master weights), in training mode.

    Call it with the same random seed on every rank: not every backend sends rank 0's weights on.

    Args:
        config: an existing model gets the vocabulary that it tells, if that has grown.
        tp_size: ranks that hold the model between them, by the plan that its architecture brings.
        device_type: of the run.
        say: takes lines that tell what of existing files is not used.

    Raises:
        ModelError: the weights cannot be loaded or are not all there, the attention kernel is not
            to be had, or the model cannot be split over `tp_size` ranks.
    """
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    try:
        if arguments.model_name_or_path is None:
            with whole_models():
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=arguments.trust_remote_code, **kwargs
                )
        else:
            model = _load_grown(config, arguments, device_type, say, kwargs)
    except ModelError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise ModelError(_why_not_made(arguments, error)) from error
    if tp_size > 1:
        model = _split_matrices(model, tp_size)
    if arguments.gradient_checkpointing:
        # The reentrant form, and the one that sharding backends bring, lose the dropout masks.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def fit_vocab(model: PreTrainedModel, arguments: Arguments, *, tp_size: int = 1) -> list[str]:
    """Pads embedding and head as asked for, or by itself for new models with many tokens.

    It depends on the model alone and not on the device, so that checkpoints can go elsewhere.

    Args:
        tp_size: ranks that hold the model between them; a head that they share is not padded.

    Returns:
        What the log says of it.

    Raises:
        ModelError: it was asked for and cannot be.
    """
    vocab_size = model.config.get_text_config().vocab_size
    multiple = asked = arguments.pad_vocab_to_multiple_of
    if multiple is None:
        is_large = arguments.model_type is not None and vocab_size >= LARGE_VOCAB
        multiple = VOCAB_MULTIPLE if is_large else 1
    num_rows = -(-vocab_size // multiple) * multiple
    if num_rows == vocab_size:
        return []
    reason = f"{tp_size} ranks share the head (tensor parallelism)" if tp_size > 1 else None
    reason = reason or why_not_padded(model) or why_not_chunked(model)
    if reason and asked:
        raise ModelError(
            f"--pad_vocab_to_multiple_of {asked}: {reason}. Leave it out, or use another model."
        )
    if reason:
        return [f"Vocabulary {vocab_size:,} tokens, not padded: {reason}"]
    pad_vocab(model, num_rows)
    return [
        f"Vocabulary {vocab_size:,} tokens, embedding padded to {num_rows:,} rows (a multiple of"
        f" {multiple})"
    ]


def choose_chunked_loss(
    model: PreTrainedModel,
    asked: bool | None,
    *,
    num_positions: int,
    device_type: str,
    tp_size: int = 1,
) -> tuple[bool, list[str]]:
    """Whether the loss is computed for a chunk of positions at a time, and what to say of it.

    Args:
        asked: `--chunked_loss`.
        num_positions: in the largest micro-batch of one rank.
        device_type: where it is computed.
        tp_size: ranks that hold the model between them.

    Raises:
        ModelError: it was asked for and cannot be.
    """
    vocab_size = model.config.get_text_config().vocab_size
    is_worth_it = is_worth_chunking(num_positions, vocab_size, device_type)
    if asked is False or (asked is None and not is_worth_it):
        return False, []
    reason = f"{tp_size} ranks share the head (tensor parallelism)" if tp_size > 1 else None
    reason = reason or why_not_chunked(model)
    if reason and asked:
        raise ModelError(f"--chunked_loss true: {reason}. Leave it out, or use another model.")
    places = f"{num_positions:,} positions x {vocab_size:,} tokens"
    if reason:
        return False, [f"Logits   {places}, all at once: {reason}"]
    chunk_size = min(num_positions, positions_per_chunk(vocab_size, device_type))
    return True, [f"Logits   {places}, of {chunk_size:,} positions at a time"]


def check_row_split(model: PreTrainedModel, block_size: int, cp_size: int) -> None:
    """Makes sure that `cp_size` ranks can share the positions of a row (context parallelism).

    Raises:
        ModelError: the rows do not divide, or attention is computed in a way that cannot be split.
    """
    if cp_size == 1:
        return
    if block_size % (2 * cp_size):
        raise ModelError(
            f"--block_size {block_size} cannot be shared by {cp_size} ranks: each takes a part from"
            f" both ends of a row. Give a multiple of {2 * cp_size}."
        )
    kernel = model.config._attn_implementation
    if kernel != "sdpa":
        raise ModelError(
            f"--attn_implementation {kernel}: rows shared by {cp_size} ranks need sdpa."
        )
    # Accelerate takes away the masks of modules with this name; others would keep theirs.
    if not any(name.endswith("self_attn") for name, _ in model.named_modules()):
        raise ModelError(
            f"Rows cannot be shared by ranks in {model.config.model_type}: Accelerate knows the"
            " attention of llama, qwen3 and the like. Use one of these, or another file of"
            " accelerate_configs/."
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters, all and those outside of embedding tables; tied ones count once.

    Those that are not trained count too, rows that only pad the vocabulary do not.
    """
    embedded = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    sizes = {id(p): trained_shape(p).numel() for p in model.parameters()}
    return sum(sizes.values()), sum(size for key, size in sizes.items() if key not in embedded)


def count_trained(model: nn.Module) -> int:
    """Parameters that are trained: all, those not frozen, or those of adapters and their like."""
    return sum(trained_shape(p).numel() for p in model.parameters() if p.requires_grad)


def model_fingerprint(model: nn.Module) -> str:
    """The model's size, a hash over the names, shapes and types of its weights, and its padding.

    With adapters or frozen parameters also which weights are trained, and a checksum of the files
    from which the others come.
    """
    shapes = {name: whole_shape(p) for name, p in model.named_parameters()}
    # Weights are built in float32; ZeRO-3 may hold parts of them in another type.
    layout = [(name, list(shape), "torch.float32") for name, shape in shapes.items()]
    adapters, frozen = adapters_of(model), frozen_base(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if adapters is not None or frozen is not None:
        layout += [(name, [], "trained") for name in trained]
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:12]
    size = f"{sum(shape.numel() for shape in shapes.values()):,} parameters ({digest})"
    heads = [module for module in model.modules() if isinstance(module, PaddedHead)]
    padding = [
        f", {head.num_tokens:,} tokens in {head.out_features:,} rows (pad_vocab_to_multiple_of)"
        for head in heads
        if head.num_tokens < head.out_features
    ]
    base = "" if adapters is None else f", adapters for the base weights {adapters.base_mark}"
    if frozen is not None:
        base = f", {sum(shapes[name].numel() for name in trained):,} of them trained"
        base += f", the others of the base weights {frozen}" if frozen else ""
    return size + "".join(padding) + base


def _load_grown(
    config: PretrainedConfig,
    arguments: Arguments,
    device_type: str,
    say: Say,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """The model of the files, with rows for all tokens of `config`."""
    stored = stored_config(config, arguments)
    for line in check_weights(stored, arguments):
        say(line)
    model = load_existing(stored, arguments, device_type=device_type, **kwargs)
    if config.get_text_config().vocab_size != stored.get_text_config().vocab_size:
        grow_embedding(model, config.get_text_config().vocab_size)
    return model


def _why_not_made(arguments: Arguments, error: Exception) -> str:
    source = arguments.model_name_or_path or f"a {arguments.model_type} configuration"
    kernel, told = arguments.attn_implementation, " ".join(str(error).split())
    if kernel is not None and "attention" in told.lower():
        return (
            f"--attn_implementation {kernel} is not to be had for {source}: {told} Install what it"
            " needs, or give sdpa, eager, or null for the best that is there."
        )
    return f"No model could be made from {source}: {told}"


def _split_matrices(model: PreTrainedModel, tp_size: int) -> PreTrainedModel:
    """Cuts the weights that the model's own plan names; every rank keeps its part."""
    if not model.tp_plan:
        raise ModelError(
            f"Tensor parallelism over {tp_size} ranks: transformers has no plan for"
            f" {model.config.model_type}. Use a model that has one (llama, qwen3, mistral, ...), or"
            " another file of accelerate_configs/."
        )
    if model.config.tie_word_embeddings:
        raise ModelError(
            f"Tensor parallelism over {tp_size} ranks: transformers cannot split a head that is"
            " tied to the embedding. For a new model give tie_word_embeddings=false in"
            " --config_overrides; else use another file of accelerate_configs/."
        )
    asked = DistributedConfig(tp_size=tp_size, tp_plan="auto")
    try:
        config, _, mesh = model.prepare_distribute_model(asked)
        return model.maybe_distribute_model(model, config, mesh)
    except ValueError as error:
        raise ModelError(f"The model cannot be split over {tp_size} ranks: {error}") from error


def _make_config(model_type: str, overrides: dict[str, Any]) -> PretrainedConfig:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        close = difflib.get_close_matches(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 3)
        raise ModelError(
            f"--model_type {model_type} is no causal language model of transformers."
            + (f" Did you mean {' or '.join(close)}?" if close else " Try gpt2, llama or qwen3.")
        )
    config = AutoConfig.for_model(model_type)
    known = sorted({*config.to_dict(), *config.attribute_map})
    unknown = [name for name in overrides if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 3)
        raise ModelError(
            f"config_overrides: a {model_type} configuration has no {', '.join(unknown)}."
            f" {'Closest: ' if close else 'Known: '}{', '.join(close or known)}."
        )
    try:
        return AutoConfig.for_model(model_type, **overrides)
    except Exception as error:  # configurations check their values in many ways
        raise ModelError(
            f"config_overrides {overrides} do not fit {model_type}: {error}"
        ) from error


def _set_dropout(config: PretrainedConfig, probability: float) -> None:
    names = [n for n in config.to_dict() if DROPOUT_FIELD.match(n)]
    if not names and probability > 0:
        raise ModelError(
            f"--dropout {probability}: the configuration of {config.model_type} has no dropout."
            " Leave it out."
        )
    for name in names:
        setattr(config, name, probability)
