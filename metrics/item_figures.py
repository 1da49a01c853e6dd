"""Figures of items, each counted once however often ranks repeat it, and their means with intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fulgurite.methods.bootstrap import bootstrap_interval
from fulgurite.metrics.per_sample import PerSampleMetric


class ItemFigures(PerSampleMetric):
    """Means over items of named figures, with bootstrap intervals over the items.

    An item that several ranks hold counts once per figure, by the value of the lowest rank. The order of the items
    changes nothing, neither in the means nor in the draws of the intervals.

    Args:
        names: of the figures.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of its draws.

    State: digest of the item, number of the figure and value, float64, of everything that is known.

    Raises:
        ValueError: no names, or one twice.
    """

    items: list[Tensor]
    figures: list[Tensor]
    values: list[Tensor]

    def __init__(self, names: Sequence[str], level: float = 0.95, resamples: int = 1000, seed: int = 0) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names={list(names)}: give at least one figure, each once")
        self.names = tuple(names)
        self.level, self.resamples, self.seed = level, resamples, seed
        self.keep("items", torch.int64)
        self.keep("figures", torch.int64)
        self.keep("values", torch.float64)

    def update(self, ids: Sequence[str], figures: Mapping[str, Tensor | Sequence[float]]) -> None:
        """Add some figures of N items.

        Args:
            ids: of the items, the same on all ranks.
            figures: (N,) by name; NaN where an item has none.

        Raises:
            ValueError: a name is not among ``names``, or has another number of values than there are ids.
        """
        numbers = torch.tensor([number_of(each) for each in ids], dtype=torch.int64, device=self.device)
        for name, given in figures.items():
            values = torch.as_tensor(given, dtype=torch.float64, device=self.device).detach()
            if name not in self.names or values.shape != numbers.shape:
                raise ValueError(
                    f"{name!r} has values of shape {tuple(values.shape)} for {len(ids)} items; figures are "
                    f"{list(self.names)}, with a number for each item"
                )
            known = ~values.isnan()
            self.items.append(numbers[known])
            self.figures.append(torch.full_like(self.items[-1], self.names.index(name)))
            self.values.append(values[known])

    def table(self) -> Tensor:
        """(N, C) float64 of all items and figures, NaN where an item has none; in no order of use."""
        items, figures, values = (self.joined(name) for name in ("items", "figures", "values"))
        known, row = items.unique(return_inverse=True)
        cell = row * len(self.names) + figures
        used, place = cell.unique(return_inverse=True)
        order = torch.arange(len(cell), device=cell.device)
        first = torch.full_like(used, len(cell)).scatter_reduce_(0, place, order, "amin")
        table = values.new_full((len(known) * len(self.names),), torch.nan)
        return table.index_copy_(0, used, values[first]).view(-1, len(self.names))

    def compute(self) -> dict[str, Tensor]:
        """The mean of each figure over the items that have it, and ``<name>/low`` and ``/high``; NaN where none has."""
        table = self.table()
        means = table.nanmean(0)
        low, high = (end.to(means) for end in bootstrap_interval(table, self.level, self.resamples, self.seed))
        found: dict[str, Tensor] = {}
        for column, name in enumerate(self.names):
            found |= {name: means[column], f"{name}/low": low[column], f"{name}/high": high[column]}
        return found


def number_of(item: str) -> int:
    """64 bits that stand for an id."""
    return int.from_bytes(hashlib.blake2b(item.encode(), digest_size=8).digest(), "little", signed=True)
