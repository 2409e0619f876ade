"""Proves that JSON, YAML and TOML files say what they seem to say, each line by its number.

The same settings give the same arguments in all three forms, flat or in sections. What two readers
of a form could understand differently is refused, where it stands, and so is what only that form
can say.
"""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from arguments import GROUPS, KINDS, Arguments
from llm_training.argument_files import Table, plain, read_file, read_toml
from llm_training.argument_parsing import SECTIONS, read_arguments
from tests.argument_cases import (
    GOOD,
    open_clean_place,
    problems_of,
    the_problem_of,
    write,
    write_good,
)


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        (b'{"seed": 1,}', ["not valid JSON", "double quotes", "line 1 column 12"]),
        (b'{\n "seed": 1\n "device": "cpu"\n}', ["',' delimiter", "line 3 column 2"]),
        (b"", ["not valid JSON", "line 1 column 1"]),
        (b"seed: 1", ["not valid JSON", "line 1 column 1"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b'{\n # seed\n "seed": 1}', ["line 2 column 2", "no comments", "use YAML or TOML"]),
        (b"{} {}", ["not valid JSON", "Extra data"]),
        (b'["seed"]', ['holds ["seed"], not one object']),
        (b'{"run_name": "\xff"}', ["not UTF-8 text", "0xff", "position 14"]),
    ],
)
def test_a_file_that_cannot_be_read(content: bytes, phrases: list[str]) -> None:
    problem = the_problem_of(write("bad.json", content))
    assert problem.startswith("argument file bad.json: ")
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


def test_pairs_behind_a_flag_change_their_keys_of_a_files_object_alone() -> None:
    path = write_good(config_overrides={"n_layer": 2, "n_head": 4})

    def overrides(*flag: str) -> dict[str, Any]:
        return read_arguments([path, "--config_overrides", *flag]).config_overrides

    assert overrides("n_layer=3,n_embd=8") == {"n_layer": 3, "n_head": 4, "n_embd": 8}
    assert overrides('{"n_embd": 8}') == {"n_embd": 8}
    assert overrides("null") == {}
    bad = write_good("bad.json", config_overrides=[1])
    problem = the_problem_of(bad, "--config_overrides", "n_layer=3")
    assert problem.startswith("config_overrides (bad.json line")


def test_a_file_that_is_not_there() -> None:
    Path("folder.json").mkdir()
    missing, folder = problems_of("missing.json", "folder.json")
    assert missing.startswith("argument file missing.json: No such file or directory")
    assert folder.startswith("argument file folder.json: Is a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission() -> None:
    Path(write_good()).chmod(0)
    assert "Permission denied" in the_problem_of("good.json")


def test_keys_that_stand_twice() -> None:
    text = json.dumps(GOOD)[:-1] + ', "seed": 1, "seed": 2, "config_overrides": {"a": 1, "a": 1}}'
    text = text.replace('"seed": 2', '\n"seed": 2').replace('{"a": 1,', '{"a": 1,\n')
    outer, inner = sorted(problems_of(write("twice.json", text)), reverse=True)
    assert outer == "seed (twice.json line 1 and line 2): the key stands twice; keep one"
    assert inner.startswith("config_overrides (twice.json line 2): the key a stands twice")
    assert inner.endswith("on line 2 and line 3")


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("weight_decay", 0, 0.0),
        ("dropout", None, None),
        ("eval_metrics", "token_accuracy", ["token_accuracy"]),
        ("validation_file", None, []),
        ("config_overrides", {"act": "${WHERE}", "n": [1]}, {"act": "somewhere", "n": [1]}),
        ("train_file", "${PYTHON_STDLIB}/*.py", [sysconfig.get_path("stdlib") + "/*.py"]),
        ("experiment_name", "costs $5", "costs $5"),
    ],
)
def test_a_file_is_read(name: str, given: Any, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "somewhere")
    found = getattr(read_arguments([write_good(**{name: given})]), name)
    assert (found, type(found)) == (value, type(value))


def test_a_byte_order_mark_is_no_mistake() -> None:
    path = write("marked.json", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_arguments([path]).model_type == "gpt2"


def test_later_files_win_and_flags_win_over_files() -> None:
    first = write_good("first.json", seed=1, max_steps=1, save_steps=1)
    second = write("second.json", '{"max_steps": 4, "save_steps": 2}')
    arguments = read_arguments([first, second, "--save_steps", "3"])
    assert (arguments.seed, arguments.max_steps, arguments.save_steps) == (1, 4, 3)
    assert arguments.logging_steps == Arguments().logging_steps


# ------------------------------------------------------------------------------- the three forms

IN_JSON = """{
  "run_name": "it", "seed": 3,
  "model": {"model_type": "gpt2", "config_overrides": {"n_layer": 2, "a": [1.5, {"b": null}]}},
  "precision and memory": {"torch_compile": false},
  "data": {
    "train_file": ["."],
    "tokenizer_name": "byte"
  },
  "learning_rate": 1e-4
}"""
IN_YAML = """\
run_name: it # a comment
seed: 3
model:
  model_type: gpt2
  config_overrides: {n_layer: 2, a: [1.5, {b: }]}
precision and memory: {torch_compile: false}
data:
  train_file:
    - .
  tokenizer_name: 'byte'
optimization: # all in comments
  # learning_rate: 1
learning_rate: 1e-4
"""
IN_TOML = """\
run_name = "it" # a comment
seed = 3
learning_rate = 1e-4
model.model_type = "gpt2"
[model.config_overrides]
n_layer = 2
a = [1.5, {b = 4}]
[precision_and_memory]
torch_compile = false
[data]
train_file = [ # "=[
  ".",
]
"tokenizer_name" = '''byte'''
"""


def test_all_forms_say_the_same_and_where() -> None:
    in_json = read_arguments([write("it.json", IN_JSON)])
    in_yaml = read_arguments([write("it.yaml", IN_YAML)])
    in_toml = read_arguments([write("it.toml", IN_TOML)])
    assert in_json == in_yaml
    assert in_json.config_overrides.pop("a") == [1.5, {"b": None}]
    assert in_toml.config_overrides.pop("a") == [1.5, {"b": 4}]  # it has no null
    assert in_json == in_toml
    assert (in_json.learning_rate, in_json.seed, in_json.train_file) == (0.0001, 3, ["."])
    names = ("seed", "model_type", "config_overrides", "torch_compile", "train_file")
    names += ("tokenizer_name", "learning_rate")
    for arguments, ending, lines in (
        (in_json, "json", [2, 3, 3, 4, 6, 7, 9]),
        (in_yaml, "yaml", [2, 4, 5, 6, 8, 10, 13]),
        (in_toml, "toml", [2, 4, 5, 9, 11, 14, 3]),
    ):
        places = [f"it.{ending} line {line}" for line in lines]
        assert [arguments.origins[name] for name in names] == places


def test_files_of_all_forms_stand_in_a_row_and_later_ones_win() -> None:
    files = [write_good(seed=1, save_steps=1), write("b.yml", "seed: 2\nmax_steps: 2\n")]
    files.append(write("c.TOML", "max_steps = 3\nlogging_steps = 3"))
    arguments = read_arguments([*files, "--logging_steps", "4"])
    found = [arguments.save_steps, arguments.seed, arguments.max_steps, arguments.logging_steps]
    assert found == [1, 2, 3, 4]
    names = ("save_steps", "seed", "max_steps", "logging_steps", "warmup_steps")
    assert [arguments.origins[name] for name in names] == [
        *("good.json line 1", "b.yml line 1", "c.TOML line 1", "command line", "default"),
    ]
    assert arguments.run_name == "c"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1.5e3", "learning_rate", 1500.0),
        ("max_steps: +7", "max_steps", 7),
        ("save_steps: ~", "save_steps", None),
        ("save_steps:", "save_steps", None),
        ("save_best: True\neval_steps: 1", "save_best", True),
        ("run_name: it's", "run_name", "it's"),
        ('run_name: "no"', "run_name", "no"),
        ("run_name: '017'", "run_name", "017"),
        ("run_name: v1.2.3", "run_name", "v1.2.3"),
        ("sample_prompt: |\n  def f():\n    x", "sample_prompt", ["def f():\n  x"]),
        ("config_overrides:\n  eps: 1e-05", "config_overrides", {"eps": 1e-05}),
        ("learning_rate: ${RATE}", "learning_rate", 0.25),
        ("save_best: ${YES}", "save_best", True),
        ("experiment_name: a$${RATE}", "experiment_name", "a${RATE}"),
        ("experiment_name: $$${RATE} $$", "experiment_name", "$${RATE} $$"),
    ],
)
def test_a_line_of_yaml(text: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE", "0.25")
    monkeypatch.setenv("YES", "true")
    found = getattr(read_arguments([write_good(), write("x.yaml", text)]), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("run_name: no", ["(x.yaml line 1)", "true or false to others", '"no" in quotes']),
        ("save_best: yes", ["true or false", 'write "yes" in quotes, or true or false without']),
        ("train_file: [off]", ["train_file (x.yaml line 1)", "off is text to some"]),
        ("run_name: 2026-01-02", ["a date to others", '"2026-01-02" in quotes']),
        ("seed: 017", ["a plain number"]),
        ("seed: 08", ["a plain number"]),
        ("seed: 0x1F", ["a number in another form"]),
        ("max_steps: 1_000", ["1_000 is text to some", "a plain number"]),
        ("run_name: 12:30", ["12:30 is text to some", "in quotes"]),
        ("learning_rate: .nan", [".nan is text to some"]),
        ("max_steps: 1e3", ["takes integer|null, not 1000.0", "write 1000"]),
        ("learning_rate: '1e-4'", ['not "1e-4"', "without quotes"]),
        ("run_name: 5", ["takes text|null, not 5", "in quotes"]),
        ("\n\nlearnig_rate: 1", ["learnig_rate (x.yaml line 3)", "did you mean learning_rate"]),
        ("seed: 1\nseed: 2", ["seed (x.yaml line 1 and line 2)", "stands twice"]),
        ("config_overrides: {1: 2}", ["the key 1 on line 1 is not text", "in quotes"]),
        ("config_overrides: {a: no}", ["config_overrides (x.yaml line 1)", "no is text"]),
        ("learning_rate: ${NOT_SET}", ["learning_rate (x.yaml line 1)", "set NOT_SET in"]),
        ("sample_prompt: ${1}", ["${1}", "write $${ for the text"]),
        ("model: {seed: 1}", ["seed (x.yaml line 1)", "section model, but belongs to run"]),
        ("precision: {seed: 1}", ["section precision, but belongs to run"]),
        ("run: {seed: 1}\nseed: 2", ["seed (x.yaml line 1 and line 2)"]),
        ("run: {seed: 1}\nrun: {ddp_timeout: 2}", ["run (x.yaml line 1 and line 2)", "twice"]),
        ("model: gpt2", ["model (x.yaml line 1)", "is a section, not a value"]),
        ("model: {sede: 1}", ["sede (x.yaml line 1)", "no such argument", "did you mean seed"]),
        ("run: {run: {seed: 1}}", ["run (x.yaml line 1)", "no such argument"]),
    ],
)
def test_one_mistake_in_yaml(text: str, phrases: list[str]) -> None:
    problem = the_problem_of(write_good(), write("x.yaml", text))
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("run_name = 2026-01-02", ["is a date or a time", "in quotes"]),
        ("# it\nsave_steps = 'null'", ["save_steps (x.toml line 2)", "TOML has no null"]),
        ("learning_rate = inf", ["takes number, not Infinity"]),
        ("[model]\nseed = 1", ["seed (x.toml line 2)", "belongs to run"]),
        ("[model]\n\n[run]\nsede = 1", ["sede (x.toml line 4)", "no such argument"]),
        ("seed = 1\n[run]\nseed = 2", ["seed (x.toml line 1 and line 3)", "stands twice"]),
        ("[[model]]\nseed = 2", ["model (x.toml line 1)", "is a section"]),
    ],
)
def test_one_mistake_in_toml(text: str, phrases: list[str]) -> None:
    problem = the_problem_of(write_good(), write("x.toml", text))
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


@pytest.mark.parametrize(
    ("name", "text", "phrases"),
    [
        ("x.yaml", "a: &b 1", ["line 1 has an anchor", "write the value out"]),
        ("x.yaml", "a: 1\nb: *a", ["line 2 has an alias"]),
        ("x.yaml", "a: !!python/name:os.system", ["line 1 has a tag"]),
        ("x.yaml", "a: 1\n---\na: 2", ["not valid YAML", "line 2"]),
        ("x.yaml", "a: [1", ["not valid YAML", "line 1"]),
        ("x.yaml", "- seed", ['holds ["seed"], not one object']),
        ("x.yaml", "", ["holds null, not one object"]),
        ("x.yaml", "no", ["no is text to some"]),
        ("x.yaml", "[" * 1200, ["not valid YAML"]),
        ("x.toml", "seed = 1\nseed = 2\n[a]", ["not valid TOML", "Cannot overwrite", "line 2"]),
        ("x.toml", "seed: 1", ["not valid TOML", "line 1"]),
    ],
    ids=lambda part: str(part)[:20],
)
def test_a_yaml_or_toml_file_that_cannot_be_read(name: str, text: str, phrases: list[str]) -> None:
    problem = the_problem_of(write(name, text))
    assert problem.startswith(f"argument file {name}: ")
    assert [phrase for phrase in phrases if phrase not in problem] == [], problem


def test_what_the_environment_holds_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2")
    for name in ("learning_rate", "device", "save_best", "config_overrides"):
        problem = the_problem_of(write_good(**{name: "${MY_KEY}"}))
        assert problem.startswith(f"{name} (good.json line 1): takes ")
        assert 'not "${MY_KEY}"' in problem and "hunter2" not in problem
    monkeypatch.setenv("MY_KEY", "hf_" + "aB3" * 10)
    problem = the_problem_of(write_good(experiment_name="${MY_KEY}"))
    assert "what looks like a key or token" in problem and "aB3" not in problem
    problem = the_problem_of(write_good(train_file="${MY_KEY}"))  # which does not exist, either
    assert "train_file holds what looks like a key or token" in problem and "aB3" not in problem


LONG_TOML = (
    r'''a = "#[="  # ] "
b = """
c = 1
[x]
\""""
d = [
  [1], # ]
  {e = "}"},
]
f.'g.h'.i = '''
    + r"""'''
'
'''''

[ t . u ] # v = 1
w = 1979-05-27 07:32:00
[[z]]
y=1"""
)


def test_lines_in_a_long_toml_file() -> None:
    """Strings, comments and brackets that look like something else do not shift a line."""
    table = read_toml(LONG_TOML)
    lines = {entry.key: entry.line for entry in table}
    assert lines == {"a": 1, "b": 2, "d": 6, "f": 10, "t": 14, "z": 16}
    inner = next(entry.value for entry in table if entry.key == "t")[0].value
    assert [(entry.key, entry.line) for entry in inner] == [("w", 15)]


def test_a_path_in_a_file_is_seen_from_the_working_folder() -> None:
    Path("below").mkdir()
    write("here.txt", "x")
    file = write("below/run.yaml", "train_file: here.txt\nmodel_type: gpt2\ntokenizer_name: byte")
    assert read_arguments([file]).train_file == ["here.txt"]
    write("below/there.txt", "x")
    write(file, "train_file: there.txt\nmodel_type: gpt2\ntokenizer_name: byte")
    assert "train_file=there.txt does not exist" in the_problem_of(file)


def test_no_section_is_called_as_an_argument() -> None:
    assert not SECTIONS.keys() & KINDS.keys()
    assert len(set(SECTIONS.values())) == len(GROUPS)


def test_a_key_of_a_file_is_text_and_its_lines_count_from_1() -> None:
    for name, text in (("x.json", '\n{"1": {"é\\n": 2}}'), ("x.yaml", "\n'1': {\"é\\n\": 2}")):
        table = read_file(write(name, text))
        assert isinstance(table, Table) and table[0].line == 2
        assert plain(table) == {"1": {"é\n": 2}}
