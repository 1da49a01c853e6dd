"""Ranks of magnitudes within each row of a matrix, and what belongs to them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.selection import bits_of


def by_rank(values: Tensor, table: Tensor) -> Tensor:
    """At the place of the entry of r-th smallest magnitude of its row, the r-th entry of a table (from 0).

    Of equal magnitudes the one further right counts as smaller. Sorts magnitude and place together as one integer of
    64 bits, which takes half the time of an argsort.

    Args:
        values: (R, columns); doubles are compared as the floats that they round to.
        table: (columns,).
    """
    rows, columns = values.shape
    keys = bits_of(values).cpu().numpy().astype(np.uint64) << np.uint64(32)
    keys |= np.arange(columns - 1, -1, -1, dtype=np.uint64)
    keys.sort(axis=1)
    places = columns - 1 - (keys & np.uint64(2**32 - 1)).astype(np.int64)
    ranked = table.expand(rows, columns)
    return torch.empty(rows, columns, dtype=table.dtype).scatter_(1, torch.from_numpy(places), ranked).to(values.device)


def row_length(operands: Operands) -> int:
    """Entries of a row: the last dimension; a vector is one row, and a scalar too."""
    return operands.shape[-1] if operands.shape else 1
