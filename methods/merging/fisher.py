"""Averages weighted by the diagonal Fisher information of every expert (arXiv 2111.09832).

    theta* = sum_i c_i F_i theta_i / sum_i c_i F_i,     c_i = w_i / ||F_i||_2 where ``normalize``

F_i is what `FisherStatistics` measures of expert i on its own data. The norm is over all its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.base import average
from fulgurite.methods.merging.data_driven import DataDrivenMerger
from fulgurite.methods.merging.plan import Plan


class Fisher(DataDrivenMerger):
    """Every entry leans to the experts whose predictions hang on it.

    Tensors without a Fisher are averaged; so are entries whose Fisher sums to 0. The weights given to a merge are
    the coefficients w_i. Holds two float64 tensors besides the sources.

    Args:
        favor_target: raise only the first expert's Fisher to ``floor``, so that where no other has information the
            first expert's value stays; False raises those of all.
        floor: least Fisher of an entry.
        normalize: divide each expert's coefficient by the norm of its Fisher.
    """

    kind = "fisher"

    def __init__(self, favor_target: bool = True, floor: float = 1e-6, normalize: bool = True) -> None:
        if floor < 0:
            raise ValueError(f"floor={floor} must not be negative")
        self.favor_target, self.floor, self.normalize = favor_target, floor, normalize

    def parameter_of(self, key: str) -> str:
        """A Fisher has the name of its parameter."""
        return key

    def begin(self, plan: Plan) -> str | None:
        """Measure the norm of each Fisher: one pass over them."""
        super().begin(plan)
        self.scanned["norms"] = [
            fisher_norm(each, number) if self.normalize else 1.0 for number, each in enumerate(self.statistics)
        ]
        return None

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """sum_i c_i F_i theta_i / sum_i c_i F_i."""
        if name not in self.statistics[0]:
            return average(experts, weights)
        if len(experts) == 1:
            return experts[0].clone()
        total = torch.zeros_like(experts[0], dtype=torch.float64)
        out = torch.zeros_like(total)
        for number, (expert, weight) in enumerate(zip(experts, weights)):
            fisher = fitting_fisher(name, number, self.statistics[number][name], expert)
            if number == 0 or not self.favor_target:
                fisher = fisher.clamp(min=self.floor)
            share = fisher * (weight / self.scanned["norms"][number])
            total += share
            out += share.mul_(expert)
        out = torch.where(total == 0, average(experts, weights).double(), out / total.where(total != 0, 1))
        return out.to(experts[0].dtype)


def fisher_norm(fisher: Mapping[str, Tensor], number: int) -> float:
    """||F||_2 over all tensors; 1 where it is 0, so that a model without information keeps its coefficient.

    Raises:
        ValueError: a tensor of this expert's Fisher is not finite.
    """
    total = 0.0
    for name, tensor in fisher.items():
        square = float(tensor.double().square().sum())
        if not math.isfinite(square):
            raise ValueError(f"{name}: the Fisher of expert {number} has entries that are not finite")
        total += square
    return total**0.5 or 1.0


def fitting_fisher(name: str, number: int, fisher: Tensor, expert: Tensor) -> Tensor:
    """``fisher`` in float64 on the expert's device, without the rows that were left out of the merge.

    Raises:
        ValueError: it has another shape, or an entry that is negative or no number.
    """
    if fisher.dim() == expert.dim() > 0 and fisher.shape[1:] == expert.shape[1:] and fisher.shape[0] > expert.shape[0]:
        fisher = fisher[: expert.shape[0]]
    if fisher.shape != expert.shape:
        raise ValueError(f"{name}: a Fisher of {tuple(fisher.shape)} for a tensor of {tuple(expert.shape)}")
    fisher = fisher.to(expert.device, torch.float64)
    if not (fisher >= 0).all():
        raise ValueError(f"{name}: the Fisher of expert {number} has entries that are negative or NaN")
    return fisher
