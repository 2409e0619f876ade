"""Tells transformers whether rows hold several documents, so that it need not look.

It looks at the positions of every forward pass. On a GPU the host then waits for all that the
device still has to do; and a model that is compiled as a whole, where looking is impossible, gets a
mask of (T, T) numbers for the case that there were several.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils

_are_packed: bool | None = None  # None: nobody has said, and transformers looks
_look = masking_utils.find_packed_sequence_indices


@contextmanager
def rows_known(are_packed: bool) -> Iterator[None]:
    """Inside, models take it that each row holds one document, or that positions part several."""
    global _are_packed
    before, _are_packed = _are_packed, are_packed
    try:
        yield
    finally:
        _are_packed = before


def _find_documents(position_ids: Tensor) -> Tensor | None:
    """The number of its document for each position (B, T) int64, in its row; None: one a row.

    In the place of transformers' `find_packed_sequence_indices`.
    """
    if _are_packed is None:
        return _look(position_ids)
    if not _are_packed:
        return None
    steps = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1)
    return (steps != 1).cumsum(-1)


masking_utils.find_packed_sequence_indices = _find_documents
