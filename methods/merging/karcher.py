"""Karcher mean: the direction with the smallest sum of squared angles to the models, at their mean length.

With u_i = x_i / |x_i|, weights that sum to 1, and mu_0 their mean direction:

    theta_i = acos <u_i, mu>
    d = sum_i w_i theta_i / sin theta_i (u_i - cos theta_i mu)
    mu <- mu cos|d| + d sin|d| / |d|          until |d| < tol
    theta* = mu sum_i w_i |x_i|

Source: Grove and Karcher, "How to conjugate C1-close group actions", 1973; arcee-ai/mergekit for weights of models.
All of it stays in the span of the models, so that T numbers are iterated and not a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.multislerp import Spherical, directions
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.slerp import TINY, combine_pieces, copied, total_gram


def karcher_factors(products: Tensor, shares: Tensor, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """(T,) factors of models with inner products (T, T). A model of length 0 has no direction, but counts as length."""
    cosines, lengths = directions(products)
    has_direction = lengths > TINY
    if not has_direction.any():
        return shares
    pull = torch.where(has_direction, shares, 0.0)
    mean = pull.clone()
    if float(mean @ cosines @ mean) < TINY**2:
        mean = (has_direction.cumsum(0).eq(1) & has_direction).to(pull)  # the first model that has one
    for _ in range(max_iter):
        mean = mean / (mean @ cosines @ mean).sqrt()
        near = (cosines @ mean).clamp(-1, 1)
        angle = near.acos()
        # No angle has the limit 1; the way to the opposite point is not defined, and adds nothing.
        bend = torch.where(angle.sin() > TINY, angle / angle.sin(), (near > 0).to(pull)) * pull
        step = bend - (bend @ near) * mean
        length = float((step @ cosines @ step).clamp_min(0).sqrt())
        if length < tol:
            break
        mean = mean * math.cos(length) + step * (math.sin(length) / length)
    mean = mean / (mean @ cosines @ mean).sqrt()
    return torch.where(has_direction, mean / lengths, 0.0) * (shares @ lengths)


class Karcher(Spherical):
    """Karcher mean, each tensor as one vector. A base is not used, except for the types of the result.

    Args:
        max_iter: steps at most.
        tol: length of a step, in radians, below which the mean is found.
    """

    def __init__(self, max_iter: int = 10, tol: float = 1e-5) -> None:
        self.max_iter, self.tol = max_iter, tol

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The mean direction at the mean length."""
        if len(weights) == 1:
            yield from copied(operands, 0)
        elif operands.num_entries:
            products = total_gram(operands, False)[0]
            factors = karcher_factors(products, products.new_tensor(weights), self.max_iter, self.tol)
            yield from combine_pieces(operands, factors[None], False)
