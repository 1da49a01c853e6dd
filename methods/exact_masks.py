"""Masks of exactly k entries: the smallest or largest scores of a tensor, of each row, or of many tensors together.

Scores are not negative and hold no NaN; doubles are compared as the floats that they round to. Of equal scores those
with the lowest flat index are chosen first, tensors in the order in which they are named, so a larger k always chooses
what a smaller k does and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fulgurite.methods.selection import places_of

PIECE = 1 << 16  # entries looked at together
ROWS_PIECE = 1 << 18

ScoreOf = Callable[[str], Tensor]


def rounded_count(fraction: float, total: int) -> int:
    """round(fraction total), as Python rounds.

    Raises:
        ValueError: a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a sparsity of {fraction} is outside [0, 1]")
    return round(fraction * total)


def smallest_of(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` smallest entries of one tensor, in its shape."""
    ((_, mask),) = chosen_of_all(lambda _: scores, {"scores": scores.numel()}, count, largest=False)
    return mask


def smallest_of_all(score_of: ScoreOf, sizes: Mapping[str, int], count: int) -> Iterator[tuple[str, Tensor]]:
    """(name, mask), True at the ``count`` smallest scores of all tensors together; see `chosen_of_all`."""
    return chosen_of_all(score_of, sizes, count, largest=False)


def largest_of_all(score_of: ScoreOf, sizes: Mapping[str, int], count: int) -> Iterator[tuple[str, Tensor]]:
    """(name, mask), True at the ``count`` largest scores of all tensors together; see `chosen_of_all`."""
    return chosen_of_all(score_of, sizes, count, largest=True)


def chosen_of_all(
    score_of: ScoreOf, sizes: Mapping[str, int], count: int, largest: bool
) -> Iterator[tuple[str, Tensor]]:
    """Choose ``count`` of the entries of several tensors, which never lie side by side.

    Asks for every tensor's scores three times (once where all or nothing is chosen), and holds one tensor's scores
    and mask, and 0.75 MiB.

    Args:
        score_of: name -> scores, the same whenever it is asked.
        sizes: name -> entries, in the order in which equal scores are chosen.
        count: 0 to the number of all entries.
        largest: choose the largest, instead of the smallest.

    Raises:
        ValueError: the count, a negative or NaN score, or a tensor of another size.
    """
    total = sum(sizes.values())
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} entries cannot be chosen")

    def parts() -> Iterator[Sequence[Tensor]]:
        for name in sizes:
            for piece in checked(name, score_of(name), sizes[name]).flatten().split(PIECE):
                yield [piece]

    rank = count if largest else total - count + 1  # of the last that is chosen, from the largest down
    place = places_of(parts, total, [[rank]])[0][rank] if count else None
    # Of the equal ones, those that are chosen.
    left = 0 if place is None else place.ties if largest else place.equal - place.ties + 1
    for name in sizes:
        scores = checked(name, score_of(name), sizes[name]).to(torch.float32)
        if place is None:
            yield name, torch.zeros_like(scores, dtype=torch.bool)
            continue
        mask = scores > place.value if largest else scores < place.value
        equal = scores == place.value
        found = int(equal.sum())
        if found > left:
            equal &= equal.flatten().cumsum(0).view_as(equal) <= left
        left = max(left - found, 0)
        yield name, mask.logical_or_(equal)


def checked(name: str, scores: Tensor, size: int) -> Tensor:
    """The scores; ValueError where they are not ``size`` numbers that are not negative."""
    if scores.numel() != size:
        raise ValueError(f"{name}: {scores.numel()} scores, expected {size}")
    if size and not scores.min() >= 0:
        raise ValueError(f"{name}: negative or NaN scores")
    return scores


def smallest_of_rows(scores: Tensor, counts: int | Tensor) -> Tensor:
    """True at the smallest entries of every row; of equal ones, the first.

    Holds a copy of 2^18 scores on the CPU, and one more of all scores elsewhere; with counts by row, an integer of 8
    bytes per score.

    Args:
        scores: (R, C).
        counts: how many of every row, or (R,) integers.

    Raises:
        ValueError: a count outside [0, C], or negative or NaN scores.
    """
    rows, columns = scores.shape
    checked("scores", scores, rows * columns)
    if isinstance(counts, Tensor):
        if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= columns:
            raise ValueError(f"{counts.tolist()} of {columns} entries of a row cannot be chosen")
        order = scores.argsort(dim=1, stable=True)
        chosen = torch.arange(columns, device=scores.device) < counts[:, None]
        return torch.zeros_like(chosen).scatter_(1, order, chosen)
    if not 0 <= counts <= columns:
        raise ValueError(f"{counts} of {columns} entries of a row cannot be chosen")
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=scores.device)
    if counts == 0:
        return mask
    step = max(1, ROWS_PIECE // columns) if scores.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        part = scores[start : start + step]
        last = last_smallest(part, counts)
        here = mask[start : start + step]
        torch.le(part, last, out=here)
        tied = (here.sum(1) > counts).nonzero().squeeze(1)
        if len(tied):
            here[tied] = first_ties(part[tied], last[tied], counts)
    return mask


def last_smallest(scores: Tensor, count: int) -> Tensor:
    """(R, 1) the ``count``-th smallest of every row, from 1."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # Several times faster than a sort, and than torch's kthvalue.
        parted = np.partition(scores.detach().numpy(), count - 1, axis=1)
        return torch.from_numpy(parted[:, count - 1 : count].copy())
    return scores.kthvalue(count, dim=1, keepdim=True).values


def first_ties(scores: Tensor, last: Tensor, count: int) -> Tensor:
    """Exactly ``count`` smallest of every row, where more than those equal the last one."""
    below, equal = scores < last, scores == last
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))
