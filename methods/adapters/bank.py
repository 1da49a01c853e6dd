"""Named sets of adapters beside a frozen backbone, and the choice of the set or mixture that is active."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Mixture
from fulgurite.methods.adapters.places import Place, Placement, check_meetings, find_places, make_adapters
from fulgurite.methods.adapters.report import BankReport, PlacementReport
from fulgurite.methods.structure import ModelSpec

LIVE = "live"


@dataclass(frozen=True)
class _Selection:
    """What is active: one set for all samples, or a mixture of ``sets``, or (both None) nothing."""

    name: str | None = None
    mixture: Mixture | None = None
    sets: tuple[str, ...] = ()


_Selections = Mapping[int, _Selection]
# The active selection per bank, by id. A context variable, because threads that share a bank must not see
# each other's choice.
_ACTIVE: contextvars.ContextVar[_Selections] = contextvars.ContextVar(
    "fulgurite_adapters",
    default=MappingProxyType({}),
)


class AdapterBank(nn.Module):
    """Several named sets of adapters of one make, attached to a frozen backbone by forward hooks.

    The backbone's parameter names do not change, and the backbone is no part of the bank: the state dict
    holds ``sets.<set>.<site with "/" for ".">.<tensor>`` only. The set ``live`` is the one that trains; all
    others have ``requires_grad`` off. Where no `use` is active, the live set is applied.

    Placements that meet at a site act in their order, each on what the one before gave; the second's key is
    ``<site>@1``. An adapter that spans all sites of its placement has the key ``placement-<number>``.

    A module that owns both the backbone and the bank can be deep-copied and pickled; the copy's hooks call
    the copy's bank. Create all sets before a strategy wraps the model, and attach before `torch.compile`
    first runs.

    Args:
        backbone: the frozen model.
        placements: which kind of adapter goes where. Without any, sets are empty.
        sets: names of the sets to make besides ``live``, in the order of the columns of mixing weights.
        spec: the model's structure; ``backbone.spec`` when not given.

    Raises:
        LookupError: a point is unknown, or matches fewer or more modules than the model has there.
        ValueError: two placements cannot meet at a site or nest in a replaced one, or a set's name cannot be used.
    """

    def __init__(
        self,
        backbone: nn.Module,
        placements: Sequence[Placement],
        sets: Sequence[str] = ("initial",),
        spec: ModelSpec | None = None,
    ) -> None:
        super().__init__()
        self.placements = list(placements)
        self._places = find_places(backbone, self.placements, spec or backbone.spec)
        self.num_backbone_parameters = sum(p.numel() for p in backbone.parameters())
        self.sets = nn.ModuleDict()
        for name in (*sets, LIVE):
            self.add(name)
        live = self._set(LIVE)
        check_meetings(self._places, live)
        for place in self._places:
            if hasattr(live[place.key], "before"):
                place.module.register_forward_pre_hook(functools.partial(self._prepare, place), with_kwargs=True)
            place.module.register_forward_hook(functools.partial(self._adapt, place), with_kwargs=True)
            if hasattr(live[place.key], "failed"):
                hook = functools.partial(self._clean_up, place)
                place.module.register_forward_hook(hook, with_kwargs=True, always_call=True)

    @property
    def live(self) -> str:
        """Name of the one set that trains."""
        return LIVE

    @property
    def names(self) -> list[str]:
        """Names of all sets, in order of creation."""
        return list(self.sets)

    @property
    def sites(self) -> list[str]:
        """Names of the adapters of a set, as in `adapters_of`, in order of the placements."""
        return list(self._labels.values())

    @property
    def places(self) -> list[Place]:
        """Every site with the adapter that acts there, in the order of the placements."""
        return list(self._places)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the kinds route by, which `tasks_of` counts through; empty where none does.

        Raises:
            ValueError: two kinds name other tasks, or the same in another order.
        """
        named = {adapter.tasks: key for key, adapter in self._set(LIVE).items() if adapter.tasks}
        if len(named) > 1:
            raise ValueError(f"kinds that route by task must name the same tasks in the same order, not {list(named)}")
        return next(iter(named), ())

    @property
    def _labels(self) -> dict[str, str]:
        """The adapters' public names by their keys."""
        return {place.key: place.label for place in self._places}

    def add(self, name: str) -> None:
        """Make a fresh set on the devices of its sites. Only ``live`` trains.

        Raises:
            ValueError: the name is taken, or cannot be part of a parameter's name.
        """
        if not name or "." in name or hasattr(self.sets, name):
            raise ValueError(
                f"an adapter set cannot be called {name!r}: it is empty, taken, reserved, or has a '.'; "
                f"there are {self.names}"
            )
        self.sets[name] = make_adapters(self.placements, self._places).requires_grad_(name == LIVE)

    def remove(self, name: str) -> None:
        """Forget a set. The live set stays."""
        self._set(name)
        if name == LIVE:
            raise ValueError(f"the set {LIVE!r} cannot be removed")
        del self.sets[name]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Parameters of one set, in the same order for every set."""
        return list(self._set(name).parameters())

    def adapters_of(self, name: str) -> dict[str, Adapter]:
        """The adapters of one set by the module name of their site (``<site>@1``, ``placement-<number>``)."""
        labels = self._labels
        return {labels[key]: adapter for key, adapter in self._set(name).items()}

    def _set(self, name: str) -> nn.ModuleDict:
        if name not in self.sets:
            raise LookupError(f"no adapter set {name!r}; there are {self.names}")
        return self.sets[name]

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Copy the values of one set into another, in place. Under FSDP2, reshard the adapters before."""
        to, of = self._set(target), self._set(source)
        for own, other in zip((*to.parameters(), *to.buffers()), (*of.parameters(), *of.buffers()), strict=True):
            own.copy_(other)

    @torch.no_grad()
    def load_sites(self, name: str, sites: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill the adapters of some sites of a set, in place; those of other sites stay as they are.

        Args:
            name: the set.
            sites: module name of the site -> the adapter's state dict.

        Raises:
            ValueError: something does not fit. Lists all that does not, and then changes nothing.
        """
        adapters = self.adapters_of(name)
        problems = [f"{site}: no adapter there" for site in sites if site not in adapters]
        for site, tensors in sites.items():
            own = adapters[site].state_dict() if site in adapters else {}
            for tensor in sorted(own.keys() | tensors.keys()) if own else ():
                shapes = [tuple(s[tensor].shape) if tensor in s else "missing" for s in (tensors, own)]
                if shapes[0] != shapes[1]:
                    problems.append(f"{site} {tensor}: given {shapes[0]}, model {shapes[1]}")
        if problems:
            shown = "\n  ".join(problems[:20])
            raise ValueError(f"{len(problems)} adapters or tensors do not fit this model's adapters:\n  {shown}")
        for site, tensors in sites.items():
            for tensor, own in adapters[site].state_dict().items():
                own.copy_(tensors[tensor])

    def reset(self, name: str, generator: torch.Generator | None = None) -> None:
        """Give one set its starting values again, in place."""
        for adapter in self._set(name).values():
            adapter.reset_parameters(generator)

    @contextlib.contextmanager
    def use(self, selection: str | Tensor | None, sets: Sequence[str] | None = None) -> Iterator[None]:
        """Make a choice of adapters active, in this thread, until the block ends; blocks may nest.

        Args:
            selection: the name of a set; weights (B, K) that mix the sets per sample; an index (B,) long, one
                set per sample; or None, the bare backbone.
            sets: the K sets that the columns of weights, or an index, stand for; all but ``live``, in order,
                when not given.

        Raises:
            LookupError: there is no set of that name.
            ValueError: the shape does not fit the sets, or a kind does not define mixing.
        """
        with self._active(self._selection(selection, sets)):
            yield

    @contextlib.contextmanager
    def _active(self, chosen: _Selection) -> Iterator[None]:
        token = _ACTIVE.set(MappingProxyType({**_ACTIVE.get(), id(self): chosen}))
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def _selection(self, selection: str | Tensor | None, sets: Sequence[str] | None) -> _Selection:
        if selection is None:
            return _Selection()
        if isinstance(selection, str):
            self._set(selection)
            return _Selection(selection)
        names = tuple(sets) if sets is not None else tuple(name for name in self.sets if name != LIVE)
        adapters = [self._set(name) for name in names]
        if selection.dim() == 1 and selection.dtype == torch.long:
            if len(selection) and not 0 <= int(selection.min()) <= int(selection.max()) < len(names):
                raise ValueError(f"a set's index lies outside 0 to {len(names) - 1}; the sets are {list(names)}")
            return _Selection(mixture=Mixture.one_hot(selection, len(names)), sets=names)
        if selection.dim() != 2 or selection.shape[1] != len(names) or not selection.is_floating_point():
            raise ValueError(
                f"mixing weights are floats (B, {len(names)}) over {list(names)}, and an index is long (B,); "
                f"this is {selection.dtype} {tuple(selection.shape)}"
            )
        if not bool(selection.isfinite().all()):
            raise ValueError("some mixing weights are not finite")
        for key, adapter in adapters[0].items():
            if not adapter.mixes:
                raise ValueError(
                    f"{adapter} at {self._labels[key]!r} does not define mixing; "
                    "select one set by its name, or one per sample by an index"
                )
        return _Selection(mixture=Mixture.of(selection), sets=names)

    def _prepare(self, place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook of a place whose kind defines ``before``."""
        chosen = _ACTIVE.get().get(id(self), _Selection(LIVE))
        call = (args, kwargs) if place.index is None else (place.index, args, kwargs)
        if chosen.name is not None:
            return self.sets[chosen.name][place.key].before(*call)
        if chosen.mixture is None:
            return None
        experts = [self.sets[name][place.key] for name in chosen.sets]
        with _gathered(experts):
            return type(experts[0]).mix_before(experts, chosen.mixture, *call)

    def _adapt(self, place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        """The forward hook of a place."""
        chosen = _ACTIVE.get().get(id(self), _Selection(LIVE))
        if chosen.name is None and chosen.mixture is None:
            return y
        if place.index is None:
            call = (args[0] if args else next(iter(kwargs.values())), y)
        else:
            call = (place.index, args, kwargs, y)
        if chosen.name is not None:
            return self.sets[chosen.name][place.key](*call)
        if place.index is None:
            _require_samples(place.name, *call, len(chosen.mixture.weights))
        experts = [self.sets[name][place.key] for name in chosen.sets]
        kind = type(experts[0])
        with _gathered(experts):
            return (kind.select if chosen.mixture.is_one_hot else kind.mix)(experts, chosen.mixture, *call)

    def _clean_up(self, place: Place, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        """Where the call of a place has raised, ``y`` is None: let its adapters undo what they did before it."""
        for adapters in self.sets.values() if y is None else ():
            adapters[place.key].failed(place.index)

    def report(self) -> BankReport:
        """What one set trains and stores, by placement."""
        rows = []
        for number, placement in enumerate(self.placements):
            places = [place for place in self._places if place.placement == number]
            adapters = [self._set(LIVE)[key] for key in dict.fromkeys(place.key for place in places)]
            parameters = [p for adapter in adapters for p in adapter.parameters()]
            rows.append(
                PlacementReport(
                    kind=adapters[0].title,
                    points=tuple(placement.points),
                    num_sites=len(places),
                    num_parameters=sum(p.numel() for p in parameters),
                    num_bytes=sum(p.numel() * p.element_size() for p in parameters),
                )
            )
        return BankReport(tuple(rows), self.num_backbone_parameters)


def _require_samples(site: str, x: Tensor, y: Tensor, num_samples: int) -> None:
    if y.dim() < 2 or len(y) != num_samples or len(x) != num_samples:
        raise ValueError(
            f"the site {site!r} turns {tuple(x.shape)} into {tuple(y.shape)}, but the selection is for "
            f"{num_samples} samples, which must be the first dimension"
        )


@contextlib.contextmanager
def _gathered(experts: Sequence[Adapter]) -> Iterator[None]:
    """Whole parameters while mixing, where FSDP2 has sharded them: mixing passes by the experts' forward."""
    sharded = [expert for expert in experts if hasattr(expert, "unshard")]
    if sharded and torch.is_grad_enabled():
        raise ValueError("mixing sets that FSDP2 has sharded has no gradients; run it under torch.no_grad()")
    for expert in sharded:
        expert.unshard()
    try:
        yield
    finally:
        for expert in sharded:
            expert.reshard()
