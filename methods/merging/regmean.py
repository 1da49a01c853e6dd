"""Linear layers that keep the outputs of every expert on its own data: RegMean (arXiv 2212.09849).

    W* minimises sum_i w_i tr((W - W_i) G_i (W - W_i)^T),     G_i <- a G_i + (1 - a) diag(G_i)
    W*^T = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i^T,            G_i = X_i^T X_i / rows

G_i (in, in) is what `GramStatistics` measures of the inputs of expert i's layer; W is (out, in).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from fulgurite.methods.merging.base import average
from fulgurite.methods.merging.data_driven import DataDrivenMerger


class RegMean(DataDrivenMerger):
    """The least-squares average of linear layers; all other tensors are averaged.

    NOTE: solved for the difference from the weighted mean, so that the ridge, and directions that no input has
    shown, pull to the mean of the experts and not to 0; where the Grams have full rank the solution is the same.
    Holds two (in, in) and two (in, out) float64 tensors besides the sources.

    Args:
        offdiag: a, the factor of the Grams' off-diagonal entries; 1 keeps them, 0 weighs each column alone.
        ridge: added to the diagonal of the summed Gram, relative to its mean.
    """

    kind = "gram"

    def __init__(self, offdiag: float = 0.9, ridge: float = 1e-8) -> None:
        if not 0 <= offdiag <= 1:
            raise ValueError(f"offdiag={offdiag} must be from 0 to 1")
        if ridge < 0:
            raise ValueError(f"ridge={ridge} must not be negative")
        self.offdiag, self.ridge = offdiag, ridge
        self.transposed: frozenset[str] = frozenset()

    def use(self, statistics: Sequence[Mapping[str, Tensor]], transposed: Collection[str] = ()) -> Self:
        """Take the Grams of the experts, by the names of the layers.

        Args:
            statistics: ``GramStatistics.means()`` of each expert, in their order.
            transposed: names of the layers whose weight is stored as (in, out): ``GramStatistics.transposed``.
        """
        self.transposed = frozenset(transposed)
        return super().use(statistics)

    def parameter_of(self, key: str) -> str:
        """The Gram of a layer's input is about its weight."""
        return f"{key}.weight"

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """The least-squares average of a linear layer's weights, the average of anything else."""
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.statistics[0]:
            return average(experts, weights)
        if len(experts) == 1:
            return experts[0].clone()
        turned = layer in self.transposed
        matrices = [expert.T if turned else expert for expert in experts]
        grams = [fitting_gram(layer, number, each[layer], matrices[0]) for number, each in enumerate(self.statistics)]
        merged = regression_mean(matrices, grams, weights, self.offdiag, self.ridge)
        return (merged.T if turned else merged).contiguous().to(experts[0].dtype)


def regression_mean(
    matrices: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    offdiag: float = 1.0,
    ridge: float = 1e-8,
) -> Tensor:
    """W* (out, in) in float64, from T matrices (out, in) and Grams (in, in).

    By Cholesky where what ``ridge`` and ``offdiag`` add to the diagonal is above rounding errors of the Grams' type,
    since the factorisation of a singular matrix often passes, with rounding errors for pivots. Else, and where it
    fails, by least squares, which is slower and leaves directions within those errors at the mean.
    """
    mean = average([matrix.double() for matrix in matrices], weights)
    total = torch.zeros_like(grams[0], dtype=torch.float64)
    right = torch.zeros_like(mean.T)
    for matrix, gram, weight in zip(matrices, grams, weights):
        scaled = gram.double() * offdiag
        scaled.diagonal().copy_(gram.diagonal())
        total.add_(scaled, alpha=weight)
        right.addmm_(scaled, (matrix.double() - mean).T, alpha=weight)
    total.diagonal().add_(ridge * total.diagonal().mean())
    rounding = 8 * len(total) ** 0.5 * max(torch.finfo(gram.dtype).eps for gram in grams)
    if ridge + 1 - offdiag > rounding:
        factor, failed = torch.linalg.cholesky_ex(total)
        if not failed:
            return mean + torch.cholesky_solve(right, factor).T
    # Only the CPU's solver takes matrices of less than full rank.
    solved = torch.linalg.lstsq(total.cpu(), right.cpu(), rcond=rounding, driver="gelsd").solution
    return mean + solved.to(mean.device).T


def fitting_gram(layer: str, number: int, gram: Tensor, matrix: Tensor) -> Tensor:
    """``gram`` on the matrix's device.

    Raises:
        ValueError: the layer is no matrix, the Gram is of another width, or has an entry that is no number.
    """
    width = matrix.shape[-1]
    if matrix.dim() != 2 or gram.shape != (width, width):
        raise ValueError(
            f"{layer}: a Gram of {tuple(gram.shape)} for a weight of {tuple(matrix.shape)} as (out, in); "
            "name layers that are stored as (in, out) in transposed, and measure Grams whole, without diagonal"
        )
    if not gram.isfinite().all():
        raise ValueError(f"{layer}: the Gram of expert {number} has entries that are not finite")
    return gram.to(matrix.device)
