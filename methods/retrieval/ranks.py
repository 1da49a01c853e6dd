"""At which place the right video stands for every text, and a right text for every video: counted, not sorted.

A rank is 1 + the number of candidates that score higher than the right one. Where others score exactly as much, the
rule ``ties`` decides, and every one of them counts once: ``optimistic`` puts them behind the right one, ``pessimistic``
before it, ``mean`` half of them on either side, so that equal scores for all give the rank of a guess. (The published
code lists such a query once per equal score.) A score that is no number counts as higher.

Texts look for one video each. A video looks among videos too: what it scores for another is the best of the other's
texts, as is published for sets with several sentences per video; with one text per video that is a rank among texts.

Legend: T texts, V videos, b texts of a block.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Ties = Literal["optimistic", "mean", "pessimistic"]

PIECE = 1 << 19  # scores that are compared at once, so that what is compared stays in the cache
# What says that a score is below the right one; where there are two, each counts half.
_BELOW = {"optimistic": (torch.le,), "mean": (torch.le, torch.lt), "pessimistic": (torch.lt,)}


def _halves(scores: Tensor, right: Tensor, dim: int, ties: Ties, room: Tensor, tolerance: float) -> Tensor:
    """How many ``scores`` along ``dim`` are above the ``right`` one, in halves; int64. ``room`` has their shape."""
    below = _BELOW[ties]
    margin = tolerance * right.abs().clamp(min=1)
    limits = {torch.le: right + margin, torch.lt: right - margin} if tolerance else {torch.le: right, torch.lt: right}
    # Into float32, whose comparisons and sums are several times as fast as those of bool, and exact up to 2^24.
    count = sum(compare(scores, limits[compare], out=room).sum(dim) for compare in below)
    return ((2 // len(below)) * (len(below) * scores.shape[dim] - count)).long()


def owner_of_texts(captions: Tensor) -> Tensor:
    """(T,) the video of each text, from the number of texts (V,) of each video."""
    return torch.repeat_interleave(torch.arange(len(captions), device=captions.device), captions)


class RankCounts:
    """Ranks of both directions from blocks of scores that come in any order, each once, on one process or on several.

    Rows of a block are complete, so that a text's rank is known at once; a video's rank is the sum over blocks, and
    over processes, of how many texts are above its own. Holds O(T + V) integers, and works in a few rows at a time.

    Args:
        owner: (T,) the video of each text; texts of a video follow one another, and every video has one.
        own: (T,) the score of each text with its video, as the video's rank is to be counted with.
        ties: see above.
        tolerance: scores count as equal that differ by no more than this share of the right one, or this much where
            that is below 1: equal pairs get scores of other last digits in blocks of other shapes.

    Attributes:
        texts: (2, T) int64: candidates above the right one, in halves, and how often a text was counted.
        videos: (2, V) int64: the same for videos; the second row says how often a video's texts were. Sums of both
            over processes are those of all blocks.

    Raises:
        ValueError: ``owner`` is not as said, the shapes differ, or a score in ``own`` is not a number.
    """

    def __init__(self, owner: Tensor, own: Tensor, ties: Ties = "mean", tolerance: float = 0.0) -> None:
        if ties not in _BELOW:
            raise ValueError(f"ties={ties!r}: choose one of {', '.join(_BELOW)}")
        if owner.dim() != 1 or owner.shape != own.shape or not len(owner):
            raise ValueError(f"owner {tuple(owner.shape)} and own {tuple(own.shape)}: give one entry per text")
        steps = owner.diff().cpu()
        if owner[0] != 0 or ((steps != 0) & (steps != 1)).any():
            raise ValueError(
                "owner must count the videos up from 0, texts of a video one after the other, none left out"
            )
        if own.isnan().any():
            raise ValueError(f"text {int(own.isnan().nonzero()[0])} scores NaN with its own video: the model diverged")
        self.ties, self.tolerance = ties, tolerance
        self.owner = owner.to(own.device)
        self.own = own.new_full((int(owner[-1]) + 1,), -torch.inf).scatter_reduce_(0, self.owner, own, "amax")
        ends = 1 + torch.cat([steps, steps.new_ones(1)]).nonzero()[:, 0]
        self._starts = [0, *ends.tolist()]  # of the texts of each video, and the end
        self._most = int(ends.diff(prepend=ends.new_zeros(1)).max())
        self._memory = torch.empty(0)
        self.texts = torch.zeros(2, len(owner), dtype=torch.int64, device=own.device)
        self.videos = torch.zeros(2, len(self.own), dtype=torch.int64, device=own.device)

    def add(self, first: int, scores: Tensor) -> None:
        """Count a block of scores (b, V) of the texts from ``first`` on, in both directions.

        Raises:
            ValueError: the block does not fit the texts and videos, or has only some of the texts of a video.
        """
        self._in_parts(first, scores, self._count_texts, self._count_videos)

    def add_texts(self, first: int, scores: Tensor) -> None:
        """As `add`, for the ranks of the texts of the block alone."""
        self._in_parts(first, scores, self._count_texts)

    def add_videos(self, first: int, scores: Tensor) -> None:
        """As `add`, for the ranks of the videos alone."""
        self._in_parts(first, scores, self._count_videos)

    def _in_parts(self, first: int, scores: Tensor, *counts: Callable[[int, int, Tensor], None]) -> None:
        """Count after count for few videos at a time."""
        texts, videos = self.texts.shape[1], self.videos.shape[1]
        last, starts = first + len(scores), self._starts
        if scores.dim() != 2 or scores.shape[1] != videos or not first < last <= texts:
            raise ValueError(
                f"scores {tuple(scores.shape)} from text {first} on: there are {texts} texts, {videos} videos"
            )
        begin, end = bisect_right(starts, first) - 1, bisect_left(starts, last)
        if (starts[begin], starts[end]) != (first, last):
            raise ValueError(
                f"a block with texts {first} to {last - 1} divides the texts of a video, which are {starts[begin]} to "
                f"{starts[end] - 1}: let blocks begin and end with whole videos"
            )
        step = max(1, PIECE // (videos * self._most))
        for video in range(begin, end, step):
            stop = min(video + step, end)
            for count in counts:
                count(video, stop, scores[starts[video] - first : starts[stop] - first])

    def _count_texts(self, begin: int, end: int, scores: Tensor) -> None:
        """For the ranks of all texts of the videos from ``begin`` to ``end``."""
        rows = slice(self._starts[begin], self._starts[end])
        right = scores.gather(1, self.owner[rows, None])
        above = _halves(scores, right, 1, self.ties, self._room(scores), self.tolerance)
        self.texts[0, rows] += above - _halves(right, right, 1, self.ties, self._room(right), self.tolerance)
        self.texts[1, rows] += 1

    def _count_videos(self, begin: int, end: int, scores: Tensor) -> None:
        """For the ranks of all videos, among those from ``begin`` to ``end``."""
        if self._most > 1:
            owner = self.owner[self._starts[begin] : self._starts[end], None] - begin
            best = scores.new_full((end - begin, scores.shape[1]), -torch.inf)
            scores = best.scatter_reduce_(0, owner.expand_as(scores), scores, "amax")
        self.videos[0] += _halves(scores, self.own, 0, self.ties, self._room(scores), self.tolerance)
        own = scores.diagonal(begin)
        room = self._room(own[None])
        self.videos[0, begin:end] -= _halves(own[None], self.own[begin:end], 0, self.ties, room, self.tolerance)
        self.videos[1, begin:end] += 1

    def _room(self, like: Tensor) -> Tensor:
        """Memory of the shape of ``like``, the same again for every part."""
        if self._memory.numel() < like.numel():
            self._memory = torch.empty(like.numel(), device=like.device)
        return self._memory[: like.numel()].view(like.shape)


def ranks_of_counts(counts: Tensor) -> Tensor:
    """(N,) float64 ranks from 1 on, of `RankCounts.texts` or `RankCounts.videos`, (2, N), summed over processes."""
    return 1 + counts[0].double() / 2


def ranks_both_ways(scores: Tensor, owner: Tensor | None = None, ties: Ties = "mean") -> tuple[Tensor, Tensor]:
    """Ranks of a whole matrix: of the right video for each text (T,), of the own texts for each video (V,); float64.

    Memory beside the matrix and the result: the few rows that are compared at once.

    Args:
        scores: (T, V).
        owner: (T,) the video of each text; None for one text per video.
        ties: see above.

    Raises:
        ValueError: as `RankCounts`.
    """
    counts = whole_counts(scores, owner, ties)
    return ranks_of_counts(counts.texts), ranks_of_counts(counts.videos)


def whole_counts(scores: Tensor, owner: Tensor | None = None, ties: Ties = "mean") -> RankCounts:
    """`RankCounts` of a whole matrix (T, V); see `ranks_both_ways`."""
    owner = torch.arange(len(scores), device=scores.device) if owner is None else owner.to(scores.device)
    if scores.dim() != 2 or owner.shape != scores.shape[:1] or int(owner.max()) + 1 != scores.shape[1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} and owner {tuple(owner.shape)} do not fit: give a row per text, a column "
            "per video, and with several texts per video the owner of each"
        )
    counts = RankCounts(owner, scores.gather(1, owner[:, None])[:, 0], ties)
    counts.add(0, scores)
    return counts
