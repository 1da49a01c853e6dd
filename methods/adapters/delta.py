"""Changes of a linear layer's weight itself, W' = f(W), while the layer keeps its own parameter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Mixture, mixed_linear


class Reparametrization(Adapter):
    """A linear site computes with ``weight(W)`` in place of its W. A subclass defines `weight`."""

    verb = "reparametrize"

    def __init__(self, site: nn.Linear) -> None:
        super().__init__()
        if not isinstance(site, nn.Linear):
            raise ValueError(f"{type(self).__name__} changes nn.Linear layers, not {type(site).__name__}")
        self._site = (site,)  # in a tuple, so that the frozen layer is no part of this one

    @abstractmethod
    def weight(self, original: Tensor) -> Tensor:
        """The weight to compute with, from the site's own; both (O, I)."""

    @torch.no_grad()
    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """W'."""
        return {"weight": self.weight(site.weight)}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` (..., I) -> (..., O) with the changed weight."""
        (site,) = self._site
        return F.linear(x, self.weight(site.weight), site.bias)


class WeightDelta(Reparametrization):
    """W' = W + delta with a dense delta, zero at start. For edits of single weights.

    A sample's mixed weight is W + sum_i p_i delta_i. A set is as large as the layers it changes.
    """

    def __init__(self, site: nn.Linear) -> None:
        super().__init__(site)
        self.delta = nn.Parameter(torch.zeros_like(site.weight, requires_grad=True))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Zero; nothing is drawn."""
        self.delta.zero_()

    def weight(self, original: Tensor) -> Tensor:
        """W + delta."""
        return original + self.delta

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``x`` (B, ..., I), ``y`` (B, ..., O) -> (B, ..., O)."""
        return y + mixed_linear(x, [expert.delta for expert in experts], None, mixture)
