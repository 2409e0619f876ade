"""The equivalence worker with whole rows, whose runs leave a finished model behind.

accelerate launch --config_file ... vocab_padding_worker.py CASES OUTPUT
"""

from __future__ import annotations

from llm_training.ranks import leave
from tests.distributed import equivalence_worker

if __name__ == "__main__":
    equivalence_worker.Recorder.install = lambda _: None  # type: ignore[method-assign]
    equivalence_worker.main()
    leave(0)
