"""Iso-CTS: equal singular values for directions that tasks share and for directions of their own (arXiv 2502.04959).

With r = min(m, n), c = int(f r), s = round((r - c) / T) and then c = r - s T:

    U_c, S_c, V_c      the c largest triplets of sum_i tau_i
    U_i, S_i, V_i      the s largest triplets of tau_i - U_c U_c^T tau_i
    tau* = mean(S) polar([U_1 .. U_T, U_c]) polar([V_1 .. V_T, V_c])^T
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.iso_c import iso_c
from fulgurite.methods.merging.spectral import Solver, Spectral, polar, triplets


def iso_cts(taus: Sequence[Tensor], common: float = 0.8, solver: Solver = "eigh") -> Tensor:
    """tau* (m, n) of T task vectors (m, n); Iso-C where the tasks leave no common direction.

    A task vector of zeros has no direction and does not count as a task.
    """
    taus = [tau for tau in taus if tau.any()]
    total = torch.stack(taus).sum(0)
    if not total.any():
        return total
    rank = min(total.shape)
    own = round((rank - int(rank * common)) / len(taus))
    shared = rank - own * len(taus)
    if shared <= 0:
        return iso_c(taus, solver)
    base = triplets(total, shared, solver)
    parts = [triplets(tau - base[0] @ (base[0].mT @ tau), own, solver) for tau in taus]
    left, values, right = (torch.cat(part, dim=-1) for part in zip(*parts, base))
    return polar(left, solver)[0] @ polar(right, solver)[0].mT * values.mean()


class IsoCts(Spectral):
    """Iso-CTS.

    Args:
        lam: multiple of tau*.
        exclude: patterns of names of matrices that are averaged.
        common: share of directions that are common to all tasks; 1 is Iso-C.
        solver: of triplets and polar factors, see `polar`.
    """

    def __init__(
        self, lam: float = 1.0, exclude: Sequence[str] = (), common: float = 0.8, solver: Solver = "eigh"
    ) -> None:
        super().__init__(lam, exclude)
        if not 0 <= common <= 1:
            raise ValueError(f"common={common} is not a share of the directions, from 0 to 1")
        self.common, self.solver = common, solver

    def merge_matrix(self, taus: Sequence[Tensor]) -> Tensor:
        """See `iso_cts`."""
        return iso_cts(taus, self.common, self.solver)
