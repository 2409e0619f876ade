"""Proves that every preset of train_configs/ is what its README says, and that it runs.

The README names each argument with its value; its commands parse without a problem on the machine
that they are for; its computed sizes are those of `llm_training/footprint.py` and `flops.py`. Each
preset then trains three steps on this CPU, with data and sizes shrunk by flags alone. What that
leaves out is what only a GPU can show: its memory, its speed, and compiled code.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoConfig, AutoModelForCausalLM

import train_llm
from arguments import Arguments, describe, resolve_batch_sizes
from llm_training.argument_checks import find_problems
from llm_training.argument_parsing import read_arguments
from llm_training.chunked_loss import is_worth_chunking, positions_per_chunk
from llm_training.data.tokens.tokenizers import train_tokenizer
from llm_training.flops import model_flops_per_token, peak_flops
from llm_training.footprint import (
    Backend,
    ModelShape,
    activation_bytes,
    frozen_bytes,
    state_bytes_per_parameter,
    working_bytes,
)
from llm_training.launch_settings import LaunchSettings, read_launch_settings
from llm_training.lora import add_adapters
from llm_training.modeling import count_parameters
from tests.launches import DDP, FSDP

ROOT = Path(__file__).parents[1]
PRESETS = sorted(ROOT.glob("train_configs/*.json"))
README = (ROOT / "train_configs" / "README.md").read_text(encoding="utf-8")
DEFAULTS = describe(Arguments())
each_preset = pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)


class Gpu(NamedTuple):
    """The device that a preset is for.

    Attributes:
        rate: operations a second that it is taken to keep up.
        is_half: whether it computes in 16 bits.
    """

    gigabytes: int
    rate: float
    is_half: bool = True


UTILIZATION = 0.4  # of the peak, taken for granted
A100, H100 = (
    UTILIZATION * (peak_flops(name, "bf16") or 0.0)
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3")
)
GPUS = {
    "gpt2_124m": Gpu(40, A100),
    "memory_constrained": Gpu(11, 10e12, is_half=False),  # cards of 11 GB do not multiply bf16
    "high_performance": Gpu(80, H100),
    "production": Gpu(80, A100),
    "llama_1b": Gpu(80, H100),
    "finetune": Gpu(24, 0.0),
    "finetune_lora": Gpu(24, 0.0),
}
VOCAB_SIZES = {"openai-community/gpt2": 50_257, "TinyLlama/TinyLlama_v1.1": 32_000}
SMOLLM2 = {"vocab_size": 49_152, "tie_word_embeddings": True}
LOADED_CONFIGS = {  # as the config.json on the hub has it
    "HuggingFaceTB/SmolLM2-360M-Instruct": {
        **SMOLLM2,
        "num_hidden_layers": 32,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        **SMOLLM2,
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}

# Flags that make every preset small enough for a test.
SMALL = {
    "max_steps": "3",
    "warmup_steps": "1",
    "eval_steps": "2",
    "eval_max_batches": "1",
    "save_steps": "2",
    "logging_steps": "1",
    "block_size": "32",
    "global_batch_size": "4",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "null",
    "validation_split_percentage": "10",
    "sample_max_new_tokens": "4",
    "mixed_precision": "fp32",
    "report_to": "none",
    "device": "cpu",
    "num_threads": "1",
    "torch_compile": "false",
    "torch_compile_scope": "blocks",
    "torch_compile_mode": "default",
    "deterministic": "true",
}
SMALL_CONFIGS = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "".join(f"Line {i} says that {i} x {i} = {i * i}.\n" for i in range(200))


def section(name: str) -> str:
    """What the README says of a preset."""
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"train_configs/README.md has no section ## {name}"
    return found[1]


def commands(name: str) -> list[list[str]]:
    """The words of each command of its section that starts the script."""
    blocks = re.findall(r"```bash\n(.*?)```", section(name), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "train_llm.py" in line]


def launch_of(words: list[str]) -> LaunchSettings:
    """How the processes of a command start, as the script itself finds it out."""
    if words[0] == "python":
        return LaunchSettings()
    assert words[:3] == ["accelerate", "launch", "--config_file"], words
    file = ROOT / words[3]
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    count = str(settings["num_processes"])
    if "--num_processes" in words:
        count = words[words.index("--num_processes") + 1]
    environ = {"MULTI_GPU": DDP, "FSDP": FSDP}[settings["distributed_type"]]
    command = ["python", "/bin/accelerate", "launch", "--config_file", str(file), *words[4:]]
    return read_launch_settings({**environ, "WORLD_SIZE": count}, command)


def reset_accelerate() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


# ----------------------------------------------------------------------------- what is written


@each_preset
def test_the_readme_gives_each_argument_with_its_value(path: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| .{5,} \|$", section(path.stem), re.M)
    said = {name: json.loads(value) for name, value in rows}
    assert said == json.loads(path.read_text(encoding="utf-8"))
    assert len(rows) == len(said)  # none stands twice


def test_every_section_is_of_a_preset() -> None:
    titles = re.findall(r"^## (\w+)$", README, re.M)
    assert sorted(titles) == [path.stem for path in PRESETS]


@each_preset
def test_a_preset_repeats_no_default(path: Path) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert [name for name, value in settings.items() if DEFAULTS[name] == value] == []


@each_preset
def test_its_commands_have_no_problem_on_the_machine_that_they_are_for(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user brings, an earlier run and the package for 8 bits are taken as there."""
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    there = {"bitsandbytes": "json"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find_spec(there.get(name, name), *rest)
    )
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shakespeare.txt").write_text(TEXT)
    make_model(Path("runs/quickstart/final"))
    for file in ("problems.jsonl", "problems_validation.jsonl"):
        write_problems(file, 8)
    assert commands(path.stem)
    for words in commands(path.stem):
        launch = launch_of(words)
        own = words[words.index("train_llm.py") + 1 :]
        assert own[0] == f"train_configs/{path.name}"
        arguments = read_arguments(own, launch.num_processes)
        assert find_problems(arguments, launch) == []


# ---------------------------------------------------------------------------------- what it needs


def row_of_needs(name: str) -> str:
    """The line of the README's table of needs of a preset, by its first command."""
    arguments = Arguments(**json.loads((ROOT / f"train_configs/{name}.json").read_text("utf-8")))
    launch = launch_of(commands(name)[0])
    config = config_of(arguments)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, arguments)
    parameters, _ = count_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states, kept, logits = gigabytes_of(name, arguments, launch, config, (parameters, trained))
    total = states + kept + logits
    assert total < 0.9 * GPUS[name].gigabytes
    flops = model_flops_per_token(model, config, int(arguments.block_size or 0))
    cells = [
        f"`{name}`",
        f"{parameters / 1e6:,.0f}M",
        f"{launch.num_processes} x {GPUS[name].gigabytes} GB",
        f"{states:.1f} + {kept:.1f} + {logits:.1f} = {total:.0f} GB",
        *time_cells(name, arguments, launch, flops or 0.0),
    ]
    return f"| {' | '.join(cells)} |"


def time_cells(
    name: str, arguments: Arguments, launch: LaunchSettings, flops_per_token: float
) -> list[str]:
    """Tokens of a step, tokens, operations, rate of a GPU and hours."""
    batch = resolve_batch_sizes(arguments, launch.num_processes)
    step = batch.global_batch * int(arguments.block_size or 0)
    if arguments.max_steps is None:
        return [f"{step:,}", "by your data", "", "", ""]
    tokens = step * arguments.max_steps
    flops, rate = tokens * flops_per_token, GPUS[name].rate
    again = 4 / 3 if arguments.gradient_checkpointing else 1  # the forward pass is a third of 3
    hours = again * flops / (rate * launch.num_processes) / 3600
    return [f"{step:,}", f"{tokens / 1e9:.1f}B", f"{flops:.1e}", f"{rate:.1e}", f"{hours:.0f}"]


def config_of(arguments: Arguments) -> Any:
    """The configuration that the run will have, without the hub."""
    if arguments.model_name_or_path:
        return AutoConfig.for_model("llama", **LOADED_CONFIGS[arguments.model_name_or_path])
    return AutoConfig.for_model(
        arguments.model_type,
        vocab_size=VOCAB_SIZES[str(arguments.tokenizer_name)],
        max_position_embeddings=arguments.block_size,
        **arguments.config_overrides,
    )


def gigabytes_of(
    name: str,
    arguments: Arguments,
    launch: LaunchSettings,
    config: Any,
    counts: tuple[int, int],
) -> tuple[float, float, float]:
    """What a GPU holds: weights with gradients and moments; activations; logits.

    Args:
        counts: of all parameters, and of those that are trained.
    """
    parameters, trained = counts
    is_gpt2 = config.model_type == "gpt2"
    shape = ModelShape(
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=4 * config.hidden_size if is_gpt2 else config.intermediate_size,
        matrices_in_mlp=2 if is_gpt2 else 3,
        vocabulary=config.vocab_size,
    )
    batch = resolve_batch_sizes(arguments, launch.num_processes)
    positions = batch.per_device * int(arguments.block_size or 0)
    backend, is_half = cast(Backend, launch.backend), GPUS[name].is_half
    states = trained * state_bytes_per_parameter(
        backend, launch.num_processes, is_half=is_half, accumulates=batch.accumulation > 1
    )
    frozen = frozen_bytes(backend, launch.num_processes, is_half=is_half)
    states += (parameters - trained) * frozen
    states += working_bytes(shape, backend, is_half=is_half)
    kept = activation_bytes(
        shape, positions, is_half=is_half, checkpointing=arguments.gradient_checkpointing
    )
    is_chunked = arguments.chunked_loss
    if is_chunked is None:
        is_chunked = is_worth_chunking(positions, shape.vocabulary, "cuda")
    if is_chunked:
        positions = min(positions, positions_per_chunk(shape.vocabulary, "cuda"))
    logits = (8 if is_chunked else 12) * positions * shape.vocabulary
    return states / 1e9, kept / 1e9, logits / 1e9


@pytest.mark.parametrize("name", GPUS)
def test_the_computed_needs_are_current(name: str) -> None:
    assert row_of_needs(name) in README.splitlines()


# ------------------------------------------------------------------------------------ that it runs


@each_preset
def test_it_trains_three_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = json.loads(path.read_text(encoding="utf-8"))
    flags = SMALL | small_data(path.stem, settings)
    if "model_type" in settings:
        flags["config_overrides"] = json.dumps(
            settings.get("config_overrides", {}) | SMALL_CONFIGS[settings["model_type"]]
        )
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    reset_accelerate()
    arguments = read_arguments([str(path), *words, "--run_name", "run"], 1)
    assert train_llm.main(arguments) == 0
    result = json.loads((tmp_path / "runs/run/result.json").read_text(encoding="utf-8"))
    assert result["step"] == 3
    assert result["last_loss"] > 0
    final = tmp_path / "runs/run/final"
    if "lora_rank" in settings:
        assert (final / "adapter_config.json").is_file()
    else:
        assert AutoConfig.from_pretrained(final).model_type


def small_data(name: str, settings: dict[str, Any]) -> dict[str, str]:
    """Flags with local data, tokenizer and model in the place of those that the preset names."""
    flags: dict[str, str] = {}
    if "dataset_name" in settings:
        write_dataset(Path("dataset"))
        flags = {"dataset_name": "./dataset", "dataset_config_name": "null"}
    elif "prompt_column" in settings:
        write_problems(settings["train_file"], 40)
        write_problems(settings["validation_file"], 8)
        flags = {"chat_template": str(ROOT / settings["chat_template"])}
    elif name != "quick_test":  # whose own text is small and on every machine
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        flags = {"train_file": "text.txt"}
    if "model_name_or_path" in settings:
        flags["model_name_or_path"] = make_model(Path("model"))
    elif settings["tokenizer_name"] not in ("char", "byte", "bpe"):
        flags["tokenizer_name"] = make_tokenizer(Path("tokenizer"))
    elif settings["tokenizer_name"] == "bpe":
        flags["vocab_size"] = "300"
    return flags


def write_dataset(folder: Path) -> None:
    """A dataset with a column of text and one of conversations."""
    folder.mkdir()
    for split, count in (("train", 40), ("test", 8)):
        rows = [
            {
                "text": TEXT[i : i + 200],
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": f"{i}!"},
                ],
            }
            for i in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_problems(file: str, count: int) -> None:
    rows = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(count)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path(file).write_text(lines, encoding="utf-8")


def make_tokenizer(folder: Path) -> str:
    tokenizer = train_tokenizer("bpe", [TEXT], 300, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return f"./{folder}"


def make_model(folder: Path) -> str:
    make_tokenizer(folder)
    config = AutoConfig.for_model("llama", vocab_size=300, **SMALL_CONFIGS["llama"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return f"./{folder}"
