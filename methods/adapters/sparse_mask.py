"""Training of a fixed sparse subset of a model's weights: FISH masks (arXiv 2111.09839).

    theta' = theta, but for the k = int(P rho) entries of highest score, which train

with P the parameters of all sites and rho the density. What trains is one vector of k numbers, the weights themselves
at k positions, so that the optimizer's state, its weight decay and its momentum are those of these entries alone, and
nothing else can move. By default the score is the empirical Fisher information, sum_n (d loss_n / d theta)^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from fulgurite.methods.adapters.base import Spanning, SpanSite
from fulgurite.methods.adapters.lent_values import (
    LentAlias,
    Loan,
    at_end_of_backward,
    give_in_backward,
    in_backward,
    read_entries,
    write_entries,
)
from fulgurite.methods.adapters.mask_choice import (
    chosen_positions,
    common_entries,
    matching,
    num_chosen,
    position_type,
)
from fulgurite.methods.adapters.masked_weights import MaskedWeight, masked_weights
from fulgurite.methods.random import uniform
from fulgurite.methods.sharding import OnDemand, whole, write

Score = Literal["label", "label_absolute", "expect", "expect_absolute", "sampled", "random", "magnitude"]
WITHOUT_DATA = ("random", "magnitude")
UNSCORED = -1


@dataclass(frozen=True)
class _Entries:
    """The chosen entries of one tensor: their place in the vectors of all, and their flat indices in the tensor."""

    weight: MaskedWeight
    part: slice
    index: Tensor


@dataclass(frozen=True)
class _Layout:
    """The positions by tensor, and by site as (number of the entries among ``all``, path of the tensor in the site)."""

    version: tuple[int, int]
    all: tuple[_Entries, ...]
    of_site: dict[int, list[tuple[int, str]]]


class SparseMask(Spanning):
    """Trains the k highest-scored entries of its sites' own parameters; usually at the point ``parameters``.

    A fresh mask is the identity, also one without positions yet. The positions come from `set_scores`; ``random`` and
    ``magnitude`` masks have theirs from the start. At all times but while a site is at work, the backbone's weights are
    its own, bit for bit. Buffers are left alone. Shapes are fixed by the density, so that a mask can be renewed, and
    all sets have the same. Mixing sets is not defined; threads that use several sets of one backbone at a time are
    refused.

    State: ``values`` (k,) in float32 or wider, ``positions`` (k,) int32, or int64 beyond 2^31 parameters. Memory
    besides: 8 k bytes, and at one time the gradient of one tensor. Time: O(k) more than a step that trains everything
    takes without its optimizer.

    Args:
        sites: modules that own parameters.
        density: rho.
        score: what positions are chosen by. ``label`` and ``label_absolute`` are moments of the gradients of the
            examples' losses, ``expect`` and ``expect_absolute`` their expectation over the model's own labels, where
            an example has one, and ``sampled`` its estimate by drawn labels; ``random``, and ``magnitude`` of the
            weights, need no data.
        whole: full patterns of the names of tensors that train entirely, as heads do; they count.
        samples: examples that scores are summed over, by those who compute them.
        seed: of random and sampled scores.

    Raises:
        LookupError: a pattern of ``whole`` matches nothing.
        ValueError: a density that has no room for ``whole``, no parameters, or a recurrent layer of torch, which keeps
            its weights elsewhere.
    """

    verb = "reparametrize"

    def __init__(
        self,
        sites: Sequence[SpanSite],
        density: float = 0.005,
        score: Score = "label",
        whole: Sequence[str] = (),
        samples: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.density, self.score, self.samples, self.seed = density, score, samples, seed
        self._sites = tuple(sites)
        self.weights = masked_weights(sites)
        self.num_total = sum(weight.size for weight in self.weights)
        self.whole = frozenset(matching([weight.name for weight in self.weights], whole))
        heads = sum(weight.size for weight in self.weights if weight.name in self.whole)
        count = num_chosen(self.num_total, density, heads)
        own = [self._parameter(weight) for weight in self.weights]
        dtype = torch.float32
        for parameter in own:
            dtype = torch.promote_types(dtype, parameter.dtype)
        device = own[0].device
        self.values = nn.Parameter(torch.zeros(count, dtype=dtype, device=device))
        positions = torch.full((count,), UNSCORED, dtype=position_type(self.num_total), device=device)
        self.register_buffer("positions", positions)
        self._applied = False
        self._seen: set[int] = set()
        # Derived from the state, or of calls that are going on: no part of copies and pickles.
        self._laid_out: _Layout | None = None
        self._split: tuple[Any, tuple[Tensor, ...]] | None = None
        self._calls: dict[int, list[tuple[Loan, nn.Module, str, nn.Parameter]]] = {}
        if score in WITHOUT_DATA and device.type != "meta":
            self.set_scores(self.own_scores())

    def __getstate__(self) -> dict[str, Any]:
        """Without what neither copies nor pickles take."""
        return {**self.__dict__, "_laid_out": None, "_split": None, "_calls": {}}

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of the masked tensors by name, in the order in which positions count through them."""
        return {weight.name: weight.size for weight in self.weights}

    @property
    def is_scored(self) -> bool:
        """Whether the mask has its positions."""
        return self._layout() is not None

    def _place(self, owner: tuple[int, str]) -> tuple[nn.Module, str]:
        """The module that has a tensor, and its name in it."""
        inner, _, name = owner[1].rpartition(".")
        return self._sites[owner[0]].module.get_submodule(inner), name

    def _parameter(self, weight: MaskedWeight) -> Tensor:
        module, name = self._place(weight.owners[0])
        return module._parameters[name]

    def _layout(self) -> _Layout | None:
        """None where the positions are not chosen yet. Waits for the device, once per change of the positions."""
        version = (id(self.positions), 0 if self.positions.is_inference() else self.positions._version)
        if self._laid_out is None or self._laid_out.version != version:
            offsets = [weight.offset for weight in self.weights] + [self.num_total]
            positions = self.positions.long()
            start = torch.searchsorted(positions, torch.tensor(offsets, device=positions.device)).tolist()
            if start[0]:
                return None
            entries: list[_Entries] = []
            of_site: dict[int, list[tuple[int, str]]] = {}
            for weight, first, end in zip(self.weights, start, start[1:]):
                if first == end:
                    continue
                for site, path in weight.owners:
                    of_site.setdefault(site, []).append((len(entries), path))
                entries.append(_Entries(weight, slice(first, end), positions[first:end] - weight.offset))
            self._laid_out = _Layout(version, tuple(entries), of_site)
        return self._laid_out

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The backbone's own values at the positions, which stay; nothing is drawn. Under FSDP2 a collective."""
        layout = self._layout()
        if layout is not None:
            write(self.values, self._own_values(layout))

    def _own_values(self, layout: _Layout) -> Tensor:
        parts = [read_entries(whole(self._parameter(entries.weight)), entries.index) for entries in layout.all]
        return torch.cat([part.to(self.values.dtype) for part in parts])

    def own_scores(self, draw: int = 0) -> Mapping[str, Tensor]:
        """Scores that need no data, made when they are asked for; random ones by seed and number of the ``draw``.

        Raises:
            ValueError: this mask's score needs data.
        """
        makers = {
            "random": lambda w: uniform(self.seed, "sparse_mask", draw, w.name, w.size),
            "magnitude": lambda w: whole(self._parameter(w)).detach().abs(),
        }
        if self.score not in makers:
            raise ValueError(f'score="{self.score}" needs data: compute scores and give them to set_scores')
        return OnDemand({w.name: lambda w=w: makers[self.score](w) for w in self.weights})

    @torch.no_grad()
    def set_scores(self, scores: Mapping[str, Tensor], keep_dropped: bool = False) -> None:
        """Choose the positions, or choose them anew: entries that stay keep their values, others start at the weight's.

        Under FSDP2 a collective, for which the module must be resharded.

        Args:
            scores: name of a tensor -> its scores.
            keep_dropped: write the values of entries that are chosen no more into the backbone, which changes it for
                all sets, instead of going back to its own.

        Raises:
            LookupError, ValueError: as `chosen_positions`.
        """
        chosen = chosen_positions(scores, self.sizes, len(self.positions), self.whole)
        before, positions, values = self._layout(), self.positions.clone(), whole(self.values).clone()
        chosen = chosen.to(positions.device)
        if before is not None and keep_dropped:
            dropped = torch.ones_like(positions, dtype=torch.bool)
            dropped[common_entries(positions, chosen)[0]] = False
            self._settle(before, values, dropped)
        self.positions.copy_(chosen)
        fresh = self._own_values(self._layout())
        if before is not None:
            old, new = common_entries(positions, chosen)
            fresh[new] = values[old]
        write(self.values, fresh)

    def _settle(self, layout: _Layout, values: Tensor, dropped: Tensor) -> None:
        """Make the backbone's the values of dropped entries."""
        for entries in layout.all:
            gone = dropped[entries.part]
            if gone.any():
                parameter = self._parameter(entries.weight).detach()
                changed = whole(parameter).clone()
                write_entries(changed, entries.index[gone], values[entries.part][gone])
                write(parameter, changed)

    @torch.no_grad()
    def deltas(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Tensor name -> (flat indices, what is added there to the backbone's entries); disjoint masks add exactly.

        Raises:
            ValueError: the positions are not chosen yet.
        """
        layout = self._required()
        change = whole(self.values) - self._own_values(layout)
        return {entries.weight.name: (entries.index, change[entries.part]) for entries in layout.all}

    @torch.no_grad()
    def folded_at(self, index: int, site: nn.Module) -> dict[str, Tensor]:
        """The site's tensors with the values in them; nothing where the positions are not chosen yet."""
        layout, values, out = self._layout(), whole(self.values), {}
        for number, path in layout.of_site.get(index, ()) if layout is not None else ():
            entries = layout.all[number]
            out[path] = site.get_parameter(path).detach().clone()
            write_entries(out[path], entries.index, values[entries.part])
        return out

    def _required(self) -> _Layout:
        layout = self._layout()
        if layout is None:
            raise ValueError(
                f'the positions of this mask are not chosen yet: score="{self.score}" needs data; give scores to '
                'set_scores before training, or set score="random" or "magnitude"'
            )
        return layout

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The backbone's own weights have the values while inside, for code that reads them; sites do nothing more.

        Raises:
            ValueError: FSDP2 has sharded the weights.
        """
        layout, loans = self._layout(), []
        for entries in layout.all if layout is not None else ():
            weight = self._parameter(entries.weight)
            if isinstance(weight, DTensor):
                raise ValueError(f"{entries.weight.name} is sharded: measure a second module, made from a checkpoint")
            loans.append(self._loan(entries, weight, self.values.detach()[entries.part]))
        self._seen.clear()
        try:
            for loan in loans:
                loan.give()
            self._applied = True
            yield
        finally:
            self._applied = False
            for loan in loans:
                loan.take_back()

    def unseen(self) -> list[str]:
        """Tensors whose modules were not called in the last `applied`; used in another way, they could not train."""
        return [w.name for w in self.weights if not any(number in self._seen for number, _ in w.owners)]

    def _loan(self, entries: _Entries, parameter: Tensor, values: Tensor) -> Loan:
        return Loan(self, *self._place(entries.weight.owners[0]), parameter.data, entries.index, values.detach())

    def before(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Lend the values to the site's weights, which it reads as functions of them.

        Raises:
            ValueError: something trains, and the positions are not chosen yet.
        """
        if self._applied:
            self._seen.add(index)
            return
        trains = torch.is_grad_enabled() and self.values.requires_grad
        layout = self._required() if trains else self._layout()
        if layout is None:
            return
        calls = self._calls[index] = []
        if in_backward():  # a checkpointed block, run again, may stop in the middle of a site
            at_end_of_backward(lambda: self._end(index))
        pieces = self._pieces(layout) if trains else None
        for number, path in layout.of_site.get(index, ()):
            entries, (module, name) = layout.all[number], self._place((index, path))
            values = self.values.detach()[entries.part] if pieces is None else pieces[number]
            parameter = module._parameters[name]
            loan = self._loan(entries, parameter, values)
            calls.append((loan, module, name, parameter))
            loan.give()
            if trains:
                module._parameters[name] = LentAlias.apply(values, loan)

    def _pieces(self, layout: _Layout) -> tuple[Tensor, ...]:
        """The values of every tensor that has some, split once for all sites until they change."""
        key = (id(self.values), self.values._version, layout.version)
        if self._split is None or self._split[0] != key:
            sizes = [entries.part.stop - entries.part.start for entries in layout.all]
            self._split = (key, self.values.split(sizes))
        return self._split[1]

    def at(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        """``y``; the site's weights are its own again until a backward pass comes to ``y``."""
        loans = self._end(index)
        if loans and torch.is_grad_enabled():
            give_in_backward([leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)], loans)
        return y

    def failed(self, index: int) -> None:
        """Put the site back as it was."""
        self._end(index)

    def _end(self, index: int) -> list[Loan]:
        """Put the site back as it was; the loans of its call."""
        calls = self._calls.pop(index, [])
        for loan, module, name, parameter in calls:
            module._parameters[name] = parameter
            loan.take_back()
        return [loan for loan, *_ in calls]
