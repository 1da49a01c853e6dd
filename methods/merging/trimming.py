"""The entries of largest magnitude of the task vectors of one tensor, by `methods.selection`, read in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.selection import Cut, Parts, cuts_at, kept_count, take


def cuts_of(operands: Operands, keep: Sequence[int], all_ties: bool = False) -> list[Cut]:
    """Where to cut the T task vectors of one tensor to keep the entries of largest magnitude.

    Args:
        operands: the tensor, with a base.
        keep: how many entries of each are kept, T numbers.
        all_ties: keep all that equal the last one kept, so ``keep`` or more.
    """
    found = cuts_at(task_vectors(operands), operands.num_entries, [[rank] for rank in keep], all_ties)
    return [cut for (cut,) in found]


def task_vectors(operands: Operands) -> Parts:
    """The T task vectors of one tensor."""
    return lambda: ([(expert - base).flatten() for expert in experts] for _, base, experts in operands.pieces())


def trim(values: Tensor, density: float) -> Tensor:
    """The int(density n) entries of largest magnitude, zeros elsewhere. Shape kept; one flat tensor more."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device).expand_as(values)
    (cut,) = cuts_of(Operands("", [zero, values], True), [kept_count(density, values.numel())])
    kept, _ = take(values.flatten(), cut)
    return kept.view_as(values)
