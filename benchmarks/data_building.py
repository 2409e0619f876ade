"""How fast text becomes tokens here, beside the tokenizers library alone and the usual pipeline.

    python benchmarks/data_building.py --megabytes 60 --rounds 3
    python benchmarks/data_building.py --memory 1000     # only the peak memory, 1 GB of text

Each round runs, one after the other in fresh processes and with the same tokenizer:

- `raw`: `encode_batch_fast` of the tokenizers library over all documents, held in memory, on all
  cores; nothing is read, kept or written
- `ours`: the store is built as for a run: read, checked, split, tokenized, counted, hashed, written
- `map`: `datasets` with `map(tokenize)` and `map(group_texts)`, as the examples of transformers do
  it; in one process, where the tokenizer uses all cores, and in one for each core, as ours

These read JSON lines, a document a file. `short_raw`, `short`, `map_short` and
`map_short_processes` are the same on short documents: the paragraphs of half of these files. `text`
and `map_text` are `ours` and `map` on the same text in one text file: one document for us, a row
for each line there, as the examples load text.

Rates are in megabytes of text a second. What is compared are the ratios within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

VOCAB_SIZE = 8192
BLOCK_SIZE = 1024
BATCH_DOCUMENTS = 1000
NUM_WINDOWS = 200
CORPUS, SHORT_CORPUS, TEXT_FILE = "corpus.jsonl", "short.jsonl", "corpus.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=60, help="text in the timed corpus")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--memory", type=float, help="only measure memory, on so many megabytes")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder = options.worker
        print(json.dumps(WORKERS[name](Path(folder))))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder)
        if options.memory:
            measure_memory(folder, options.memory)
        else:
            write_corpus(folder, options.megabytes)
            compare(folder, options.rounds)
            compare_reading(folder)


def library_texts() -> list[str]:
    """Python's own library source, one document a file."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    texts = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
    return [text for text in texts if text and "\0" not in text]


def train_tokenizer(folder: Path) -> None:
    from llm_training.data.tokens.tokenizers import train_tokenizer

    train_tokenizer("bpe", library_texts()[::10], VOCAB_SIZE).save_pretrained(folder / "tokenizer")


def write_corpus(folder: Path, megabytes: float) -> None:
    """The library's text, repeated as often as it takes, as JSON lines."""
    left = megabytes * 1e6
    with (folder / CORPUS).open("w", encoding="utf-8") as file:
        for number, text in enumerate(cycle(library_texts())):
            if left <= 0:
                break
            # Nothing that a cache of equal words or texts could make easier.
            file.write(json.dumps({"text": f"# {number}\n{text}"}) + "\n")
            left -= len(text.encode())


def write_short(folder: Path) -> None:
    """Half of the corpus, each paragraph a document."""
    texts = read_texts(folder / CORPUS)
    with (folder / SHORT_CORPUS).open("w", encoding="utf-8") as file:
        for text in texts[: max(1, len(texts) // 2)]:
            for paragraph in filter(str.strip, text.split("\n\n")):
                file.write(json.dumps({"text": paragraph}) + "\n")


def write_text(folder: Path) -> None:
    """All of the corpus as one text file."""
    target = (folder / TEXT_FILE).open("w", encoding="utf-8", newline="")
    with (folder / CORPUS).open(encoding="utf-8") as lines, target:
        target.writelines(json.loads(line)["text"] for line in lines)


def compare(folder: Path, rounds: int) -> None:
    """Prints the rates of each round and the ratios."""
    write_text(folder)
    write_short(folder)
    names = [name for name in WORKERS if name != "reading"]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        found = {name: run_worker(name, folder) for name in rates}
        for name, result in found.items():
            rates[name].append(result["bytes"] / 1e6 / result["seconds"])
        shown = ", ".join(f"{name} {rates[name][-1]:.2f} MB/s" for name in rates)
        print(f"round {number + 1}: {shown}", flush=True)
    pairs = [("ours", "raw"), ("ours", "map"), ("ours", "map_processes"), ("text", "map_text")]
    pairs += [("short", other) for other in ("short_raw", "map_short", "map_short_processes")]
    for mine, other in pairs:
        ratios = sorted(a / b for a, b in zip(rates[mine], rates[other], strict=True))
        print(
            f"{mine} / {other}: {statistics.median(ratios):.3f}"
            f" (from {ratios[0]:.3f} to {ratios[-1]:.3f} in {rounds} rounds)"
        )


def run_worker(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, str(folder)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def read_texts(corpus: Path) -> list[str]:
    with corpus.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def run_raw(folder: Path, corpus: str = CORPUS) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = read_texts(folder / corpus)
    tokenizer.encode_batch_fast(texts[:10])
    began = time.perf_counter()
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        tokenizer.encode_batch_fast(texts[start : start + BATCH_DOCUMENTS])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": sum(len(text.encode()) for text in texts)}


def run_ours(folder: Path, corpus: str = CORPUS) -> dict[str, Any]:
    # Imported on first use; a run has it anyway.
    from transformers import AutoTokenizer  # noqa: F401

    from arguments import Arguments
    from llm_training.data.prepare import prepare_source

    with tempfile.TemporaryDirectory() as cache:
        arguments = Arguments(
            train_file=[str(folder / corpus)],
            tokenizer_name=str(folder / "tokenizer"),
            cache_dir=cache,
        )
        began = time.perf_counter()
        data = prepare_source(arguments, say=lambda line: print(line, file=sys.stderr))
        seconds = time.perf_counter() - began
    splits = data.ledger.splits.values()
    return {
        "seconds": seconds,
        "bytes": sum(split.bytes for split in splits),
        "tokens": sum(split.tokens for split in splits),
        # Of this process; those that it starts to encode are not in it.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run_map(folder: Path, corpus: str = CORPUS, processes: int | None = None) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"]))

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = {name: list(chain(*lists)) for name, lists in rows.items()}
        total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        grouped = {
            name: [ids[start : start + BLOCK_SIZE] for start in range(0, total, BLOCK_SIZE)]
            for name, ids in joined.items()
        }
        return grouped | {"labels": [ids.copy() for ids in grouped["input_ids"]]}

    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        kind, words = ("text", {"keep_linebreaks": True}) if corpus == TEXT_FILE else ("json", {})
        rows = datasets.load_dataset(
            kind, data_files=str(folder / corpus), split="train", cache_dir=cache, **words
        )
        tokens = rows.map(tokenize, batched=True, num_proc=processes, remove_columns=["text"])
        tokens.map(group_texts, batched=True, num_proc=processes)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": sum(len(text.encode()) for text in rows["text"])}


def measure_memory(folder: Path, megabytes: float) -> None:
    """Prints the peak memory of building a store from JSON lines and from one text file."""
    write_corpus(folder, megabytes)
    write_text(folder)
    for name in ("ours", "text"):
        result = run_worker(name, folder)
        print(
            f"{name}: {result['bytes'] / 1e6:,.0f} MB of text, {result['tokens']:,} tokens in"
            f" {result['seconds']:,.0f} s, peak memory {result['peak_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )


def compare_reading(folder: Path) -> None:
    """Prints how long reading takes beside a step of the quickstart's model."""
    result = run_worker("reading", folder)
    print(
        f"reading one step's rows: {result['read_ms']:.2f} ms of {result['step_ms']:.0f} ms"
        f" = {result['read_ms'] / result['step_ms']:.2%} of a step of the quickstart's model"
    )


def run_reading(folder: Path) -> dict[str, Any]:
    """Milliseconds of taking one step's rows, and of the step, with the quickstart's model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from arguments import Arguments
    from llm_training.data.prepare import prepare_source
    from llm_training.data.rows.windows import TrainingWindows, train_rows

    settings = json.loads((ROOT / "train_configs/quickstart.json").read_text("utf-8"))
    size, block_size = settings["per_device_train_batch_size"], settings["block_size"]
    with tempfile.TemporaryDirectory() as cache:
        arguments = Arguments(
            train_file=[str(folder / CORPUS)],
            tokenizer_name=str(folder / "tokenizer"),
            cache_dir=cache,
        )
        data = prepare_source(arguments, say=lambda line: None)
        rows = train_rows(data, arguments, block_size)
        assert rows is not None
        windows = TrainingWindows(rows, 1, 10**9, size, 1, 0, 1)
        positions = range(0, NUM_WINDOWS * size, size)
        read = [time_of(partial(windows.window, position)) for position in positions]
        batch = windows.window(0)[0]
    config = AutoConfig.for_model(
        settings["model_type"], **settings["config_overrides"], vocab_size=VOCAB_SIZE
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = [time_of(step) for _ in range(12)][4:]
    return {"read_ms": 1e3 * statistics.median(read), "step_ms": 1e3 * statistics.median(steps)}


def time_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


WORKERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "raw": run_raw,
    "ours": run_ours,
    "map": run_map,
    "map_processes": partial(run_map, processes=os.cpu_count()),
    "text": partial(run_ours, corpus=TEXT_FILE),
    "map_text": partial(run_map, corpus=TEXT_FILE),
    "short_raw": partial(run_raw, corpus=SHORT_CORPUS),
    "short": partial(run_ours, corpus=SHORT_CORPUS),
    "map_short": partial(run_map, corpus=SHORT_CORPUS),
    "map_short_processes": partial(run_map, corpus=SHORT_CORPUS, processes=os.cpu_count()),
    "reading": run_reading,
}

if __name__ == "__main__":
    main()
