"""Proves that processes beside this one give the same ids, and that none of them can do harm.

One that is killed costs no text; none outlives the one that asks, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from llm_training.data.documents.sources import Document
from llm_training.data.tokens.encoding import TextEncoder
from llm_training.data.tokens.encoding_processes import EncodingProcesses, PlainEncoder
from llm_training.data.tokens.tokenizers import train_tokenizer
from tests.data.tokens.test_encoding import Part, part

ROOT = Path(__file__).parents[3]
TEXTS = ["def f(x):\n    return x", "中文 and ASCII", "", "it's\0gone", " \n"] * 3


@pytest.fixture(scope="module")
def encoder() -> PlainEncoder:
    backend: Tokenizer = train_tokenizer("bpe", TEXTS, 300).backend_tokenizer
    backend.add_tokens([AddedToken("\0", normalized=False)])
    return PlainEncoder(backend, backend.token_to_id("\0"))


def until(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_gives_the_ids_and_ends_when_it_is_not_needed(encoder: PlainEncoder) -> None:
    assert encoder.has_words
    with EncodingProcesses(encoder, 1) as processes:
        assert processes.encode(TEXTS) == encoder.encode(TEXTS)
        [process] = processes._started
        # Ctrl-C reaches it too.
        process.send_signal(signal.SIGINT)
        assert processes.encode(TEXTS[:4]) == encoder.encode(TEXTS[:4])
        assert process.poll() is None
    assert process.poll() is not None


def test_where_a_process_was_killed_nothing_is_lost(encoder: PlainEncoder) -> None:
    with EncodingProcesses(encoder, 1) as processes:
        processes.encode(TEXTS)
        processes._started[0].kill()
        for _ in range(3):
            assert processes.encode(TEXTS) == encoder.encode(TEXTS)
        assert len(processes._started) == 1


def test_where_no_process_can_be_started_nothing_is_lost(
    encoder: PlainEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with EncodingProcesses(encoder, 2) as processes:
        assert processes.encode(TEXTS) == encoder.encode(TEXTS)


def test_no_process_outlives_the_one_that_asks(tmp_path: Path) -> None:
    script = """
import time
from llm_training.data.tokens.encoding_processes import EncodingProcesses, PlainEncoder
from llm_training.data.tokens.tokenizers import train_tokenizer
encoder = PlainEncoder(train_tokenizer("byte", [], 0).backend_tokenizer, None)
with EncodingProcesses(encoder, 1) as processes:
    processes.encode(["text"])
    print(processes._started[0].pid, flush=True)
    time.sleep(60)
"""
    asking = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert asking.stdout is not None
    pid = int(asking.stdout.readline())
    assert is_running(pid)
    os.kill(asking.pid, signal.SIGKILL)
    asking.wait()
    asking.stdout.close()
    assert until(lambda: not is_running(pid))


def test_documents_come_in_order_from_many_processes(
    monkeypatch: pytest.MonkeyPatch, text_folder: Path
) -> None:
    monkeypatch.setattr("llm_training.data.tokens.encoding._BATCH_CHARACTERS", 2_000)
    monkeypatch.setattr("llm_training.data.tokens.encoding._PIECE_CHARACTERS", 300)
    texts = [path.read_text()[:20_000] for path in sorted(text_folder.glob("*.py"))[:3]]
    documents = [part(text, str(i)) for i, text in enumerate([*texts, *filter(None, TEXTS)] * 3)]
    # A conversation among them is not for these processes.
    documents.insert(5, Part(Document("chat", 4, None, "row 7", learned=((0, 2),)), "chat"))
    tokenizer = train_tokenizer("bpe", texts, 600)

    def results(num_processes: int) -> list[tuple[str, list[int], bool]]:
        encoder = TextEncoder(tokenizer, num_processes)
        return [
            (p.key, ids.tolist(), learned is None) for p, ids, learned in encoder.encode(documents)
        ]

    alone = results(0)
    assert results(1) == alone
    assert results(2) == alone
