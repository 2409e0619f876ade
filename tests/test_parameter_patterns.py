"""Proves that patterns of names freeze what they say, set the rates that they say, and no others.

The models are tiny ones of two kinds: GPT-2 with its tied head, and llama, whose head is its own.
`tests/distributed/test_frozen.py` has several processes, `test_optim.py` the optimizers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from arguments import Arguments, BatchSizes
from llm_training.argument_checks import find_problems
from llm_training.causal_lm import CausalLMWithLoss
from llm_training.launch_settings import LaunchSettings
from llm_training.memory_needs import estimate_memory
from llm_training.modeling import model_fingerprint
from llm_training.network import build_network
from llm_training.parameter_patterns import (
    PatternError,
    freeze_parameters,
    rate_factors,
    rate_lines,
)
from llm_training.pattern_checks import pattern_problems
from llm_training.traced_memory import Outline
from tests.small_runs import curve, open_place, train_small

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    },
}
# A loaded model in place of the new one of `small_runs`.
LOADED: dict[str, Any] = {"model_type": None, "config_overrides": {}, "dropout": None}
# What differs from 1 so little that the curve is the same, but makes a group of its own.
NEARLY_ONE = 1 + 1e-9


def tiny(kind: str = "gpt2", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, vocab_size=257, **SIZES[kind], **changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def freeze(model: PreTrainedModel, *patterns: str) -> list[str]:
    return freeze_parameters(model, Arguments(freeze_parameters=[*patterns]))


def trained_names(model: PreTrainedModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def factors_by_name(model: PreTrainedModel, patterns: dict[str, float]) -> dict[str, float]:
    found = rate_factors(model, patterns)
    return {n: found[id(p)] for n, p in model.named_parameters() if id(p) in found}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_place(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------- which are frozen


@pytest.mark.parametrize(
    ("kind", "patterns", "is_frozen"),
    [
        ("gpt2", ["transformer.wpe.weight"], lambda n: n == "transformer.wpe.weight"),
        ("gpt2", ["*.wpe.*"], lambda n: ".wpe." in n),
        ("gpt2", ["*.h.0.*"], lambda n: ".h.0." in n),
        ("gpt2", ["*.h.[1-9].*"], lambda n: ".h.1." in n),
        ("gpt2", ["*.c_??.weight"], lambda n: n.endswith("c_fc.weight")),
        ("gpt2", ["*.bias", "*.ln_*"], lambda n: n.endswith(".bias") or ".ln_" in n),
        ("gpt2", ["*", "!*.mlp.*"], lambda n: ".mlp." not in n),
        # The last that fits counts, in any number of turns.
        ("gpt2", ["*", "!*.mlp.*", "*.bias"], lambda n: ".mlp." not in n or "bias" in n),
        ("gpt2", ["*.mlp.*", "!*.mlp.*", "*.h.1.mlp.*"], lambda n: ".h.1.mlp." in n),
        # One that never decides is no mistake.
        ("gpt2", ["*.mlp.c_fc.*", "*.mlp.*"], lambda n: ".mlp." in n),
        # A tied weight goes by both its names.
        ("gpt2", ["lm_head.*"], lambda n: n == "transformer.wte.weight"),
        ("gpt2", ["*.wte.*"], lambda n: n == "transformer.wte.weight"),
        ("gpt2", ["*", "!lm_head.*"], lambda n: n != "transformer.wte.weight"),
        ("llama", ["lm_head.*"], lambda n: n == "lm_head.weight"),
        ("llama", ["*", "!lm_head.weight"], lambda n: n != "lm_head.weight"),
    ],
)
def test_the_last_pattern_that_fits_decides(kind: str, patterns: list[str], is_frozen: Any) -> None:
    model = tiny(kind)
    expected = {name for name in trained_names(model) if not is_frozen(name)}
    assert expected
    freeze(model, *patterns)
    assert trained_names(model) == expected


def test_without_patterns_nothing_is_done_or_said() -> None:
    model = tiny()
    assert freeze(model) == rate_lines(model, Arguments()) == []
    assert len(trained_names(model)) == 28


def test_a_name_is_that_of_the_model_itself_whatever_is_around_it() -> None:
    model = tiny()
    wrapped = CausalLMWithLoss(model, chunked_loss=True)
    assert rate_factors(wrapped, {"transformer.h.0.*": 3}) == rate_factors(
        model, {"transformer.h.0.*": 3}
    )
    with pytest.raises(PatternError, match="gpt2 has no such parameter"):
        rate_factors(wrapped, {"model.transformer.h.0.*": 3})


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["*.wpx.*"], ["--freeze_parameters *.wpx.*: gpt2", "Closest are transformer.wpe.weight."]),
        (["wte"], ["Closest are transformer.wte.weight.", "A pattern fits whole names"]),
        (["h.0.mlp"], ["Closest are transformer.h.*.mlp.c_fc.weight, transformer.h.*.mlp.c_fc"]),
        (["*.bias", "!*.atn.*"], ["--freeze_parameters !*.atn.*", "transformer.h.*.attn.c_attn"]),
        (
            ["*QQQQ*"],
            ["It has transformer.wte.weight, lm_head.weight, transformer.", " more kinds"],
        ),
        (["TRANSFORMER.*"], ["no such parameter"]),
        (
            ["*"],
            ["--freeze_parameters * leaves nothing to train", "such as !transformer.ln_f.bias"],
        ),
        (["*.bias", "!*"], ["--freeze_parameters *.bias !* freezes nothing", "put what begins"]),
    ],
)
def test_patterns_that_do_not_do_what_was_meant_are_told(
    patterns: list[str], words: list[str]
) -> None:
    with pytest.raises(PatternError) as caught:
        freeze(tiny(), *patterns)
    assert [word for word in words if word not in str(caught.value)] == []


def test_what_is_frozen_is_said_with_what_is_tied_to_it() -> None:
    # Two layers of 12 tensors, and four outside of them; the embedding is 257 x 16.
    assert freeze(tiny(), "*.wpe.*") == [
        "Frozen   1 of 28 tensors: 512 of 11,216 parameters stay as they are, 10,704 are trained"
    ]
    assert freeze(tiny(), "*.wte.*")[0].endswith(
        " 4,112 of 11,216 parameters stay as they are, 7,104 are trained; transformer.wte.weight"
        " and lm_head.weight are one weight: frozen"
    )
    assert freeze(tiny(), "*", "!lm_head.*")[0].endswith(
        "; transformer.wte.weight and lm_head.weight are one weight: trained"
    )
    assert "one weight" not in freeze(tiny(), "*", "!*.mlp.*")[0]


@pytest.mark.parametrize(
    ("backend", "precision", "is_said"),
    [("deepspeed", "bf16", True), ("deepspeed", "no", False), ("fsdp", "bf16", False)],
)
def test_a_backend_that_rounds_what_is_frozen_is_told(
    backend: Any, precision: str, is_said: bool
) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=257, **SIZES["gpt2"])
    stand_in: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
    arguments = Arguments(model_type="gpt2", freeze_parameters=["*.wte.*"], cpu_fast_path=False)
    batch = BatchSizes(per_device=1, accumulation=1, processes=1, global_batch=1)
    launch = LaunchSettings(backend=backend)
    _, lines = build_network(stand_in, arguments, launch, config, batch, 32)
    assert any("held in bf16 by DeepSpeed, also in final/" in line for line in lines) == is_said


# ------------------------------------------------------------------------------- which rates


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"*.wpe.*": 0.1}, {"transformer.wpe.weight": 0.1}),
        ({"lm_head.*": 0.5}, {"transformer.wte.weight": 0.5}),
        # The last that fits counts, also where it is 1.
        ({"*.ln_f.*": 2, "*.bias": 3, "*.h.*": 1}, dict(zip(("w", "b"), (2, 3), strict=True))),
    ],
)
def test_the_last_factor_that_fits_counts(
    patterns: dict[str, float], expected: dict[str, float]
) -> None:
    names = {"w": "transformer.ln_f.weight", "b": "transformer.ln_f.bias"}
    assert factors_by_name(tiny(), patterns) == {names.get(n, n): f for n, f in expected.items()}


def test_factors_of_what_is_not_trained_are_refused() -> None:
    model = tiny()
    freeze(model, "*.wte.*", "*.h.0.*")
    assert factors_by_name(model, {"*.h.*.ln_1.bias": 2}) == {"transformer.h.1.ln_1.bias": 2}
    with pytest.raises(PatternError) as caught:
        rate_factors(model, {"*.bias": 2, "lm_head.weight": 3})
    assert "--learning_rate_factors lm_head.weight: what fits it, such as lm_head" in str(
        caught.value
    )
    assert "is not trained" in str(caught.value) and "ln_f.weight" not in str(caught.value)[:120]
    with pytest.raises(PatternError, match=r"--learning_rate_factors \*\.wpx\.\*: gpt2 has no"):
        rate_factors(model, {"*.wpx.*": 2})


def test_rates_are_said() -> None:
    def said(**patterns: float) -> list[str]:
        names = {f"*{key}*": factor for key, factor in patterns.items()}
        return rate_lines(tiny(), Arguments(learning_rate_factors=names))

    assert said(wpe=0.1, ln_=4) == [
        "Rates    x 0.1: 1 tensor, 512 parameters; x 4: 10 tensors, 160 parameters; x 1: the rest"
    ]
    assert said(t=2) == ["Rates    x 2: 28 tensors, 11,216 parameters"]
    assert said(wpe=1) == ["Rates    x 1: all"]
    assert said(wte=2)[0].endswith(
        "; transformer.wte.weight and lm_head.weight are one weight: x 2"
    )


# ------------------------------------------------------------------------------- quick checks


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze_parameters": ["*.wte.*", "!"]}, ['freeze_parameters=["*.wte.*", "!"]', "behind"]),
        ({"freeze_parameters": ["!*.wte.*", "*"]}, ["!*.wte.* takes out of", "begin with what is"]),
        ({"freeze_parameters": ["*.wte.*"], "lora_rank": 4}, ["lora_rank=4 exclude each other"]),
        ({"learning_rate_factors": {"*.wte.*": "0.1"}}, ['"*.wte.*": "0.1"', "without quotes"]),
        ({"learning_rate_factors": {"*.wte.*": True}}, ["true is no factor", "a number above 0"]),
        ({"learning_rate_factors": {"*.wte.*": None}}, ["null is no factor", "a number above 0"]),
        ({"learning_rate_factors": {"*.wte.*": 0}}, ["0 is out of range", "freeze_parameters"]),
        ({"learning_rate_factors": {"*.wte.*": -0.5}}, ["-0.5 is out of range", "more than 0"]),
        ({"learning_rate_factors": {"!*.wte.*": 2}}, ["without a !", "the factor 1"]),
        ({"learning_rate_factors": {"": 2}}, ["a pattern of names belongs before the colon"]),
    ],
)
def test_what_no_model_could_make_sense_of_is_told_at_once(
    settings: dict[str, Any], words: list[str]
) -> None:
    arguments = Arguments(model_name_or_path="base", **settings)
    (problem,) = pattern_problems(arguments)
    assert [word for word in words if word not in problem] == []
    assert problem in find_problems(arguments, LaunchSettings())


def test_good_patterns_have_no_problem() -> None:
    assert not [*pattern_problems(Arguments())]
    assert not [*pattern_problems(Arguments(freeze_parameters=["*", "!*.mlp.*"]))]
    factors = {"*.wte.*": 0.1, "*lora_B*": 16}
    assert not [*pattern_problems(Arguments(learning_rate_factors=factors, lora_rank=4))]


# ------------------------------------------------------------------------------- the fingerprint


def test_without_freezing_the_fingerprint_is_what_it_always_was() -> None:
    model = tiny("llama")
    layout = [(n, list(p.shape), "torch.float32") for n, p in model.named_parameters()]
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:12]
    expected = f"{sum(p.numel() for p in model.parameters()):,} parameters ({digest})"
    assert model_fingerprint(model) == expected
    # Also where the architecture itself has something that it does not train.
    model.lm_head.weight.requires_grad_(False)
    assert model_fingerprint(model) == expected


def test_the_fingerprint_tells_what_is_frozen() -> None:
    def mark(*patterns: str) -> str:
        model = tiny()
        freeze(model, *patterns)
        return model_fingerprint(CausalLMWithLoss(model))

    marks = [mark(), mark("*.wpe.*"), mark("*.h.0.*"), mark("*.h.1.*"), mark("*.h.[1-9].*")]
    assert len({*marks}) == 4 and marks[3] == marks[4]
    assert marks[1].endswith(", 10,704 of them trained")


# ------------------------------------------------------------------------------- whole runs

FROZEN: dict[str, Any] = {
    "freeze_parameters": ["*.wte.*", "*.h.0.mlp.*", "!*.bias"],
    "learning_rate_factors": {"*.attn.*": 0.5, "*.bias": 2},
    "learning_rate": 1e-2,
}


def is_frozen(name: str) -> bool:
    return ".wte." in name or (".h.0.mlp." in name and not name.endswith(".bias"))


def save_base(place: Path, kind: str = "gpt2") -> Path:
    tiny(kind).save_pretrained(place / "base")
    return place / "base" / "model.safetensors"


def test_what_is_frozen_keeps_its_bits_and_all_else_moves(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_file(save_base(place))
    loaded = LOADED | {"model_name_or_path": "base"} | FROZEN
    run = train_small(place, **loaded)
    said = capsys.readouterr().out
    assert "Frozen   3 of 28 tensors: 6,160 of 11,216 parameters stay" in said
    assert "Rates    x 0.5: " in said and "; x 2: " in said and "; x 1: the rest" in said
    after = load_file(run / "final" / "model.safetensors")
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if is_frozen(name)} and len(same) == 3
    opened = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert all(torch.equal(tensor, opened[name]) for name, tensor in after.items())

    # Checkpoints hold what is trained alone, with its moments.
    checkpoint = run / "checkpoints" / "step-00000004"
    kept = load_file(checkpoint / "model.safetensors")
    assert {name.removeprefix("model.") for name in kept} == before.keys() - same
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    assert len(state) == len(kept) == 25
    # The rate in the log is that of the plan.
    plain = train_small(place, "plain", **LOADED, model_name_or_path="base", learning_rate=1e-2)
    rates = [[line["train/learning_rate"] for line in curve(folder)] for folder in (run, plain)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_new_model_with_frozen_parts_goes_on_bit_for_bit(optim: str, place: Path) -> None:
    """Its frozen weights follow from the seed, which nobody named."""
    whole = train_small(place, "whole", optim=optim, **FROZEN)
    shutil.copytree(whole, place / "again", symlinks=True)
    for step in (3, 4):
        shutil.rmtree(place / f"again/checkpoints/step-0000000{step}")
    for name in ("last", "best"):
        (place / "again/checkpoints" / name).unlink(missing_ok=True)
    shutil.rmtree(place / "again/final")
    (place / "again/result.json").unlink()
    (place / "again/train_log.jsonl").unlink()
    again = train_small(place, "again", optim=optim, **FROZEN)
    assert curve(again) == curve(whole)[2:]
    one, other = (load_file(f / "final" / "model.safetensors") for f in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_moments_find_their_parameters_when_factors_change(optim: str, place: Path) -> None:
    """Other factors make other groups, in which parameters have other numbers."""
    common = {"learning_rate": 1e-2, "optim": optim, "dropout": 0.0}
    whole = train_small(place, "whole", **common)
    orders = []
    for number, patterns in enumerate((["*.bias", "*.mlp.*"], ["*.ln_*", "*.attn.c_proj.*"])):
        source = place / "whole" if number == 0 else place / "changed-0"
        again = train_small(
            place,
            f"changed-{number}",
            resume_from_checkpoint=str(source / f"checkpoints/step-0000000{number + 1}"),
            learning_rate_factors=dict.fromkeys(patterns, NEARLY_ONE),
            **common,
        )
        manifest = json.loads((again / "checkpoints/step-00000004/manifest.json").read_text())
        orders.append(manifest["model_state"]["optimizer_parameters"])
        for found, expected in zip(curve(again), curve(whole)[number + 1 :], strict=True):
            assert found == pytest.approx(expected, rel=1e-6)
    assert orders[0] != orders[1] and {*orders[0]} == {*orders[1]}


def test_a_checkpoint_that_names_no_parameters_is_not_guessed_at(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Old ones do not; their numbers are those of an optimizer without factors."""
    path = train_small(place, "run", max_steps=2) / "checkpoints/step-00000002/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["model_state"]["optimizer_parameters"]
    path.write_text(json.dumps(manifest))
    factors = {"learning_rate_factors": {"*.mlp.*": 2}}
    train_small(place, "run", 1, **factors)
    said = capsys.readouterr().err
    assert "does not say which state belongs to which" in said and "--reset_optimizer" in said
    train_small(place, "run", max_steps=3)
    train_small(place, "run", reset_optimizer=True, **factors)


def test_factors_are_those_of_the_last_start(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate of nearly nothing from step 3 on: what has it stands still from there."""
    common = {"learning_rate": 1e-2, "learning_rate_factors": {"*.mlp.*": 4}}
    whole = train_small(place, "run", max_steps=2, lr_scheduler_type="constant", **common)
    before = load_file(whole / "final/model.safetensors")
    common["learning_rate_factors"] = {"*.mlp.*": 1e-30}
    capsys.readouterr()
    train_small(place, "run", lr_scheduler_type="constant", **common)
    assert "Changed  learning_rate_factors: " in capsys.readouterr().out
    after = load_file(whole / "final/model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".mlp." in name}


def test_a_changed_base_or_other_patterns_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_base(place)
    loaded = LOADED | {"model_name_or_path": "base"} | FROZEN
    train_small(place, max_steps=2, **loaded)
    capsys.readouterr()
    train_small(place, code=1, max_steps=3, **loaded | {"freeze_parameters": ["*.wte.*"]})
    said = capsys.readouterr().err
    assert "belongs to another run (model: " in said and "of them trained" in said

    weights = load_file(path)
    weights["transformer.h.0.mlp.c_fc.weight"][3, 5] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    train_small(place, code=1, max_steps=3, **loaded)
    said = capsys.readouterr().err
    assert "belongs to another run" in said and said.count("the others of the base weights") == 2


def test_the_wrong_pattern_ends_the_run_before_step_0(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_small(place, code=1, freeze_parameters=["*.wpx.*"])
    assert "--freeze_parameters *.wpx.*: gpt2 has no such parameter" in capsys.readouterr().err
    train_small(place, code=1, learning_rate_factors={"*.wpx.*": 2})
    assert "--learning_rate_factors *.wpx.*: gpt2 has no such" in capsys.readouterr().err
    train_small(place, dry_run=True, **FROZEN)
    said = capsys.readouterr().out
    assert "Frozen   3 of 16 tensors" in said and "Rates    x 0.5" in said


def test_matrices_of_an_adapter_have_rates_of_their_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_base(place)
    adapted = LOADED | {"model_name_or_path": "base", "lora_rank": 3, "learning_rate": 1e-2}
    common = adapted | {"lr_scheduler_type": "constant", "max_steps": 1, "weight_decay": 0.0}
    moved = {}
    for name, factors in (("plain", {}), ("plus", {"*lora_B*": 16})):
        run = train_small(place, name, learning_rate_factors=factors, **common)
        tensors = load_file(run / "final/adapter_model.safetensors")
        moved[name] = {n: t for n, t in tensors.items() if "lora_B" in n}
    # Of each pair the second: 3 x 48 and 3 x 16, 3 x 64 and 3 x 16 in each of two layers.
    assert "Rates    x 16: 8 tensors, 864 parameters; x 1: the rest" in capsys.readouterr().out
    for name, tensor in moved["plain"].items():  # they begin as zeros
        torch.testing.assert_close(moved["plus"][name], 16 * tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"chunked_loss": True}], ids=["blocks", "chunks"]
)
def test_a_frozen_embedding_lets_gradients_through(changes: dict[str, Any], place: Path) -> None:
    """It is the head too; and the blocks are computed a second time in the backward pass."""
    frozen = {"freeze_parameters": ["*.w[tp]e.*"], "dropout": 0.0, "learning_rate": 1e-2}
    plain = train_small(place, "plain", **frozen)
    other = train_small(place, "other", **frozen, **changes)
    for found, expected in zip(curve(other), curve(plain), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    one, two = (load_file(f / "final/model.safetensors") for f in (plain, other))
    first = load_file(plain / "checkpoints/step-00000001/model.safetensors")
    assert all((one[n.removeprefix("model.")] != t).any() for n, t in first.items())
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------- what it takes


def test_moments_and_gradients_are_reckoned_for_what_is_trained() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=257, **SIZES["gpt2"])
    batch = BatchSizes(per_device=1, accumulation=1, processes=1, global_batch=1)

    def need(**changes: Any) -> Any:
        arguments = Arguments(model_type="gpt2", cpu_fast_path=False, **changes)
        stand_in: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
        launch = LaunchSettings()

        def build() -> Any:
            return build_network(stand_in, arguments, launch, config, batch, 32)[0]

        return estimate_memory(Outline(build), arguments, launch, batch, 32, precision="fp32")

    whole, part = need(), need(freeze_parameters=["*.wte.*"])
    assert (whole.weights, whole.gradients, whole.optimizer) == (44_864, 44_864, 89_728)
    assert (part.weights, part.gradients, part.optimizer) == (44_864, 28_416, 56_832)


def test_a_padded_table_freezes_with_its_padding(place: Path) -> None:
    frozen = {"freeze_parameters": ["*.wte.*"], "learning_rate": 1e-2, "seed": 1}
    tables = []
    for name, multiple in (("padded", 64), ("plain", 1)):
        run = train_small(place, name, pad_vocab_to_multiple_of=multiple, **frozen)
        tables.append(load_file(run / "final/model.safetensors")["transformer.wte.weight"])
    assert tables[0].shape == (257, 16) and torch.equal(*tables)
