"""How many weights each group of a model keeps, so that all together keep exactly K (ECoFLaP, arXiv 2310.02998).

    k_g = min(N_g, low_g + lambda s_g),     sum_g k_g = K = int(N (1 - p)),     low_g = ceil(N_g (1 - cap))

s_g is the importance of group g, N_g its weights, and lambda the one number that makes the sum right. Fractions are
rounded by largest remainder. What groups of importance 0 are left with, once all others keep everything, is in
proportion to what they could still keep. Where the ceilings of a cap close to p already exceed K, they are floors: the
cap is then held to less than one weight.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Dialect = Literal["exact", "official"]


@dataclass(frozen=True)
class Allocation:
    """Weights that are kept of each of G groups.

    Args:
        kept: G integers.
        sizes: G numbers of weights.
    """

    kept: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def sparsity(self) -> tuple[float, ...]:
        """The pruned share of every group; 0 of an empty one."""
        return tuple((size - kept) / size if size else 0.0 for kept, size in zip(self.kept, self.sizes))

    @property
    def pruned(self) -> tuple[int, ...]:
        """Weights that are pruned of each."""
        return tuple(size - kept for kept, size in zip(self.kept, self.sizes))


def allocate_sparsity(
    importance: Sequence[float] | Tensor,
    sizes: Sequence[int],
    target: float,
    max_sparsity: float,
    dialect: Dialect = "exact",
) -> Allocation:
    """Give every group a sparsity by its importance.

    Raising one importance never makes its group sparser, and a common factor changes nothing.

    Args:
        importance: G scores, not negative.
        sizes: G numbers of weights.
        target: p, pruned share of all weights.
        max_sparsity: cap on the share of each group, at least ``target``.
        dialect: ``official`` adds the surplus of its ceilings where it should be taken away, as the published code
            does, and so keeps a few weights more than K.

    Raises:
        ValueError: numbers outside these ranges, or lengths that differ.
    """
    scores = [float(score) for score in importance]
    check(scores, sizes, target, max_sparsity)
    total = kept_total(sum(sizes), target)
    if dialect == "official":
        return Allocation(tuple(official(scores, sizes, total, max_sparsity)), tuple(sizes))
    if dialect != "exact":
        raise ValueError(f"dialect={dialect!r}: expected 'exact' or 'official'")
    shares = [size * (1 - as_fraction(max_sparsity)) for size in sizes]
    low = [math.ceil(share) for share in shares]
    if sum(low) > total:
        low = [math.floor(share) for share in shares]
    room = [size - least for size, least in zip(sizes, low)]
    given = round_to_sum(fill(scores, room, total - sum(low)), scores, total - sum(low))
    return Allocation(tuple(least + more for least, more in zip(low, given)), tuple(sizes))


def uniform_sparsity(sizes: Sequence[int], target: float) -> Allocation:
    """The same share of every group, to less than one weight, and of all together exactly."""
    return allocate_sparsity(sizes, sizes, target, 1.0)


def allocate_per_tower(
    importance: Sequence[float] | Tensor,
    sizes: Sequence[int],
    towers: Sequence[Hashable],
    target: float,
    max_sparsity: float,
    dialect: Dialect = "exact",
) -> Allocation:
    """As `allocate_sparsity`, for each tower on its own, so that each has ``target``.

    Args:
        towers: G names, the tower of every group.
    """
    if len(towers) != len(sizes):
        raise ValueError(f"{len(towers)} towers for {len(sizes)} groups")
    scores, kept = [float(score) for score in importance], [0] * len(sizes)
    for tower in dict.fromkeys(towers):
        own = [number for number, each in enumerate(towers) if each == tower]
        found = allocate_sparsity([scores[i] for i in own], [sizes[i] for i in own], target, max_sparsity, dialect)
        for number, count in zip(own, found.kept):
            kept[number] = count
    return Allocation(tuple(kept), tuple(sizes))


def check(scores: Sequence[float], sizes: Sequence[int], target: float, max_sparsity: float) -> None:
    """Raise ValueError for what no allocation can be made from."""
    if len(scores) != len(sizes):
        raise ValueError(f"{len(scores)} importances for {len(sizes)} groups")
    if not 0 <= target <= max_sparsity <= 1:
        raise ValueError(f"sparsity {target}, max_sparsity {max_sparsity}: expected 0 <= sparsity <= max_sparsity <= 1")
    wrong = [number for number, score in enumerate(scores) if not 0 <= score < math.inf]
    if wrong:
        raise ValueError(f"the importance of group {wrong[0]} is {scores[wrong[0]]}: expected a finite one, at least 0")


def as_fraction(number: float) -> Fraction:
    """The decimal that a float was written as: 0.6, and not 0.59999999999999998."""
    return Fraction(repr(float(number)))


def kept_total(total: int, target: float) -> int:
    """int(N (1 - p))."""
    return math.floor(total * (1 - as_fraction(target)))


def fill(scores: Sequence[float], room: Sequence[int], amount: int) -> list[Fraction]:
    """min(room_g, lambda s_g) with the lambda whose sum is ``amount``, exactly; see above for scores of 0."""
    exact = [Fraction(score) for score in scores]
    given = [Fraction(0)] * len(room)
    left, weight = Fraction(amount), sum(exact)
    positive = sorted((g for g in range(len(room)) if exact[g] > 0), key=lambda g: room[g] / exact[g])
    for done, group in enumerate(positive):
        if left * exact[group] < room[group] * weight:
            for other in positive[done:]:
                given[other] = left * exact[other] / weight
            return given
        given[group] = Fraction(room[group])
        left, weight = left - room[group], weight - exact[group]
    rest = [group for group in range(len(room)) if exact[group] == 0]
    total = sum(room[group] for group in rest)
    for group in rest:
        given[group] = left * room[group] / total if total else Fraction(0)
    return given


def round_to_sum(amounts: Sequence[Fraction], scores: Sequence[float], total: int) -> list[int]:
    """Integers next to ``amounts`` with this sum: those of largest remainder are rounded up."""
    whole = [math.floor(amount) for amount in amounts]
    by_remainder = sorted(range(len(whole)), key=lambda g: (whole[g] - amounts[g], -scores[g], g))
    for group in by_remainder[: total - sum(whole)]:
        whole[group] += 1
    return whole


def official(scores: Sequence[float], sizes: Sequence[int], total: int, max_sparsity: float) -> list[int]:
    """The published loop with its sign error, in float32 as there."""
    weights, full = torch.tensor(scores), torch.tensor(sizes)
    least = torch.ceil(full * (1 - max_sparsity))
    kept = least.clone()
    while kept.sum() < total:
        added = torch.ceil(weights / weights.sum() * (total - kept.sum())) if weights.any() else torch.zeros_like(kept)
        kept += added
        weights[kept >= full] = 0
        kept = torch.minimum(kept, full)
        if not added.any():
            for group in range(len(sizes)):
                room = min(total - int(kept.sum()), sizes[group] - int(kept[group])) if weights.any() else 0
                kept[group] += room
            break
    surplus = int(kept.sum()) - total
    for group in kept.argsort(descending=True, stable=True).tolist():
        change = min(surplus, int(kept[group] - least[group]))
        if change <= 0:
            break
        kept[group] += change  # NOTE the published sign: this should take away
        surplus -= change
    return [min(int(count), size) for count, size in zip(kept, sizes)]
