"""A trained copy of a small module per set: projections, norms, heads."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Mixture, mixed_linear


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
        biases = None if getattr(first, "bias", None) is None else [m.bias for m in modules]
        if isinstance(first, nn.Linear):
            return mixed_linear(x, [m.weight for m in modules], biases, mixture)
        if isinstance(first, nn.LayerNorm):
            scaled = F.layer_norm(x, first.normalized_shape, eps=first.eps)
        else:
            scaled = F.rms_norm(x, first.normalized_shape, eps=first.eps)
        scaled = scaled * mixture.average([m.weight for m in modules], like=scaled)
        return scaled if biases is None else scaled + mixture.average(biases, like=scaled)


def bare_copy(site: nn.Module) -> nn.Module:
    """A deep copy of ``site`` free of the forward hooks on it, which would drag the bank along."""
    bare = copy.copy(site)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = {name: OrderedDict() for name in site.__dict__ if name.startswith(kinds)}
    bare.__dict__ = {**site.__dict__, **hooks}
    return copy.deepcopy(bare)
