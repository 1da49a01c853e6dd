"""A trained copy of a small module per set: projections, norms, heads."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Mixture, mixed_linear


class Replace(Adapter):
    """The site's output is that of a trained copy of the site, which starts with the pretrained values.

    The site itself stays frozen and still runs, so this is for small modules. Mixing is defined for `nn.Linear` and
    for norms that end in ``weight`` and ``bias`` of the normalised size.
    """

    verb = "replace"

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self._site = (site,)  # in a tuple, so that the frozen module is no part of this one
        self.module = _without_hooks(site).requires_grad_(True)

    @property
    def mixes(self) -> bool:
        """True for linear layers and norms with an affine part."""
        return isinstance(self.module, (nn.Linear, nn.LayerNorm, nn.RMSNorm))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Copy the pretrained values again; nothing is drawn."""
        for own, pretrained in zip(self.module.parameters(), self._site[0].parameters(), strict=True):
            own.copy_(pretrained)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the copy makes of the site's input ``x``."""
        return self.module(x)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """Average the copies' weights per sample; ``x`` is (B, ..., I)."""
        modules = [expert.module for expert in experts]
        if isinstance(modules[0], nn.Linear):
            biases = None if modules[0].bias is None else [m.bias for m in modules]
            return mixed_linear(x, [m.weight for m in modules], biases, mixture)
        return super().mix(experts, mixture, x, y)


def _without_hooks(site: nn.Module) -> nn.Module:
    """A deep copy of ``site`` free of the hooks on it: they belong to the bank."""
    bare = copy.copy(site)
    bare.__dict__ = {
        **site.__dict__,
        "_forward_hooks": OrderedDict(),
        "_forward_hooks_with_kwargs": OrderedDict(),
    }
    return copy.deepcopy(bare)
