"""A trained copy of a small module per set: projections, norms, heads."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Mixture, mixed_linear, mixed_norm


class Replace(Adapter):
    """The site's output is that of a trained copy of the site, which starts with the pretrained values.

    The site itself stays frozen, and still runs, so this is for small modules. Mixing is defined for
    `nn.Linear`, and for `nn.LayerNorm` and `nn.RMSNorm` with a weight over the last dimension.
    """

    verb = "replace"

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self._site = (site,)  # in a tuple, so that the frozen module is no part of this one
        self.module = bare_copy(site).requires_grad_(True)

    @property
    def mixes(self) -> bool:
        """True for linear layers, and norms over the last dimension that have a weight."""
        module = self.module
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return module.weight is not None and module.weight.dim() == 1
        return type(module) is nn.Linear

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Copy the pretrained values again; nothing is drawn."""
        for own, pretrained in zip(self.module.parameters(), self._site[0].parameters(), strict=True):
            own.copy_(pretrained)

    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """The tensors of the copy."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the copy makes of the site's input ``x``."""
        return self.module(x)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """What the average of the copies makes of each sample of ``x`` (B, ..., I)."""
        modules = [expert.module for expert in experts]
        first = modules[0]
        if not experts[0].mixes:
            return super().mix(experts, mixture, x, y)
        if isinstance(first, nn.Linear):
            biases = None if first.bias is None else [m.bias for m in modules]
            return mixed_linear(x, [m.weight for m in modules], biases, mixture)
        return mixed_norm(x, modules, mixture)


def bare_copy(site: nn.Module) -> nn.Module:
    """A deep copy of ``site`` free of the forward hooks on it, which would drag the bank along.

    It does not recompute: the site's recomputation is of the site itself.
    """
    bare = copy.copy(site)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = {name: OrderedDict() for name in site.__dict__ if name.startswith(kinds)}
    bare.__dict__ = {**site.__dict__, **hooks}
    bare.__dict__.pop("forward", None)
    return copy.deepcopy(bare)
