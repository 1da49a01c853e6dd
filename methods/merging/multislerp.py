"""Multi-SLERP: the mean direction of any number of models, at their mean length.

With u_i = x_i / |x_i| and weights that sum to 1, as in arcee-ai/mergekit:

    mu = sum_i w_i u_i / |sum_i w_i u_i|
    theta* = (mu cos|d| + d sin|d| / |d|) sum_i w_i |x_i|,   d = sum_i w_i (u_i - <u_i, mu> mu)

The tangent d is 0 whatever the models are, since sum_i w_i u_i is a multiple of mu, so that mu is all there is to
compute. The mean along arcs is another one: see `karcher`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.slerp import TINY, combine_pieces, copied, total_gram


class Spherical(Piecewise):
    """A merger of any number of models whose weights are shares: they are divided by their sum."""

    needs_base: ClassVar[bool] = False

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """The shares.

        Raises:
            ValueError: see `Merger.check`; or weights that cancel.
        """
        weights = super().check(num_experts, has_base, weights)
        total = sum(weights)
        if abs(total) < TINY:
            raise ValueError(f"{type(self).__name__} divides weights by their sum, which is 0 for {weights}")
        return [weight / total for weight in weights]


def directions(products: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (T, T) and lengths (T,) from inner products (T, T); a model of length 0 has cosine 0 with all."""
    lengths = products.diagonal().sqrt()
    scale = torch.where(lengths > TINY, 1 / lengths, 0.0)
    return products * scale[:, None] * scale, lengths


def multislerp_factors(products: Tensor, shares: Tensor) -> Tensor:
    """(T,) factors of models with inner products (T, T).

    Raises:
        ArithmeticError: the directions of more than two models cancel.
    """
    cosines, lengths = directions(products)
    long = float((shares @ cosines @ shares).clamp_min(0).sqrt())
    if long < TINY:
        if len(shares) > 2 and bool((lengths > TINY).any()):
            raise ArithmeticError("the directions of the models cancel, so that they have no mean")
        return shares
    return torch.where(lengths > TINY, shares / lengths, 0.0) * (shares @ lengths) / long


class MultiSlerp(Spherical):
    """Multi-SLERP, each tensor as one vector.

    Args:
        task_vectors: merge the changes from the base, and add them to it.
    """

    def __init__(self, task_vectors: bool = False) -> None:
        self.needs_base = task_vectors

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The mean direction at the mean length."""
        if len(weights) == 1:
            yield from copied(operands, 0)
        elif operands.num_entries:
            products = total_gram(operands, self.needs_base)[0]
            try:
                factors = multislerp_factors(products, products.new_tensor(weights))
            except ArithmeticError as error:
                raise ArithmeticError(f"{operands.name}: {error}") from error
            yield from combine_pieces(operands, factors[None], self.needs_base)
