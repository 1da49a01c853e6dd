"""Spherical interpolation of two models (SLERP), and what all spherical merges share.

    c = <a, b> / (|a| |b|), theta = acos c          (each tensor is one vector)
    slerp(t) = (sin((1 - t) theta) a + sin(t theta) b) / sin theta
    |c| > 0.9995: (1 - t) a + t b

Source: Shoemake, "Animating rotation with quaternion curves", 1985; the two models keep their lengths, as is usual for
weights. A spherical merge is a sum of its models whose factors depend on their inner products alone, so that it needs
`gram` (T x T numbers in float64, in pieces) and then one running sum, and never a normalised copy of a model.

R vectors per tensor, C entries of a vector, T models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Merger

BLOCK = 1 << 20  # entries of a tensor that are in float64 at a time
TINY = 1e-8  # a length up to this has no direction
NEARLY_PARALLEL = 0.9995


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products of models, vector by vector, of their task vectors where there is a base.

    Args:
        tensors: T of (R, C).
        base: (R, C).

    Returns:
        (R, T, T) in float64. Holds T + 1 blocks of a million entries.
    """
    rows, columns = tensors[0].shape
    out = torch.zeros(rows, len(tensors), len(tensors), dtype=torch.float64, device=tensors[0].device)
    width = max(1, min(columns, BLOCK))
    height = max(1, BLOCK // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            place = (slice(row, row + height), slice(column, column + width))
            block = torch.stack([tensor[place].double() for tensor in tensors], dim=1)
            if base is not None:
                block -= base[place].double().unsqueeze(1)
            out[place[0]] += block @ block.mT
    return out


def combine(factors: Tensor, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """sum_i f_i x_i; theta_0 + sum_i f_i tau_i where there is a base.

    Args:
        factors: (R, T).
        tensors: T of (R, C).
        base: (R, C).

    Returns:
        (R, C), a new tensor: one running sum.
    """
    columns = factors.to(tensors[0].dtype).unsqueeze(-1)
    out = tensors[0] * columns[:, 0]
    for number, tensor in enumerate(tensors[1:], start=1):
        out.addcmul_(tensor, columns[:, number])
    if base is not None:
        out.addcmul_(base, (1 - factors.sum(1, keepdim=True)).to(base.dtype))
    return out


def slerp_factors(products: Tensor, t: float, parallel: float = NEARLY_PARALLEL) -> Tensor:
    """(R, 2) factors of two models with inner products (R, 2, 2); those of a line where |c| > ``parallel``."""
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    cosine = products[:, 0, 1] / torch.where(lengths > TINY, lengths, 1.0).prod(1)
    cosine = cosine.clamp(-1, 1)
    angle = cosine.acos()
    line = torch.tensor([1 - t, t], dtype=torch.float64, device=products.device).expand(len(products), 2)
    shares = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()], dim=1)
    straight = (cosine.abs() > parallel).unsqueeze(1)
    return torch.where(straight, line, shares / torch.where(straight, 1.0, angle.sin().unsqueeze(1)))


def share_of_second(weights: Sequence[float]) -> float:
    """t = w_1 / (w_0 + w_1), a half where the weights cancel."""
    total = weights[0] + weights[1]
    return 0.5 if abs(total) < 1e-6 else weights[1] / total


class TwoModels(Merger):
    """A merger that interpolates between two models, by the share of the second.

    Args:
        t: share of the second model, 0 gives the first and 1 the second; None takes it from the weights,
            w_1 / (w_0 + w_1).
    """

    needs_base: ClassVar[bool] = False
    min_experts: ClassVar[int] = 2

    def __init__(self, t: float | None = None) -> None:
        self.t = t

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """The shares of both models.

        Raises:
            ValueError: not two models, or both ``t`` and weights that differ.
        """
        weights = super().check(num_experts, has_base, weights)
        if num_experts != 2:
            raise ValueError(f"{type(self).__name__} merges 2 models, got {num_experts}")
        if self.t is not None and weights[0] != weights[1]:
            raise ValueError(f"{type(self).__name__} has t={self.t} and weights {weights}: give one of them")
        t = share_of_second(weights) if self.t is None else self.t
        return [1 - t, t]


class Slerp(TwoModels):
    """SLERP of two models, each tensor as one vector. A base is not used, except for the types of the result.

    Args:
        t: share of the second model; None takes it from the weights, a half where they are equal.
    """

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """The point at ``t`` of the arc; one running sum."""
        t = share_of_second(weights)
        if t in (0, 1):
            return experts[int(t)].clone()
        flat = [expert.reshape(1, -1) for expert in experts]
        return combine(slerp_factors(gram(flat), t), flat).view(experts[0].shape)
