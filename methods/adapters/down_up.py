"""What adapters share that go down to a narrow layer and up again beside a residual.

    A(y) = y + s norm_after(up(drop(act(down(norm_before(z))))))

z is the site's own output y, or of a *parallel* adapter its input x. Both norms are optional. Kinds differ in what
the maps ``down`` and ``up`` are made of; each has ``weight`` (O, I) and ``bias`` (O,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import Adapter, site_width
from fulgurite.methods.adapters.mixing import Mixture, mixed_linear, mixed_norm

Activation = Literal["relu", "gelu", "gelu_new"]
Init = Literal["zero_up", "official"]
# gelu_new is 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh")}


def inner_width(width: int, reduction: int) -> int:
    """``width // reduction``. Raises `ValueError` where that leaves no unit."""
    if not 1 <= reduction <= width:
        raise ValueError(f"reduction={reduction} leaves no inner unit of {width}; take 1 to {width}")
    return width // reduction


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The non-linearity of that name. Raises `ValueError` where there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class DownUp(Adapter):
    """Down, a non-linearity, up. A subclass makes the maps, and gives them their starting values.

    Args:
        down: to the inner width.
        up: back to the width of the site's output.
        scale: s.
        dropout: after the activation.
        activation: the non-linearity.
        init: how a subclass starts.
        norm_before: width of a layer norm before ``down``; None for none.
        norm_after: of one after ``up``.
        parallel: read the site's input.
    """

    verb = "transform"

    def __init__(
        self,
        down: nn.Module,
        up: nn.Module,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "relu",
        init: Init = "zero_up",
        norm_before: int | None = None,
        norm_after: int | None = None,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        if init not in ("zero_up", "official"):
            raise ValueError(f"init={init!r} is neither 'zero_up' nor 'official'")
        self.scale, self.dropout, self.init, self.parallel = scale, dropout, init, parallel
        self.activation = activation_of(activation)
        self.down, self.up = down, up
        self.norm_before = None if norm_before is None else nn.LayerNorm(norm_before)
        self.norm_after = None if norm_after is None else nn.LayerNorm(norm_after)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` (..., I), ``y`` (..., O) -> (..., O)."""
        z = x if self.parallel else y
        if self.norm_before is not None:
            z = self.norm_before(z)
        change = self.up(F.dropout(self.activation(self.down(z)), self.dropout, self.training))
        if self.norm_after is not None:
            change = self.norm_after(change).to(y.dtype)
        return torch.add(y, change, alpha=self.scale)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (B, ..., O) -> (B, ..., O). On CPU the extra memory stays below a plain adapter's.

        The matrices of ``down`` and ``up`` are averaged, whatever parameters they are made of.
        """
        first = experts[0]
        z = x if first.parallel else y
        if first.norm_before is not None:
            z = mixed_norm(z, [e.norm_before for e in experts], mixture)
        hidden = mixed_linear(z, *_maps([e.down for e in experts]), mixture)
        hidden = F.dropout(first.activation(hidden), first.dropout, first.training)
        change = mixed_linear(hidden, *_maps([e.up for e in experts]), mixture)
        if first.norm_after is not None:
            change = mixed_norm(change, [e.norm_after for e in experts], mixture).to(y.dtype)
        if torch.is_grad_enabled() or change.dtype != y.dtype:
            return torch.add(y, change, alpha=first.scale)
        return torch.add(y, change, alpha=first.scale, out=change)


def _maps(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


def input_width(site: int | nn.Module) -> int:
    """Number of features that enter ``site``: as many as leave it, unless it says otherwise."""
    inside = getattr(site, "in_features", None)
    return inside if isinstance(inside, int) else site_width(site)
