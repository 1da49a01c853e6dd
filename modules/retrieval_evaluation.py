"""Ranks of all texts and videos of an evaluation, from features that every process computed its share of.

Every text of a process is scored against all videos, block by block; videos of the other processes come by in turn. No
process holds a whole matrix of scores: memory is that of the own features, of one block of rows, and of the bank's
scores where they are few.

Legend: L levels, T texts, V videos, b texts of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.methods.ranks import Ranks
from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.normalizers import Blocks, ScoreNormalizer
from fulgurite.methods.retrieval.ranks import RankCounts, ranks_of_counts
from fulgurite.samples import Batch, DataError

Direction = Literal["text_to_video", "video_to_text"]
Scorer = Callable[[TextFeatures, VideoFeatures], Tensor]
TEXTS, VIDEOS = 256, 256  # of a block
OWN = 8  # videos of a block whose captions are scored with them alone
KEPT = 1 << 30  # bytes of a bank's scores that are kept between passes
TOP = 5
EQUAL = 2e-6  # share by which equal scores of float32 differ in blocks of other shapes


class Shelf:
    """Features of this process's texts and videos, on the CPU, as batches bring them; texts of a video adjoin."""

    def __init__(self) -> None:
        self._texts: list[TextFeatures] = []
        self._videos: list[VideoFeatures] = []
        self.rows: list[dict[str, Any]] = []  # of the videos

    def add(self, texts: TextFeatures, videos: VideoFeatures, batch: Batch) -> None:
        """Take in a batch, without the repeats that keep processes in step."""
        counted = batch["counted"]
        self._texts.append(texts[counted[batch["owner"]]].map(lambda each: each.detach().cpu()))
        self._videos.append(videos[counted].map(lambda each: each.detach().cpu()))
        self.rows += [
            {"id": batch["id"][i], "domain": batch["domain"][i], "captions": list(batch["captions"][i])}
            for i in counted.nonzero().flatten().tolist()
        ]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> TextFeatures:
        """All texts so far."""
        self._texts = [TextFeatures.cat(self._texts)]
        return self._texts[0]

    @property
    def videos(self) -> VideoFeatures:
        """All videos so far."""
        self._videos = [VideoFeatures.cat(self._videos)]
        return self._videos[0]


@dataclass(frozen=True)
class Normalizing:
    """A normaliser, and the features of the bank's queries that this process holds.

    Args:
        normalizer: itself.
        texts: of the bank, for text-to-video; None for none on this process.
        videos: of the bank, for video-to-text; None for none on this process.
        directions: that are normalised.
    """

    normalizer: ScoreNormalizer
    texts: TextFeatures | None = None
    videos: VideoFeatures | None = None
    directions: tuple[Direction, ...] = ("text_to_video", "video_to_text")


@dataclass
class Ranking:
    """What an evaluation found, by variant.

    Args:
        counts: of the levels up to the name's last one, ``+normalized`` where they are.
        top: (b, TOP) numbers of the best videos of this process's texts by the last variant, and their scores.
        rows: of all videos, in order of their numbers.
        first: number of this process's first text.
    """

    counts: dict[str, RankCounts]
    top: tuple[Tensor, Tensor]
    rows: list[dict[str, Any]]
    first: int

    def groups(self, domains: Sequence[str]) -> Tensor:
        """(T,) which of ``domains`` a text is of; -1 for texts of other processes."""
        number = {domain: i for i, domain in enumerate(domains)}
        owner = next(iter(self.counts.values())).owner
        group = torch.tensor([number[row["domain"]] for row in self.rows])[owner]
        own = torch.zeros(len(owner), dtype=torch.bool)
        own[self.first : self.first + len(self.top[0])] = True
        return group.where(own, -1)

    def answers(self) -> list[dict[str, Any]]:
        """One JSON-able row per text of this process: its rank by the last variant, and the best videos."""
        ranks = ranks_of_counts(list(self.counts.values())[-1].texts).tolist()
        found = best_videos(self.rows, self.first, self.top)
        return [{**row, "rank": ranks[self.first + i]} for i, row in enumerate(found)]


def best_videos(rows: Sequence[dict[str, Any]], first: int, top: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """One JSON-able row per text of a process: the video that it was given with, itself, and the best videos.

    Args:
        rows: of all videos.
        first: number of the process's first text.
        top: (b, k) numbers of the best videos of its texts, and their scores.
    """
    texts = [(row, caption) for row in rows for caption in row["captions"]]
    return [
        {
            "id": row["id"],
            "domain": row["domain"],
            "caption": caption,
            "top": [
                {"id": rows[video]["id"], "domain": rows[video]["domain"], "score": round(score, 4)}
                for video, score in zip(best, scores)
            ],
        }
        for (row, caption), best, scores in zip(texts[first:], *(each.tolist() for each in top))
    ]


@dataclass
class Evaluation:
    """One evaluation.

    Args:
        shelf: of this process, which holds something.
        score: (L, T, V) of features on the CPU, as float32 on the CPU.
        levels: their names.
        ranks: the processes, all of which evaluate.
        normalizing: None for raw scores alone.
    """

    shelf: Shelf
    score: Scorer
    levels: Sequence[str]
    ranks: Ranks
    normalizing: Normalizing | None = None
    fitted: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.ranks.gather(self.shelf.rows)
        self.rows = [row for part in rows for row in part]
        self.captions = torch.tensor([len(row["captions"]) for row in self.rows])
        self.owner = torch.repeat_interleave(torch.arange(len(self.rows)), self.captions)
        texts = [sum(len(row["captions"]) for row in part) for part in rows]
        before = self.ranks.rank
        self.first_text, self.first_video = sum(texts[:before]), sum(map(len, rows[:before]))
        self.starts = [0, *torch.tensor([len(row["captions"]) for row in rows[before]]).cumsum(0).tolist()]

    def variants(self) -> list[tuple[str, int, bool]]:
        """Name, number of levels, and whether normalised, from the first level alone to all of them."""
        names = ["+".join(self.levels[: n + 1]) for n in range(len(self.levels))]
        raw = [(name, n + 1, False) for n, name in enumerate(names)]
        return raw if self.normalizing is None else raw + [(f"{name}+normalized", n, True) for name, n, _ in raw]

    def run(self) -> Ranking:
        """Rank everything in both directions. All processes call it."""
        self.fit()
        own = torch.cat(self.ranks.gather(self._own()), dim=1)  # (L, T)
        counts = {}
        for name, n, normalized in self.variants():
            right = self._combined("video_to_text", own[:n, None], n, normalized, slice(None))[0]
            counts[name] = RankCounts(self.owner, right, tolerance=EQUAL)
        top = [torch.zeros(0, min(TOP, len(self.rows))).sort()]
        for start, scores in self.rows_of_texts():
            first = self.first_text + start
            columns = slice(first, first + scores.shape[1])
            for name, n, normalized in self.variants():
                forward = self._combined("text_to_video", scores[:n], n, normalized, slice(None))
                counts[name].add_texts(first, forward)
                backward = self._combined("video_to_text", scores[:n].mT, n, normalized, columns).T
                counts[name].add_videos(first, backward)
            top.append(forward.topk(min(TOP, forward.shape[1])))
        return Ranking(
            counts,
            (torch.cat([each.indices for each in top]), torch.cat([each.values for each in top])),
            self.rows,
            self.first_text,
        )

    def best(self) -> list[dict[str, Any]]:
        """`best_videos` by the raw scores of all levels, for texts of which none need be right. All processes call it.

        Raises:
            DataError: there are no texts.
        """
        if not len(self.owner):
            raise DataError("there are no captions to rank videos by: give the data some, or use index and search")
        top = [torch.zeros(0, min(TOP, len(self.rows))).sort()]
        top += [scores.mean(0).topk(min(TOP, len(self.rows))) for _, scores in self.rows_of_texts()]
        both = torch.cat([each.indices for each in top]), torch.cat([each.values for each in top])
        return best_videos(self.rows, self.first_text, both)

    def _combined(self, direction: Direction, scores: Tensor, n: int, normalized: bool, columns: slice) -> Tensor:
        """(q, c) of the first ``n`` levels ``scores`` (n, q, c) of queries and some candidates."""
        if not normalized or direction not in self.fitted:
            return scores.mean(0)
        fitted = {name: value[:n, columns] for name, value in self.fitted[direction].items()}
        return self.normalizing.normalizer.apply(scores, fitted)

    def fit(self) -> None:
        """Fit the normaliser for each of its directions. All processes call it."""
        if self.normalizing is None:
            return
        normalizer = self.normalizing.normalizer
        for direction in self.normalizing.directions:
            self.fitted[direction] = normalizer.fit(self._queries(direction, normalizer.mode), self.ranks)

    def _queries(self, direction: Direction, mode: str) -> Blocks:
        """Scores (L, b, N) of this process's queries, of the bank or of the test, against all candidates."""
        if mode == "transductive":
            texts, videos = self.shelf.texts, self.shelf.videos
        else:
            texts, videos = self.normalizing.texts, self.normalizing.videos

        def blocks() -> Iterator[Tensor]:
            if direction == "text_to_video":
                yield from (scores for _, scores in self._against_videos(texts, None))
            else:
                yield from self._against_texts(videos)

        queries = texts if direction == "text_to_video" else videos
        candidates = len(self.rows) if direction == "text_to_video" else len(self.owner)
        size = 4 * len(self.levels) * candidates * (0 if queries is None else len(queries))
        if max(self.ranks.gather(size)) > KEPT:
            return blocks
        kept = list(blocks())
        return lambda: kept

    def rows_of_texts(self) -> Iterator[tuple[int, Tensor]]:
        """First text and scores (L, b, V) of blocks of this process's texts, each of whole videos."""
        yield from self._against_videos(self.shelf.texts, self.starts)

    def _against_videos(self, texts: TextFeatures | None, starts: Sequence[int] | None) -> Iterator[tuple[int, Tensor]]:
        """Blocks of ``texts`` against all videos, all processes in step; a block ends at one of ``starts``."""
        ends = [] if texts is None else block_ends(len(texts), TEXTS, starts)
        for number in range(max(self.ranks.gather(len(ends)))):
            begin, end = ([0, *ends][number], ends[number]) if number < len(ends) else (0, 0)
            parts = []
            for videos in self._turns(self.shelf.videos, VIDEOS):
                if end:
                    parts.append(self.score(texts[begin:end], videos))
            if end:
                yield begin, torch.cat(parts, dim=2)

    def _against_texts(self, videos: VideoFeatures | None) -> Iterator[Tensor]:
        """(L, b, T) of blocks of ``videos`` against all texts, all processes in step."""
        ends = [] if videos is None else block_ends(len(videos), VIDEOS, None)
        for number in range(max(self.ranks.gather(len(ends)))):
            begin, end = ([0, *ends][number], ends[number]) if number < len(ends) else (0, 0)
            parts = []
            for texts in self._turns(self.shelf.texts, TEXTS):
                if end:
                    parts.append(self.score(texts, videos[begin:end]).mT)
            if end:
                yield torch.cat(parts, dim=2)

    def _turns(self, own: Any, size: int) -> Iterator[Any]:
        """The features of all processes, in order, each ``size`` rows at most."""
        for rank, count in enumerate(self.ranks.gather(len(own))):
            for start in range(0, count, size):
                # A slice would travel with all that it is cut from.
                part = own[start : start + size].map(torch.clone) if rank == self.ranks.rank else None
                yield self.ranks.broadcast(part, rank)

    def _own(self) -> Tensor:
        """(L, b) scores of this process's texts with their own videos."""
        texts, videos, starts = self.shelf.texts, self.shelf.videos, self.starts
        parts = [torch.zeros(len(self.levels), 0)]
        for video in range(0, len(videos), OWN):
            last = min(video + OWN, len(videos))
            begin, end = starts[video], starts[last]
            scores = self.score(texts[begin:end], videos[video:last])
            owner = self.owner[self.first_text + begin : self.first_text + end] - self.first_video - video
            parts.append(scores.gather(2, owner.expand(len(scores), -1)[..., None])[..., 0])
        return torch.cat(parts, dim=1)


def block_ends(count: int, size: int, starts: Sequence[int] | None) -> list[int]:
    """Ends of blocks of at most ``size`` of ``count`` rows.

    Args:
        count: rows.
        size: of a block; one that cannot be divided may be larger.
        starts: of what must not be divided, from 0 on, and the end; None lets blocks end anywhere.
    """
    if starts is None:
        return [*range(size, count, size), count] if count else []
    ends, begin = [], 0
    for at, after in zip(starts[1:], [*starts[2:], None]):
        if after is None or after - begin > size:
            ends.append(at)
            begin = at
    return ends
