"""What every kind of adapter promises to the bank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

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

    One that changes what enters the site defines ``before(args, kwargs)``, which is called with the arguments of the
    site's call and gives those to call it with instead, or None, and the class method ``mix_before(experts, mixture,
    args, kwargs)`` for sets that are mixed or chosen per sample.
    """

    verb: ClassVar[Verb]
    spans: ClassVar[bool] = False  # one adapter for all sites of a placement, as `Spanning`
    tasks: tuple[str, ...] = ()  # names of the tasks that it routes by, see `tasks.tasks_of`

    @property
    def title(self) -> str:
        """The kind in words, for reports."""
        return type(self).__name__

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

    def of_tasks(self) -> Sequence[Sequence[nn.Parameter]]:
        """The parameters that each task computes with, of a kind that holds some per task itself; empty for others."""
        return ()

    def part(self, name: str) -> nn.Module:
        """The submodule ``name``, e.g. ``"down"``. Raises `ValueError` that lists what there is."""
        if name not in self._modules and not isinstance(self.__dict__.get(name), nn.Module):
            raise ValueError(
                f"{self.title} has no part {name!r} to share; it has {[n for n, _ in self.named_children()]}"
            )
        return getattr(self, name)

    def adopt(self, name: str, module: nn.Module) -> None:
        """Compute with another adapter's part ``name``, which stays that adapter's: it is stored there alone."""
        self.part(name)
        self._modules.pop(name, None)
        self.__dict__[name] = module

    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """Tensors of ``site``, by their names in it, with which it computes alone what it computes with this adapter.

        Only what changes is listed. Raises `FoldError` where no tensors do that, as for a kind that defines none.
        """
        raise FoldError(f"{self.title} cannot be folded into the weights of a {type(site).__name__}")

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
        return mixture.gather(parts, len(y))


@dataclass(frozen=True)
class SpanSite:
    """A module that a `Spanning` adapter acts on, and the public place of the model that it was found at."""

    name: str
    module: nn.Module
    point: str


class Spanning(Adapter):
    """One adapter for all sites of a placement; its first positional argument is their sequence of `SpanSite`.

    The sites come in the order of the placement's points, and at one point in that of the model. Modules of the
    backbone that a subclass keeps must not become its submodules: keep them in a tuple. ``before`` and ``mix_before``
    get the site's index before the arguments. One that must undo what ``before`` did where the call raises
    defines ``failed(index)``.
    """

    spans = True

    @property
    def mixes(self) -> bool:
        """False unless a subclass defines `mix`."""
        return False

    @abstractmethod
    def at(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        """New output of the site ``index`` from its call's arguments and its own output ``y``."""

    def folded_at(self, index: int, site: nn.Module) -> dict[str, Tensor]:
        """As `folded`, for the site ``index``, of which ``site`` may be a copy that others were folded into."""
        raise FoldError(f"{self.title} cannot be folded into the weights of a {type(site).__name__}")

    def forward(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        """`at`."""
        return self.at(index, args, kwargs, y)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, index: int, args: Any, kwargs: Any, y: Any) -> Any:
        """Output at one site of the adapters that each sample's weights average, exactly."""
        raise NotImplementedError(f"{cls.__name__} does not define mixing; select one set by name or by index")

    @classmethod
    def mix_before(cls, experts: Sequence[Self], mixture: Mixture, index: int, args: Any, kwargs: Any) -> Any:
        """What the site is called with; defined for one adapter for all samples."""
        return experts[cls.only(mixture)].before(index, args, kwargs)

    @classmethod
    def select(cls, experts: Sequence[Self], mixture: Mixture, index: int, args: Any, kwargs: Any, y: Any) -> Any:
        """Output at one site of one adapter per sample. Defined for one adapter for all samples."""
        return experts[cls.only(mixture)](index, args, kwargs, y)

    @classmethod
    def only(cls, mixture: Mixture) -> int:
        """The one expert of all samples of a one-hot mixture. Raises `ValueError` where there are several."""
        if not mixture.is_one_hot or len(mixture.groups) > 1:
            raise ValueError(f"{cls.__name__} cannot run another set for every sample; select one set by its name")
        return mixture.groups[0].experts[0]


def site_width(site: int | nn.Module) -> int:
    """Number of features that leave ``site``."""
    if isinstance(site, int):
        return site
    for name in ("out_features", "normalized_shape", "embedding_dim", "out_channels", "width"):
        size = getattr(site, name, None)
        if size is not None:
            return size if isinstance(size, int) else size[-1]
    raise ValueError(f"the width of a {type(site).__name__} is not known; attach to a layer, or give the width")
