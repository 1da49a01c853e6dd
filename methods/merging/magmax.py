"""MagMax: of every coordinate the change of largest magnitude (arXiv 2407.06322).

    tau*_j = tau_ij,  i = argmax_i |w_i tau_ij| (the last of equal ones);   theta* = theta_0 + lam w_i tau*_j

Meant for experts that were fine-tuned one after the other, each from the one before; all tau_i are taken from theta_0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Elementwise


class MagMax(Elementwise):
    """The largest changes. One running tensor, whatever the number of experts.

    Args:
        lam: multiple of the merged task vector.
    """

    def __init__(self, lam: float = 0.5) -> None:
        self.lam = lam

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """theta_0 + lam times the largest w_i tau_i; with lam w_i = 1 entries of expert i to the bit."""
        out, largest = base.clone(), torch.zeros_like(base)
        for expert, weight in zip(experts, weights):
            change = (expert - base).mul_(weight)
            value = expert if self.lam * weight == 1 else torch.add(base, change, alpha=self.lam)
            later = change.abs_() >= largest
            out, largest = torch.where(later, value, out), torch.where(later, change, largest)
        return out
