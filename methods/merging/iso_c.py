"""Iso-C: the sum of task vectors, with all singular values made equal (arXiv 2502.04959).

M = sum_i tau_i = U S V^T,    tau* = mean(S) U V^T
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fulgurite.methods.merging.spectral import Solver, Spectral, polar


def iso_c(taus: Sequence[Tensor], solver: Solver = "eigh") -> Tensor:
    """mean(S) U V^T of the sum of task vectors (m, n); one polar factor, and no SVD unless ``solver`` says so."""
    total = taus[0].clone()
    for tau in taus[1:]:
        total += tau
    if not total.any():
        return total
    factor, nuclear = polar(total, solver)
    return factor * (nuclear / min(total.shape))


class IsoC(Spectral):
    """Iso-C.

    Args:
        lam: multiple of tau*; 1.5 was found good for eight tasks of a ViT-B/32.
        exclude: patterns of names of matrices that are averaged; the published runs exclude ``text_projection``.
        solver: of the polar factor, see `polar`.
    """

    def __init__(self, lam: float = 1.0, exclude: Sequence[str] = (), solver: Solver = "eigh") -> None:
        super().__init__(lam, exclude)
        self.solver = solver

    def merge_matrix(self, taus: Sequence[Tensor]) -> Tensor:
        """See `iso_c`."""
        return iso_c(taus, self.solver)
