"""CLIP4Clip: one vector of a text against one of a video (Luo et al., 2021, arXiv 2104.08860).

    S = scale s . v

s is the sentence and v the frames, pooled as they are (meanP) or after a temporal encoder (seqTransf), both of unit
length. The published tightTransf reads text and video together, so nothing of it can be stored for search, and seqLSTM
is a weaker temporal encoder; neither is offered.

Legend: T texts, V videos, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fulgurite.methods.retrieval.features import TextFeatures, TextTokens, VideoFeatures, VideoTokens
from fulgurite.methods.retrieval.head import RetrievalHead, TowerFacts
from fulgurite.methods.retrieval.pooling import Temporal, VideoVector, require_length, unit, without_autocast


class Clip4Clip(RetrievalHead):
    """The scaled cosine of sentence and video.

    Args:
        max_frames: most frames of a video.
        temporal: ``"mean"`` pools frames as they are (meanP), ``"transformer"`` relates them first (seqTransf).
        temporal_layers: blocks of the temporal encoder.
        init_seed: of a temporal encoder without CLIP's blocks.
    """

    levels = ("video_sentence",)

    def __init__(
        self, max_frames: int = 12, temporal: Temporal = "mean", temporal_layers: int = 4, init_seed: int = 0
    ) -> None:
        super().__init__()
        self.max_frames, self.temporal = max_frames, temporal
        self.temporal_layers, self.init_seed = temporal_layers, init_seed

    @property
    def limits(self) -> dict[str, int]:
        """As in the base."""
        return {"frames": self.max_frames}

    def build(self, towers: TowerFacts) -> None:
        """As in the base; a temporal encoder starts from the tower for text."""
        self.logit_scale = nn.Parameter(torch.tensor([towers.logit_scale]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            self.video_vector = VideoVector(self.temporal, self.temporal_layers, self.max_frames, towers)

    def embed_text(self, tokens: TextTokens) -> TextFeatures:
        """Sentences alone: texts may have any length."""
        with without_autocast(tokens.sentence):
            return TextFeatures(unit(tokens.sentence.to(self.logit_scale.dtype)))

    def embed_video(self, tokens: VideoTokens, seeds: Sequence[int] | None = None) -> VideoFeatures:
        """Videos alone; nothing is random."""
        require_length(tokens.tokens.shape[1], self.max_frames, "frames")
        with without_autocast(tokens.tokens):
            return VideoFeatures(self.video_vector(tokens.tokens[:, :, 0].to(self.logit_scale.dtype), tokens.mask))

    def similarity(self, texts: TextFeatures, videos: VideoFeatures, levels: Sequence[str] | None = None) -> Tensor:
        """As in the base; of one level."""
        count = len(self.chosen_levels(levels))
        with without_autocast(texts.sentence):
            scores = self.logit_scale.exp() * (texts.sentence @ videos.video.T)
        return scores.expand(count, -1, -1)
