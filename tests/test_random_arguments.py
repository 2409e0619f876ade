"""Proves that no value at any argument ends in a traceback, and that what is shown is read again.

The values are drawn: the same ones each time, in a few seconds. To look further, with new ones:

    RANDOM_EXAMPLES=20000 pytest tests/test_random_arguments.py --timeout 0
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arguments import KINDS, SOURCE_ARGUMENTS, Arguments, Kind
from llm_training import argument_parsing
from llm_training.argument_parsing import parse_arguments, resolve_arguments
from llm_training.resolved_arguments import as_settings, as_yaml
from tests.argument_cases import GOOD, open_clean_place, write, write_good

NUM_EXAMPLES = os.environ.get("RANDOM_EXAMPLES")
drawn = settings(
    max_examples=int(NUM_EXAMPLES or 200),
    derandomize=NUM_EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[*HealthCheck],
)

NUMBERS = st.one_of(
    st.integers(-2, 600),
    st.sampled_from(
        [10**400, -(10**20), 2**32, 1e-300, 1e308, math.inf, -math.inf, math.nan, -0.0]
    ),
    st.floats(),
)
# Also what is a variable, a path, a secret, a word of YAML, or no character at all.
ODD_WORDS = (
    *("", " ", ".", "..", "/", "~", "~/x", "*", "[", "a/b", "a/b/c", "good.json", "\x00", "\udc80"),
    *("${HOME}", "${", "${NOT_SET}", "$${x}", "null", "none", "true", "no", "1e-4", "017", "0x1"),
    *("auto", "char", "bpe", "gpt2", "-1", "=", "{", "a://me:pw@b", "hf_" + "aB3" * 10, "a" * 5000),
)
WORDS = st.one_of(st.text(max_size=12), st.sampled_from(ODD_WORDS))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


def fitting(kind: Kind) -> st.SearchStrategy[Any]:
    """What an argument takes, whatever it means."""
    resolved = [word for word in ODD_WORDS if word and not word.startswith("~/")]
    texts = st.one_of(st.text(min_size=1, max_size=12), st.sampled_from(resolved))
    texts = st.sampled_from(kind.choices) if kind.choices else texts
    values: st.SearchStrategy[Any] = {
        bool: st.booleans(),
        int: st.one_of(st.integers(-2, 600), st.integers()),
        float: st.one_of(
            st.floats(0, 60), st.floats(allow_nan=False, allow_infinity=False), st.just(0.0)
        ),
        str: texts,
        list: st.lists(texts, max_size=3),
        dict: st.dictionaries(
            st.one_of(st.sampled_from(["n_positions", "n_layer"]), st.text(max_size=5)),
            st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
            max_size=3,
        ),
    }[kind.type]
    return st.one_of(st.none(), values) if kind.nullable else values


SOURCES = st.dictionaries(
    st.text(max_size=5),
    st.one_of(
        ANYTHING,
        st.dictionaries(st.sampled_from([*SOURCE_ARGUMENTS, "weight"]), ANYTHING, max_size=3),
    ),
    max_size=3,
)
# One to four arguments, each with something of any type or of its own.
ENTRIES = st.lists(
    st.sampled_from([*KINDS]).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.one_of(ANYTHING, fitting(KINDS[name]), *[SOURCES] * (name == "train_mixture")),
        )
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda entry: entry[0],
).map(dict)
FLAGS = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([*KINDS]), st.sampled_from([f"no_{name}" for name in KINDS])),
        st.lists(st.one_of(WORDS, NUMBERS.map(str)), max_size=2),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)


def read(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments come of it, or what is shown, or a report."""
    code, found = None, None
    try:
        found = parse_arguments(argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    if code == 2:
        assert said.err.rpartition("\nAll arguments: ")[0].partition(" with the arguments:\n  - ")[
            2
        ]
    else:
        assert said.err == ""
        assert isinstance(found, Arguments) or (code == 0 and said.out.startswith("# Every"))


@drawn
@given(entries=ENTRIES, is_yaml=st.booleans())
@example(
    entries={
        "torch_compile": True,
        "torch_compile_mode": "reduce-overhead",
        "gradient_accumulation_steps": 2,
        "global_batch_size": 0,
    },
    is_yaml=False,
)
@example(entries={"block_size": 9, "config_overrides": {"n_positions": "x"}}, is_yaml=True)
def test_anything_in_a_file(
    entries: dict[str, Any], is_yaml: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    content = GOOD | entries
    if is_yaml:
        text = yaml.dump(content, allow_unicode=False)
        read([write("x.yaml", text)], capsys)
    else:
        read([write("x.json", json.dumps(content))], capsys)


@drawn
@given(flags=FLAGS)
def test_anything_behind_a_flag(
    flags: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name, values in flags for word in (f"--{name}", *values)]
    read([write_good(), *words], capsys)


@drawn
@given(text=st.one_of(st.binary(max_size=60), st.text(max_size=60)), ending=st.sampled_from("jyt"))
def test_anything_as_a_file(
    text: str | bytes, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = {"j": "x.json", "y": "x.yaml", "t": "x.toml"}[ending]
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    read([write_good(), write(name, content)], capsys)


@drawn
@given(data=st.data())
def test_what_is_shown_is_read_again_as_it_was(
    data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(argument_parsing, "find_problems", lambda *_: ["no matter what they mean"])
    kept_out = ("train_mixture", "validation_sets", "from_run", "show_arguments")
    names = data.draw(
        st.lists(st.sampled_from([n for n in KINDS if n not in kept_out]), max_size=6, unique=True)
    )
    values = {name: data.draw(fitting(KINDS[name]), label=name) for name in names}
    arguments = Arguments(**values).with_origins({name: data.draw(st.text()) for name in names})
    write("x.yaml", as_yaml(arguments))
    write("x.json", json.dumps(as_settings(arguments)))
    for file in ("x.yaml", "x.json"):
        assert resolve_arguments([file], 1).arguments == arguments
