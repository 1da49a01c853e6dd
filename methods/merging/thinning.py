"""What methods share that drop entries of task vectors, rescale what is left, and then combine it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fulgurite.methods.merging.base import Piecewise
from fulgurite.methods.merging.combine import Combine
from fulgurite.methods.merging.plan import Operands

SMALLEST_NORM = 1e-7  # below which nothing is rescaled to it
KEPT = 2**24  # bytes that one tensor's masks may take
Masks = tuple[int, list[np.ndarray]]
Thinned = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


class Thinning(Piecewise):
    """Drop, rescale, combine; a subclass says what is dropped in `thinned`.

    Attributes:
        rescale: ``l1`` divides what is left of a tensor so that its sum of magnitudes is that of the whole, for which
            each tensor is read twice; one with masks of more than 16 MiB, 1 bit per expert and entry, is also thinned
            twice. All else is the subclass's own.
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
        parts = None
        if self.rescale == "l1":
            masks: list[Masks] | None = [] if len(weights) * operands.num_entries <= 8 * KEPT else None
            divisors = l1_divisors(self.thinned(operands, settings), len(weights), masks)
            parts = masks and masked(operands, masks)
        by_entry = self.rescale not in ("l1", "none") and any(0 < density < 1 for density, *_ in settings)
        as_is = not by_entry and all(divisor == 1 for divisor in divisors)
        for base, experts, _, deltas in parts or self.thinned(operands, settings):
            for delta, divisor in zip(deltas, divisors):
                if divisor != 1:
                    delta.div_(divisor)
            yield self.combine(base, experts, deltas, weights, as_is).flatten()


def l1_divisors(parts: Iterator[Thinned], num_experts: int, masks: list[Masks] | None = None) -> list[float]:
    """What to divide T thinned tensors by, so that their sums of magnitudes are those of the full ones.

    ``masks`` gets, for every part, its number of entries and T packed masks of what is left.
    """
    before, after = [0.0] * num_experts, [0.0] * num_experts
    for _, _, full, thinned in parts:
        for number, (whole, kept) in enumerate(zip(full, thinned)):
            before[number] += float(whole.abs().sum())
            after[number] += float(kept.abs().sum())
        if masks is not None:
            packed = [np.packbits(kept.flatten().ne(0).cpu().numpy()) for kept in thinned]
            masks.append((thinned[0].numel(), packed))
    return [a / b if min(a, b) >= SMALLEST_NORM else 1.0 for a, b in zip(after, before)]


def masked(operands: Operands, masks: Sequence[Masks]) -> Iterator[Thinned]:
    """The parts again whose masks these are."""
    start = 0
    for count, packed in masks:
        base, experts = operands.part(start, count)
        full, left = [expert - base for expert in experts], []
        for delta, bits in zip(full, packed):
            left.append(delta * torch.from_numpy(np.unpackbits(bits, count=count)).to(delta.device))
        yield base, experts, full, left
        start += count
