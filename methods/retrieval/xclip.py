"""X-CLIP: every grain of a text against every grain of a video (Ma et al., ACM MM 2022, arXiv 2207.07285).

    A(x; M)          = sum_j (softmax(x / tau) M)_j x_j           no second softmax, unlike UCoFiA
    video_sentence   S1 = scale (s G) . v
    video_word       S2 = scale A_w(w . v; M1)
    frame_sentence   S3 = scale A_f(s . f; M2)
    frame_word       C  = (w L) . f
                     S4 = scale (A_f(A_w(C; Mw); Mf2) + A_w(A_f(C; Mf); Mw2)) / 2

s, w sentence and words, f frames, v one vector of all frames (`pooling`), each of unit length. All matrices start as
the identity. The score is the mean of the four. Padding words and missing frames take part, as in the published code,
unless ``mask_padding`` is on.

Legend: T texts, V videos, W words, F frames, D width; t, v texts and videos of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fulgurite.methods.retrieval.features import TextFeatures, TextTokens, VideoFeatures, VideoTokens
from fulgurite.methods.retrieval.head import RetrievalHead, TowerFacts
from fulgurite.methods.retrieval.isa import sharp_softmax
from fulgurite.methods.retrieval.pooling import Temporal, VideoVector, require_length, unit, without_autocast
from fulgurite.methods.retrieval.tiles import Level, tiled_scores


def attended(x: Tensor, matrix: Tensor, temperature: float = 0.01, mask: Tensor | None = None) -> Tensor:
    """A(x; M) over the last axis.

    Args:
        x: (..., n) similarities.
        matrix: (m, m) with m >= n, of which the first n rows and columns are used.
        temperature: tau.
        mask: True for entries that count, broadcastable to x; the others get no weight. None counts all.

    Returns:
        (...).
    """
    size, scaled = x.shape[-1], x / temperature
    weights = sharp_softmax(scaled, mask) @ matrix[:size, :size]
    if mask is not None:
        weights = weights.masked_fill(~mask, 0)
    return (weights * x).sum(-1)


class XClip(RetrievalHead):
    """Four levels of similarity.

    Args:
        max_frames: frames that the matrices are made for; fewer use their leading block.
        max_words: words that the matrices are made for; fewer use their leading block.
        temporal: ``"transformer"`` relates frames before they are pooled (seqTransf), ``"mean"`` does not (meanP).
        temporal_layers: blocks of the temporal encoder.
        temperature: tau.
        mask_padding: keep padding words and missing frames out of levels 2 to 4.
        init_seed: of a temporal encoder without CLIP's blocks.
    """

    levels = ("video_sentence", "video_word", "frame_sentence", "frame_word")

    def __init__(
        self,
        max_frames: int = 12,
        max_words: int = 32,
        temporal: Temporal = "transformer",
        temporal_layers: int = 4,
        temperature: float = 0.01,
        mask_padding: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        self.max_frames, self.max_words = max_frames, max_words
        self.temporal, self.temporal_layers = temporal, temporal_layers
        self.temperature, self.mask_padding, self.init_seed = temperature, mask_padding, init_seed

    @property
    def limits(self) -> dict[str, int]:
        """As in the base."""
        return {"frames": self.max_frames, "words": self.max_words}

    def build(self, towers: TowerFacts) -> None:
        """As in the base; identity matrices, the temporal encoder from the tower for text."""
        self.logit_scale = nn.Parameter(torch.tensor([towers.logit_scale]))
        self.sentence_projection = nn.Parameter(torch.eye(towers.width))
        self.word_projection = nn.Parameter(torch.eye(towers.width))
        self.video_word_matrix = nn.Parameter(torch.eye(self.max_words))
        self.frame_sentence_matrix = nn.Parameter(torch.eye(self.max_frames))
        self.word_matrix = nn.Parameter(torch.eye(self.max_words))
        self.word_matrix_2 = nn.Parameter(torch.eye(self.max_words))
        self.frame_matrix = nn.Parameter(torch.eye(self.max_frames))
        self.frame_matrix_2 = nn.Parameter(torch.eye(self.max_frames))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            self.video_vector = VideoVector(self.temporal, self.temporal_layers, self.max_frames, towers)

    def embed_text(self, tokens: TextTokens) -> TextFeatures:
        """Sentences and words."""
        require_length(tokens.words.shape[1], self.max_words, "words")
        dtype = self.logit_scale.dtype
        with without_autocast(tokens.words):
            sentence, words = unit(tokens.sentence.to(dtype)), unit(tokens.words.to(dtype))
        return TextFeatures(sentence, words, tokens.mask if self.mask_padding else None)

    def embed_video(self, tokens: VideoTokens, seeds: Sequence[int] | None = None) -> VideoFeatures:
        """Videos and frames, with the projections on this side, so that bare sentences and words compare with them.

        What stands as ``patches`` is what words are compared with: (V, 1 + F, D), the bare video before the frames
        times L^T. Nothing is random.
        """
        require_length(tokens.tokens.shape[1], self.max_frames, "frames")
        with without_autocast(tokens.tokens):
            given = tokens.tokens[:, :, 0].to(self.logit_scale.dtype)
            video, frames = self.video_vector(given, tokens.mask), unit(given)
            for_words = torch.cat((video[:, None], frames @ self.word_projection.T), dim=1)
            video = video @ self.sentence_projection.T
        if not self.mask_padding:
            return VideoFeatures(video, frames, for_words)
        whole = tokens.mask.new_ones(len(video), 1)
        return VideoFeatures(video, frames, for_words, tokens.mask, torch.cat((whole, tokens.mask), dim=1))

    def similarity(self, texts: TextFeatures, videos: VideoFeatures, levels: Sequence[str] | None = None) -> Tensor:
        """As in the base."""
        chosen, words = self.chosen_levels(levels), 0 if texts.words is None else texts.words.shape[1]
        frames = 0 if videos.frames is None else videos.frames.shape[1]
        ways = {
            "video_sentence": Level(self._video_sentence, 1),
            "video_word": Level(self._video_word, words),
            "frame_sentence": Level(self._frame_sentence, frames),
            "frame_word": Level(self._frame_word, words * frames),
        }
        matrices = (
            self.video_word_matrix,
            self.frame_sentence_matrix,
            self.word_matrix,
            self.word_matrix_2,
            self.frame_matrix,
            self.frame_matrix_2,
        )
        return tiled_scores([ways[level] for level in chosen], texts, videos, (self.logit_scale.exp(), *matrices))

    def _video_sentence(self, texts: TextFeatures, videos: VideoFeatures, scale: Tensor, *_: Tensor) -> Tensor:
        return scale * (texts.sentence @ videos.video.T)

    def _video_word(
        self, texts: TextFeatures, videos: VideoFeatures, scale: Tensor, matrix: Tensor, *_: Tensor
    ) -> Tensor:
        x = (texts.words @ videos.patches[:, 0].T).mT  # (t, v, W)
        return scale * attended(x, matrix, self.temperature, _over(texts.word_mask, 1))

    def _frame_sentence(
        self, texts: TextFeatures, videos: VideoFeatures, scale: Tensor, _: Tensor, matrix: Tensor, *__: Tensor
    ) -> Tensor:
        x = texts.sentence @ videos.frames.flatten(0, 1).T
        x = x.unflatten(1, videos.frames.shape[:2])  # (t, v, F)
        return scale * attended(x, matrix, self.temperature, videos.frame_mask)

    def _frame_word(
        self, texts: TextFeatures, videos: VideoFeatures, scale: Tensor, _: Tensor, __: Tensor, *matrices: Tensor
    ) -> Tensor:
        words_first, words_last, frames_first, frames_last = matrices
        tau, frames = self.temperature, videos.patches[:, 1:]
        x = (texts.words @ frames.flatten(0, 1).T).unflatten(2, frames.shape[:2]).transpose(1, 2)  # (t, v, W, F)
        word_mask, frame_mask = texts.word_mask, videos.frame_mask
        of_frames = attended(x.mT, words_first, tau, _over(word_mask, 1, 2))  # (t, v, F)
        of_words = attended(x, frames_first, tau, _over(frame_mask, 1))  # (t, v, W)
        over_frames = attended(of_frames, frames_last, tau, frame_mask)
        over_words = attended(of_words, words_last, tau, _over(word_mask, 1))
        return scale * (over_frames + over_words) / 2


def _over(mask: Tensor | None, *axes: int) -> Tensor | None:
    """``mask`` with axes of length 1 put in, to broadcast over the others."""
    for axis in axes if mask is not None else ():
        mask = mask.unsqueeze(axis)
    return mask
