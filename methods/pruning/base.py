"""What all pruning of one matrix shares: how many of its weights go, in all matrices alike or by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fulgurite.methods.compression import Compressor
from fulgurite.methods.pruning.pattern import kept_of


class Pruner(Compressor):
    """A compressor that sets weights to zero.

    Args:
        sparsity: share of every matrix that is pruned, 0 to 1.
        pattern: N:M instead, N weights kept of every M consecutive inputs.
        sparsities: full pattern of layer names -> sparsity, in the place of ``sparsity``; the first that matches.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        sparsities: dict[str, float] | None = None,
    ) -> None:
        if (sparsity is None) == (pattern is None):
            raise ValueError(f"sparsity={sparsity}, pattern={pattern!r}: give one of the two")
        if pattern is not None and sparsities:
            raise ValueError(f"pattern={pattern!r} prunes all matrices alike: leave out sparsities")
        for value in (sparsity or 0.0, *(sparsities or {}).values()):
            if not 0 <= value <= 1:
                raise ValueError(f"a sparsity of {value} is outside [0, 1]")
        if pattern is not None:
            kept_of(pattern)
        self.sparsity, self.pattern, self.sparsities = sparsity, pattern, dict(sparsities or {})
        self.assigned: dict[str, float] = {}

    def assign(self, sparsities: Mapping[str, float]) -> None:
        """Take the sparsity of every matrix from an allocation, by the name of its layer.

        Raises:
            ValueError: ``pattern`` or ``sparsities`` say otherwise.
        """
        if self.pattern is not None or self.sparsities:
            raise ValueError("an allocation gives every layer its sparsity: leave out pattern and sparsities")
        self.assigned = dict(sparsities)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Give every matrix its sparsity.

        Raises:
            ValueError: an entry of ``sparsities`` matches no layer, or an allocation leaves some out.
        """
        if self.assigned:
            if missing := [name for name in weights if name not in self.assigned]:
                raise ValueError(f"the allocation has no sparsity for {len(missing)} layers, first {missing[0]}")
            return
        for pattern in self.sparsities:
            if not any(re.fullmatch(pattern, name) for name in weights):
                raise ValueError(
                    f"sparsities: {pattern!r} matches none of {len(weights)} layers, as {next(iter(weights))}"
                )

    def sparsity_of(self, name: str) -> float | None:
        """Of one layer; None with an N:M pattern."""
        if name in self.assigned:
            return self.assigned[name]
        return next((value for each, value in self.sparsities.items() if re.fullmatch(each, name)), self.sparsity)
