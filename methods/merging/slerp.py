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

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.plan import Operands

TINY = 1e-8  # a length up to this has no direction
NEARLY_PARALLEL = 0.9995


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products of models, vector by vector, of their task vectors where there is a base.

    Args:
        tensors: T of (R, C).
        base: (R, C).

    Returns:
        (R, T, T) in float64. Holds T + 1 copies in float64.
    """
    block = torch.stack([tensor.double() for tensor in tensors], dim=1)
    if base is not None:
        block -= base.double().unsqueeze(1)
    return block @ block.mT


def total_gram(operands: Operands, of_task_vectors: bool) -> Tensor:
    """(1, T, T) inner products of models, each tensor as one vector."""
    total = torch.zeros(())
    for _, base, experts in operands.pieces():
        total = gram([e[None] for e in experts], base[None] if of_task_vectors else None) + total
    return total


def combine_pieces(operands: Operands, factors: Tensor, of_task_vectors: bool) -> Iterator[Tensor]:
    """`combine` with the same factors (1, T) all over the tensor."""
    for _, base, experts in operands.pieces():
        yield combine(factors, [e[None] for e in experts], base[None] if of_task_vectors else None)[0]


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


class TwoModels(Piecewise):
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

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The point at ``t`` of the arc."""
        t = share_of_second(weights)
        if t in (0, 1):
            yield from copied(operands, int(t))
        elif operands.num_entries:
            yield from combine_pieces(operands, slerp_factors(total_gram(operands, False), t), False)


def copied(operands: Operands, number: int) -> Iterator[Tensor]:
    """One expert's tensor."""
    for _, _, experts in operands.pieces():
        yield experts[number]
