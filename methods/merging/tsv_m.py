"""TSV-M: leading singular triplets of every task, made orthogonal to each other (arXiv 2412.00081).

tau_i ~ U_i S_i V_i^T, the t = r // T largest triplets each, r = min(m, n), at least one
tau* = polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1 .. V_T])^T
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.spectral import Solver, Spectral, polar, triplets


def tsv_m(taus: Sequence[Tensor], solver: Solver = "eigh") -> Tensor:
    """tau* (m, n) of T task vectors (m, n). A task vector of zeros has no direction and adds none."""
    num = max(1, min(taus[0].shape) // len(taus))
    parts = [triplets(tau, num, solver) for tau in taus if tau.any()]
    left, values, right = (torch.cat(part, dim=-1) for part in zip(*parts))
    return (polar(left, solver)[0] * values) @ polar(right, solver)[0].mT


class TsvM(Spectral):
    """TSV-M.

    Args:
        lam: multiple of tau*.
        exclude: patterns of names of matrices that are averaged.
        whiten: how triplets and polar factors are found: ``"svd"`` as published, ``"eigh"`` and ``"newton_schulz"``
            (the polar factors) faster, and equal to rounding.
    """

    def __init__(self, lam: float = 1.0, exclude: Sequence[str] = (), whiten: Solver = "eigh") -> None:
        super().__init__(lam, exclude)
        self.whiten = whiten

    def merge_matrix(self, taus: Sequence[Tensor]) -> Tensor:
        """See `tsv_m`."""
        return tsv_m(taus, self.whiten)
