"""How many texts find their video among the first, and videos their texts: R@K, median and mean rank.

Legend: T texts, V videos, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from fulgurite.methods.retrieval.ranks import RankCounts, Ties, ranks_of_counts, whole_counts

DIRECTIONS = ("text_to_video", "video_to_text")


def rank_figures(ranks: Tensor, recalls: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """``R@K`` in percent for every K, ``MdR`` (of an even number the mean of the middle two) and ``MnR``; float64.

    All are NaN where there are no ranks.

    Args:
        ranks: (N,) from 1 on, halves where scores were equal.
        recalls: the K.
    """
    ranks = ranks.double()
    figures = {f"R@{k}": 100 * (ranks <= k).double().mean() for k in recalls}
    middle = ranks.sort().values[(len(ranks) - 1) // 2 : len(ranks) // 2 + 1]
    return {**figures, "MdR": middle.mean(), "MnR": ranks.mean()}


class RetrievalRecall(Metric):
    """Recalls and ranks of both directions over one set of texts and videos; exact over processes of uneven data.

    The whole matrix need not exist: a `RankCounts`, filled block by block with the texts of this process, holds all
    that is counted, and counts of all processes add up. Ties, and videos with several texts: see
    `fulgurite.methods.retrieval.ranks`.

    Args:
        recalls: the K of R@K.
        ties: for whole matrices; a `RankCounts` brings its own.
        groups: names of the groups of texts for which there are figures of their own, as domains; each among all
            candidates.

    Raises:
        ValueError: a K is below 1.
    """

    full_state_update = True

    def __init__(self, recalls: Sequence[int] = (1, 5, 10), ties: Ties = "mean", groups: Sequence[str] = ()) -> None:
        super().__init__()
        if not recalls or min(recalls) < 1:
            raise ValueError(f"recalls={list(recalls)}: give numbers from 1 on")
        self.recalls = tuple(recalls)
        self.ties = ties
        self.groups = tuple(groups)
        nothing = torch.zeros(2, 0, dtype=torch.int64)
        self.add_state("texts", nothing, dist_reduce_fx="sum")
        self.add_state("videos", nothing, dist_reduce_fx="sum")
        self.add_state("owner", nothing[0], dist_reduce_fx="max")  # the same on every process
        self.add_state("group", nothing[0], dist_reduce_fx="max")  # -1 for texts of other processes

    def update(self, scores: Tensor | RankCounts, owner: Tensor | None = None, group: Tensor | None = None) -> None:
        """Take in the whole set, or under several processes what this one has counted of it (nothing, perhaps).

        Args:
            scores: (T, V), or the counts of this process.
            owner: (T,) the video of each text of a matrix; None for one text per video.
            group: (T,) index of each text's group; -1 for none, and for texts of other processes. The group of a
                video is that of its texts.

        Raises:
            ValueError: shapes do not fit, a group has no name, a score of a text with its own video is not a number,
                or there was an update before.
        """
        if self.texts.numel():
            raise ValueError(
                "RetrievalRecall ranks one set: count its blocks in one RankCounts, and reset between sets"
            )
        counts = scores if isinstance(scores, RankCounts) else whole_counts(scores, owner, self.ties)
        group = torch.full_like(counts.owner, -1) if group is None else group.to(counts.owner)
        if group.shape != counts.owner.shape or int(group.max()) >= len(self.groups):
            raise ValueError(
                f"group {tuple(group.shape)} up to {int(group.max())} for {len(counts.owner)} texts and the groups "
                f"{list(self.groups)}: give an index of these, or -1, per text"
            )
        self.texts, self.videos = counts.texts.to(self.device), counts.videos.to(self.device)
        self.owner, self.group = counts.owner.to(self.device), group.to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """``text_to_video/R@1`` and so on, of each direction, and ``text_to_video/R@1/<group>`` of each group.

        Raises:
            ValueError: a text was not counted exactly once, over all processes.
        """
        for name, (_, times) in (("text", self.texts), ("video", self.videos)):
            if (wrong := (times != 1).nonzero()[:, 0]).numel():
                raise ValueError(
                    f"{len(wrong)} of {len(times)} {name}s were not counted once, as {name} {int(wrong[0])}, counted "
                    f"{int(times[wrong[0]])} times: add every block of scores on one process, and once"
                )
        groups = (self.group, self._video_groups())
        figures: dict[str, Tensor] = {}
        for direction, counts, group in zip(DIRECTIONS, (self.texts, self.videos), groups):
            ranks = ranks_of_counts(counts)
            figures |= {f"{direction}/{key}": value for key, value in rank_figures(ranks, self.recalls).items()}
            for index, name in enumerate(self.groups):
                own = rank_figures(ranks[group == index], self.recalls)
                figures |= {f"{direction}/{key}/{name}": value for key, value in own.items()}
        return figures

    def _video_groups(self) -> Tensor:
        return torch.full_like(self.videos[0], -1).scatter_reduce_(0, self.owner, self.group, "amax")
