"""Named sets of adapters beside a frozen backbone, and the choice of which set, or which mixture, is active."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Mixture
from fulgurite.methods.adapters.report import BankReport, PlacementReport
from fulgurite.methods.structure import ModelSpec

LIVE = "live"


@dataclass
class Placement:
    """One kind of adapter at some public places of a model.

    Args:
        points: names among the ``points`` of the model's `ModelSpec`.
        kind: makes the adapter of one site; its first positional argument is the site's module.
    """

    points: list[str]
    kind: Callable[[nn.Module], Adapter]


@dataclass(frozen=True)
class _Selection:
    """What is active: one set for all samples, a mixture over ``sets``, or (both None) nothing."""

    name: str | None = None
    sets: tuple[str, ...] = ()
    mixture: Mixture | None = None
    one_hot: bool = False


# Which selection of which bank (by id) is active in this thread or task. A context variable, because threads that
# share a bank must not see each other's choice.
_ACTIVE: contextvars.ContextVar[dict[int, _Selection]] = contextvars.ContextVar(
    "fulgurite_adapters", default={}
)


class AdapterBank(nn.Module):
    """Several named sets of adapters of one make, attached to a frozen backbone by forward hooks.

    The backbone's parameter names do not change, and the backbone is no part of the bank: the state dict holds
    ``sets.<set>.<site with "/" for ".">.<tensor>`` only. The set `live` is the one that trains; all others have
    ``requires_grad`` off. Without an active `use`, the live set is applied.

    The hooks follow when a module that owns both the backbone and the bank is deep-copied or pickled. Create all sets
    before a strategy wraps the model, and attach before `torch.compile` runs for the first time.

    Args:
        backbone: the frozen model.
        placements: which kind of adapter goes where. A site carries one adapter.
        sets: names of the sets made at once, besides ``live``.
        spec: the model's structure; ``backbone.spec`` when not given.

    Raises:
        LookupError: a point is unknown, or matches fewer or more modules than the model has there.
        ValueError: two placements meet at a site, or a set's name cannot be used.
    """

    live = LIVE

    def __init__(
        self,
        backbone: nn.Module,
        placements: Sequence[Placement],
        sets: Sequence[str] = ("initial",),
        spec: ModelSpec | None = None,
    ) -> None:
        super().__init__()
        spec = spec or backbone.spec
        if not placements:
            raise ValueError("no placements: name at least one point to adapt")
        self.placements = list(placements)
        self._kinds: dict[str, Callable[[nn.Module], Adapter]] = {}
        self._modules_at: dict[str, tuple[nn.Module]] = {}  # in tuples: the backbone is no part of the bank
        self._placement_of: dict[str, int] = {}
        for number, placement in enumerate(self.placements):
            for point in placement.points:
                for site in spec.point_names(backbone, point):
                    self._claim(site, number, backbone.get_submodule(site))
        self.num_backbone_parameters = sum(p.numel() for p in backbone.parameters())
        self.sets = nn.ModuleDict()
        for name in (*sets, LIVE):
            self.add(name)
        for key, (module,) in self._modules_at.items():
            module.register_forward_hook(functools.partial(self._apply, key), with_kwargs=True)

    def _claim(self, site: str, number: int, module: nn.Module) -> None:
        key = site.replace(".", "/")
        for other in self._kinds:
            if key == other:
                raise ValueError(
                    f"placements {self._placement_of[other]} and {number} both adapt {site!r}; a site carries one adapter"
                )
        self._kinds[key] = self.placements[number].kind
        self._modules_at[key] = (module,)
        self._placement_of[key] = number

    @property
    def names(self) -> list[str]:
        """Names of all sets, in order of creation."""
        return list(self.sets)

    @property
    def sites(self) -> list[str]:
        """Module names of the adapted sites, in order of the placements."""
        return [key.replace("/", ".") for key in self._kinds]

    def add(self, name: str) -> None:
        """Make a fresh set. Only ``live`` trains.

        Raises:
            ValueError: the name is taken, or cannot be part of a parameter's name.
        """
        if not name or "." in name or name in self.sets or hasattr(self.sets, name):
            raise ValueError(
                f"a set cannot be called {name!r}: empty, taken, reserved, or with a '.'; have {self.names}"
            )
        adapters = nn.ModuleDict()
        for key, kind in self._kinds.items():
            (module,) = self._modules_at[key]
            adapter = kind(module)
            reference = next(module.parameters(), None)
            if reference is not None:
                adapter.to(reference.device)
            adapters[key] = adapter
        self.sets[name] = adapters.requires_grad_(name == LIVE)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Parameters of one set, in a fixed order."""
        return list(self._set(name).parameters())

    def _set(self, name: str) -> nn.ModuleDict:
        if name not in self.sets:
            raise LookupError(f"no adapter set {name!r}; have {self.names}")
        return self.sets[name]

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Copy the values of one set into another, in place. Under FSDP2, reshard the adapters before."""
        for to, of in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
            to.copy_(of)

    def reset(self, name: str, generator: torch.Generator | None = None) -> None:
        """Give one set its starting values, in place."""
        for adapter in self._set(name).values():
            adapter.reset_parameters(generator)

    @contextlib.contextmanager
    def use(self, selection: str | Tensor | None, sets: Sequence[str] | None = None) -> Iterator[None]:
        """Make a choice of adapters active in this thread until the block ends.

        Args:
            selection: the name of a set; weights (B, K) that mix the sets per sample; an index (B,) long, one set per
                sample; or None, the bare backbone.
            sets: the K sets that the columns of weights, or an index, stand for; all but ``live``, in order, when
                not given.

        Raises:
            LookupError: a name is not that of a set.
            ValueError: the shape does not fit the sets, or a kind does not define mixing.
        """
        chosen = self._selection(selection, sets)
        token = _ACTIVE.set({**_ACTIVE.get(), id(self): chosen})
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def _selection(self, selection: str | Tensor | None, sets: Sequence[str] | None) -> _Selection:
        if selection is None:
            return _Selection()
        if isinstance(selection, str):
            self._set(selection)
            return _Selection(name=selection)
        names = tuple(sets) if sets is not None else tuple(name for name in self.sets if name != LIVE)
        for name in names:
            self._set(name)
        if selection.dim() == 1 and selection.dtype == torch.long:
            if len(selection) and not 0 <= int(selection.min()) <= int(selection.max()) < len(names):
                raise ValueError(f"an index outside 0..{len(names) - 1}: the sets are {list(names)}")
            return _Selection(sets=names, mixture=Mixture.one_hot(selection, len(names)), one_hot=True)
        if selection.dim() != 2 or selection.shape[1] != len(names) or not selection.is_floating_point():
            raise ValueError(
                f"mixing weights are floats (B, {len(names)}) over {list(names)}, or an index (B,) long; "
                f"got {selection.dtype} {tuple(selection.shape)}"
            )
        if not bool(torch.isfinite(selection).all()):
            raise ValueError("mixing weights are not finite")
        for key, adapter in self._set(names[0]).items():
            if not adapter.mixes:
                raise ValueError(
                    f"{adapter} at {key.replace('/', '.')!r} does not define mixing; select one set by name or by index"
                )
        return _Selection(sets=names, mixture=Mixture.of(selection))

    def _apply(self, key: str, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
        chosen = _ACTIVE.get().get(id(self))
        if chosen is None:
            chosen = _Selection(name=LIVE)
        x = args[0] if args else next(iter(kwargs.values()))
        if chosen.name is not None:
            return self.sets[chosen.name][key](x, y)
        if chosen.mixture is None:
            return y
        num_samples = len(chosen.mixture.weights)
        if y.dim() < 2 or len(y) != num_samples:
            raise ValueError(
                f"{key.replace('/', '.')!r} gives {tuple(y.shape)}, but the mixture is for a batch of {num_samples}: "
                "per-sample adapters need the batch as the first dimension"
            )
        experts = [self.sets[name][key] for name in chosen.sets]
        act = type(experts[0]).select if chosen.one_hot else type(experts[0]).mix
        return act(experts, chosen.mixture, x, y)

    def checkpoint_context(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts that give activation checkpointing the selection of the forward pass when it recomputes.

        Recomputation runs in the backward pass, when the `use` block may have ended. Pass this method:
        ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": bank.checkpoint_context})``.
        """
        return contextlib.nullcontext(), self._again(_ACTIVE.get().get(id(self)))

    @contextlib.contextmanager
    def _again(self, chosen: _Selection | None) -> Iterator[None]:
        active = {key: value for key, value in _ACTIVE.get().items() if key != id(self)}
        token = _ACTIVE.set(active if chosen is None else {**active, id(self): chosen})
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def report(self) -> BankReport:
        """What trains, and how much of the backbone that is."""
        rows = []
        for number, placement in enumerate(self.placements):
            adapters = [a for key, a in self.sets[LIVE].items() if self._placement_of[key] == number]
            parameters = [p for a in adapters for p in a.parameters()]
            rows.append(
                PlacementReport(
                    kind=type(adapters[0]).__name__,
                    points=tuple(placement.points),
                    num_sites=len(adapters),
                    num_parameters=sum(p.numel() for p in parameters),
                    num_bytes=sum(p.numel() * p.element_size() for p in parameters),
                )
            )
        return BankReport(tuple(rows), self.num_backbone_parameters)
