"""Bottleneck adapter (Houlsby et al., 2019, arXiv 1902.00751), placed as FrozenBiLM, DAM and VL-Adapter do.

    A(z) = z + s (U drop(act(D z + d)) + u)

D is (dim / reduction, dim), U is (dim, dim / reduction). A parallel one (He et al., 2021, arXiv 2110.04366) reads the
site's input x in place of its output z.
"""

from __future__ import annotations

import torch
from torch import nn

from fulgurite.methods.adapters.base import site_width
from fulgurite.methods.adapters.down_up import Activation, DownUp, Init, inner_width, input_width


class Bottleneck(DownUp):
    """A(z) = z + s * (U drop(act(D z + d)) + u) on the output z of a site.

    Parameters: 2 D b + D + b for inner width b = D // reduction, and 2 D more for each norm.

    Args:
        dim: features that leave the site, or the site itself.
        reduction: the inner width is ``dim // reduction``.
        scale: s.
        dropout: after the activation.
        activation: the non-linearity.
        init: ``"zero_up"`` starts with U = u = 0, the identity; ``"official"`` with N(0, 0.02) weights and
            zero biases, what the published code ends up with.
        norm_before: a layer norm before D, within the residual.
        norm_after: one after U. It would blow up a U of zeros at the first step, so that ``"zero_up"`` leaves
            U as it is drawn and starts with the norm's weight at zero.
        parallel: D reads the site's input, whose width it takes.

    Raises:
        ValueError: ``reduction`` leaves no inner unit.
    """

    def __init__(
        self,
        dim: int | nn.Module,
        reduction: int = 8,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "relu",
        init: Init = "zero_up",
        norm_before: bool = False,
        norm_after: bool = False,
        parallel: bool = False,
    ) -> None:
        width = site_width(dim)
        enters = input_width(dim) if parallel else width
        inner = inner_width(width, reduction)
        super().__init__(
            nn.Linear(enters, inner),
            nn.Linear(inner, width),
            scale,
            dropout,
            activation,
            init,
            enters if norm_before else None,
            width if norm_after else None,
            parallel,
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """D ~ N(0, 0.02); U is zero, or drawn like D for ``init="official"``; biases are zero."""
        self.down.weight.normal_(std=0.02, generator=generator)
        self.down.bias.zero_()
        if self.init == "official" or self.norm_after is not None:
            self.up.weight.normal_(std=0.02, generator=generator)
        else:
            self.up.weight.zero_()
        self.up.bias.zero_()
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                norm.reset_parameters()
        if self.init == "zero_up" and self.norm_after is not None:
            self.norm_after.weight.zero_()
