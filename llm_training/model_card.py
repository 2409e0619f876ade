"""The model card: README.md in a model's folder, with the front matter that Hugging Face reads.

It tells what the model is, how and on what it was trained, how good it is and how to use it,
without logins, tokens and the folders of the machine that trained it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    PrecisionArguments,
)
from llm_training.hub_metadata import (
    base_model,
    by_set,
    front_matter,
    is_adapter,
    without_folders,
)
from llm_training.recorded_runs import changed_arguments, read_folder
from llm_training.throughput import format_duration
from llm_training.tracking.redaction import redact

FILE_NAME = "README.md"
# What decides how the model came out; where it was written and logged does not.
TOLD_GROUPS = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    OptimizationArguments,
    PrecisionArguments,
)
NOT_TOLD = {"cache_dir"}
MAX_VALUE = 300  # characters of an argument
SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden size": ("hidden_size", "n_embd", "d_model"),
    "attention heads": ("num_attention_heads", "n_head"),
    "key and value heads": ("num_key_value_heads",),
    "vocabulary": ("vocab_size",),
    "longest row": ("max_position_embeddings", "n_positions"),
}
MEASURES = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "token accuracy",
}


def write_card_of_run(output: Path, folder: Path, step: int | None = None) -> Path:
    """Writes the card of an exported model from the records of its run.

    Args:
        output: the run's output folder.
        folder: the model's: `final/` or `best/`.
        step: of the model; None: the last one, as right after an export.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    run = read_folder(output)
    at = run.step if step is None else step
    tokens, seconds = run.until(at)
    result: dict[str, Any] = {"step": at, "tokens": tokens, "seconds": seconds}
    if at == run.step and run.result is not None:
        result["samples"] = run.result.get("samples")
    metrics = run.evaluation(step)
    return write_model_card(folder, run.arguments, run.provenance, run.ledger, result, metrics)


def write_model_card(
    folder: Path,
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any],
    ledger: Mapping[str, Any],
    result: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Path:
    """Writes README.md into a model's folder; it is whole at every moment.

    Args:
        folder: holds the exported model.
        arguments: all of them, in plain values.
        provenance: as provenance.json has it.
        ledger: as ledger.json has it.
        result: what is known of `step`, `tokens`, `seconds` and `samples`, as in result.json.
        metrics: the evaluation of this model: `eval/loss`, `eval/loss_stderr`, `eval/NAME/loss`.

    Returns:
        The file.
    """
    text = model_card(folder, arguments, provenance, ledger, result, metrics)
    path, beside = folder / FILE_NAME, folder / f"{FILE_NAME}.tmp"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    return path


def model_card(
    folder: Path,
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any],
    ledger: Mapping[str, Any],
    result: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """The text of the card; the arguments are those of `write_model_card`."""
    config = _read_json(folder / "config.json")
    name = str(arguments.get("run_name") or "model")
    matter = yaml.safe_dump(
        front_matter(folder, arguments, metrics), sort_keys=False, allow_unicode=True
    )
    sections = [
        [f"# {name}", "", opening(arguments, provenance, result, config)],
        ["## Model", "", *model_lines(config, provenance)],
        ["## Training", "", *training_lines(arguments, provenance, result)],
        ["## Data", "", *data_lines(ledger)],
        ["## Results", "", *result_lines(metrics, result)],
        ["## Samples", "", *sample_lines(result)],
        ["## Use", "", *use_lines(folder, arguments)],
        ["## Limits", "", *limit_lines(arguments, ledger, metrics)],
    ]
    told = ["\n".join(lines) for lines in sections if len(lines) > 2]
    return f"---\n{matter}---\n\n" + "\n\n".join(told) + "\n"


# --------------------------------------------------------------------------------------- sections


def opening(
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any],
    result: Mapping[str, Any],
    config: Mapping[str, Any],
) -> str:
    """One sentence on what it is."""
    kind = config.get("model_type") or arguments.get("model_type") or "causal"
    size = provenance.get("num_parameters")
    sized = f" with {size:,} parameters" if size else ""
    tokens = result.get("tokens")
    amount = f" on {tokens:,} tokens" if tokens else ""
    base = base_model(arguments)
    if base is None:
        return f"A `{kind}` language model{sized}, trained from scratch{amount}."
    way = "adapted by LoRA from" if arguments.get("lora_rank") else "fine-tuned from"
    return (
        f"A `{kind}` language model{sized}, {way} `{base}`{amount}. The card and the license of"
        " that model hold beside this."
    )


def model_lines(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """Architecture and sizes."""
    found = {
        label: next((config[name] for name in names if config.get(name) is not None), None)
        for label, names in SIZES.items()
    }
    return _table(
        {
            "architecture": ", ".join(config.get("architectures") or ()),
            "parameters": provenance.get("num_parameters"),
            "of them outside of embeddings": provenance.get("num_parameters_outside_embeddings"),
            **found,
            "weights in": config.get("dtype"),
        }
    )


def training_lines(
    arguments: Mapping[str, Any], provenance: Mapping[str, Any], result: Mapping[str, Any]
) -> list[str]:
    """How long, on what, with which versions, and with which arguments."""
    seconds = result.get("seconds")
    processes = provenance.get("num_processes")
    hardware = provenance.get("device_name")
    lines = _table(
        {
            "steps": result.get("step"),
            "tokens predicted": result.get("tokens"),
            "time": format_duration(seconds) if seconds else None,
            "device": f"{processes} x {hardware}" if processes and hardware else hardware,
            "precision": provenance.get("precision"),
            "backend": provenance.get("backend"),
            "torch": provenance.get("torch_version"),
            "transformers": provenance.get("transformers_version"),
            "accelerate": provenance.get("accelerate_version"),
            "revision of the code": provenance.get("git_revision"),
            "fingerprint of the data": provenance.get("data_fingerprint"),
        }
    )
    if told := told_arguments(arguments):
        shown = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=96)
        lines += ["", "Arguments that differ from the defaults of `train_llm.py`:", ""]
        lines += _fenced(shown, "yaml")
    return lines


def told_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that made the model what it is and differ from their defaults."""
    names = {name for group in TOLD_GROUPS for name in group.__dataclass_fields__} - NOT_TOLD
    names.add("seed")
    changed = changed_arguments(arguments)
    return {
        name: _cut(without_folders(redact(value, name)))
        for name, value in changed.items()
        if name in names
    }


def data_lines(ledger: Mapping[str, Any]) -> list[str]:
    """Sources, documents and tokens, what was left out, and what leaked into validation."""
    heads = ("source", "split", "documents", "bytes", "tokens")
    rows, left_out = [], list[str]()
    parts = [("", ledger), *ledger.get("validation_sets", {}).items()]
    for of_set, part in parts:
        for source, documents in part.get("documents", {}).items():
            name = " ".join(filter(None, (of_set, source)))
            for split, counts in documents.get("splits", {}).items():
                rows.append([name, split, *(_count(counts.get(head)) for head in heads[2:])])
            for reason, counts in documents.get("left_out", {}).items():
                where = f" ({name})" if name else ""
                left_out.append(f"- {_count(counts.get('count'))} {reason}{where}")
    first = 0 if any(row[0] for row in rows) else 1  # where no source has a name
    lines = _columns(heads[first:], [row[first:] for row in rows])
    if left_out:
        lines += ["", "Left out:", "", *left_out]
    leakage = ledger.get("leakage")
    if leakage and leakage.get("tokens"):
        share = leakage["overlapping_tokens"] / leakage["tokens"]
        lines += [
            "",
            f"Of {leakage['documents']:,} validation documents {leakage['same_documents']:,} are"
            f" also in training, and {share:.2%} of the validation tokens lie in stretches that"
            " training has too.",
        ]
    return lines


def result_lines(metrics: Mapping[str, float], result: Mapping[str, Any]) -> list[str]:
    """What the validation data says, set by set."""
    sets = by_set(metrics)
    kinds = [kind for kind in MEASURES if any(kind in measured for measured in sets.values())]
    if not kinds:
        return []
    rows = [
        [name or "validation", *(_measured(measured, kind) for kind in kinds)]
        for name, measured in sets.items()
    ]
    lines = _columns(["validation data", *(MEASURES[kind] for kind in kinds)], rows)
    remarks = []
    if any("loss_stderr" in measured for measured in sets.values()):
        remarks.append("± is one standard error over the rows of the validation data.")
    if result.get("step") is not None:
        remarks.insert(0, f"After {result['step']:,} steps.")
    return [*lines, "", " ".join(remarks)] if remarks else lines


def sample_lines(result: Mapping[str, Any]) -> list[str]:
    """What it made of the prompts of its run."""
    lines: list[str] = []
    for sample in result.get("samples") or ():
        kind = "the likeliest token each time" if sample.get("kind") == "greedy" else "drawn"
        lines += [""] * bool(lines) + [f"Continuation, {kind}; the prompt stands in front:", ""]
        lines += _fenced(f"{sample.get('prompt', '')}{sample.get('text', '')}", "text")
    return lines


def use_lines(folder: Path, arguments: Mapping[str, Any]) -> list[str]:
    """A snippet that needs nothing but the folder."""
    package, auto = "transformers", "AutoModelForCausalLM"
    if is_adapter(folder):
        package, auto = "peft", "AutoPeftModelForCausalLM"
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    code = [f"from {package} import {auto}"]
    if package == "transformers" and has_tokenizer:
        code = [f"from transformers import {auto}, AutoTokenizer"]
    elif has_tokenizer:
        code.append("from transformers import AutoTokenizer")
    code += ["", 'folder = "."  # where this file lies, or the name it is published under']
    code.append(f"model = {auto}.from_pretrained(folder)")
    if not has_tokenizer:
        code += ["logits = model(input_ids=token_ids).logits  # (rows, tokens) of int64"]
        return _fenced("\n".join(code), "python")
    code.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    prompts = arguments.get("sample_prompt") or ["Once upon a time"]
    prompt = json.dumps(prompts if isinstance(prompts, str) else prompts[0], ensure_ascii=False)
    if (folder / "chat_template.jinja").is_file():
        code += [
            f'turns = [{{"role": "user", "content": {prompt}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        code.append(f'inputs = tokenizer({prompt}, return_tensors="pt")')
    length = max(1, min(64, (arguments.get("block_size") or 128) // 2))
    code += [
        f"tokens = model.generate(**inputs, max_new_tokens={length}, do_sample=True)",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    ]
    return _fenced("\n".join(code), "python")


def limit_lines(
    arguments: Mapping[str, Any], ledger: Mapping[str, Any], metrics: Mapping[str, float]
) -> list[str]:
    """What must not be read into it."""
    lines = [
        "- It continues text in the way of its training data, what is wrong or hurtful there"
        " included, and what it says is not checked against anything.",
        "- It was judged on the validation data above alone."
        if any(name.endswith("loss") for name in metrics)
        else "- It was not judged on any validation data.",
    ]
    if block_size := arguments.get("block_size"):
        lines.append(
            f"- It was trained on rows of {block_size:,} tokens; longer texts are untried."
        )
    if not ledger.get("leakage"):
        lines.append("- What validation and training have in common was not counted.")
    lines.append(
        "- No license is stated: whoever publishes this chooses one that its data and, where there"
        " is one, its base allow, and writes it as `license:` at the head of this file."
    )
    return lines


# ------------------------------------------------------------------------------------------ values


def _cut(value: Any) -> Any:
    is_long = len(value if isinstance(value, str) else json.dumps(value, default=str)) > MAX_VALUE
    if not is_long:
        return value
    if isinstance(value, list):
        return [*map(_cut, value[:3]), f"... {len(value) - 3} more"] if len(value) > 3 else value
    return value[:MAX_VALUE] + " ..." if isinstance(value, str) else value


def _measured(measured: Mapping[str, float], kind: str) -> str:
    if kind not in measured:
        return ""
    error = measured.get(f"{kind}_stderr")
    shown = f"{measured[kind]:,.2f}" if kind == "perplexity" else f"{measured[kind]:.4f}"
    return shown if error is None else f"{shown} ± {error:.4f}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _table(facts: Mapping[str, Any]) -> list[str]:
    """Those of the facts that are known."""
    rows = [[label, _count(value)] for label, value in facts.items() if value not in (None, "")]
    return _columns(("", ""), rows)


def _columns(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown; nothing where it has no rows."""
    if not rows:
        return []
    lines = [list(heads), ["---"] * len(heads), *rows]
    escaped = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in escaped]


def _fenced(text: str, kind: str) -> list[str]:
    """A block of code, in a fence longer than any inside it."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + kind, *text.rstrip("\n").split("\n"), fence]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
