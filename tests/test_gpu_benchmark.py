"""Proves that the GPU benchmark works: its peer is GPT-2, a trial measures, failures are told."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.bare_loop import peak_bytes
from benchmarks.gpu_training import EXTRA_PACKAGES, TASKS, VARIANTS, RunFailed, run_process
from benchmarks.nanogpt_like import Model, Sizes
from benchmarks.peak_memory import last_peak
from llm_training.argument_parsing import ArgumentProblems, read_arguments

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32}
NAMES = {
    "wte": "tokens",
    "wpe": "positions",
    "ln_f": "norm",
    "h": "blocks",
    "ln_1": "attention_norm",
    "attn.c_attn": "query_key_value",
    "attn.c_proj": "attention_out",
    "ln_2": "forward_norm",
    "mlp.c_fc": "forward_in",
    "mlp.c_proj": "forward_out",
}


def peer_name(name: str) -> str:
    name = f".{name}"
    for theirs, own in NAMES.items():
        name = name.replace(f".{theirs}.", f".{own}.")
    return name[1:]


def test_the_peer_computes_what_gpt2_computes() -> None:
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=16, **SIZES, **dropouts)
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases and all
    peer = Model(Sizes(**SIZES, vocab_size=128, block_size=16)).double()
    peer.load_state_dict(
        {  # transformers stores the matrices of the blocks transposed
            peer_name(name): tensor.T if tensor.ndim == 2 and ".c_" in name else tensor
            for name, tensor in model.transformer.state_dict().items()
        }
    )
    ids = torch.randint(128, (3, 17))
    logits = model(input_ids=ids[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(peer(ids[:, :-1], ids[:, 1:]), expected, rtol=1e-9, atol=0)


def test_the_peer_is_gpt2_with_124_million_parameters_and_a_padded_vocabulary() -> None:
    task = TASKS["gpt2_124m"]
    with torch.device("meta"):
        peer = Model(Sizes(**task.sizes, vocab_size=task.vocab_size, block_size=task.block_size))
    assert peer.tokens.weight.shape == (50304, 768)
    assert sum(p.numel() for p in peer.parameters()) == 124_439_808 + 47 * 768


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_one_that_the_arguments_know(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.bin").write_bytes(bytes(range(1, 255)))
    words = ["--model_type", "gpt2", "--train_file", "train.bin", "--max_steps", "1"]
    try:
        read_arguments([*words, *VARIANTS[name]], 1)
    except ArgumentProblems as problems:
        package = EXTRA_PACKAGES[name].replace("_", "-")
        assert "1 problem with" in str(problems) and f"pip install {package}" in str(problems)


@pytest.mark.slow
def test_a_trial_measures_both_sides_and_tells_what_failed(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_training.py"), "--quick"]
    command += ["--output", str(page), "--variants", "nanogpt_like_eager", "eager", "liger"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines()]
    rates = {
        row[0].strip("| "): float(row[1].replace(",", ""))
        for row in rows
        if len(row) == 5 and "GiB" in row[3]
    }
    assert rates.keys() == {"nanogpt_like_eager", "eager"}
    assert all(rate > 100 for rate in rates.values())
    (ratio,) = [row for row in rows if row[:2] == ["| eager", "nanogpt_like_eager"]]
    assert float(ratio[2]) == pytest.approx(rates["eager"] / rates["nanogpt_like_eager"], rel=1e-2)
    assert any(row[0] == "| liger" and "liger_kernel" in row[1] for row in rows)
    assert not list(tmp_path.glob("**/checkpoints"))


def test_a_run_that_fails_or_hangs_says_why_and_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="ValueError: so it is"):
        run_process(["-c", "raise ValueError('so it is')"], tmp_path, tmp_path, 30)
    with pytest.raises(RunFailed, match="not done within 1 s"):
        run_process(["-c", "import time; time.sleep(60)"], tmp_path, tmp_path, 1)


def test_the_peak_of_a_script_that_is_killed_is_known(tmp_path: Path) -> None:
    # A process that is started counts the highest memory of the one that starts it.
    size = peak_bytes() + 100_000_000
    (tmp_path / "script.py").write_text(
        f"import sys, time\nblock = b'1' * {size}\nprint(sys.argv[1:], flush=True)\n"
        "time.sleep(60)\n"
    )
    peaks, out = tmp_path / "peaks", tmp_path / "out"
    words = [str(ROOT / "benchmarks" / "peak_memory.py"), str(peaks), "cpu", "script.py", "a"]

    def is_known() -> bool:
        return out.read_text() == "['a']\n" and last_peak(peaks) > size

    run_process(words, tmp_path, tmp_path, 30, is_known)
    assert last_peak(peaks) < size + 200_000_000
