"""Weighted averages and sums of task vectors.

    average          theta* = sum_i w_i theta_i / sum_i w_i           (model soups, arXiv 2203.05482)
    task arithmetic  theta* = theta_0 + lam sum_i w_i tau_i           (arXiv 2212.04089)

A negative weight subtracts a task: forgetting (w < 0), or analogies (tau_a + tau_b - tau_c).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fulgurite.methods.merging.base import Elementwise, average


class Average(Elementwise):
    """The weighted mean of the experts; the base counts only if it is listed among them.

    Args:
        normalize: divide by the sum of the weights; False gives the plain weighted sum.
    """

    needs_base: ClassVar[bool] = False

    def __init__(self, normalize: bool = True) -> None:
        self.normalize = normalize

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses weights that cancel where they are divided by their sum."""
        weights = super().check(num_experts, has_base, weights)
        if self.normalize and abs(sum(weights)) < 1e-8:
            raise ValueError(f"Average divides by the sum of the weights, and {weights} cancel: set normalize to false")
        return weights

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """sum_i w_i theta_i, over the sum of the weights where ``normalize``."""
        if self.normalize:
            return average(experts, weights)
        return weighted_sum(experts, weights)


class TaskArithmetic(Elementwise):
    """The base plus a multiple of the weighted sum of task vectors.

    Args:
        lam: the multiple; 0.3 is the published choice for eight tasks, 1 that of mergekit.
        normalize: divide the sum by the sum of the weights (by 1 where that is below 1e-8).
    """

    def __init__(self, lam: float = 0.3, normalize: bool = False) -> None:
        self.lam, self.normalize = lam, normalize

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """theta_0 + lam sum_i w_i tau_i, the base where lam is 0."""
        total = sum(weights)
        scale = self.lam / total if self.normalize and abs(total) >= 1e-8 else self.lam
        # One expert at weight 1 must come back to the bit, which theta_0 + (theta_1 - theta_0) does not promise.
        if scale * sum(weights) == 1:
            return weighted_sum(experts, [scale * weight for weight in weights])
        out = base * (1 - scale * sum(weights))
        for expert, weight in zip(experts, weights):
            out.add_(expert, alpha=scale * weight)
        return out


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i. One running tensor."""
    out = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        out.add_(tensor, alpha=weight)
    return out
