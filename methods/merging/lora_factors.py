"""The element-wise combinations that `peft` offers for LoRA, on any tensors of one shape.

    linear             sum_i w_i t_i
    magnitude_prune    sum_i w_i top(t_i)
    dare_linear        sum_i w_i thin(t_i)
    ties, dare_ties    sum_i w_i kept_i / max(1, number kept),  kept_i: entries of top(t_i) or thin(t_i) that have
                       the elected sign

top keeps the int(density * n) largest magnitudes; thin keeps each entry with probability density and divides it by
that. The election is on the unweighted entries and gives + to a zero; TIES is arXiv 2306.01708, DARE 2311.03099.

Applied to the factors A and B one by one (`of_factors`) they are what ``peft`` calls by these names, and not a sum of
weight changes: B A of combined factors has the cross terms B_i A_j. Applied to the changes s B A they are peft's
``*_svd``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.random import uniform

Rule = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
Vote = Literal["total", "frequency"]


@dataclass(frozen=True)
class Combination:
    """A rule with its settings.

    Args:
        rule: see the module.
        density: share of entries that stay, in (0, 1]; ``linear`` has none.
        vote: sign of the sum of entries (``total``) or of the sum of their signs (``frequency``).
        seed: of the masks of ``dare_*``.
    """

    rule: Rule
    density: float = 1.0
    vote: Vote = "total"
    seed: int = 0

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
        """One tensor of T. Holds T more of them.

        Args:
            tensors: T of one shape.
            weights: T numbers.
            name: of the place; masks depend on it, the seed, the rule and the number of the tensor alone.
        """
        if self.rule.startswith("dare"):
            parts = [self._thinned(tensor, number, name) for number, tensor in enumerate(tensors)]
        else:
            parts = [largest(tensor, self.density) for tensor in tensors]
        if not self.rule.endswith("ties"):
            return sum(part * weight for part, weight in zip(parts, weights))
        return elected_mean(parts, weights, self.vote)

    def _thinned(self, tensor: Tensor, number: int, name: str) -> Tensor:
        if self.density == 1:
            return tensor
        numbers = uniform(self.seed, self.rule, number, name, tensor.numel()).view(tensor.shape).to(tensor.device)
        return torch.where(numbers < self.density, tensor / self.density, 0)


def largest(tensor: Tensor, density: float) -> Tensor:
    """The int(density * n) entries of largest magnitude, at least one; of equal ones those that come first."""
    if density == 1:
        return tensor
    flat = tensor.flatten()
    keep = max(int(density * len(flat)), 1)
    chosen = flat.abs().sort(descending=True, stable=True).indices[:keep]
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).view(tensor.shape)


def elected_mean(tensors: Sequence[Tensor], weights: Sequence[float], vote: Vote) -> Tensor:
    """sum_i w_i t_i over entries of the elected sign, divided by their number (by 1 where there is none)."""
    votes = sum(tensor.sign() if vote == "frequency" else tensor for tensor in tensors)
    sign = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for tensor, weight in zip(tensors, weights):
        kept = tensor.sign() == sign
        total += torch.where(kept, tensor * weight, 0)
        count += kept
    return total / count.clamp_(min=1)


def of_factors(
    downs: Sequence[Tensor], ups: Sequence[Tensor], shares: Sequence[float], combine: Combination, site: str
) -> tuple[Tensor, Tensor]:
    """A and B, each combined with the weights sqrt|w_i s_i|; the sign goes to A.

    Args:
        downs: T times A (r, in).
        ups: T times B (out, r).
        shares: w_i s_i.
        combine: for each of the two.
        site: name of the layer.
    """
    roots = [math.sqrt(abs(share)) for share in shares]
    signed = [math.copysign(root, share) for root, share in zip(roots, shares)]
    return combine(downs, signed, f"{site}.A"), combine(ups, roots, f"{site}.B")
