"""Adapters that have parts in common, e.g. the A of Compacter's products in all sites of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter, Spanning, SpanSite
from fulgurite.methods.adapters.mixing import Mixture


def share(adapters: Sequence[Adapter], parts: Sequence[str]) -> None:
    """Let all adapters compute with the first one's ``parts``, which are stored there alone.

    Raises:
        ValueError: an adapter lacks a part, or has one of another shape.
    """
    first, *others = adapters
    for name in parts:
        module = first.part(name)
        shapes = [p.shape for p in module.parameters()]
        for other in others:
            own = [p.shape for p in other.part(name).parameters()]
            if own != shapes:
                raise ValueError(
                    f"{name!r} cannot be shared: its tensors are {_listed(shapes)} at one site and {_listed(own)} at "
                    "another; share it among sites of one width"
                )
            other.adopt(name, module)


def used_by(adapter: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that an adapter computes with, those of parts that another one stores included."""
    for module in adapter.modules():
        yield from module.parameters(recurse=False)
        for part in vars(module).values():
            if isinstance(part, nn.Module):
                yield from part.parameters()


def _listed(shapes: Sequence[torch.Size]) -> list[tuple[int, ...]]:
    return [tuple(shape) for shape in shapes]


class Shared(Spanning):
    """An adapter per site, of which some parts are one and the same at all sites of the placement.

    Parameters: those of the adapters, each shared part once.

    Args:
        sites: where.
        kind: makes the adapter of one site.
        parts: names of the submodules that are shared, e.g. ``["rule"]`` of a `Compacter`.

    Raises:
        ValueError: ``kind`` spans, lacks a part, or its parts differ in shape from site to site.
    """

    def __init__(self, sites: Sequence[SpanSite], kind: Callable[[nn.Module], Adapter], parts: list[str]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.each = nn.ModuleList(kind(site.module) for site in sites)
        if any(adapter.spans for adapter in self.each):
            raise ValueError(f"Shared takes kinds with one adapter per site, not {self.each[0].title}")
        share(self.each, parts)
        self.tasks = self.each[0].tasks

    @property
    def verb(self) -> str:
        """That of the kind."""
        return self.each[0].verb

    @property
    def title(self) -> str:
        """The kind, and what is shared."""
        return f"{self.each[0].title}, {' and '.join(self.parts)} of all sites shared"

    @property
    def mixes(self) -> bool:
        """Whether the kind does."""
        return all(adapter.mixes for adapter in self.each)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Those of every site, one after the other."""
        for adapter in self.each:
            adapter.reset_parameters(generator)

    def folded_at(self, index: int, site: nn.Module) -> dict[str, Tensor]:
        """As the site's adapter."""
        return self.each[index].folded(site)

    def at(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        """What the site's adapter makes of it."""
        return self.each[index](_input(args, kwargs), y)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, index: int, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        """As the kind mixes."""
        each = [expert.each[index] for expert in experts]
        return type(each[0]).mix(each, mixture, _input(args, kwargs), y)

    @classmethod
    def select(cls, experts: Sequence[Self], mixture: Mixture, index: int, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        """As the kind selects."""
        each = [expert.each[index] for expert in experts]
        return type(each[0]).select(each, mixture, _input(args, kwargs), y)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
