"""Which frames of a video are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from fulgurite.samples.video import Video


def uniform(n: int, k: int) -> list[int]:
    """The centres of ``k`` equal spans of ``n`` frames: ``floor((j + 1/2) n / k)``. Repeats frames where n <
    k."""
    _check(n, k)
    return [(2 * j + 1) * n // (2 * k) for j in range(k)]


def official_dam(n: int, k: int) -> list[int]:
    """Rule of the published DAM and FrozenBiLM code: all frames where n <= k, else ``floor(j n / k)``.

    Never the last frame of a longer video. Shorter videos are padded by the collator, not here.
    """
    _check(n, k)
    return list(range(n)) if n <= k else [j * n // k for j in range(k)]


def per_second(fps: float, n: int) -> list[int]:
    """The first frame at or after each full second of ``n`` frames at ``fps``, none twice; at least one."""
    if fps <= 0:
        raise ValueError(f"frames per second must be positive to sample by second, got {fps}")
    seconds = range(ceil(n / fps))
    return list(dict.fromkeys(i for second in seconds if (i := ceil(second * fps)) < n))


def clip4clip(fps: float, n: int, k: int, rate: int = 1, seconds: float | None = None) -> list[int]:
    """Rule of the published CLIP4Clip and UCoFiA code: ``rate`` frames of every second, ``k`` of them at most.

    With ``f = int(fps)``, second s has the frames ``s f + {0, d, 2 d, ...}``, ``d = f // rate``, as far as there are
    such; the last second is ``ceil(n / f)``, or ``seconds`` where that is sooner, itself included. Of m > ``k`` frames
    those at ``linspace(0, m - 1, k)``, rounded down, are kept. Shorter videos are padded by the collator, not here.
    """
    _check(n, min(k, rate))
    whole = max(1, int(fps))
    last = ceil(n / whole) if seconds is None else min(ceil(n / whole), int(seconds))
    offsets = range(0, whole, max(1, whole // rate))[:rate]
    found = [i for second in range(last + 1) for offset in offsets if (i := second * whole + offset) < n]
    return found if len(found) <= k else [found[i] for i in np.linspace(0, len(found) - 1, k, dtype=int)]


def _check(n: int, k: int) -> None:
    if n < 1 or k < 1:
        raise ValueError(f"cannot take {k} of {n} frames: both must be at least 1")


@dataclass(frozen=True)
class FrameSampling:
    """A rule as a value, so that it can stand in YAML and in the key of stored features.

    Args:
        rule: `uniform`, `official_dam`, `per_second` or `clip4clip`.
        count: frames per video for the first two; the most frames kept for the others (``per_second`` with 0: all).
        rate: frames per second, of ``clip4clip`` alone.
    """

    rule: Literal["uniform", "official_dam", "per_second", "clip4clip"] = "uniform"
    count: int = 8
    rate: int = 1

    def __post_init__(self) -> None:
        if self.rate < 1 or (self.rate > 1 and self.rule != "clip4clip"):
            raise ValueError(f"rate={self.rate} with the rule {self.rule!r}: 1 or more for 'clip4clip', else 1")
        if self.rule != "per_second" and self.count < 1:
            raise ValueError(f"count={self.count} frames: the rule {self.rule!r} needs at least 1")

    def indices(self, video: Video) -> list[int]:
        """Frame indices of ``video``, ascending."""
        n = video.num_frames
        if self.rule == "uniform":
            return uniform(n, self.count)
        if self.rule == "official_dam":
            return official_dam(n, self.count)
        if self.rule == "clip4clip":
            return clip4clip(video.fps or 1.0, n, self.count, self.rate, video.seconds)
        seconds = per_second(video.fps or 1.0, n)
        return seconds[: self.count] if self.count else seconds

    @property
    def key(self) -> str:
        """Text that names the rule, its count, and its rate where it has one."""
        return f"{self.rule}-{self.count}" + (f"-{self.rate}" if self.rule == "clip4clip" else "")
