"""Where the adapters of a bank go: placements by public places, resolved to modules of a backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fulgurite.methods.adapters.base import Adapter, SpanSite
from fulgurite.methods.structure import ModelSpec


@dataclass
class Placement:
    """One kind of adapter at some public places of a model.

    Args:
        points: names among the ``points`` of the model's `ModelSpec`.
        kind: makes the adapter of one site; its first positional argument is the site's module, or of a kind that
            spans (`Spanning`) all sites.
    """

    points: list[str]
    kind: Callable[[nn.Module], Adapter]

    @property
    def spans(self) -> bool:
        """Whether the kind makes one adapter for all sites."""
        return any(each.spans for each in _kinds(self.kind))


def _kinds(kind: Any) -> Iterator[type[Adapter]]:
    """The adapter class that a placement's ``kind`` is or holds: a class, or a partial around one as YAML gives it."""
    if isinstance(kind, partial):
        yield from _kinds(kind.func)
        for argument in kind.args:
            yield from _kinds(argument)
    elif isinstance(kind, type) and issubclass(kind, Adapter):
        yield kind


@dataclass(frozen=True)
class Place:
    """A module of the backbone, and the adapter of one placement that acts there.

    Args:
        key: of the adapter in a set; all places of an adapter that spans have the same.
        name: of the module.
        module: the site.
        point: where the placement found it.
        placement: number of the placement.
        index: among the sites of an adapter that spans; None for one of its own.
    """

    key: str
    name: str
    module: nn.Module
    point: str
    placement: int
    index: int | None = None

    @property
    def label(self) -> str:
        """Public name of the adapter: its site's, with ``@1`` for a second one there, or that of its placement."""
        return self.key.replace("/", ".")


def site_of(label: str) -> str:
    """Name of the module that an adapter stands at, by the adapter's `Place.label`."""
    return label.partition("@")[0]


def find_places(backbone: nn.Module, placements: Sequence[Placement], spec: ModelSpec) -> list[Place]:
    """The places of all placements, in their order.

    Raises:
        LookupError: a point is unknown, or matches fewer or more modules than the model has there.
        ValueError: a placement has no point, or names a module twice.
    """
    places: list[Place] = []
    keys: set[str] = set()
    for number, placement in enumerate(placements):
        names: dict[str, str] = {}
        for point in placement.points:
            for name in spec.point_names(backbone, point):
                if name in names:
                    raise ValueError(f"placements {number} and {number} meet at {name!r} ({names[name]!r}, {point!r})")
                names[name] = point
        if not names:
            raise ValueError(f"nothing to adapt: give placement {number} at least one point")
        for index, (name, point) in enumerate(names.items()):
            key = f"placement-{number}" if placement.spans else _free_key(name, keys)
            keys.add(key)
            module = backbone.get_submodule(name)
            places.append(Place(key, name, module, point, number, index if placement.spans else None))
    return places


def _free_key(name: str, taken: set[str]) -> str:
    """The site's name as a key; ``@1`` and so on follows where placements before it are there."""
    key = first = name.replace(".", "/")
    number = 0
    while key in taken:
        number += 1
        key = f"{first}@{number}"
    return key


def make_adapters(placements: Sequence[Placement], places: Sequence[Place]) -> nn.ModuleDict:
    """One set's adapters by key, on the devices of their sites.

    Raises:
        ValueError: a kind makes something else than an adapter.
    """
    together: dict[str, list[Place]] = {}
    for place in places:
        together.setdefault(place.key, []).append(place)
    adapters = nn.ModuleDict()
    for key, group in together.items():
        first = group[0]
        spanned = tuple(SpanSite(place.name, place.module, place.point) for place in group)
        adapter = placements[first.placement].kind(first.module if first.index is None else spanned)
        if not isinstance(adapter, Adapter):
            raise ValueError(f"placement {first.placement} makes a {type(adapter).__name__}, which is no Adapter")
        if adapter.spans != (first.index is not None):
            raise ValueError(
                f"placement {first.placement}: {adapter.title} acts on all sites at once; give its class, or a partial "
                "of it, as the kind"
            )
        # Sites without parameters go by those of the others.
        beside = [p for site in (*group, *places) for p in site.module.parameters()][:1]
        adapters[key] = adapter.to(beside[0].device) if beside else adapter
    return adapters


def check_meetings(places: Sequence[Place], adapters: Mapping[str, Adapter]) -> None:
    """What acts at one module must act one after the other, and nothing may lie inside a module that is replaced.

    Raises:
        ValueError: a placement that meets others is not of a kind that transforms the output, or one nests.
    """
    first: dict[str, Place] = {}
    for place in places:
        before = first.setdefault(place.name, place)
        if before is not place and adapters[place.key].verb != "transform":
            raise ValueError(
                f"placements {before.placement} and {place.placement} meet at {place.name!r} ({place.point!r}); after "
                f"the first, a site takes kinds that transform its output, and {adapters[place.key].title} does not"
            )
    replaced = [place.name for place in places if adapters[place.key].verb == "replace"]
    for outer in replaced:
        for place in places:
            if place.name.startswith(f"{outer}."):
                raise ValueError(f"{place.name!r} lies inside {outer!r}, which is replaced; adapt only one of them")
