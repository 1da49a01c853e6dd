"""What methods share that drop entries of task vectors, rescale what is left, and then combine it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.combine import Combine
from fulgurite.methods.merging.plan import Operands

SMALLEST_NORM = 1e-7  # below which nothing is rescaled to it
Thinned = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


class Thinning(Piecewise):
    """Drop, rescale, combine; a subclass says what is dropped in `thinned`.

    Attributes:
        rescale: ``l1`` divides what is left of a tensor so that its sum of magnitudes is that of the whole, for which
            each tensor is thinned twice; all else is the subclass's own.
        combine: the last step.
    """

    rescale: str
    combine: Combine

    @abstractmethod
    def settings(self, num_experts: int) -> list[tuple[float, ...]]:
        """The density, and what else there is, of every expert.

        Raises:
            ValueError: there are settings for another number of experts.
        """

    @abstractmethod
    def thinned(self, operands: Operands, settings: Sequence[tuple[float, ...]]) -> Iterator[Thinned]:
        """Of pieces or blocks of rows in order: base, experts, task vectors, and what is left of these."""

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses settings for another number of experts."""
        weights = super().check(num_experts, has_base, weights)
        self.settings(num_experts)
        return weights

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The combination of the thinned task vectors."""
        settings, divisors = self.settings(len(weights)), [1.0] * len(weights)
        if self.rescale == "l1":
            divisors = l1_divisors(self.thinned(operands, settings), len(weights))
        by_entry = self.rescale not in ("l1", "none") and any(0 < density < 1 for density, *_ in settings)
        as_is = not by_entry and all(divisor == 1 for divisor in divisors)
        for base, experts, _, deltas in self.thinned(operands, settings):
            for delta, divisor in zip(deltas, divisors):
                if divisor != 1:
                    delta.div_(divisor)
            yield self.combine(base, experts, deltas, weights, as_is).flatten()


def l1_divisors(parts: Iterator[Thinned], num_experts: int) -> list[float]:
    """What to divide T thinned tensors by, so that their sums of magnitudes are those of the full ones."""
    before, after = [0.0] * num_experts, [0.0] * num_experts
    for _, _, full, thinned in parts:
        for number, (whole, kept) in enumerate(zip(full, thinned)):
            before[number] += float(whole.abs().sum())
            after[number] += float(kept.abs().sum())
    return [a / b if min(a, b) >= SMALLEST_NORM else 1.0 for a, b in zip(after, before)]
