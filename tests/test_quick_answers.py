"""Proves that `--help`, `--show_arguments` and mistakes in the arguments wait for nothing slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.argument_cases import ROOT, open_clean_place, run_python, write, write_good

SLOW = {"torch", "transformers", "datasets", "mlflow", "accelerate", "numpy", "tokenizers"}
MODEL = ("--model_type=null", "--model_name_or_path=model")
# The script as it is started, and what it has imported when it ends.
ENTRY = """
import runpy
sys.argv = ["train_llm.py", *{words!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("slow:", sorted({slow!r} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clean_place(tmp_path, monkeypatch)
    write("x.yaml", "save_steps: 20\nmax_steps: 10\nblock_size: 8")
    write("x.toml", "seed = 1.5")
    Path("model").mkdir()
    write("model/config.json", '{"max_position_embeddings": 4}')


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--help"], 0, "--learning_rate"),
        ([], 2, "usage: python train_llm.py"),
        (["good.json", "--show_arguments"], 0, "  seed: 42  # default"),
        (["good.json", "x.yaml", "--show_arguments"], 2, "save_steps=20 is more than max_steps=10"),
        (["good.json", "x.toml"], 2, "seed (x.toml line 1): takes integer|null, not 1.5"),
        (["good.json", "--max_iters", "5"], 2, "nanoGPT's"),
        (["good.json", "--from_run", "nowhere"], 2, "nowhere is no folder"),
        (["good.json", *MODEL, "--block_size=4", "--show_arguments"], 0, "block_size: 4  # comm"),
        (["good.json", *MODEL, "--block_size=5"], 2, "max_position_embeddings=4"),
        (
            ["good.json", "--device", "cpu", "--mixed_precision", "fp16"],
            2,
            "use bf16, fp32 or auto",
        ),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_nothing_slow_is_imported(argv: list[str], code: int, says: str) -> None:
    write_good()
    script = str(ROOT / "train_llm.py")
    ended = run_python(ENTRY.format(words=argv, script=script, slow=SLOW))
    assert ended.returncode == code, ended.stderr
    assert says in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.endswith("slow: []\n")
