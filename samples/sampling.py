"""Which frames of a video are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

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


def _check(n: int, k: int) -> None:
    if n < 1 or k < 1:
        raise ValueError(f"cannot take {k} of {n} frames: both must be at least 1")


@dataclass(frozen=True)
class FrameSampling:
    """A rule as a value, so that it can stand in YAML and in the key of stored features.

    Args:
        rule: `uniform`, `official_dam` or `per_second`.
        count: frames per video for the first two; the most frames kept for ``per_second`` (0: all).
    """

    rule: Literal["uniform", "official_dam", "per_second"] = "uniform"
    count: int = 8

    def __post_init__(self) -> None:
        if self.rule != "per_second" and self.count < 1:
            raise ValueError(f"count={self.count} frames: the rule {self.rule!r} needs at least 1")

    def indices(self, video: Video) -> list[int]:
        """Frame indices of ``video``, ascending."""
        n = video.num_frames
        if self.rule == "uniform":
            return uniform(n, self.count)
        if self.rule == "official_dam":
            return official_dam(n, self.count)
        seconds = per_second(video.fps or 1.0, n)
        return seconds[: self.count] if self.count else seconds

    @property
    def key(self) -> str:
        """Text that names the rule and its count."""
        return f"{self.rule}-{self.count}"
