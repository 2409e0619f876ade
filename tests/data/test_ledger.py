"""Proves that the ledger's sums are exact and that it survives JSON."""

from __future__ import annotations

import json

from llm_training.data.ledger import NAMES_KEPT, Ledger


def filled_ledger() -> Ledger:
    ledger = Ledger()
    ledger.use("train", num_bytes=10, num_tokens=4, is_new_file=True)
    ledger.use("train", num_bytes=5, num_tokens=3, is_new_file=False)
    ledger.use("validation", num_bytes=2, num_tokens=2, is_new_file=True)
    for i in range(NAMES_KEPT + 2):
        ledger.leave_out("empty documents", f"a.jsonl, line {i}")
    ledger.ignore_file("files without a known text suffix", "photo.png")
    return ledger


def test_counts_add_up() -> None:
    ledger = filled_ledger()
    assert vars(ledger.splits["train"]) == {"files": 1, "documents": 2, "bytes": 15, "tokens": 7}
    assert ledger.documents_seen == 2 + 1 + NAMES_KEPT + 2


def test_a_document_cut_in_two_was_seen_once() -> None:
    ledger = Ledger()
    ledger.use("train", num_bytes=95, num_tokens=96, is_new_file=True)
    ledger.use("validation", num_bytes=5, num_tokens=6, is_new_file=True)
    ledger.documents_cut += 1
    assert ledger.documents_seen == 1


def test_it_survives_json() -> None:
    ledger = filled_ledger()
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_lines_name_the_first_few() -> None:
    lines = filled_ledger().lines()
    assert lines[0] == "train: 2 documents, 1 files, 0.00 MB of text, 7 tokens"
    assert "left out: 7 empty documents (a.jsonl, line 0, " in lines[2]
    assert lines[2].endswith("line 4, ...)")
    assert lines[3] == "not read: 1 files without a known text suffix (photo.png)"
