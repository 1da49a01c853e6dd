"""Scores of all pairs, computed tile by tile: memory does not grow with what lies between features and scores.

In training a tile is computed again in the backward pass, which therefore keeps the features alone.

Legend: L levels, T texts, V videos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures

# Entries of the largest tensor of a tile. Small enough for a processor's cache; a GPU needs more to be busy.
CACHE_ENTRIES, GPU_ENTRIES = 2**20, 2**21


@dataclass(frozen=True)
class Level:
    """One way to compare texts with videos.

    Args:
        score: (t, v) scores of a tile from its texts, its videos and what all tiles share; differentiable. The score of
            a pair depends on that pair alone.
        entries: how many entries of the largest tensor on the way belong to one pair.
        fill: ``fill(out, texts, videos, *shared, tile=tile)`` writes the scores of all texts and videos into (T, V),
            without gradients and in bounded memory; None computes ``score`` tile by tile.
    """

    score: Callable[..., Tensor]
    entries: int
    fill: Callable[..., None] | None = None


def tile_shape(
    num_texts: int, num_videos: int, entries: int, device: torch.device, in_cache: int = CACHE_ENTRIES
) -> tuple[int, int]:
    """Texts and videos of a tile: powers of two, as many of both where there are enough."""
    pairs = max(1, (in_cache if device.type == "cpu" else GPU_ENTRIES) // entries)
    texts = max(1, min(num_texts, _power_of_two(math.isqrt(pairs))))
    videos = max(1, min(num_videos, _power_of_two(pairs // texts)))
    return _power_of_two(pairs // videos), videos


def _power_of_two(limit: int) -> int:
    """The largest up to a limit."""
    return 1 << (limit.bit_length() - 1)


def tiled_scores(
    levels: Sequence[Level],
    texts: TextFeatures,
    videos: VideoFeatures,
    shared: Sequence[Tensor],
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Scores of every text with every video at every level.

    Peak memory beyond features, scores and their gradients is that of one tile.

    Args:
        levels: L ways to compare.
        texts: T of them.
        videos: V of them.
        shared: what all tiles need: matrices, scales.
        tile: texts and videos of a tile; None sizes it by the cache, level by level.

    Returns:
        (L, T, V), in float32 at least.
    """
    given = texts.tensors() | videos.tensors()
    names = tuple(texts.tensors()), tuple(videos.tensors())
    with torch.autocast(texts.sentence.device.type, enabled=False):
        return _Tiled.apply(tuple(levels), names, tile, *given.values(), *shared)


class _Tiled(torch.autograd.Function):
    """Scores forward by the fastest way, gradients through ``Level.score`` of one tile after the other."""

    @staticmethod
    def forward(ctx, levels, names, tile, *tensors) -> Tensor:
        ctx.levels, ctx.names, ctx.tile = levels, names, tile
        ctx.save_for_backward(*tensors)
        texts, videos, shared = _regroup(names, tensors)
        scores = texts.sentence.new_empty(len(levels), len(texts), len(videos), dtype=_wide(texts.sentence.dtype))
        for level, out in zip(levels, scores):
            if level.fill is not None:
                level.fill(out, texts, videos, *shared, tile=tile)
                continue
            for rows, columns in _tiles(level, texts, videos, tile):
                out[rows, columns] = level.score(texts[rows], videos[columns], *shared)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        wanted = [i for i, need in enumerate(needed) if need]
        sums = {i: torch.zeros_like(tensors[i], dtype=_wide(tensors[i].dtype)) for i in wanted}
        texts, videos, _ = _regroup(ctx.names, tensors)
        for level, grad_level in zip(ctx.levels, grad):
            for rows, columns in _tiles(level, texts, videos, ctx.tile):
                parts = [rows] * len(ctx.names[0]) + [columns] * len(ctx.names[1])
                parts += [...] * (len(tensors) - len(parts))
                leaves = [t[part].detach().requires_grad_(need) for t, part, need in zip(tensors, parts, needed)]
                with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                    tile_texts, tile_videos, shared = _regroup(ctx.names, leaves)
                    scores = level.score(tile_texts, tile_videos, *shared)
                if not scores.requires_grad:
                    break
                asked = [leaves[i] for i in wanted]
                found = torch.autograd.grad(scores, asked, grad_level[rows, columns], allow_unused=True)
                for i, value in zip(wanted, found):
                    if value is not None:
                        sums[i][parts[i]] += value
        return None, None, None, *(sums[i].to(t.dtype) if i in sums else None for i, t in enumerate(tensors))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which scores and gradients are summed."""
    return torch.promote_types(dtype, torch.float32)


def _regroup(names: tuple[Sequence[str], Sequence[str]], tensors: Sequence[Tensor]):
    """Texts, videos and what is shared, from tensors in a row."""
    end = len(names[0]) + len(names[1])
    texts = TextFeatures(**dict(zip(names[0], tensors[: len(names[0])])))
    videos = VideoFeatures(**dict(zip(names[1], tensors[len(names[0]) : end])))
    return texts, videos, tensors[end:]


def _tiles(
    level: Level, texts: TextFeatures, videos: VideoFeatures, tile: tuple[int, int] | None
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of one tile after the other."""
    shape = tile or tile_shape(len(texts), len(videos), level.entries, texts.sentence.device)
    for row in range(0, len(texts), shape[0]):
        for column in range(0, len(videos), shape[1]):
            yield slice(row, row + shape[0]), slice(column, column + shape[1])
