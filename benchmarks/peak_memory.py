"""Runs a script as it is and writes down the highest memory that it has taken so far.

    python benchmarks/peak_memory.py PEAKS cuda train_llm.py run.json ...

Every half second a thread appends to the file PEAKS the largest number of bytes that torch has
allocated on the GPU (`cuda`) or that the process held (`cpu`): a line only where it grew. So the
number outlives the process, however that ends.
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from benchmarks.bare_loop import peak_bytes  # noqa: E402

SECONDS_BETWEEN = 0.5


def main() -> None:
    if len(sys.argv) < 4:
        print("benchmarks/gpu_training.py starts this.")
        return
    peaks, device, script = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).resolve()
    threading.Thread(target=write_peaks, args=(peaks, device), daemon=True).start()
    sys.argv[:] = [str(script), *sys.argv[4:]]
    sys.path[0] = str(script.parent)  # as Python itself has it
    runpy.run_path(str(script), run_name="__main__")


def write_peaks(file: Path, device: str) -> None:
    last = 0
    with file.open("a", encoding="ascii") as lines:
        while True:
            peak = allocated_bytes() if device == "cuda" else peak_bytes()
            if peak > last:
                lines.write(f"{peak}\n")
                lines.flush()
                last = peak
            time.sleep(SECONDS_BETWEEN)


def allocated_bytes() -> int:
    """The most that torch has had allocated on the GPU; 0 before it uses one."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return 0
        return int(torch.cuda.max_memory_allocated())
    except AttributeError:  # the script is importing torch just now
        return 0


def last_peak(file: Path) -> int:
    """The last whole line of a file written so, in bytes; 0 where there is none yet."""
    lines = file.read_text("ascii").rpartition("\n")[0].splitlines() if file.exists() else []
    return int(lines[-1]) if lines else 0


if __name__ == "__main__":
    main()
