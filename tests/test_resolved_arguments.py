"""Proves that resolved arguments say where they come from, and can be saved and run again."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from arguments import GROUPS, KINDS, Arguments, describe
from llm_training.argument_parsing import parse_arguments, read_arguments, resolve_arguments
from llm_training.outputs import OutputFolder
from llm_training.resolved_arguments import as_settings, as_yaml, section_name
from tests.argument_cases import GOOD, open_clean_place, run_python, write, write_good
from tests.launches import DDP, DDP_FILE, NAMES_JSON, SINGLE, WITH_JSON, launched

TEXTS = (
    *("no", "1e-4", "null", "~", "017", "2026-01-02", " a # b: c, [d] {e} ", "- x", "'\"\\"),
    *("${HOME}", "$${HOME}", "$$${", "$", "${", "${NOT_SET}", "é 漢 😀", "\n\t", "\r\n"),
    *("\x00\x1b\x7f\x85\u2028\ufeff", "\udc80", "%YAML", "---", "<<", "=", "*a", "&a", "!!b"),
    "x" * 3000,
)
NUMBERS = (0.0, 1e-08, 5e-05, 1e16, 1.5e300, 0.1, 3.0, -2.5e-7)


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)


def any_value(name: str, draw: random.Random) -> Any:
    """Something of the type that an argument takes; what it means is of no interest."""
    kind = KINDS[name]
    if kind.nullable and draw.random() < 0.2:
        return None
    if kind.choices:
        choice = draw.choice(kind.choices)
        return [choice] if kind.type is list else choice
    if kind.type is list:
        return draw.sample(TEXTS, draw.randrange(4))
    if kind.type is dict:
        inner: list[Any] = [*TEXTS, *NUMBERS, 7, True, None, [1e-5, "no", {"no": []}], {}]
        return {text: draw.choice(inner) for text in draw.sample(TEXTS[:-1], 5)}
    values = {bool: (True, False), int: (0, -3, 10**20), float: NUMBERS, str: TEXTS}
    return draw.choice(values[kind.type])


def settings_of(text: str) -> dict[str, Any]:
    """The settings in a text with sections, as any reader of YAML sees them."""
    sections = yaml.safe_load(text)
    assert list(sections) == [section_name(group) for group in GROUPS]
    return {name: value for section in sections.values() for name, value in section.items()}


@pytest.mark.parametrize("seed", range(25))
def test_any_arguments_are_read_again_as_they_were(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = "llm_training.argument_parsing.find_problems"
    monkeypatch.setattr(judge, lambda *_: ["what they mean is of no interest"])
    draw = random.Random(seed)
    left_out = ("train_mixture", "validation_sets", "from_run", "show_arguments")
    values = {name: any_value(name, draw) for name in KINDS if name not in left_out}
    arguments = Arguments(**values).with_origins({name: draw.choice(TEXTS) for name in KINDS})
    text = as_yaml(arguments)
    assert all(line.isprintable() for line in text.split("\n"))
    write("saved.yaml", text)
    write("saved.json", json.dumps(as_settings(arguments)))
    assert settings_of(text) == as_settings(arguments)
    for file in ("saved.yaml", "saved.json"):
        assert resolve_arguments([file], 1).arguments == arguments


def test_saved_arguments_are_read_again_as_they_were() -> None:
    flags = "--config_overrides a=1,b=x --no_save_best --save_steps null --exclude_files é*"
    arguments = read_arguments([write_good(), *flags.split()], 2)
    Path("saved.json").write_text(json.dumps(describe(arguments)))
    assert read_arguments(["saved.json"], 2) == arguments
    assert json.loads(Path("saved.json").read_text(encoding="utf-8")) == describe(arguments)
    assert list(describe(arguments)) == list(KINDS)
    write("saved.yaml", as_yaml(arguments))
    assert read_arguments(["saved.yaml"], 2) == arguments


# ---------------------------------------------------------------------------------- the origins


def test_every_value_has_an_origin() -> None:
    write("run.toml", "[optimization]\nwarmup_steps = 2\nglobal_batch_size = 12")
    arguments = read_arguments([write_good(save_steps=3), "run.toml", "--save_steps=4"], 2)
    assert list(arguments.origins)[: len(KINDS)] == [
        name for group in GROUPS for name in group.__dataclass_fields__
    ]
    expected = {
        "model_type": "good.json line 1",
        "warmup_steps": "run.toml line 2",
        "save_steps": "command line",
        "learning_rate": "default",
        "global_batch_size": "run.toml line 3",
        "per_device_train_batch_size": "derived from global_batch_size and 2 processes",
        "gradient_accumulation_steps": "derived from global_batch_size and 2 processes",
        "run_name": "derived from run.toml",
        "output_dir": "derived from run_name",
        "launch.num_processes": "2  # as this process was started",
    }
    assert {name: arguments.origins.get(name) for name in expected} == expected
    plain = read_arguments([write_good(run_name=None), "--output_dir", "a/b"])
    assert plain.origins["global_batch_size"] == "derived from 1 process"
    assert plain.origins["run_name"] == "derived from good.json"
    words = [f"--{name}={value}" for name, value in GOOD.items()]
    assert read_arguments(words).origins["run_name"] == "default"
    assert read_arguments([*words, "--output_dir=a"]).origins["run_name"] == (
        "derived from output_dir"
    )


def test_origins_are_no_part_of_the_arguments() -> None:
    arguments = Arguments(seed=3)
    known = arguments.with_origins({"seed": "here"})
    assert (arguments.origins, known.origins) == ({}, {"seed": "here"})
    assert known == arguments and describe(known) == describe(arguments)
    assert repr(known) == repr(arguments)
    assert copy.deepcopy(known).origins == {"seed": "here"}
    assert "#" not in as_yaml(arguments).partition("\n")[2]


@pytest.mark.parametrize(
    ("environ", "file", "options", "zero", "lines"),
    [
        (SINGLE, None, "", None, []),
        (DDP, None, "", None, ["num_processes: 2  # as this process was started"]),
        (
            DDP | {"ACCELERATE_MIXED_PRECISION": "bf16"},
            DDP_FILE + "mixed_precision: bf16\n",
            "",
            None,
            [
                "num_processes: 2  # launch.yaml says num_processes: 2",
                "mixed_precision: bf16  # launch.yaml says mixed_precision: bf16",
            ],
        ),
        (
            WITH_JSON,
            NAMES_JSON,
            "--num_processes 2",
            {"zero_optimization": {"stage": 2}},
            [
                "num_processes: 2  # accelerate launch says --num_processes 2",
                "zero_optimization.stage: 2  # zero.json",
            ],
        ),
    ],
    ids=["python", "torchrun", "ddp", "deepspeed"],
)
def test_what_the_launch_decides_stands_beside_the_arguments(
    environ: dict[str, str],
    file: str | None,
    options: str,
    zero: Any,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = launched(environ, file, options, zero)
    monkeypatch.setattr("llm_training.argument_parsing.read_launch_settings", lambda: launch)
    text = as_yaml(resolve_arguments([write_good()]).arguments)
    comments = text.rpartition("show_arguments: false  # default\n")[2].splitlines()
    assert {f"# {line}" for line in lines} <= set(comments)
    assert bool(comments) is bool(lines)
    assert settings_of(text)["mixed_precision"] == "auto"


# ----------------------------------------------------------------------------- --show_arguments


def shown_by(*argv: str, code: int = 0, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([*argv, "--show_arguments"])
    assert ended.value.code == code
    output = capsys.readouterr()
    return output.out, output.err


def test_shown_arguments_run_again_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seed", "7", "--sample_prompt", "a $${b} # c", "--num_threads=2"]
    out, err = shown_by(write_good(), *flags, capsys=capsys)
    assert err == ""
    assert "\n  seed: 7  # command line\n" in out
    assert '\n  model_type: "gpt2"  # good.json line 1\n' in out
    assert read_arguments([write("saved.yaml", out)]) == read_arguments(["good.json", *flags])
    again, _ = shown_by("saved.yaml", capsys=capsys)
    assert settings_of(again) == settings_of(out)
    assert "\n  seed: 7  # saved.yaml line " in again


def test_shown_arguments_run_on_another_number_of_processes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sizes that were derived are shown, and derived anew; those that were given stay."""
    out, _ = shown_by(write_good(), "--per_device_train_batch_size=4", capsys=capsys)
    assert "\n  # global_batch_size: " in out and "\n  per_device_train_batch_size: 4" in out
    again = read_arguments([write("saved.yaml", out)], 2)
    assert (again.per_device_train_batch_size, again.global_batch_size) == (4, 8)


def test_shown_arguments_come_before_what_is_wrong_with_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, err = shown_by(write_good(seed=7), "--max_steps", "x", code=2, capsys=capsys)
    assert "\n  seed: 7  # good.json line 1\n" in out
    assert "\n  max_steps: null  # default, for command line is refused\n" in out
    assert err.startswith("1 problem with the arguments:\n  - max_steps (command line): takes")


def test_only_rank_0_shows_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown_by(write_good(), capsys=capsys) == ("", "")


def test_showing_imports_nothing_slow_and_takes_no_second() -> None:
    write("good.yaml", "".join(f"{name}: {json.dumps(value)}\n" for name, value in GOOD.items()))
    ended = run_python(
        "import resource\n"
        "from llm_training.argument_parsing import parse_arguments\n"
        "try: parse_arguments(['good.yaml', '--show_arguments'])\n"
        "except SystemExit as end: print('code', end.code)\n"
        "tops = {name.split('.')[0] for name in sys.modules}\n"
        "print('slow', sorted(tops & {'torch', 'transformers', 'numpy', 'accelerate', 'mlflow'}))\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    *_, code, slow, seconds = ended.stdout.splitlines()
    assert (code, slow) == ("code 0", "slow []"), ended.stderr
    assert float(seconds) < 1  # of a processor


# ------------------------------------------------------------------------------ the output folder


def test_the_output_folder_keeps_arguments_with_origins(tmp_path: Path) -> None:
    arguments = read_arguments([write_good(sample_prompt="$${x}"), "--seed", "7"])
    output = OutputFolder("out")
    output.path.mkdir()
    output.write_opening(arguments, {}, {})
    assert read_arguments(["out/arguments.yaml"]) == arguments
    assert read_arguments(["out/arguments.json"]) == arguments
    assert "\n  seed: 7  # command line\n" in Path("out/arguments.yaml").read_text("utf-8")
    assert output.changed_arguments(arguments) == {}
    assert {"arguments.json", "arguments.yaml"} <= {path.name for path in output.artifacts()}
    assert not list(Path("out").glob("*.tmp"))
