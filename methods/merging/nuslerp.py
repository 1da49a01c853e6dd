"""NuSLERP: SLERP by weights, of whole tensors or of each of their vectors, of models or of their task vectors.

    t = w_1 / (w_0 + w_1),    slerp(t) of `slerp` without its shortcut for small angles

as in arcee-ai/mergekit; only vectors on one line to the precision of float32 are interpolated on that line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.slerp import (
    TwoModels,
    combine,
    combine_pieces,
    copied,
    gram,
    share_of_second,
    slerp_factors,
    total_gram,
)

COLLINEAR = 1 - 5e-13  # |c| at an angle of 1e-6, which is what rounding to float32 makes of none


class NuSlerp(TwoModels):
    """NuSLERP of two models.

    Args:
        t: share of the second model; None takes it from the weights, a half where they cancel.
        flatten: each tensor is one vector; False interpolates vector by vector.
        dim: along which the vectors lie where not ``flatten``: -1 are the rows of a matrix (out, in), 0 its columns
            (``row_wise`` in mergekit).
        task_vectors: interpolate the changes from the base, and add them to it.
    """

    def __init__(
        self, t: float | None = None, flatten: bool = True, dim: Literal[-1, 0] = -1, task_vectors: bool = False
    ) -> None:
        super().__init__(t)
        self.flatten, self.dim, self.needs_base = flatten, dim, task_vectors

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The point at ``t`` of each arc. Where ``dim`` is 0, also 2 numbers for every entry of a row."""
        t, taus, shape = share_of_second(weights), self.needs_base, operands.shape
        if t in (0, 1):
            yield from copied(operands, int(t))
        elif operands.num_entries == 0:
            return
        elif self.flatten or len(shape) < 2:
            factors = slerp_factors(total_gram(operands, taus), t, COLLINEAR)
            yield from combine_pieces(operands, factors, taus)
        elif self.dim == -1:
            for base, experts in operands.rows(shape[-1]):
                origin = base if taus else None
                factors = slerp_factors(gram(experts, origin), t, COLLINEAR)
                yield combine(factors, experts, origin).flatten()
        else:
            yield from self.by_column(operands, t)

    def by_column(self, operands: Operands, t: float) -> Iterator[Tensor]:
        """Each column of (out, ..) is a vector."""
        columns, taus = operands.num_entries // operands.shape[0], self.needs_base
        total = torch.zeros(())
        for base, experts in operands.rows(columns):
            total = gram([e.T for e in experts], base.T if taus else None) + total
        factors = slerp_factors(total, t, COLLINEAR)
        for base, experts in operands.rows(columns):
            yield combine(factors, [e.T for e in experts], base.T if taus else None).T.flatten()
