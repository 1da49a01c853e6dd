"""The k entries of largest magnitude, exactly k, of one tensor or of a whole model, without a sort.

k = int(density n), at least 1; of entries equal to the k-th largest, those of lowest flat index are kept. Magnitudes of
float32 order like their bits read as integers: a histogram of the upper 16 bits says in which bin the k-th largest
lies, and one of the lower 15 bits of what is in that bin says which number it is. Both add up over pieces, threads and
processes, and take 0.5 and 0.25 MiB. Doubles are compared as the floats that they round to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 13  # entries below which looking at all of them is cheaper than a histogram
SHIFT = 15
BINS, LOWER = 1 << 16, 1 << SHIFT
Parts = Callable[[], Iterator[Sequence[Tensor]]]  # V flat vectors in pieces, in order, whenever it is called


@dataclass(frozen=True)
class Cut:
    """Where to cut: magnitudes above ``value`` are kept, and the first ``ties`` of those equal to it."""

    value: float
    ties: int


EVERYTHING, NOTHING = Cut(-1.0, 0), Cut(float("inf"), 0)


def kept_count(density: float, count: int) -> int:
    """int(density count), at least 1 where both are positive."""
    return min(max(int(density * count), 1), count) if density > 0 else 0


def bits_of(values: Tensor) -> Tensor:
    """Magnitudes as int32 that order like them."""
    return values.abs().to(torch.float32).view(torch.int32)


def upper_histogram(bits: Tensor) -> Tensor:
    """(65,536,) counts of the upper 16 bits."""
    return torch.bincount(bits >> SHIFT, minlength=BINS)


def lower_histogram(bits: Tensor, upper: int) -> Tensor:
    """(32,768,) counts of the lower 15 bits of those entries whose upper 16 are ``upper``."""
    if bits.is_cuda:
        inside = bits[(bits >> SHIFT) == upper]
        return torch.bincount(inside & (LOWER - 1), minlength=LOWER)
    array = bits.numpy()  # where numpy needs a third of the time to find the few that are inside
    inside = array[np.flatnonzero((array >> SHIFT) == upper)]
    return torch.from_numpy(np.bincount(inside & (LOWER - 1), minlength=LOWER))


def locate(histogram: Tensor, rank: int) -> tuple[int, int, int]:
    """The bin that holds the ``rank``-th largest (from 1), its rank among those in the bin, and how many these are."""
    above = histogram.flip(0).cumsum(0)  # entries in this bin and the higher ones
    position = int(torch.searchsorted(above, rank))
    before = int(above[position - 1]) if position else 0
    return len(histogram) - 1 - position, rank - before, int(above[position]) - before


def value_of(upper: int, lower: int) -> float:
    """The float32 with these bits."""
    return float(np.array([(upper << SHIFT) | lower], dtype=np.int32).view(np.float32)[0])


def settled(value: float, ties: int, equal: int) -> Cut:
    """A cut for a tensor in which ``equal`` entries are tied: nothing is left to count where it takes all of them."""
    return Cut(value, ties) if ties < equal else Cut(float(np.nextafter(np.float32(value), np.float32(-np.inf))), 0)


@dataclass(frozen=True)
class Place:
    """A rank among magnitudes: its ``value``, its rank among those that equal it, and how many ``equal`` it."""

    value: float
    ties: int
    equal: int

    @classmethod
    def within(cls, histogram: Tensor, upper: int, rank: int) -> Place:
        """From the histogram of the lower bits, and the rank in it, of those whose upper ones are ``upper``."""
        lower, ties, equal = locate(histogram, rank)
        return cls(value_of(upper, lower), ties, equal)

    def cut(self, all_ties: bool = False) -> Cut:
        """What keeps all entries up to this rank, or ``all_ties`` of it too."""
        return settled(self.value, self.equal if all_ties else self.ties, self.equal)


def cuts_at(parts: Parts, count: int, ranks: Sequence[Sequence[int]], all_ties: bool = False) -> list[list[Cut]]:
    """Where to cut each of V vectors at one or several ranks of its magnitudes.

    Reads the vectors twice. Memory: one histogram per vector, then one per rank.

    Args:
        parts: the vectors.
        count: of entries in each.
        ranks: of each vector, how many entries are kept (0 to all): one cut for each of these numbers.
        all_ties: keep all that equal the last one kept, so that number or more.
    """
    found = places_of(parts, count, [[rank for rank in own if 0 < rank < count] for own in ranks])
    edge = {True: NOTHING, False: EVERYTHING}
    return [[own[k].cut(all_ties) if k in own else edge[k <= 0] for k in wanted] for own, wanted in zip(found, ranks)]


def places_of(parts: Parts, count: int, ranks: Sequence[Sequence[int]]) -> list[dict[int, Place]]:
    """Of V vectors of ``count`` entries, given ranks (1 for the largest magnitude, to ``count``) -> their places."""
    if not any(ranks):
        return [{} for _ in ranks]
    if count <= SMALL:
        vectors = [torch.cat(pieces) for pieces in zip(*parts())]
        return [{rank: small_place(vector, rank) for rank in own} for vector, own in zip(vectors, ranks)]
    uppers = [torch.zeros(BINS if own else 0, dtype=torch.int64) for own in ranks]
    for pieces in parts():
        for total, piece in zip(uppers, pieces):
            if len(total):
                total += upper_histogram(bits_of(piece)).cpu()
    bins = [{rank: locate(total, rank) for rank in own} for total, own in zip(uppers, ranks)]
    lowers = [{upper: torch.zeros(LOWER, dtype=torch.int64) for upper, _, _ in own.values()} for own in bins]
    for pieces in parts():
        for totals, piece in zip(lowers, pieces):
            bits = bits_of(piece) if totals else None
            for upper, total in totals.items():
                total += lower_histogram(bits, upper).cpu()
    return [
        {rank: Place.within(totals[upper], upper, inner) for rank, (upper, inner, _) in own.items()}
        for own, totals in zip(bins, lowers)
    ]


def small_place(values: Tensor, rank: int) -> Place:
    """Of one flat tensor of a few entries."""
    magnitude = values.abs().to(torch.float32)
    value = magnitude.kthvalue(values.numel() - rank + 1).values
    return Place(value.item(), rank - int((magnitude > value).sum()), int((magnitude == value).sum()))


def take(values: Tensor, cut: Cut) -> tuple[Tensor, Cut]:
    """Zero what is not kept of these flat entries.

    Returns:
        the kept entries among zeros; the cut for those that follow in the same tensor, with the ties that are left.
    """
    if values.dtype == torch.float32:
        above = torch.nn.functional.hardshrink(values, cut.value)
    else:
        above = values * (values.abs().to(torch.float32) > cut.value)
    if cut.ties == 0:
        return above, cut
    equal = values.abs().to(torch.float32) == cut.value
    found = int(equal.sum())
    if found > cut.ties:
        equal &= equal.cumsum(0) <= cut.ties
    return above.add_(values * equal), Cut(cut.value, max(cut.ties - found, 0))


def take_between(values: Tensor, outer: Cut, inner: Cut) -> tuple[Tensor, Cut, Cut]:
    """Zero what the outer cut does not keep, and what the inner one does; returns as `take`, with both cuts."""
    kept, outer = take(values, outer)
    removed, inner = take(values, inner)
    return kept.sub_(removed), outer, inner


@dataclass
class Split:
    """Ties of each expert's threshold that are left to keep, to be given to tensors in the order of their names.

    Args:
        values: T thresholds.
        ties: T numbers of entries equal to them that are kept.
        equal: T numbers of entries equal to them that there are.
    """

    values: list[float]
    ties: list[int]
    equal: list[int]

    @property
    def is_open(self) -> bool:
        """Whether some but not all ties are kept, so that it matters which."""
        return any(ties < equal for ties, equal in zip(self.ties, self.equal))

    def cuts(self, names: Sequence[str], counts: dict[str, list[int]] | None = None) -> dict[str, list[Cut]]:
        """T cuts for every tensor.

        Args:
            names: of all tensors, in order.
            counts: T numbers of ties in each, needed where the split ``is_open``.
        """
        left, out = list(self.ties), {}
        for name in names:
            here = counts[name] if counts is not None else [0] * len(left)
            given = [min(a, b) for a, b in zip(here, left)]
            out[name] = [settled(v, g, h) for v, g, h in zip(self.values, given, here)]
            left = [a - b for a, b in zip(left, given)]
        return out
