"""RAM: average changes that several models share, and keep those of one model whole (arXiv 2601.13572).

i touches j      |tau_ij| > epsilon
tau*_j           lam_i tau_ij if i alone touches j, the mean over those that touch it if several do, else 0
RAM              lam_i = 1
RAM+             lam_i = 1 + r clamp(shared_i / unique_i, 0, alpha)    entries of a tensor that i touches with
                                                                       others, and alone
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.per_expert import refuse_weights
from fulgurite.methods.merging.plan import Operands


class Ram(Piecewise):
    """RAM, or with ``plus`` RAM+, which reads each tensor twice.

    Args:
        epsilon: size of a change that is none.
        plus: make up for what averaging takes from models that share much.
        r: how much of it.
        alpha: the ratio of shared to unique entries from which no more is made up for.

    Raises:
        ValueError: epsilon is negative.
    """

    def __init__(self, epsilon: float = 1e-5, plus: bool = False, r: float = 0.1, alpha: float = 0.2) -> None:
        if not epsilon >= 0:
            raise ValueError(f"epsilon is a size of at least 0, got {epsilon}")
        self.epsilon, self.plus, self.r, self.alpha = epsilon, plus, r, alpha

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses weights that differ."""
        return refuse_weights(type(self).__name__, super().check(num_experts, has_base, weights))

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """theta_0 + tau*, made of the models' own values where they are only averaged."""
        factors = self.factors(operands) if self.plus else [1.0] * len(weights)
        for _, base, experts in operands.pieces():
            touched, count = self.touched(base, experts)
            out = torch.zeros_like(base)
            for expert, own, factor in zip(experts, touched, factors):
                value = expert
                if factor != 1:
                    value = torch.where(count == 1, torch.add(base, expert - base, alpha=factor), expert)
                out.addcmul_(own.to(base.dtype), value)
            yield torch.where(count == 0, base, out.div_(count.clamp(min=1)))

    def touched(self, base: Tensor, experts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Which entries each model touches, and how many touch each."""
        own = [(expert - base).abs_() > self.epsilon for expert in experts]
        return own, torch.stack(own).sum(0)

    def factors(self, operands: Operands) -> list[float]:
        """lam_i of one tensor."""
        num_experts = len(operands.tensors) - 1
        shared, unique = [0] * num_experts, [0] * num_experts
        for _, base, experts in operands.pieces():
            touched, count = self.touched(base, experts)
            for number, own in enumerate(touched):
                alone = int((own & (count == 1)).sum())
                unique[number] += alone
                shared[number] += int(own.sum()) - alone
        # One that touches nothing alone has nothing to scale.
        ratios = [with_others / max(alone, 1) for with_others, alone in zip(shared, unique)]
        return [1 + self.r * min(max(ratio, 0), self.alpha) for ratio in ratios]
