"""SCE: select, calculate, erase (FuseChat, arXiv 2408.07990).

    select     the int(topk nnz) coordinates of largest variance over the tau_i, of nnz that vary; all where topk = 1
    calculate  w_i = mean_j tau_ij^2 over the selected, divided by their sum (equal where that is below ``floor``)
    erase      s_j = sign(sum_i tau_ij), plus where it is 0
    merge      tau*_j = sum_{i: tau_ij s_j > 0} w_i tau_ij / max(sum_{i: tau_ij s_j > 0} w_i, 1e-6)

per tensor; theta* = theta_0 + tau*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.election import Election, merge_elected
from fulgurite.methods.merging.per_expert import check_fractions, refuse_weights
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.selection import EVERYTHING, Cut, cuts_at, take

ELECTION = Election(weighted=False, zero="positive", floor=1e-6)


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """Of T numbers each, divided by T; in the shape of one delta."""
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    return sum((delta - mean).square_() for delta in deltas) / len(deltas)


class Sce(Piecewise):
    """Select, calculate, erase. Reads each tensor twice, or five times where it selects.

    Args:
        topk: share of the coordinates that vary.
        floor: sum of mean squares below which all models count alike. NOTE: it is mergekit's, not the paper's, and
            task vectors of a usual size (1e-3) are below it; 0 weighs models of any size.

    Raises:
        ValueError: topk outside [0, 1].
    """

    def __init__(self, topk: float = 1.0, floor: float = 1e-6) -> None:
        check_fractions("topk", topk)
        self.topk, self.floor = topk, floor

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses weights that differ."""
        return refuse_weights(type(self).__name__, super().check(num_experts, has_base, weights))

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """theta_0 + tau*."""
        cut = self.cut(operands)
        squares, count = [0.0] * len(weights), max(operands.num_entries, 1)
        for _, _, deltas in self.selected(operands, cut):
            squares = [a + float(delta.square().sum()) / count for a, delta in zip(squares, deltas)]
        total = sum(squares)
        own = [1 / len(weights)] * len(weights) if total <= self.floor else [square / total for square in squares]
        for base, experts, deltas in self.selected(operands, cut):
            yield merge_elected(base, experts, deltas, own, ELECTION, as_is=True)

    def selected(self, operands: Operands, cut: Cut) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
        """Base, experts, and the selected entries of their task vectors, of pieces."""
        for _, base, experts in operands.pieces():
            deltas = [expert - base for expert in experts]
            if cut != EVERYTHING:
                varying, cut = take(variance(deltas).flatten(), cut)
                deltas = [delta.mul_(varying != 0) for delta in deltas]
            yield base, experts, deltas

    def cut(self, operands: Operands) -> Cut:
        """Where to cut the variances of one tensor."""
        if self.topk == 1:
            return EVERYTHING

        def variances() -> Iterator[list[Tensor]]:
            for _, base, experts in operands.pieces():
                yield [variance([expert - base for expert in experts])]

        varying = sum(int(values.count_nonzero()) for (values,) in variances())
        keep = int(varying * self.topk)
        return cuts_at(variances, operands.num_entries, [[keep]])[0][0]
