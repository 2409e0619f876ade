"""The data of a run: prepared, and handed out step by step to this rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from arguments import Arguments, BatchSizes, holds_conversations, mixture_sources
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.causality import brings_its_code, check_causality
from llm_training.data import PreparedData, prepare_data
from llm_training.data.documents.chat_templates import end_of_turn
from llm_training.data.rows.ahead import Windows, prepare_for_device
from llm_training.data.rows.store_rows import Rows
from llm_training.data.rows.windows import (
    TrainingWindows,
    validation_rows,
    validation_set_rows,
)
from llm_training.data.tokens.token_bytes import bytes_per_token
from llm_training.document_mask import check_document_mask
from llm_training.evaluation_checks import own_name
from llm_training.generation import add_end_token
from llm_training.metrics import MetricError, check_metrics
from llm_training.modeling import fit_config, load_config
from llm_training.planning import Plan
from llm_training.ranks import data_parallel, local_main_first
from llm_training.state import TrainState
from llm_training.streams import TrainingStream, streamed_validation
from llm_training.vocab_padding import num_tokens_of


def build_data(
    arguments: Arguments, accelerator: Accelerator, check: Callable[[], None] = lambda: None
) -> tuple[PreparedData, PretrainedConfig, int]:
    """The tokenized data, the model's configuration fitted to it, and the tokens in a row.

    Args:
        check: called every few seconds meanwhile; what it raises ends the work.
    """

    def say(line: str) -> None:
        check()
        accelerator.print(line)

    def prepare() -> PreparedData:
        return prepare_data(arguments, tokenizer_source=arguments.model_name_or_path, say=say)

    data = local_main_first(accelerator, prepare)
    check()
    config = load_config(arguments, data.tokenizer)
    block_size = fit_config(
        config,
        arguments,
        data.vocab_size,
        arguments.block_size,
        tokenizer=data.tokenizer,
        say=say,
    )
    return data, config, block_size


def build_validation(
    arguments: Arguments,
    accelerator: Accelerator,
    data: PreparedData,
    block_size: int,
    batch: BatchSizes,
) -> dict[str, Rows]:
    """The rows that the model is judged on, where it is, by the name of their set; "": the main.

    Raises:
        MetricError: one that is to be computed on them cannot be.
    """
    if arguments.eval_steps is None and not arguments.eval_only:
        return {}
    check_metric_for_best_model(arguments, check_metrics(arguments.eval_metrics))
    rows = validation_rows(data, arguments, block_size)
    if rows is None and arguments.streaming:
        num_rows = (arguments.eval_max_batches or 1) * batch.global_batch
        rows = streamed_validation(arguments, accelerator, data, block_size, num_rows)
    main = {} if rows is None else {"": rows}
    return main | validation_set_rows(data, arguments, block_size)


def check_metric_for_best_model(arguments: Arguments, names: Sequence[str]) -> None:
    """Makes sure that the metric to go by is among those that are computed on each set.

    Args:
        names: what the metrics of --eval_metrics call their results.

    Raises:
        MetricError: it is not.
    """
    if own_name(arguments) not in ("loss", *names):
        raise MetricError(
            f"--metric_for_best_model {arguments.metric_for_best_model} will not be there: what is"
            f" measured is called {', '.join(('loss', *names))}. Go by one of these, as"
            " eval/NAME, or of a set eval/SET/NAME."
        )


def end_at_turns(arguments: Arguments, data: PreparedData, model: PreTrainedModel) -> None:
    """Lets a model that is trained on conversations end at what ends an answer in them.

    Many tokenizers have another token for that than for the end of a text.
    """
    if data.tokenizer is not None and any(
        map(holds_conversations, mixture_sources(arguments).values())
    ):
        add_end_token(model, data.tokenizer, end_of_turn(data.tokenizer))


def build_token_bytes(arguments: Arguments, data: PreparedData) -> NDArray[np.int32] | None:
    """The bytes of each token, (V,), where what is measured needs them and a tokenizer tells."""
    if data.tokenizer is None or "bits_per_byte" not in arguments.eval_metrics:
        return None
    return bytes_per_token(data.tokenizer)


def build_windows(
    arguments: Arguments,
    accelerator: Accelerator,
    data: PreparedData,
    plan: Plan,
    state: TrainState,
) -> tuple[Windows, str]:
    """This rank's share of every step, and what marks the data that it is of."""
    if plan.rows is None:
        stream = TrainingStream(
            arguments, accelerator, data, plan.block_size, seed=state.seed, state=state
        )
        streamed = stream.windows(plan.batch, plan.num_samples)
        return prepare_for_device(streamed, accelerator.device), stream.fingerprint[:12]
    rank, num_ranks = data_parallel(accelerator)
    windows = TrainingWindows(
        rows=plan.rows,
        seed=state.seed,
        num_samples=plan.num_samples,
        micro_batch_size=plan.batch.per_device,
        num_micro_batches=plan.batch.accumulation,
        rank=rank,
        num_ranks=num_ranks,
    )
    mark = " ".join([data.fingerprint[:12], *plan.rows.marks])
    return prepare_for_device(windows, accelerator.device), mark


def try_attention(
    accelerator: Accelerator,
    model: nn.Module,
    network: CausalLMWithLoss,
    windows: Windows,
    plan: Plan,
) -> None:
    """Makes sure that no token sees what it must not: what comes later, or another document.

    Raises:
        ModelError: code that came with the model lets it look ahead.
        DocumentMaskError: documents that are to be apart see each other.
    """
    shape = {
        "batch_size": plan.batch.per_device,
        "block_size": plan.block_size,
        "vocab_size": num_tokens_of(network.model),
    }
    if brings_its_code(network.model):
        check_causality(accelerator, model, **shape)
    if windows.document_mask:
        kernel = network.config._attn_implementation
        check_document_mask(accelerator, model, **shape, kernel=kernel)
