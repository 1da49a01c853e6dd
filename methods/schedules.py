"""Learning-rate schedules as plain functions of (step, total steps), restarted at every stage.

The factor of the *first* step is that of a warm-up that has begun: step s of w warm-up steps has factor (s + 1) / w.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Schedule(ABC):
    """Multiplies the learning rate. ``step`` counts from 0 to ``total`` - 1 within one stage."""

    @abstractmethod
    def __call__(self, step: int, total: int) -> float:
        """Factor of the base learning rate for optimizer step ``step`` of ``total``."""


class Constant(Schedule):
    """Factor 1 throughout."""

    def __call__(self, step: int, total: int) -> float:
        """Always 1."""
        return 1.0


class WarmupLinear(Schedule):
    """Linear warm-up, then linear decay to 0 after the last step.

    Args:
        warmup: share of the stage's steps that warm up, in [0, 1).
    """

    def __init__(self, warmup: float = 0.1) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} is a share of the steps and must lie in [0, 1)")
        self.warmup = warmup

    def __call__(self, step: int, total: int) -> float:
        """(step + 1) / w while warming up, then (total - step) / (total - w)."""
        warm = int(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        return max(total - step, 0) / max(total - warm, 1)


class WarmupCosine(WarmupLinear):
    """Linear warm-up, then half a cosine down to 0."""

    def __call__(self, step: int, total: int) -> float:
        """(step + 1) / w while warming up, then (1 + cos(pi * progress)) / 2."""
        warm = int(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        progress = min((step - warm) / max(total - warm, 1), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class BertCosine(WarmupLinear):
    """The published schedule of `BertAdam`: with x = step / total, x / w up to w, then (1 + cos(pi x)) / 2.

    The factor of the first step is 0, so that it changes nothing. The cosine is taken of x itself and not of the
    progress after the warm-up: the factor jumps from almost 1 to (1 + cos(pi w)) / 2, 0.976 for w = 0.1.
    """

    def __call__(self, step: int, total: int) -> float:
        """``x / w`` while warming up, then (1 + cos(pi x)) / 2."""
        x = min(step / max(total, 1), 1.0)
        return x / self.warmup if x < self.warmup else 0.5 * (1.0 + math.cos(math.pi * x))


class StagedSchedule:
    """One schedule run afresh in every stage, as a function of the global optimizer step.

    Args:
        schedule: factor within a stage.
        lengths: optimizer steps of every stage, in order.
    """

    def __init__(self, schedule: Schedule, lengths: Sequence[int]) -> None:
        self.schedule = schedule
        self.lengths = list(lengths)
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    def __call__(self, step: int) -> float:
        """Factor for global optimizer step ``step``; past the end it is that of the end."""
        stage = bisect.bisect_right(self.starts, step) - 1
        return self.schedule(step - self.starts[stage], self.lengths[stage])
