"""Find videos of an index by what is said of them: all by the coarse level, the best of these by all levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fulgurite.methods.retrieval.two_stage import two_stage_search
from fulgurite.modules.video_text_retrieval import VideoTextRetrieval
from fulgurite.samples import DataError
from fulgurite.samples.video_index import VideoIndex

COARSE = "video_sentence"


@dataclass(frozen=True)
class Hit:
    """A video that was found.

    Args:
        score: the mean of ``levels``.
        levels: score by name of level.
        key: digest of its content.
        paths: its files, sorted; several where files are equal.
    """

    score: float
    levels: dict[str, float]
    key: str
    paths: tuple[Path, ...]


@torch.no_grad()
def search_videos(
    module: VideoTextRetrieval, index: VideoIndex, queries: Sequence[str], top: int = 10, candidates: int = 100
) -> list[list[Hit]]:
    """The best videos for each query, best first.

    Memory beside the mapped index: that of `coarse_candidates`, and the features of ``candidates`` videos. With
    ``candidates`` of all videos it is the full ranking. Of equal scores the better at the coarse level comes first,
    then the one that was stored first. A head of one level has no use for candidates, and ranks by it alone.

    Args:
        module: that embedded the videos, in evaluation mode.
        index: of videos.
        queries: texts.
        top: videos per query; all where the index has fewer.
        candidates: how many of the coarse ranking all levels are computed of.

    Raises:
        DataError: a query is empty, or too long for the module.
        ValueError: ``top`` or ``candidates`` make no sense, or the head's first level is no product of vectors.
    """
    for number, query in enumerate(queries, start=1):
        if not query.strip():
            raise DataError(f"query {number} is empty; say what the videos show")
    levels = module.head.levels
    if levels[0] != COARSE:
        raise ValueError(f"{type(module.head).__name__} ranks by {levels[0]} first; search needs {COARSE}")
    candidates = top if len(levels) == 1 else candidates
    if not 1 <= top <= candidates:
        raise ValueError(
            f"top {top} of {candidates} candidates: set --top from 1 to what --candidates says, or raise it"
        )
    batch = module.backbone.caption_batch(queries, [f"query {number}" for number in range(1, len(queries) + 1)])
    batch = {name: value.to(module.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    texts = module.embed_captions(batch)
    seen: list[dict[int, list[float]]] = [{} for _ in queries]

    def all_levels(query: int, columns: Tensor) -> Tensor:
        videos = index.features(columns).map(lambda each: each.to(module.device))
        scores = module.levels_of(texts[query : query + 1], videos)[:, 0].float().cpu()
        seen[query] = dict(zip(columns.tolist(), scores.T.tolist()))
        return scores

    # The factor of all cosines changes no order.
    coarse = texts.sentence.float().cpu()
    scores, found = two_stage_search(coarse, index.coarse_blocks(), all_levels, candidates, top)
    return [
        [
            Hit(score, dict(zip(levels, seen[query][column])), key := index.keys[column], tuple(index.paths[key]))
            for score, column in zip(row.tolist(), columns.tolist())
        ]
        for query, (row, columns) in enumerate(zip(scores, found))
    ]
