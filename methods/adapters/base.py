"""What every kind of adapter promises to the bank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.mixing import Mixture

Verb = Literal["transform", "reparametrize", "replace"]


class FoldError(ValueError):
    """No weights of a site compute what it computes with its adapter."""


class Adapter(nn.Module, ABC):
    """Trainable tensors of one place (a *site*) of a frozen backbone, and how they change what leaves it.

    A subclass says by `verb` what it does to the site: ``transform`` its output, ``reparametrize`` its
    weight, or ``replace`` the module. A fresh adapter leaves the backbone's output as it is, unless its
    docstring says otherwise.
    """

    verb: ClassVar[Verb]

    @property
    def mixes(self) -> bool:
        """Whether `mix` is defined."""
        return True

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give the parameters their starting values in place."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """New output of the site from its input ``x`` and its own output ``y``."""

    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """Tensors of ``site``, by their names in it, with which it computes alone what it computes with this adapter.

        Only what changes is listed. Raises `FoldError` where no tensors do that, as for a kind that defines none.
        """
        raise FoldError(f"{type(self).__name__} cannot be folded into the weights of a {type(site).__name__}")

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """Output of the adapters that each sample's weights average, exactly. ``x``, ``y`` are (B, ...)."""
        raise NotImplementedError(f"{cls.__name__} does not define mixing; select one set by name or by index")

    @classmethod
    def select(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """Output of one adapter per sample: ``mixture`` is one-hot."""
        if len(mixture.groups) == 1:
            return experts[mixture.groups[0].experts[0]](x, y)
        parts = [experts[group.experts[0]](x[group.rows], y[group.rows]) for group in mixture.groups]
        out = parts[0].new_empty(len(y), *parts[0].shape[1:])
        for group, part in zip(mixture.groups, parts):
            out[group.rows] = part
        return out


def site_width(site: int | nn.Module) -> int:
    """Number of features that leave ``site``."""
    if isinstance(site, int):
        return site
    for name in ("out_features", "normalized_shape", "embedding_dim", "out_channels"):
        size = getattr(site, name, None)
        if size is not None:
            return size if isinstance(size, int) else size[-1]
    raise ValueError(f"the width of a {type(site).__name__} is not known; attach to a layer, or give the width")
