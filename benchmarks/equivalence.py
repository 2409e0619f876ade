"""Every backend, one curve: trains the same small runs under each and compares them step by step.

    python benchmarks/equivalence.py [--details] [--backends ddp zero3] [--compiled]

The reference is one process without accumulation. Every other run has the same global batch, split
over two processes and over one, two or four micro-batches; all of them on the CPU, over gloo. The
exit code is 1 where a comparison breaks its bound.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from tests.distributed.launching import environment_of, launch  # noqa: E402

WORKER = ROOT / "tests/distributed/equivalence_worker.py"
Record = dict[str, Any]  # of one run: what the worker's `run_case` returns

# 55 rows of training and 10 of validation, the last of them shorter. The 77 samples of 1.4 epochs
# are ten steps: the seventh runs over the end of an epoch, the last has five rows.
GLOBAL_BATCH_SIZE = 8
BLOCK_SIZE = 32
NUM_TOKENS = {"train": 55 * BLOCK_SIZE + 11, "validation": 9 * BLOCK_SIZE + 21}
RESUMED_STEP = 5
SETTINGS = {
    "tokenizer_name": "byte",
    "block_size": BLOCK_SIZE,
    "dropout": 0.0,  # its masks depend on how rows are spread over ranks
    "global_batch_size": GLOBAL_BATCH_SIZE,
    "num_train_epochs": 1.4,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_grad_norm": 2.3,  # some steps are clipped, some are not
    "logging_steps": 1,
    "eval_steps": 5,
    "save_steps": None,
    "report_to": ["none"],
    "device": "cpu",
    "num_threads": 1,
}
# GPT-2's head is its embedding table, Llama's is a matrix of its own. AdamW divides the scale of a
# gradient out, unless its epsilon is large: with Llama's, a wrong factor bends the curve as well.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "config_overrides": {
            "num_hidden_layers": 2,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "adam_epsilon": 1e-2,
    },
    "gpt2": {"config_overrides": {"n_layer": 2, "n_embd": 48, "n_head": 4}, "adam_epsilon": 1e-8},
}


@dataclass(frozen=True)
class Backend:
    """How the processes are started.

    Attributes:
        title: as the table names it.
        config: the file of `accelerate_configs/`.
        active: what Accelerate then says that it runs, in the worker's words.
        launcher_args: words for `accelerate launch` beside the file.
    """

    title: str
    config: str
    active: str
    launcher_args: tuple[str, ...] = ()


FULL = ("--fsdp_state_dict_type", "FULL_STATE_DICT")
BACKENDS = {
    "single": Backend("1 process", "single", "1 replicated"),
    "ddp": Backend("2 x DDP", "ddp", "2 replicated"),
    "fsdp": Backend("2 x FSDP2, sharded state dict", "fsdp", "FSDP2 SHARDED_STATE_DICT"),
    "fsdp_full": Backend("2 x FSDP2, full state dict", "fsdp", "FSDP2 FULL_STATE_DICT", FULL),
    "zero1": Backend("2 x ZeRO-1", "zero1", "ZeRO-1"),
    "zero2": Backend("2 x ZeRO-2", "zero2", "ZeRO-2"),
    "zero3": Backend("2 x ZeRO-3", "zero3", "ZeRO-3"),
    "tp": Backend("2 x tensor parallel", "tp", "TP over 2"),
    "cp": Backend("2 x context parallel", "cp", "FSDP2 SHARDED_STATE_DICT CP over 2"),
}
# What a backend cannot train, and how it says so.
REFUSALS = {
    ("tp", "gpt2"): "transformers has no plan for gpt2",
    ("cp", "gpt2"): "Rows cannot be shared by ranks in gpt2",
}
# Refused before anything starts: ranks that share a row know no documents, and cannot compile.
UNTRAINED_VARIANTS = {"cp": ("masked", "compiled")}


@dataclass(frozen=True)
class Case:
    """One run under a backend.

    Attributes:
        model: a key of `MODELS`.
        accumulation: micro-batches of each process in a step.
        precision: "fp32" or "bf16".
        variant: "", "checkpointed" (activations computed twice), "resumed" (from the checkpoint at
            `RESUMED_STEP` that the plain case leaves), "masked" (documents of a row do not see each
            other) or "compiled".
    """

    model: str
    accumulation: int
    precision: str = "fp32"
    variant: str = ""

    @property
    def name(self) -> str:
        """For a person, and for the worker's files."""
        words = (self.model, f"x{self.accumulation}", self.precision, self.variant)
        return " ".join(filter(None, words))

    @property
    def reference(self) -> Case:
        """The case of one process that this one must equal."""
        variant = self.variant if self.variant == "masked" else ""  # that one is another run
        return Case(self.model, 1, self.precision, variant)


CASES = (
    *(Case(model, accumulation) for model in MODELS for accumulation in (1, 2, 4)),
    Case("llama", 2, variant="checkpointed"),
    Case("llama", 2, variant="resumed"),
    Case("llama", 2, variant="masked"),
    *(Case(model, 2, "bf16") for model in MODELS),
)
COMPILED_CASES = tuple(Case(model, 2, variant="compiled") for model in MODELS)

# The largest relative difference from the reference over all steps. In fp32 only the order of sums
# may differ. In bf16, which keeps eight bits, every operation rounds by up to 2^-8 = 3.9e-3, each
# backend in other places; the errors of many tokens mostly cancel. The bounds are about twice what
# was measured over all backends (losses 4.2e-4, norm 2.4e-3). They stay below 2^-9 = 2e-3, by which
# a loss is wrong that is itself rounded to bf16 on its way.
BOUNDS = {
    "fp32": {"loss": 1e-5, "grad_norm": 1e-5, "eval_loss": 1e-5},
    "bf16": {"loss": 1e-3, "grad_norm": 5e-3, "eval_loss": 1e-3},
    "compiled": {"loss": 1e-4, "grad_norm": 1e-4, "eval_loss": 1e-4},
}
# A run that only claims to be in bf16 has the losses of its fp32 twin.
LEAST_BF16_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class Cell:
    """One case under one backend, held against the reference.

    Attributes:
        differences: largest relative difference of loss, grad_norm and eval_loss over all steps.
        same_rates: whether the learning rates are equal to the last bit.
        same_samples: whether each step reads the same rows in the same order and predicts as many
            tokens.
        active: what Accelerate ran.
        refusal: what the run said in place of training, "" where it trained.
        compiled_graphs: how many pieces of the model torch.compile has made.
        from_fp32: a bf16 run's largest relative difference in loss from the same run in fp32.
    """

    backend: str
    case: Case
    differences: dict[str, float]
    same_rates: bool = True
    same_samples: bool = True
    active: str = ""
    refusal: str = ""
    compiled_graphs: int = 0
    from_fp32: float = math.inf

    @property
    def bounds(self) -> dict[str, float]:
        """What `differences` may be."""
        return BOUNDS["compiled" if self.case.variant == "compiled" else self.case.precision]

    def problems(self) -> list[str]:
        """How this cell breaks what is promised; empty where it does not."""
        expected = REFUSALS.get((self.backend, self.case.model), "")
        if expected or self.refusal:
            is_expected = expected != "" and expected in self.refusal
            return [] if is_expected else [f"refused with {self.refusal!r}, not {expected!r}"]
        problems = [
            f"{name} differs by {value:.1e}, more than {self.bounds[name]:.1e}"
            for name, value in self.differences.items()
            if not value <= self.bounds[name]  # true for NaN too
        ]
        problems += [] if self.same_rates else ["other learning rates"]
        problems += [] if self.same_samples else ["other samples"]
        if self.active != BACKENDS[self.backend].active:
            problems.append(f"ran as {self.active!r}")
        if self.case.variant == "compiled" and not self.compiled_graphs:
            problems.append("was not compiled")
        if not self.from_fp32 > LEAST_BF16_DIFFERENCE:
            problems.append(f"differs by only {self.from_fp32:.1e} from fp32: was it bf16?")
        return problems


# ------------------------------------------------------------------------------------------- runs


def write_inputs(folder: Path) -> None:
    """The text of all runs, documents of very unequal length, and what their settings share."""
    draw = random.Random(0)
    settings: dict[str, Any] = {**SETTINGS, "cache_dir": str(folder / "token_cache")}
    for name, num_tokens in NUM_TOKENS.items():
        documents = []
        while num_tokens > 0:
            words = draw.choices(("if", "else", "return", "value", "x", "=", "\n"), k=60)
            text = " ".join(words[: draw.choice((1, 4, 15, 60))])
            # The end of a document is a token of its own.
            documents.append({"text": text[: num_tokens - 1]})
            num_tokens -= len(documents[-1]["text"]) + 1
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, documents)), "utf-8")
        settings[f"{name}_file"] = [str(file)]
    (folder / "run.json").write_text(json.dumps(settings), "utf-8")


def cases_of(backend: str) -> tuple[Case, ...]:
    """What a backend trains; one process also trains the reference of each case."""
    if backend == "single":
        return tuple(dict.fromkeys([*(case.reference for case in CASES), *CASES]))
    refused = {model for name, model in REFUSALS if name == backend}
    left_out = UNTRAINED_VARIANTS.get(backend, ())
    cases = [c for c in CASES if c.variant not in left_out]
    return tuple(c for c in cases if c.model not in refused or c == c.reference)


def run_backend(backend: str, cases: Sequence[Case], folder: Path) -> dict[str, Record]:
    """Trains all cases in one launch; returns what the worker noted of each, by its name.

    Args:
        backend: a key of `BACKENDS`.
        folder: where `write_inputs` has been; each backend writes into a folder of its own there.
    """
    return _run(backend, {backend: cases}, {}, folder)[backend]


def run_together(backends: Sequence[str], folder: Path) -> dict[str, dict[str, Record]]:
    """Trains all cases of several backends on two processes in one launch, one after the other.

    Before each backend, the processes get the environment that a launch under it gives.
    """
    environments = {
        name: environment_of(BACKENDS[name].config, 2, BACKENDS[name].launcher_args)
        for name in backends
    }
    return _run("ddp", {name: cases_of(name) for name in backends}, environments, folder)


def _run(
    launched: str,
    cases: dict[str, Sequence[Case]],
    environments: dict[str, dict[str, str]],
    folder: Path,
) -> dict[str, dict[str, Record]]:
    """Launches the worker under one backend, to train the cases of one or more."""
    output = folder / "-".join(cases)
    output.mkdir(exist_ok=True)
    listed = [
        {
            "name": f"{backend}/{case.name}",
            "env": environments.get(backend, {}),
            "words": words_of(case, folder / "run.json", folder / backend),
        }
        for backend, of_backend in cases.items()
        for case in of_backend
    ]
    (output / "cases.json").write_text(json.dumps(listed), "utf-8")
    launch(
        BACKENDS[launched].config,
        WORKER,
        str(output / "cases.json"),
        str(output / "records.json"),
        launcher_args=BACKENDS[launched].launcher_args,
        timeout=900,
    )
    records = json.loads((output / "records.json").read_text("utf-8"))
    return {
        backend: {case.name: records[f"{backend}/{case.name}"] for case in of_backend}
        for backend, of_backend in cases.items()
    }


def words_of(case: Case, run_file: Path, output: Path) -> list[str]:
    """The case as words for `train_llm.py`; it writes into a folder below `output`."""
    is_resumed = case.variant == "resumed"
    left_by = replace(case, variant="") if is_resumed else case
    run_folder = output / left_by.name.replace(" ", "-")
    settings = {
        "model_type": case.model,
        "config_overrides": json.dumps(MODELS[case.model]["config_overrides"]),
        "adam_epsilon": MODELS[case.model]["adam_epsilon"],
        "gradient_accumulation_steps": case.accumulation,
        "mixed_precision": case.precision,
        "gradient_checkpointing": case.variant == "checkpointed",
        "torch_compile": case.variant == "compiled",
        "document_mask": case.variant == "masked",
        "output_dir": run_folder,
    }
    if replace(left_by, variant="resumed") in CASES:
        settings["save_steps"] = RESUMED_STEP
    if is_resumed:
        checkpoint = run_folder / f"checkpoints/step-{RESUMED_STEP:08d}"
        settings["resume_from_checkpoint"] = checkpoint
    return [str(run_file), *(f"--{name}={value}" for name, value in settings.items())]


# ------------------------------------------------------------------------------------- comparison


def compare(
    backend: str, cases: Iterable[Case], records: dict[str, Record], references: dict[str, Record]
) -> list[Cell]:
    """Holds the cases of a backend against one process: `references` is what that one noted."""
    return [compare_case(backend, case, records[case.name], references) for case in cases]


def compare_case(backend: str, case: Case, record: Record, references: dict[str, Record]) -> Cell:
    """Holds one run against the run of one process with the same model and precision."""
    if "refused" in record:
        return Cell(backend, case, {}, refusal=record["refused"])
    reference = references[case.reference.name]
    begin = RESUMED_STEP if case.variant == "resumed" else 0
    from_fp32 = math.inf
    if case.precision == "bf16":
        exact = references[replace(case.reference, precision="fp32").name]
        from_fp32 = largest_difference(record["loss"], exact["loss"])
    return Cell(
        backend,
        case,
        {name: largest_difference(record[name], reference[name]) for name in BOUNDS["fp32"]},
        same_rates=record["learning_rate"] == reference["learning_rate"],
        same_samples=record["samples"] == reference["samples"][begin:]
        and record["tokens"] == reference["tokens"],
        active=record["active"],
        compiled_graphs=record["compiled_graphs"],
        from_fp32=from_fp32,
    )


def largest_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference between two curves; infinite where their lengths differ."""
    if len(values) != len(expected) or not values:
        return math.inf
    differences = [abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


# ------------------------------------------------------------------------------------------ table


HEADER = (
    "| backend | precision | loss | gradient norm | validation loss | rates | samples | worst |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table_rows(backend: str, cells: Sequence[Cell]) -> list[str]:
    """A row for each precision, in Markdown."""
    rows = []
    title = BACKENDS[backend].title
    for precision in ("fp32", "bf16"):
        trained = [c for c in cells if c.case.precision == precision and not c.refusal]
        if not trained:
            continue
        worst = max(trained, key=lambda cell: max(cell.differences.values()))
        largest = [
            f"{max(cell.differences[name] for cell in trained):.1e}" for name in BOUNDS["fp32"]
        ]
        rates = "identical" if all(cell.same_rates for cell in trained) else "DIFFERENT"
        samples = "identical" if all(cell.same_samples for cell in trained) else "DIFFERENT"
        rows.append(row(title, precision, *largest, rates, samples, worst.case.name))
    refused = {cell.case.model: cell.refusal for cell in cells if cell.refusal}
    return rows + [row(f"{title}, {m}", "", "refused", *[""] * 4, t) for m, t in refused.items()]


def row(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def detail_lines(cells: Sequence[Cell]) -> list[str]:
    """A line for each cell."""
    lines = []
    for cell in cells:
        numbers = [f"{name} {value:.1e}" for name, value in cell.differences.items()]
        verdict = cell.problems() or ["refused as it should be" if cell.refusal else "ok"]
        where = f"{BACKENDS[cell.backend].title}, {cell.case.name}"
        lines.append(f"{where}: {', '.join([*numbers, *verdict])}")
    return lines


def explanation() -> str:
    """What the table says, with the versions that it was made with."""
    names = ("torch", "accelerate", "transformers", "deepspeed")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"Largest relative difference from one process without accumulation, over"
        f" {len(MODELS)} models, accumulation 1, 2 and 4, and all steps; in fp32 also with gradient"
        " checkpointing, with a document mask, and resumed from a checkpoint. Bounds:"
        f" {BOUNDS['fp32']['loss']:.0e} in fp32; in bf16, where one rounding is up to 3.9e-3,"
        f" {BOUNDS['bf16']['loss']:.1e} on the losses and {BOUNDS['bf16']['grad_norm']:.1e} on the"
        " gradient norm. bf16 rounds in different places: one process, DDP and tensor parallelism"
        " compute matrix products in bf16 and keep all else in fp32 (autocast); FSDP2 casts each"
        " block with its weights and inputs to bf16; DeepSpeed holds the weights in bf16 beside an"
        " fp32 copy that the optimizer updates. Learning rates and samples must be identical.\n\n"
        f"{versions}; Python {platform.python_version()} on {platform.machine()}, CPU, gloo."
    )


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--details", action="store_true", help="a line for each run as well")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--compiled", action="store_true", help="runs with torch_compile instead: takes long"
    )
    options = parser.parse_args()
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        references = run_backend("single", cases_of("single"), folder)
        print(HEADER, flush=True)
        for backend in options.backends:
            if options.compiled and "compiled" in UNTRAINED_VARIANTS.get(backend, ()):
                continue
            cases = COMPILED_CASES if options.compiled else cases_of(backend)
            is_known = backend == "single" and not options.compiled
            records = references if is_known else run_backend(backend, cases, folder)
            cells += (found := compare(backend, cases, records, references))
            print("\n".join(table_rows(backend, found)), flush=True)
    print(f"\n{explanation()}")
    if options.details:
        print("\n" + "\n".join(detail_lines(cells)))
    broken = [cell for cell in cells if cell.problems()]
    if broken:
        print("\nBROKEN\n" + "\n".join(detail_lines(broken)))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
