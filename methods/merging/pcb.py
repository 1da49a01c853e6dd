"""PCB-Merging: weigh every entry by how large it is in its model and how well it fits the others (arXiv 2410.02396).

    A_i      = |tau_i|, clamped to the range without the q n smallest and the q n largest of a model's n entries
    a_i      = (A_i - min A_i) / (max A_i - min A_i)
    intra_i  = exp(T a_i^2)
    inter_i  = tanh(tau_i sum_k sign(tau_k) a_k)      normalised; else tanh(tau_i sum_k tau_k)
    b_i      = intra_i inter_i, all but the r n largest raised to the largest of these
    s_i      = (b_i - min b_i) / (max b_i - min b_i)
    tau*     = sum_i s_i lam_i w_i sign(tau_i) A_i / max(sum_i s_i, 1e-12);   theta* = theta_0 + tau*

Order statistics, minima and maxima are over all entries of one model, which takes four passes. The published code
normalises in its experiments on vision, where task vectors of 1e-3 make tanh linear otherwise.

NOTE: intra_i is exp(T (a_i^2 - 1)) here, so that many models do not overflow; s_i is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fulgurite.methods.merging.base import STATISTIC, Piecewise
from fulgurite.methods.merging.per_expert import PerExpert, for_each
from fulgurite.methods.merging.plan import Operands, Plan
from fulgurite.methods.selection import BINS, SHIFT, locate, lower_histogram

PASSES = ("sizes", "sizes exactly", "balances", "balances exactly")
Range = tuple[float, float]


def ordered_keys(values: Tensor) -> Tensor:
    """Integers of 32 bits that order like these floats, negative ones too."""
    bits = values.flatten().to(torch.float32).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value_of_key(upper: int, lower: int) -> float:
    """The float32 whose key has these upper 17 (counted from 0) and lower 15 bits."""
    key = ((upper - BINS) << SHIFT) | lower
    bits = key ^ 0x7FFFFFFF if key < 0 else key
    return float(np.array([bits], dtype=np.int32).view(np.float32)[0])


def within(values: Tensor, span: Range) -> Tensor:
    """The values, clamped to the range and mapped to [0, 1]; 0 where the range is a point."""
    low, high = span
    return (values.clamp(low, high) - low) / (high - low) if high > low else torch.zeros_like(values)


class Pcb(Piecewise):
    """Parameter competition balancing. Memory of a pass: one MB per expert and thread.

    Args:
        ratio: r, the share of each model's entries that keep a weight.
        clamp: q, the share of entries that is clamped on each side.
        normalised: see the module.
        lam: multiple of each task vector, one or one per expert; 1 to leave them as they are.

    Raises:
        ValueError: ratio outside (0, 1], or clamp outside [0, 0.5).
    """

    def __init__(self, ratio: float = 0.05, clamp: float = 0.01, normalised: bool = True, lam: PerExpert = 1.2) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio lies above 0 and up to 1, got {ratio}")
        if not 0 <= clamp < 0.5:
            raise ValueError(f"clamp lies from 0 to below 0.5, got {clamp}")
        self.ratio, self.clamp, self.normalised, self.lam = ratio, clamp, normalised, lam

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses another number of ``lam``."""
        weights = super().check(num_experts, has_base, weights)
        for_each("lam", self.lam, num_experts)
        return weights

    def begin(self, plan: Plan) -> str | None:
        """Forget an earlier merge; look at the sizes of changes first."""
        super().begin(plan)
        count = sum(size for name, size in plan.sizes.items() if not STATISTIC.search(name))
        low = int(count * self.clamp)
        high = max(int(count * (1 - self.clamp) - 1), low)
        threshold = min(int(count * (1 - self.ratio)), max(count - 1, 0))
        # Ranks from the largest, which is 1.
        self.scanned = {"sizes": (count - low, count - high), "balances": (count - threshold, 1)}
        return PASSES[0]

    def scan(self, name: str, base: Tensor | None, experts: Sequence[Tensor]) -> list[list[Tensor]]:
        """For every expert, histograms of what the pass is about."""
        deltas = [expert - base for expert in experts]
        what = self.stage.split()[0]
        keys = [ordered_keys(v) for v in ([d.abs() for d in deltas] if what == "sizes" else self.balances(deltas))]
        if self.stage == what:
            return [[torch.bincount((key >> SHIFT) + BINS, minlength=2 * BINS).cpu()] for key in keys]
        places = self.scanned["places"]
        return [[lower_histogram(key, at[0] - BINS).cpu() for at in own] for key, own in zip(keys, places)]

    def combine(self, summary: list[list[Tensor]], other: list[list[Tensor]]) -> list[list[Tensor]]:
        """Sums of counts."""
        return [[own.add_(more) for own, more in zip(*pair)] for pair in zip(summary, other)]

    def settle(self, summary: list[list[Tensor]]) -> str | None:
        """Turn counts into the bins of the order statistics, and those into their values."""
        what = self.stage.split()[0]
        if self.stage == what:
            ranks = self.scanned[what]
            self.scanned["places"] = [[locate(histogram, rank) for rank in ranks] for (histogram,) in summary]
        else:
            self.scanned[f"{what} between"] = [
                tuple(value_of_key(at[0], locate(counts, at[1])[0]) for counts, at in zip(own, places))
                for own, places in zip(summary, self.scanned["places"])
            ]
        following = PASSES.index(self.stage) + 1
        return PASSES[following] if following < len(PASSES) else None

    def balances(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """b_i of T pieces in float32, before small ones are raised.

        A weight is exactly 0 at the threshold, and makes the entry its expert's just above it: both are compared in
        the precision that the threshold is known in.
        """
        spans = self.scanned["sizes between"]
        sizes = [within(delta.abs(), span) for delta, span in zip(deltas, spans)]
        parts = [delta.sign() * size for delta, size in zip(deltas, sizes)] if self.normalised else list(deltas)
        total = sum(parts[1:], parts[0])
        intra = [(size.square() - 1).mul_(len(deltas)).exp_() for size in sizes]
        return [(own * (delta * total).tanh_()).to(torch.float32) for own, delta in zip(intra, deltas)]

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """theta_0 + tau*."""
        spans, bounds = self.scanned["sizes between"], self.scanned["balances between"]
        factors = [lam * weight for lam, weight in zip(for_each("lam", self.lam, len(weights)), weights)]
        for _, base, experts in operands.pieces():
            deltas = [expert - base for expert in experts]
            total, scales = torch.zeros_like(base), torch.zeros_like(base)
            for delta, balance, (low, high), bound, factor in zip(
                deltas, self.balances(deltas), spans, bounds, factors
            ):
                scale = within(balance, bound).to(base.dtype)
                total.addcmul_(delta.sign() * delta.abs().clamp_(low, high), scale, value=factor)
                scales += scale
            yield base + total.div_(scales.clamp_(min=1e-12))
