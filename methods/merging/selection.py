"""The k entries of largest magnitude, exactly k, of one tensor or of a whole model, without a sort.

k = int(density n), at least 1; of entries equal to the k-th largest, those of lowest flat index are kept. Magnitudes of
float32 order like their bits read as integers, so a histogram of the upper 16 bits says in which bin the k-th largest
lies, and only that bin (well under 1 % of the entries of a task vector) is looked at more closely.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fulgurite.methods.merging.base import STATISTIC, Matching, Merger, StateDict, plan_of

BLOCK = 1 << 15  # entries worked on at once: small enough for the cache, large enough to hide the cost of a call
SMALL = 1 << 13  # entries below which looking at all of them is cheaper than a histogram
LOCK = threading.Lock()
BINS, SHIFT = 1 << 16, 15


@dataclass(frozen=True)
class Cut:
    """Where to cut: entries above ``value`` are kept, and the first ``ties`` of those equal to it."""

    value: float
    ties: int


EVERYTHING, NOTHING = Cut(-1.0, 0), Cut(float("inf"), 0)


def kept_count(density: float, count: int) -> int:
    """int(density count), at least 1 where both are positive."""
    return min(max(int(density * count), 1), count) if density > 0 else 0


def check_fraction(name: str, value: float) -> float:
    """The value, if it lies in [0, 1].

    Raises:
        ValueError: otherwise.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} lies between 0 and 1, got {value}")
    return value


def blocks(count: int) -> Iterator[slice]:
    """Slices that cover ``count`` entries in order."""
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def bins_of(magnitude: Tensor) -> Tensor:
    """The upper 16 bits below the sign, int32. Doubles are rounded first, which keeps their order."""
    return magnitude.to(torch.float32).view(torch.int32) >> SHIFT


@dataclass(frozen=True)
class Difference:
    """A flat task vector that is formed piece by piece: ``difference[part]`` is expert[part] - base[part]."""

    expert: Tensor
    base: Tensor

    def numel(self) -> int:
        """Number of entries."""
        return self.base.numel()

    def __getitem__(self, part: slice) -> Tensor:
        return self.expert[part] - self.base[part]


def cut_of(values: Tensor | Difference, keep: int, all_ties: bool = False) -> Cut:
    """Where to cut one flat tensor to keep the ``keep`` entries (0 to all) of largest magnitude. Memory: one block.

    Args:
        values: (n,) numbers.
        keep: how many are kept.
        all_ties: keep all that equal the last one kept, so ``keep`` or more.
    """
    count = values.numel()
    if keep == 0:
        return NOTHING
    if keep >= count:
        return EVERYTHING
    if count <= SMALL:
        magnitude = values[:].abs()
        value = magnitude.kthvalue(count - keep + 1).values
        equal = int((magnitude == value).sum())
        return settled(value.item(), equal if all_ties else keep - int((magnitude > value).sum()), equal)
    order = Order()
    for part in blocks(count):
        order.count(values[part].abs())
    order.locate(keep)
    for part in blocks(count):
        order.refine("", values[part].abs())
    return order.cuts([""], all_ties)[""]


def representable(value: float, dtype: torch.dtype) -> float:
    """The largest number of this type that is not above ``value``, so that x > value asks the same of x of it."""
    if dtype != torch.float32 or abs(value) == float("inf"):
        return value
    near = np.float32(value)
    return float(np.nextafter(near, np.float32(-np.inf)) if float(near) > value else near)


def take(values: Tensor, cut: Cut) -> tuple[Tensor, Cut]:
    """Zero what is not kept of these flat entries.

    Returns:
        the kept entries among zeros; the cut for those that follow in the same tensor, with the ties that are left.
    """
    above = torch.nn.functional.hardshrink(values, representable(cut.value, values.dtype))
    if cut.ties == 0:
        return above, cut
    equal = values.abs().double() == cut.value
    found = int(equal.sum())
    if found > cut.ties:
        equal &= equal.cumsum(0) <= cut.ties
    return above.add_(values * equal), Cut(cut.value, max(cut.ties - found, 0))


def settled(value: float, ties: int, equal: int) -> Cut:
    """A cut for a tensor in which ``equal`` entries are tied: nothing is left to count where it takes all of them."""
    return Cut(value, ties) if ties < equal else Cut(float(np.nextafter(value, -np.inf)), 0)


def trim(values: Tensor, density: float) -> Tensor:
    """The int(density n) entries of largest magnitude, zeros elsewhere. Shape kept; one flat tensor more."""
    flat = values.flatten()
    kept, _ = take(flat, cut_of(flat, kept_count(density, flat.numel())))
    return kept.view_as(values)


@dataclass
class Order:
    """Where one order statistic of many tensors lies, in two passes over them.

    First `count` every piece, then `locate` the rank, then `refine` every piece, then read `cuts`. Memory: a histogram
    of 0.5 MiB, and in the second pass the magnitudes in one bin (about 0.3 % of a task vector's; all, as doubles, where
    all are alike in their upper 16 bits).
    """

    seen: int = 0
    histogram: Tensor | None = None
    bin: int = -1
    rank: int = 0
    contested: dict[str, list[Tensor]] = field(default_factory=dict)

    def count(self, magnitude: Tensor) -> None:
        """First pass: see (n,) entries, not negative."""
        counts = torch.bincount(bins_of(magnitude), minlength=BINS)
        self.histogram = counts if self.histogram is None else self.histogram.add_(counts.to(self.histogram.device))
        self.seen += magnitude.numel()

    def locate(self, keep: int) -> None:
        """Between the passes: the ``keep``-th largest of all that was seen is sought, 1 to ``seen``."""
        above = self.histogram.flip(0).cumsum(0)  # entries in this bin and the higher ones
        position = int(torch.searchsorted(above, keep))
        self.bin = BINS - 1 - position
        self.rank = keep - (int(above[position - 1]) if position else 0)
        self.histogram = None

    def refine(self, name: str, magnitude: Tensor) -> None:
        """Second pass: see the same entries again; pieces of one tensor under one name."""
        found = magnitude[bins_of(magnitude).sub_(self.bin).eq_(0).nonzero().flatten()]
        if found.numel():
            self.contested.setdefault(name, []).append(found.double().cpu())

    def cuts(self, names: Sequence[str], all_ties: bool = False) -> dict[str, Cut]:
        """Where to cut each tensor; ties are kept in the order of ``names``, or all of them."""
        values = torch.cat([piece for found in self.contested.values() for piece in found])
        value = values.kthvalue(values.numel() - self.rank + 1).values.item()
        left = self.rank - int((values > value).sum())
        out = {}
        for name in names:
            equal = sum(int((own == value).sum()) for own in self.contested.get(name, ()))
            ties = equal if all_ties else min(equal, left)
            out[name] = settled(value, ties, equal)
            left -= ties
        return out


class Passes(Merger):
    """A merger that sees the whole model several times before it merges.

    ``scans`` is the number of passes. `scan` tells them apart by the names, which come sorted and once in each; a
    subclass says in `see` what it does with a tensor and in `seen` what follows from a whole pass. Running statistics
    of normalisation, which are averaged, are not shown.
    """

    scans: ClassVar[int] = 0
    models: tuple[Sequence[StateDict], StateDict | None, Matching] | None = None

    def see(self, number: int, name: str, base: Tensor, experts: Sequence[Tensor]) -> None:
        """One tensor in pass ``number``, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} scans, and does not say how")

    def seen(self, number: int) -> None:
        """The pass ``number`` has ended."""
        raise NotImplementedError(f"{type(self).__name__} scans, and does not say what follows")

    def __call__(
        self,
        experts: Sequence[StateDict],
        base: StateDict | None = None,
        weights: Sequence[float] | None = None,
        matching: Matching | None = None,
    ) -> dict[str, Tensor]:
        """As `Merger.__call__`."""
        self.models = (experts, base, matching or Matching())
        try:
            return super().__call__(experts, base, weights, matching)
        finally:
            self.models = None

    def begin(self, num_experts: int) -> None:
        """Forget an earlier merge, and make all passes but the last where the models are at hand."""
        super().begin(num_experts)
        self.scanned: dict[str, Any] = {"pass": 0, "names": {}, "experts": num_experts}
        if self.models is not None and self.scans > 1:
            plan = plan_of(*self.models)
            for _ in range(self.scans - 1):
                for name in sorted(plan.merged):
                    self.scan(name, *plan.sources(name))

    def scan(self, name: str, base: Tensor | None, experts: Sequence[Tensor]) -> None:
        """See one tensor; a name that was seen in this pass opens the next."""
        if name in self.scanned["names"]:
            self.end_pass()
        self.scanned["names"][name] = base.numel()
        if not STATISTIC.search(name):
            self.see(self.scanned["pass"], name, base.flatten(), [expert.flatten() for expert in experts])

    def end_pass(self) -> None:
        """Draw what follows from this pass and open the next."""
        self.seen(self.scanned["pass"])
        self.scanned["pass"] += 1
        self.scanned["names"] = {}

    def results(self) -> Mapping[str, Any]:
        """What all passes have collected; ends the last one. Threads may ask at once.

        Raises:
            RuntimeError: the model was shown another number of times.
        """
        with LOCK:
            if self.scanned["names"]:
                self.end_pass()
        if self.scanned["pass"] != self.scans:
            raise RuntimeError(f"{type(self).__name__} scans {self.scans} times, was shown {self.scanned['pass']}")
        return self.scanned
