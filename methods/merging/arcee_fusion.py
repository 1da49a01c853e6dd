"""Arcee Fusion: take the changes that matter most to a row's distribution (mergekit's ``arcee_fusion``).

    importance = |theta_1 - theta_0| KL(softmax(theta_1) || softmax(theta_0))    KL of each row (the last dimension)
    theta* = theta_1 where importance >= median + 1.5 (Q3 - Q1), else theta_0    quartiles of the tensor's importances

A quartile is the int(q (n - 1))-th smallest of n from 0, without interpolation.

NOTE: mergekit draws a million entries of larger tensors at random to estimate the quartiles; these are the exact ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.per_expert import refuse_several
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.row_ranks import row_length
from fulgurite.methods.selection import places_of

QUARTILES = (0.25, 0.5, 0.75)
EPSILON = 1e-8  # added to probabilities


def importance(expert: Tensor, base: Tensor) -> Tensor:
    """(R, columns) float32, of rows of these; in float64, since rows that changed little differ by rounding alone."""
    p, q = expert.double().softmax(-1).add_(EPSILON), base.double().softmax(-1).add_(EPSILON)
    divergence = (p / q).log_().mul_(p).sum(-1, keepdim=True).clamp_(min=0)
    return (expert - base).abs_().mul(divergence).to(torch.float32)


class ArceeFusion(Piecewise):
    """One model, into its base. Holds a block of rows of each, at least one row; reads each tensor three times."""

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses more than one model, and a weight other than 1."""
        return refuse_several(type(self).__name__, super().check(num_experts, has_base, weights))

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The model where its changes matter, the base elsewhere."""
        threshold = self.threshold(operands)
        for base, (expert,) in operands.rows(row_length(operands)):
            yield torch.where(importance(expert, base) >= threshold, expert, base).flatten()

    def threshold(self, operands: Operands) -> float:
        """median + 1.5 (Q3 - Q1) of the importances of one tensor."""
        count = operands.num_entries
        if count == 0:
            return 0.0

        def importances() -> Iterator[list[Tensor]]:
            for base, (expert,) in operands.rows(row_length(operands)):
                yield [importance(expert, base).flatten()]

        ranks = [count - int(quartile * (count - 1)) for quartile in QUARTILES]
        (places,) = places_of(importances, count, [ranks])
        first, median, third = (places[rank].value for rank in ranks)
        return median + 1.5 * (third - first)
