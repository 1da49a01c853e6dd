"""What mergers share that weigh experts by statistics of their data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from torch import Tensor

from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.plan import LISTED, Plan


class DataDrivenMerger(Merger):
    """A merger that takes one statistic per expert, given by `use` before it merges.

    Attributes:
        kind: which statistic.
        statistics: one mapping per expert, read tensor by tensor, so it may read from a file.
    """

    needs_base: ClassVar[bool] = False
    kind: ClassVar[Literal["gram", "fisher"]]
    statistics: Sequence[Mapping[str, Tensor]] = ()

    def use(self, statistics: Sequence[Mapping[str, Tensor]]) -> Self:
        """Take the statistics of the experts, in their order: what `Statistic.means` of each gives. Returns itself."""
        self.statistics = tuple(statistics)
        return self

    @abstractmethod
    def parameter_of(self, key: str) -> str:
        """Name of the parameter that an entry of a statistic is about."""

    def begin(self, plan: Plan) -> str | None:
        """Check that there is one statistic per expert, with the same names, about tensors of the models.

        Raises:
            ValueError: there is not.
        """
        super().begin(plan)
        if len(self.statistics) != plan.num_experts:
            raise ValueError(
                f"{type(self).__name__} has statistics of {len(self.statistics)} models for {plan.num_experts} "
                "experts: give one per expert, in their order, to use()"
            )
        first = set(self.statistics[0])
        for number, other in enumerate(self.statistics):
            if first ^ set(other):
                unlike = sorted(first ^ set(other))[:LISTED]
                raise ValueError(f"the statistics of expert 0 and expert {number} name different tensors: {unlike}")
        known = set(plan.order)
        strange = sorted({key for key in first if self.parameter_of(key) not in known})
        if strange:
            raise ValueError(f"{len(strange)} statistics are of tensors that the models lack: {strange[:LISTED]}")
        return None
