"""Proves that `--convert` makes our argument file of other tools' files, and hides no loss.

Each small file of `foreign_files/` becomes exactly the arguments that stand here; every setting of
it is accounted for; what comes out is taken by our own reader; and nothing of a file is run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from arguments import KINDS
from llm_training.argument_files import Table, plain, read_file
from llm_training.argument_parsing import ArgumentProblems, read_arguments
from llm_training.convert import ForeignFileError, convert_command, convert_file
from llm_training.foreign_names.assignments import read_assignments

ROOT = Path(__file__).parents[1]
FOREIGN_FILES = sorted((ROOT / "tests" / "foreign_files").iterdir())
each_file = pytest.mark.parametrize("path", FOREIGN_FILES, ids=lambda path: path.name)

EXPECTED: dict[str, dict[str, Any]] = {
    "nanogpt.py": {
        "model_type": "gpt2",
        "config_overrides": {
            "n_layer": 6,
            "n_head": 6,
            "n_embd": 384,
            "activation_function": "gelu",
        },
        "dropout": 0.2,
        "train_file": ["data/tiny_char"],
        "block_size": 256,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "lr_decay_steps": None,
        "min_lr_ratio": 0.1,
        "adam_beta2": 0.99,
        "max_steps": 5000,
        "per_device_train_batch_size": 64,
        "global_batch_size": 128,
        "torch_compile": False,
        "save_steps": 250,
        "save_best": True,
        "eval_steps": 250,
        "eval_max_batches": 10,
        "logging_steps": 10,
        "experiment_name": "tiny",
        "output_dir": "out-tiny",
    },
    "training_arguments.json": {
        "model_name_or_path": "org/base-model",
        "dataset_name": "org/some-text",
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 30,
        "min_lr_ratio": 0.1,
        "weight_decay": 0.01,
        "optim": "adamw",
        "adam_beta2": 0.999,
        "max_steps": 1000,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "mixed_precision": "bf16",
        "save_steps": 200,
        "save_total_limit": None,
        "save_best": True,
        "metric_for_best_model": "eval/loss",
        "eval_steps": 100,
        "per_device_eval_batch_size": 8,
        "logging_steps": 5,
        "report_to": ["wandb"],
        "push_to_hub": False,
        "output_dir": "out",
        "seed": 7,
    },
    "trainer.toml": {
        "model_type": "llama",
        "config_overrides": {
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
        },
        "train_file": ["data/train.jsonl"],
        "validation_file": ["data/val.jsonl"],
        "block_size": 256,
        "learning_rate": 3e-4,
        "warmup_steps": 100,
        "min_lr_ratio": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": None,
        "max_steps": 2000,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "global_batch_size": 32,
        "mixed_precision": "bf16",
        "save_steps": 500,
        "eval_steps": 200,
        "logging_steps": 10,
        "report_to": ["wandb"],
        "output_dir": "checkpoints/tiny",
    },
    "trainer.yaml": {
        "model_type": "gpt2",
        "config_overrides": {"n_layer": 2},
        "train_file": ["data/train.txt"],
        "tokenizer_name": "byte",
        "learning_rate": 1e-3,
        "max_steps": 1000,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "save_steps": 100,
        "eval_steps": 100,
        "logging_steps": 10,
    },
    "litgpt.yaml": {
        "train_file": ["data/books"],
        "tokenizer_name": "checkpoints/some-tokenizer",
        "block_size": 512,
        "learning_rate": 4e-4,
        "warmup_steps": 100,
        "min_lr_ratio": 0.1,
        "weight_decay": 0.1,
        "optim": "adamw",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_steps": 4000,
        "per_device_train_batch_size": 4,
        "global_batch_size": 64,
        "mixed_precision": "bf16",
        "save_steps": 500,
        "eval_steps": 250,
        "eval_max_batches": 4,
        "logging_steps": 5,
        "output_dir": "out/pretrain",
        "seed": 11,
    },
    "torchtitan.toml": {
        "block_size": 2048,
        "learning_rate": 8e-4,
        "lr_scheduler_type": "warmup-stable-decay",
        "warmup_steps": 2,
        "lr_decay_steps": 80,
        "min_lr_ratio": 0.0,
        "optim": "adamw",
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "max_steps": 100,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": True,
        "save_steps": None,
        "logging_steps": 1,
        "report_to": ["tensorboard"],
        "output_dir": "outputs",
    },
    "axolotl.yaml": {
        "model_name_or_path": "org/base-model",
        "attn_implementation": "flash_attention_2",
        "validation_split_percentage": 5.0,
        "block_size": 2048,
        "packing": "best_fit",
        "document_mask": True,
        "learning_rate_factors": {"*lora_B*": 16},
        "frozen_dtype": "nf4",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_target_modules": ["all-linear"],
        "use_rslora": True,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "optim": "adamw_8bit",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "mixed_precision": "auto",
        "gradient_checkpointing": True,
        "experiment_name": "tuning",
    },
}

# What a converted file may still lack: data, a model, a tokenizer, packages.
TO_ADD = re.compile(
    r"no model:|no data:|comes without a tokenizer|does not exist|is not installed|needs a package"
)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@each_file
def test_a_file_becomes_these_arguments(path: Path) -> None:
    assert convert_file(str(path)).values == EXPECTED[path.name]


@each_file
def test_our_own_reader_takes_what_comes_out(path: Path, tmp_path: Path) -> None:
    converted = convert_file(str(path))
    assert [problem for problem in converted.missing if not TO_ADD.search(problem)] == []
    run = write(tmp_path, "run.json", json.dumps(converted.values))
    try:
        read_arguments([run], num_processes=1)
    except ArgumentProblems as refusal:
        assert len(refusal.problems) == len(converted.missing)
    else:
        assert converted.missing == []


def test_a_complete_file_runs_as_it_comes_out(tmp_path: Path) -> None:
    data = write(tmp_path, "data.txt", "Some words to learn.\n")
    lines = ["model: gpt2", "n_layer: 2", "num_steps: 5", f"data_path: {data}", "tokenizer: byte"]
    converted = convert_file(write(tmp_path, "theirs.yaml", "\n".join(lines)))
    assert converted.left == converted.unknown == converted.missing == []
    run = write(tmp_path, "run.json", json.dumps(converted.values))
    arguments = read_arguments([run], num_processes=1)
    assert (arguments.max_steps, arguments.config_overrides) == (5, {"n_layer": 2})


@each_file
def test_every_setting_is_accounted_for(path: Path) -> None:
    converted = convert_file(str(path))
    said = [*converted.taken, *converted.left, *converted.unknown]
    silent = {"push_to_hub", "metric_for_best_model", "parallelism.data_parallel_shard_degree"}
    silent |= {"checkpoint.enable"}  # at which nothing is lost, or seen by a neighbour
    places = {re.split(r" = |: ", line)[0] for line in said}
    assert places | silent >= set(settings_of(path))


def settings_of(path: Path) -> list[str]:
    """The names in a file, dotted where they stand in a section."""
    if path.suffix == ".py":
        return re.findall(r"^(\w+) = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    return list(names_in(read_file(str(path))))


def names_in(table: Table, section: str = "") -> Iterator[str]:
    for key, _, value in table:
        if isinstance(value, Table) and key != "lr_scheduler_kwargs":
            yield from names_in(value, f"{section}{key}.")
        else:
            yield section + key


def test_what_is_said_of_a_loss() -> None:
    converted = convert_file(str(ROOT / "tests/foreign_files/training_arguments.json"))
    assert converted.tool.title == "TrainingArguments"
    assert "data_seed = 8: one seed serves weights, order and dropout" in converted.left
    assert converted.unknown == ["somebody_elses_field = 3"]
    silent = ["adam_beta2 = 0.999", "per_device_eval_batch_size = 8", "save_total_limit = null"]
    assert sorted(converted.silent) == silent  # what transformers does, and we would not


def test_adapters_are_converted_with_the_rank_that_their_tool_takes(tmp_path: Path) -> None:
    text = """
stage: sft
finetuning_type: lora
lora_target: q_proj,v_proj
cutoff_len: 512
template: default
"""
    converted = convert_file(write(tmp_path, "sft.yaml", text), "LLaMA-Factory")
    targets = {"lora_rank": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    assert converted.values.items() >= targets.items()
    text = "finetuning_type: freeze\nlora_target: all\n"
    converted = convert_file(write(tmp_path, "frozen.yaml", text), "LLaMA-Factory")
    assert "lora_rank" not in converted.values
    assert converted.values["lora_target_modules"] == ["all-linear"]
    assert any("all weights are trained (full)" in line for line in converted.left)
    converted = convert_file(write(tmp_path, "a.yaml", "adapter: lora\n"), "Axolotl")
    assert converted.left == ['adapter = "lora": set lora_rank']


def test_what_a_file_says_is_not_called_silent(tmp_path: Path) -> None:
    text = '{"evaluation_strategy": "no", "bf16": true}'
    converted = convert_file(write(tmp_path, "args.json", text))
    assert converted.values["eval_steps"] is None
    assert [line for line in converted.silent if "eval_steps" in line] == []


def test_training_arguments_as_transformers_writes_them(tmp_path: Path) -> None:
    theirs = TrainingArguments(output_dir="there", max_steps=100, warmup_steps=0.1, use_cpu=True)
    converted = convert_file(write(tmp_path, "args.json", theirs.to_json_string()))
    assert converted.left == converted.unknown == []
    assert converted.values["max_steps"] == 100
    assert converted.values["warmup_steps"] == 10
    assert converted.values["device"] == "cpu"
    # What Hugging Face does by default, and we do not.
    by_default = {"lr_scheduler_type": "linear", "min_lr_ratio": 0.0, "weight_decay": 0.0}
    by_default |= {"mixed_precision": "fp32", "eval_steps": None, "logging_steps": 500}
    assert by_default.items() <= converted.values.items()


def test_nanogpt_with_nothing_said_is_gpt2_on_openwebtext(tmp_path: Path) -> None:
    converted = convert_file(write(tmp_path, "empty.py", "batch_size = 12\n"))
    expected = {"global_batch_size": 480, "max_steps": 600_000, "learning_rate": 6e-4}
    expected |= {"warmup_steps": 2000, "train_file": ["data/openwebtext"], "torch_compile": True}
    assert expected.items() <= converted.values.items()
    assert converted.left == [
        "bias = false (its default): GPT-2 has biases here: about 0.1% more parameters"
    ]


def test_nothing_of_a_python_file_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = (
        f"max_iters = 10\nopen({str(trace)!r}, 'w').write('x')\n"
        f"learning_rate = __import__('os').system('touch {trace}')\n"
        "if True:\n    batch_size = 3\nfor n_layer in (1,):\n    pass\n"
    )
    converted = convert_file(write(tmp_path, "config.py", text))
    assert not trace.exists()
    assert converted.values["max_steps"] == 10
    assert converted.values["per_device_train_batch_size"] == 12  # nanoGPT's default
    unread = "\n".join(converted.left)
    for place in ("line 2: not read", "learning_rate: not read", "line 4: not", "line 6: not"):
        assert place in unread


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 1e-3", 1e-3),
        ("x = -3", -3),
        ("x = 5 * 8", 40),
        ("x = 2 ** 10 + 1", 1025),
        ("y = 4\nx = y * 64 // 3", 85),
        ("x = 1\nx = 2", 2),
        ("x: int = 5", 5),
        ("x = (1, 'a', [None, True])", [1, "a", [None, True]]),
    ],
)
def test_literals_and_arithmetic_are_read(text: str, value: Any) -> None:
    values, unread = read_assignments(text)
    assert values["x"] == value
    assert unread == {}


@pytest.mark.parametrize(
    "text",
    [
        *("x = f()", "x = 9 ** 9 ** 9", "x = 1 / 0", "x = 'a' * 10**9", "x = y", "x = [0] * 3"),
        *("x = 1e400 * 1", "x = 1\nx = f()", "x += 1", "x = y = 1", "x, y = 1, 2", "x = 'a' + f()"),
        *("x = 2 ** 0.5j", "x = (-8) ** 0.5", "x = lambda: 1", "x = {'a': 1}", "x = True + 1"),
    ],
)
def test_everything_else_is_named_and_not_read(text: str) -> None:
    values, unread = read_assignments(text)
    assert "x" not in values or "+=" in text
    assert len(unread) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"learning_rate": "fast", "bf16": true}', "takes number, not"),
        ('{"learning_rate": -1, "bf16": true}', "must be more than 0"),
        ('{"max_steps": 2.5, "bf16": true}', "takes integer|null, not 2.5"),
        ('{"bf16": "often", "fp16": false}', "neither true nor false"),
        ('{"optim": "lion_32bit", "bf16": true}', "optim has no 'lion_32bit'"),
        ('{"save_strategy": "epoch", "bf16": true}', "steps of one epoch"),
        ('{"bf16": true, "fp16": true}', "mixed_precision is"),
        ('{"seed": 1, "seed": 2, "bf16": true}', "stands twice"),
    ],
)
def test_a_value_that_does_not_fit_is_left_out_and_named(
    tmp_path: Path, text: str, reason: str
) -> None:
    converted = convert_file(write(tmp_path, "args.json", text))
    assert any(reason in line for line in converted.left), converted.left


def test_secrets_are_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '{"bf16": true, "hub_token": "tell-nobody", "wandb_api_key": "tell-nobody"}'
    assert convert_command(["--convert", write(tmp_path, "args.json", text)]) == 0
    said = capsys.readouterr()
    assert "hub_token = (not shown)" in said.err
    assert "tell-nobody" not in said.out + said.err


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.toml", "a = ", "not valid TOML"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.py", "a = (", "not valid Python"),
        ("a.json", "[1]", "holds no names"),
        ("a.json", '{"colour": "red"}', "none of its names is known"),
        ("a.py", "colour = 'red'", "none of its names is known"),
        ("a.py", "\0", "not valid Python"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, reason: str
) -> None:
    assert convert_command(["--convert", write(tmp_path, name, text)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert reason in said.err


def test_a_missing_file_and_an_unknown_tool_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="No such file"):
        convert_file(str(tmp_path / "missing.py"))
    with pytest.raises(ForeignFileError, match="no tool called zebra is known: nanoGPT"):
        convert_file(str(FOREIGN_FILES[0]), "zebra")


def test_our_own_files_need_no_conversion(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model_type": "gpt2", "max_steps": 3}))
    with pytest.raises(ForeignFileError, match="is an argument file of train_llm"):
        convert_file(str(path))


def test_what_could_not_be_read_is_not_called_silent(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("block_size = int(64)\nmax_iters = 10\nn_layer = 2\n")
    converted = convert_file(str(path))
    assert "block_size" not in converted.values
    assert any(text.startswith("block_size: not read") for text in converted.left)


def test_json_is_written_into_json_files_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.yaml"
    nanogpt = str(ROOT / "tests/foreign_files/nanogpt.py")
    assert convert_command(["--convert", nanogpt, "--convert_to", str(out)]) == 2
    assert not out.exists() and "name a .json file" in capsys.readouterr().err


def test_the_tool_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "max_iters: 5\nbatch_size: 4\n")
    assert convert_file(path).values == {"max_steps": 5, "global_batch_size": 4}
    assert convert_file(path, "nanogpt").values["per_device_train_batch_size"] == 4


def test_stdout_is_the_argument_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "tests/foreign_files/trainer.toml"
    assert convert_command(["--convert", str(path)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == EXPECTED[path.name]
    assert list(json.loads(said.out)) == list(EXPECTED[path.name])  # in the order of the groups
    assert "read by the names of Other trainers" in said.err


def test_a_file_is_written_but_none_is_overwritten(tmp_path: Path) -> None:
    path, out = ROOT / "tests/foreign_files/trainer.toml", tmp_path / "run.json"
    command = ["--convert", str(path), "--convert_to", str(out)]
    assert convert_command(command) == 0
    assert plain(read_file(str(out))) == EXPECTED[path.name]
    before = out.read_bytes()
    assert convert_command(command) == 2
    assert out.read_bytes() == before


def test_converting_imports_nothing_slow() -> None:
    program = (
        "import json, sys; from llm_training.convert import convert_command;"
        "convert_command(['--convert', 'tests/foreign_files/training_arguments.json']);"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = set(json.loads(run.stdout.splitlines()[-1]))
    assert {"torch", "transformers", "accelerate", "numpy", "yaml"} & imported == set()


def test_only_our_arguments_come_out() -> None:
    assert {name for values in EXPECTED.values() for name in values} <= KINDS.keys()
