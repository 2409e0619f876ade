"""Models that exist already: read from a folder or the hub, whole and exactly, or refused.

Before a weight is read, loading is rehearsed: transformers loads tensors without content, of the
names and shapes that the files' headers tell. So what is missing or of another shape is known on
every rank alike, for every backend, within seconds: ZeRO-3, which loads in parts, would not say.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import extract_commit_hash, get_checkpoint_shard_files

from arguments import Arguments, ModelArguments
from llm_training.frozen_dtype import loading_options
from llm_training.zero_init import whole_models

# Files of weights that Python unpickles, which runs whatever they hold.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.distcp", "*.msgpack", "*.h5")
# Kinds whose attention looks to both sides, unless their configuration makes decoders of them: of
# what is still to come, they would be told. tests/test_pretrained.py measures which they are.
TWO_SIDED = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
)
NUM_SHOWN = 4


class ModelError(ValueError):
    """The model asked for cannot be had; the message says why and what to do."""


def read_config(arguments: ModelArguments) -> PretrainedConfig:
    """The configuration of `model_name_or_path`, which must be that of a causal language model.

    Raises:
        ModelError: there is none, it needs code that may not run, or it is of another model.
    """
    name = str(arguments.model_name_or_path)
    try:
        commit = _commit_of(name, arguments.model_revision)
        source = _source(arguments) | ({} if commit is None else {"revision": commit})
        config: PretrainedConfig = AutoConfig.from_pretrained(name, **source)
    except Exception as error:  # code that comes along raises whatever it likes
        raise _cannot_read(arguments, error) from error
    _check_kind(config, name)
    for own in (config, config.get_text_config()):
        own._commit_hash = commit  # it is not written with the configuration
    return config


def open_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer that `model_name_or_path` brings; None where it brings none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(arguments.model_name_or_path), **_source(arguments)
        )
    except Exception:  # it raises whatever its parts raise, also where there are no files
        return None
    # A folder with a model's config.json alone gives one without a vocabulary.
    is_empty = tokenizer.is_fast and tokenizer.backend_tokenizer.get_vocab_size(False) == 0
    return None if is_empty else tokenizer


def check_direction(config: PretrainedConfig, source: str) -> None:
    """Refuses a model whose attention looks to both sides.

    Args:
        source: what named it, for the message.

    Raises:
        ModelError: it is such a model.
    """
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in TWO_SIDED and not is_decoder:
        raise ModelError(
            f"{source} is no causal language model: the attention of {config.model_type} looks to"
            " both sides, so each position would see the token that it is to predict. Use a model"
            " that is made to continue text (gpt2, llama, qwen3, mistral, ...)."
        )


def check_weights(
    config: PretrainedConfig, arguments: ModelArguments, *, fetch: bool = True
) -> list[str]:
    """Makes sure that the files hold exactly the weights of the model, without reading one.

    Args:
        config: as `read_config` gave it: the vocabulary is that of the files.
        fetch: whether files of a hub id may be fetched; if not, those not at hand are let be.

    Returns:
        What the log says of weights in the files that are not of the language model.

    Raises:
        ModelError: weights are missing, have other shapes, or the files hold more of the model.
    """
    name = str(arguments.model_name_or_path)
    try:
        files = _weight_files(name, config, arguments, fetch=fetch)
        if files is None:
            return [f"Weights  of {name} are not here yet, so they were not looked at"]
        held = _outlines(files)
        with whole_models(), quiet_loading():
            model, info = _rehearse(config, held, arguments)
    except ModelError:
        raise
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The weights of --model_name_or_path {name} cannot be read: {_one_line(error)} Copy or"
            " fetch the files again."
        ) from error
    except (ImportError, ValueError, RuntimeError) as error:
        raise ModelError(f"No model could be made from {name}: {_one_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ModelError(_what_is_missing(name, config, model, info))
    return _say_unused(name, config, model, info["unexpected_keys"])


def load_existing(
    config: PretrainedConfig, arguments: Arguments, *, device_type: str, **kwargs: Any
) -> PreTrainedModel:
    """The model with the weights of the files; `check_weights` must have had no objection.

    Args:
        config: its vocabulary is that of the files.
        kwargs: for `from_pretrained`: type of the weights, attention kernel.

    Raises:
        OSError, ImportError, ValueError: from transformers, as it could not be made.
    """
    kwargs |= _source(arguments, config) | loading_options(arguments, device_type)
    with quiet_loading():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(arguments.model_name_or_path), config=config, use_safetensors=True, **kwargs
        )
    return model


def stored_config(config: PretrainedConfig, arguments: ModelArguments) -> PretrainedConfig:
    """`config` with the vocabulary that the files have, whatever it has grown to since."""
    stored = AutoConfig.from_pretrained(
        str(arguments.model_name_or_path), **_source(arguments, config)
    ).get_text_config()
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = stored.vocab_size
    return config


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps back transformers' table of weights: what it holds is refused here, or said.

    So it does with its remarks on a plan for tensor parallelism, by which nothing is loaded here.
    """
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(_is_of_use)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage() and "tensor_parallel" not in record.name


def _commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub id stands for now; None for a local folder."""
    if Path(name).is_dir():
        return None
    path = cached_file(
        name, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    commit: str | None = extract_commit_hash(path, None)
    return commit


def _source(arguments: ModelArguments, config: PretrainedConfig | None = None) -> dict[str, Any]:
    """Which state of the hub is meant, and whether code that comes along may run.

    With its configuration the rest comes from the very same commit, though a branch may move.
    """
    commit = getattr(config, "_commit_hash", None)
    revision = commit or arguments.model_revision
    words: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    return words if revision is None else words | {"revision": revision}


def _cannot_read(arguments: ModelArguments, error: Exception) -> ModelError:
    name, revision = str(arguments.model_name_or_path), arguments.model_revision
    told = _one_line(error)
    if not arguments.trust_remote_code and "trust_remote_code" in told:
        return ModelError(
            f"--model_name_or_path {name} needs Python code that it brings along, and such code may"
            " do anything on this machine. Read it; then allow it with --trust_remote_code"
            + ("." if Path(name).is_dir() else ", and name its commit in --model_revision.")
        )
    wish = f"--model_name_or_path {name}"
    if revision is not None:
        wish += f" at --model_revision {revision}"
    advice = "Give a local folder with a config.json and weights, or a hub id while the hub is"
    advice += " reachable" + (", and a branch, tag or commit that it has." if revision else ".")
    return ModelError(f"{wish} has no model that transformers can read: {told} {advice}")


def _check_kind(config: PretrainedConfig, name: str) -> None:
    source = f"--model_name_or_path {name}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source} is no causal language model: {config.model_type} has an encoder that reads"
            " the text and a decoder that answers it, and here a text is continued. Use a model"
            " that is made for that (gpt2, llama, qwen3, mistral, ...)."
        )
    check_direction(config, source)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"{source} holds quantized weights ({method}), which cannot be trained on. Name the"
            " model that they were made from; --frozen_dtype nf4 holds it in 4 bits meanwhile."
        )


# ------------------------------------------------------------------------------ what files hold


def _weight_files(
    name: str, config: PretrainedConfig, arguments: ModelArguments, *, fetch: bool
) -> list[str] | None:
    """The safetensors files that transformers would load; None where they must not be fetched."""
    where = {"revision": _source(arguments, config).get("revision"), "local_files_only": not fetch}
    folder = Path(name)
    if folder.is_dir():
        _refuse_strange_files(folder)
    elif cached_file(
        name,
        ADAPTER_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    ):
        raise ModelError(_is_adapter(name))
    named = getattr(config, "transformers_weights", None)
    for candidate in [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        found = cached_file(
            name,
            candidate,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=fetch,
            **where,
        )
        if found and found.endswith(".index.json"):
            return list(get_checkpoint_shard_files(name, found, **where)[0])
        if found:
            return [found]
    if not fetch and not folder.is_dir():
        return None
    raise ModelError(_no_safetensors(name))


def _refuse_strange_files(folder: Path) -> None:
    """Files beside a model's that would make transformers load something else."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ModelError(_is_adapter(str(folder)))
    if any(folder.glob("shard-*-model-*.safetensors")) or any(folder.glob("*.distcp")):
        raise ModelError(
            f"--model_name_or_path {folder} is a distributed checkpoint, a part for each rank. Load"
            " it where it was made, and save it whole with save_pretrained."
        )


def _is_adapter(name: str) -> str:
    return (
        f"--model_name_or_path {name} has an {ADAPTER_CONFIG_NAME}, so it is an adapter, or a model"
        " with one beside it. Make one model of the two (merge_adapter in the run that made it, or"
        " peft's merge_and_unload), and name that."
    )


def _no_safetensors(name: str) -> str:
    folder = Path(name)
    files = sorted({path.name for kind in PICKLED for path in folder.glob(kind)})
    if folder.is_dir() and not files:
        return (
            f"--model_name_or_path {name} has no weights: there is no {SAFE_WEIGHTS_NAME} beside"
            " its config.json. For an untrained model give --model_type in its place."
        )
    what = f", but files that would need unpickling ({_first(files)})"
    if not files:
        what = ", neither on the hub nor in its local cache. Others would need unpickling"
    return (
        f"--model_name_or_path {name} has no {SAFE_WEIGHTS_NAME}{what}: to open such a file"
        " may run any code. Convert it once, on a machine that may: python -c 'from transformers"
        f' import AutoModelForCausalLM as M, AutoTokenizer as T; M.from_pretrained("{name}")'
        f'.save_pretrained("safe"); T.from_pretrained("{name}").save_pretrained("safe")\', and name'
        " the folder safe."
    )


def _outlines(files: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of the files without content; of each only the header is read."""
    held = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no dictionary
                shape = opened.get_slice(key).get_shape()
                held[key] = torch.empty(shape, device="meta")
    return held


def _rehearse(
    config: PretrainedConfig, held: dict[str, torch.Tensor], arguments: ModelArguments
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads `held` into the model of `config`, all without content; returns what did not fit."""
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=arguments.trust_remote_code
        )
    found: tuple[PreTrainedModel, dict[str, Any]] = type(plain).from_pretrained(
        None,
        config=plain.config,
        state_dict=held,
        device_map={"": torch.device("meta")},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return found


def _what_is_missing(
    name: str, config: PretrainedConfig, model: PreTrainedModel, info: dict[str, Any]
) -> str:
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"{len(missing)} are missing ({_first(missing)})")
    if mismatched:
        shapes = [
            f"{key}: {_shape(in_file)} there, {_shape(in_model)} in the model"
            for key, in_file, in_model in mismatched
        ]
        faults.append(f"{len(mismatched)} have another shape ({_first(shapes)})")
    return (
        f"The files of --model_name_or_path {name} do not hold the weights of the model that its"
        f" config.json describes: {' and '.join(faults)}. They would begin at random."
        f"{_saved_as(config, model)} Name a folder whose files belong together."
    )


def _say_unused(
    name: str, config: PretrainedConfig, model: PreTrainedModel, unexpected: Iterable[str]
) -> list[str]:
    """What is said of weights that the model does not have.

    Those beside it, such as the head of a classifier or a part that sees images, are left out, and
    the language model is what the file says. Those inside of it (a block more, a bias) belong to
    the computation: without them it would be another model.
    """
    names = sorted(unexpected)
    if not names:
        return []
    modules = {key for key, _ in model.named_modules()}
    outer = {"", model.base_model_prefix, f"{model.base_model_prefix}.model"}
    inside = [key for key in names if _deepest(key, modules) not in outer]
    if inside:
        raise ModelError(
            f"The files of --model_name_or_path {name} hold {len(inside)} weights more of the model"
            f" than its config.json describes ({_first(inside)}), and without them it would compute"
            f" something else.{_saved_as(config, model)} Name a folder whose files belong together."
        )
    return [
        f"Weights  {len(names)} in the files are not of the language model, and are left out:"
        f" {_first(names)}"
    ]


def _deepest(key: str, modules: set[str]) -> str:
    """The name of the innermost module of the model that a weight of that name would lie in."""
    parts = key.split(".")[:-1]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts)


def _saved_as(config: PretrainedConfig, model: PreTrainedModel) -> str:
    saved = getattr(config, "architectures", None) or []
    here = type(model).__name__
    return "" if here in saved or not saved else f" It was saved as {saved[0]}, not {here}."


def _shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size)) or "one number"


def _first(words: list[str]) -> str:
    shown = ", ".join(words[:NUM_SHOWN])
    return shown if len(words) <= NUM_SHOWN else f"{shown}, ..."


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
