"""Model Stock: the average pulled towards the base by how little the fine-tuned models agree (arXiv 2403.19522).

    c = mean over pairs of cos(tau_i, tau_j)
    t = T c / (1 + (T - 1) c)
    theta* = t mean_i theta_i + (1 - t) theta_0

per tensor, or per filter. Two models that agree in nothing (c = 0) give the base, equal ones (c = 1) come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.slerp import combine, combine_pieces, gram, total_gram


def mean_cosine(products: Tensor, mean: Literal["cosine", "angle"] = "cosine") -> Tensor:
    """(R,) cosine of the mean pair, from inner products (R, T, T); 0 for a pair with a task vector of length 0.

    NOTE: a product of lengths is not raised to 1e-6, as is done elsewhere: that makes the cosine of small task
    vectors (a bias, a low learning rate) about 0, and sends two equal models back to the base.
    """
    num = products.shape[1]
    first, second = torch.triu_indices(num, num, offset=1, device=products.device)
    squares = products.diagonal(dim1=1, dim2=2)
    lengths = (squares[:, first] * squares[:, second]).sqrt()
    cosines = (products[:, first, second] / torch.where(lengths > 0, lengths, 1.0)).clamp(-1, 1)
    return cosines.mean(1) if mean == "cosine" else cosines.acos().mean(1).cos()


def ratio(cosine: Tensor, num: int, clamp: bool = True) -> Tensor:
    """t of the module's equations; 0 within 1e-6 of the pole at c = -1 / (num - 1)."""
    below = 1 + (num - 1) * cosine
    pole = below.abs() < 1e-6
    t = torch.where(pole, 0.0, num * cosine / torch.where(pole, 1.0, below))
    # Below the pole, where only rounding gets, t is positive again.
    return torch.where(cosine > 0, t, 0.0).clamp(0, 1) if clamp else t


class ModelStock(Piecewise):
    """Model Stock of at least two models.

    Args:
        scope: ``"tensor"`` gives a ratio to each tensor, ``"filter"`` to each row of a matrix and each output
            channel of a kernel (vectors still have one).
        clamp: keep t in [0, 1]; without it models that point away from each other leave on the far side of the base.
        mean: over more than two models, take the mean of the pairs' cosines or of their angles.
    """

    min_experts: ClassVar[int] = 2

    def __init__(
        self,
        scope: Literal["tensor", "filter"] = "tensor",
        clamp: bool = True,
        mean: Literal["cosine", "angle"] = "cosine",
    ) -> None:
        self.scope, self.clamp, self.mean = scope, clamp, mean

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """The weights, which must be equal: the geometry is that of a plain mean.

        Raises:
            ValueError: see `Merger.check`; or weights that differ.
        """
        weights = super().check(num_experts, has_base, weights)
        if len(set(weights)) > 1:
            raise ValueError(f"ModelStock takes the plain mean of its models; leave out the weights {weights}")
        return weights

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """t mean_i theta_i + (1 - t) theta_0."""
        num, shape = len(weights), operands.shape
        if operands.num_entries == 0:
            return
        if self.scope == "tensor" or len(shape) < 2:
            yield from combine_pieces(operands, self.factors(total_gram(operands, True), num), True)
            return
        for base, experts in operands.rows(operands.num_entries // shape[0]):
            yield combine(self.factors(gram(experts, base), num), experts, base).flatten()

    def factors(self, products: Tensor, num: int) -> Tensor:
        """(R, T) factors of task vectors with inner products (R, T, T)."""
        t = ratio(mean_cosine(products, self.mean), num, self.clamp)
        return (t / num).unsqueeze(1).expand(-1, num)
