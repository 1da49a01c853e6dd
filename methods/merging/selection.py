"""The k entries of largest magnitude, exactly k, of one tensor or of a whole model, without a sort.

k = int(density n), at least 1; of entries equal to the k-th largest, those of lowest flat index are kept. Magnitudes of
float32 order like their bits read as integers: a histogram of the upper 16 bits says in which bin the k-th largest
lies, and one of the lower 15 bits of what is in that bin says which number it is. Both add up over pieces, threads and
processes, and take 0.5 and 0.25 MiB. Doubles are compared as the floats that they round to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fulgurite.methods.merging.plan import Operands

SMALL = 1 << 13  # entries below which looking at all of them is cheaper than a histogram
SHIFT = 15
BINS, LOWER = 1 << 16, 1 << SHIFT


@dataclass(frozen=True)
class Cut:
    """Where to cut: magnitudes above ``value`` are kept, and the first ``ties`` of those equal to it."""

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


def cuts_of(operands: Operands, keep: int, all_ties: bool = False) -> list[Cut]:
    """Where to cut the T task vectors of one tensor to keep the ``keep`` entries (0 to all) of largest magnitude.

    Reads the tensor twice. Memory: two histograms per expert.

    Args:
        operands: the tensor, with a base.
        keep: how many are kept.
        all_ties: keep all that equal the last one kept, so ``keep`` or more.
    """
    num_experts = len(operands.tensors) - 1
    if keep == 0 or keep >= operands.num_entries:
        return [NOTHING if keep == 0 else EVERYTHING] * num_experts
    if operands.num_entries <= SMALL:
        base, experts = operands.whole()
        return [small_cut((expert - base).flatten(), keep, all_ties) for expert in experts]
    totals = [torch.zeros(BINS, dtype=torch.int64)] * num_experts
    for _, base, experts in operands.pieces():
        totals = [total + upper_histogram(bits_of(expert - base)).cpu() for total, expert in zip(totals, experts)]
    places = [locate(total, keep) for total in totals]
    totals = [torch.zeros(LOWER, dtype=torch.int64)] * num_experts
    for _, base, experts in operands.pieces():
        for number, expert in enumerate(experts):
            found = lower_histogram(bits_of(expert - base), places[number][0])
            totals[number] = totals[number] + found.cpu()
    cuts = []
    for (upper, rank, _), total in zip(places, totals):
        lower, ties, equal = locate(total, rank)
        cuts.append(settled(value_of(upper, lower), equal if all_ties else ties, equal))
    return cuts


def small_cut(values: Tensor, keep: int, all_ties: bool = False) -> Cut:
    """Where to cut one flat tensor of a few entries."""
    magnitude = values.abs().to(torch.float32)
    value = magnitude.kthvalue(values.numel() - keep + 1).values
    equal = int((magnitude == value).sum())
    return settled(value.item(), equal if all_ties else keep - int((magnitude > value).sum()), equal)


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


def trim(values: Tensor, density: float) -> Tensor:
    """The int(density n) entries of largest magnitude, zeros elsewhere. Shape kept; one flat tensor more."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device).expand_as(values)
    (cut,) = cuts_of(Operands("", [zero, values], True), kept_count(density, values.numel()))
    kept, _ = take(values.flatten(), cut)
    return kept.view_as(values)


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
