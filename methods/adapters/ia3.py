"""(IA)^3 (Liu et al., 2022, arXiv 2205.05638): learned factors on what leaves a layer, or on what enters it.

The published places are keys and values (`IA3`) and the hidden units of the feed-forward (`IA3Input` at the layer that
reads them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter, site_width
from fulgurite.methods.adapters.down_up import input_width
from fulgurite.methods.adapters.mixing import Mixture

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class IA3(Adapter):
    """y * l, with l = 1 at start. Parameters: as many as features leave the site, which are its last dimension."""

    verb = "transform"

    def __init__(self, site: int | nn.Module) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(self.width_of(site)))

    @classmethod
    def width_of(cls, site: int | nn.Module) -> int:
        """How many factors there are."""
        return site_width(site)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Ones; nothing is drawn."""
        self.factor.fill_(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (..., O) -> (..., O)."""
        return y * self.factor.to(y.dtype)

    @torch.no_grad()
    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """diag(l) W and l b of a linear layer."""
        if not isinstance(site, nn.Linear):
            return super().folded(site)
        kind = torch.promote_types(site.weight.dtype, torch.float32)
        factor = self.factor.to(kind)
        folded = {"weight": site.weight.to(kind) * factor[:, None]}
        return folded if site.bias is None else {**folded, "bias": site.bias.to(kind) * factor}

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (B, ..., O) times each sample's average."""
        return y * mixture.average([expert.factor for expert in experts], like=y)


class IA3Input(IA3):
    """The site reads l * x, with l = 1 at start. Parameters: as many as features enter the site."""

    @classmethod
    def width_of(cls, site: int | nn.Module) -> int:
        """How many factors there are."""
        return input_width(site)

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """What the site is called with: l times its first argument (..., I)."""
        return _with_input(args, kwargs, lambda x: x * self.factor.to(x.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` as it is."""
        return y

    @torch.no_grad()
    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """W diag(l) of a linear layer."""
        if not isinstance(site, nn.Linear):
            return Adapter.folded(self, site)
        kind = torch.promote_types(site.weight.dtype, torch.float32)
        return {"weight": site.weight.to(kind) * self.factor.to(kind)}

    @classmethod
    def mix_before(cls, experts: Sequence[Self], mixture: Mixture, args: tuple[Any, ...], kwargs: Any) -> Call:
        """`before` with each sample's average."""
        factors = [expert.factor for expert in experts]
        return _with_input(args, kwargs, lambda x: x * mixture.average(factors, like=x))

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``y`` as it is."""
        return y

    @classmethod
    def select(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``y`` as it is."""
        return y


def _with_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Any) -> Call:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    first, *_ = kwargs
    return args, {**kwargs, first: change(kwargs[first])}
