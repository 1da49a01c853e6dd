"""The part of a retrieval model behind the towers: what is compared of a text and a video, and how.

Legend: T texts, V videos, D width, L levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fulgurite.methods.retrieval.features import TextFeatures, TextTokens, VideoFeatures, VideoTokens

LARGEST_SCALE = math.log(100.0)


@dataclass(frozen=True)
class TowerFacts:
    """What a head must know of the towers.

    Args:
        width: D.
        heads: attention heads of a block of that width, where the head has blocks.
        logit_scale: logarithm of the pretrained scale.
        text_blocks: CLIP's tower for text under OpenAI's names (``positional_embedding``,
            ``transformer.resblocks.<i>....``), from which a temporal encoder starts; empty where there is none of width
            D.
    """

    width: int
    heads: int
    logit_scale: float
    text_blocks: Mapping[str, Tensor] = field(default_factory=dict)


class RetrievalHead(nn.Module, ABC):
    """Scores every text against every video, at one level or several; trained with, or without, the towers.

    The score of a pair depends on that pair alone. `embed_text` and `embed_video` hold all that depends on one text
    or one video, so that it is computed once and can be stored; `similarity` is the rest.

    Attributes:
        levels: names of the levels, from coarse to fine.
        logit_scale: (1,) logarithm of the factor of cosines; at most `LARGEST_SCALE` after `clamp`. FSDP2 cuts no
            scalars.
    """

    levels: tuple[str, ...] = ()
    logit_scale: nn.Parameter

    @property
    def limits(self) -> dict[str, int]:
        """The most ``frames`` and ``words`` that it is made for; those without a limit are left out."""
        return {}

    @abstractmethod
    def build(self, towers: TowerFacts) -> None:
        """Make all parameters; called once, before anything else.

        Raises:
            ValueError: an option does not fit the towers.
        """

    @abstractmethod
    def embed_text(self, tokens: TextTokens) -> TextFeatures:
        """What is compared of texts. Raises ValueError for more words than the head was made for."""

    @abstractmethod
    def embed_video(self, tokens: VideoTokens, seeds: Sequence[int] | None = None) -> VideoFeatures:
        """What is compared of videos.

        Args:
            tokens: of the videos.
            seeds: one per video, of what is random in training; None is deterministic.

        Raises:
            ValueError: more frames than the head was made for.
        """

    @abstractmethod
    def similarity(self, texts: TextFeatures, videos: VideoFeatures, levels: Sequence[str] | None = None) -> Tensor:
        """(L, T, V) scores at ``levels``, all of them when None, in the order given; with gradients, in pieces."""

    def chosen_levels(self, levels: Sequence[str] | None) -> tuple[str, ...]:
        """Those asked for, all when None. Raises ValueError for one that this head does not have."""
        chosen = self.levels if levels is None else tuple(levels)
        if unknown := [level for level in chosen if level not in self.levels]:
            raise ValueError(f"{type(self).__name__} has no levels {unknown}; it has {list(self.levels)}")
        return chosen

    def clamp(self) -> None:
        """Keep the scale within its limit; called after every step of the optimizer."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=LARGEST_SCALE)
