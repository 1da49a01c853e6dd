"""Bottleneck adapter (Houlsby et al., 2019, arXiv 1902.00751), placed as FrozenBiLM and DAM do.

    A(z) = z + s (U drop(act(D z + d)) + u)

D is (dim / reduction, dim), U is (dim, dim / reduction).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import Adapter, site_width
from fulgurite.methods.adapters.mixing import Mixture, mixed_linear

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class Bottleneck(Adapter):
    """A(z) = z + s * (U drop(act(D z + d)) + u) on the output z of a site.

    Args:
        dim: features that leave the site, or the site itself.
        reduction: the inner width is ``dim // reduction``.
        scale: s.
        dropout: after the activation.
        activation: the non-linearity.
        init: ``"zero_up"`` starts with U = u = 0, the identity; ``"official"`` with N(0, 0.02) weights and
            zero biases, what the published code ends up with.

    Raises:
        ValueError: ``reduction`` leaves no inner unit.
    """

    verb = "transform"

    def __init__(
        self,
        dim: int | nn.Module,
        reduction: int = 8,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: Literal["relu", "gelu"] = "relu",
        init: Literal["zero_up", "official"] = "zero_up",
    ) -> None:
        super().__init__()
        dim = site_width(dim)
        if not 1 <= reduction <= dim:
            raise ValueError(f"reduction={reduction} leaves no inner unit of {dim}; take 1 to {dim}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not one of {sorted(ACTIVATIONS)}")
        self.scale, self.dropout, self.init = scale, dropout, init
        self.activation = ACTIVATIONS[activation]
        self.down = nn.Linear(dim, dim // reduction)
        self.up = nn.Linear(dim // reduction, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """D ~ N(0, 0.02); U is zero, or drawn like D for ``init="official"``; biases are zero."""
        self.down.weight.normal_(std=0.02, generator=generator)
        self.down.bias.zero_()
        if self.init == "official":
            self.up.weight.normal_(std=0.02, generator=generator)
        else:
            self.up.weight.zero_()
        self.up.bias.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (..., dim) -> (..., dim)."""
        hidden = F.dropout(self.activation(self.down(y)), self.dropout, self.training)
        return torch.add(y, self.up(hidden), alpha=self.scale)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (B, ..., dim) -> (B, ..., dim). On CPU the extra memory stays below a plain adapter's."""
        first = experts[0]
        downs, ups = [e.down for e in experts], [e.up for e in experts]
        hidden = mixed_linear(y, [d.weight for d in downs], [d.bias for d in downs], mixture)
        hidden = F.dropout(first.activation(hidden), first.dropout, first.training)
        change = mixed_linear(hidden, [u.weight for u in ups], [u.bias for u in ups], mixture)
        if torch.is_grad_enabled() or change.dtype != y.dtype:
            return torch.add(y, change, alpha=first.scale)
        return torch.add(y, change, alpha=first.scale, out=change)
