"""What mergers share that weigh experts by statistics of their data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor

from fulgurite.methods.merging.base import LISTED, Merger, StateDict


class DataDrivenMerger(Merger):
    """A merger that takes one statistic per expert, given by `use` before it merges.

    Attributes:
        statistics: one mapping per expert, read tensor by tensor, so it may read from a file.
    """

    needs_base: ClassVar[bool] = False
    statistics: Sequence[Mapping[str, Tensor]] = ()

    def use(self, statistics: Sequence[Mapping[str, Tensor]]) -> Self:
        """Take the statistics of the experts, in their order: what `Statistic.means` of each gives. Returns itself."""
        self.statistics = tuple(statistics)
        return self

    @abstractmethod
    def parameter_of(self, key: str) -> str:
        """Name of the parameter that an entry of a statistic is about."""

    def begin(self, num_experts: int) -> None:
        """Check that there is one statistic per expert, with the same names.

        Raises:
            ValueError: there is not.
        """
        super().begin(num_experts)
        if len(self.statistics) != num_experts:
            raise ValueError(
                f"{type(self).__name__} has statistics of {len(self.statistics)} models for {num_experts} experts: "
                "give one per expert, in their order, to use()"
            )
        first = set(self.statistics[0])
        for number, other in enumerate(self.statistics):
            if first ^ set(other):
                unlike = sorted(first ^ set(other))[:LISTED]
                raise ValueError(f"the statistics of expert 0 and expert {number} name different tensors: {unlike}")

    def check_names(self, names: Collection[str]) -> None:
        """Compare the statistics with the names of the models' tensors.

        Raises:
            ValueError: a statistic is of a tensor that the models do not have; it would be averaged unseen.
        """
        known = set(names)
        strange = sorted({key for each in self.statistics for key in each if self.parameter_of(key) not in known})
        if strange:
            raise ValueError(f"{len(strange)} statistics are of tensors that the models lack: {strange[:LISTED]}")

    def __call__(self, experts: Sequence[StateDict], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As `Merger`, once the statistics fit the experts' names."""
        if experts:
            self.check_names(set().union(*experts))
        return super().__call__(experts, *args, **kwargs)
