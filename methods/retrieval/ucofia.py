"""UCoFiA: a text and a video compared from coarse to fine (Wang et al., ICCV 2023, arXiv 2309.10091).

    video_sentence   S1 = scale (s G1) . (v G2)
    frame_sentence   S2 = scale ISA_f(s . f; A)
    patch_word       S3 = Bi-ISA(w L1 . p L2; Mw, Mw2, Mp, Mp2)      without the scale, for patches are not normalised

s, w sentence and words, f frames, v one vector of all frames (`pooling`), each of unit length; p the class token of
every frame and its selected patches (`patch_selection`). All matrices start as the identity. The score is the mean of
the levels. Padding words and missing frames take part in levels 2 and 3, as in the published code, unless
``mask_padding`` is on.

Legend: T texts, V videos, W words, F frames, P tokens kept of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.methods.retrieval.aggregation_matrix import Kind, aggregation_matrix
from fulgurite.methods.retrieval.coarse_to_fine import LEVELS, coarse_to_fine_similarity
from fulgurite.methods.retrieval.features import TextFeatures, TextTokens, VideoFeatures, VideoTokens
from fulgurite.methods.retrieval.head import RetrievalHead, TowerFacts
from fulgurite.methods.retrieval.patch_selection import PatchSelector
from fulgurite.methods.retrieval.pooling import Temporal, VideoVector, require_length, unit, without_autocast

Level = Literal["video_sentence", "frame_sentence", "patch_word"]
EVALUATION_SEED = 0  # of the noise, where evaluation has any: the same for every video


class Ucofia(RetrievalHead):
    """Three levels of similarity, or the first ones of them.

    Args:
        max_frames: frames that the matrices are made for; fewer use their leading block.
        max_words: words that the matrices are made for; fewer use their leading block.
        levels: which to train and rank by; parameters of others do not exist. ``video_sentence`` is always needed:
            search ranks by it first.
        top_k: patches of each frame, beside its class token.
        samples: of the noise in the selection of patches, while training.
        sigma: standard deviation of that noise.
        selector: ``"video"`` scores patches in the light of the whole video, as the released checkpoints do,
            ``"frame"`` in that of their frame, as the published training code does.
        evaluate_by: in evaluation select the patches of largest score, ``"hard"``, or by noise of a fixed seed,
            ``"perturbed"``, which is closer to the published random one.
        visual_local_matrix: have L2; the published evaluation code has none.
        temporal: ``"transformer"`` relates frames before they are pooled (seqTransf), ``"mean"`` does not (meanP).
        temporal_layers: blocks of the temporal encoder.
        isa: ``"full"`` learns a number for each pair of places, as published; ``"relative"`` one for each distance, so
            that texts and videos may be longer than trained.
        temperature: of both softmaxes of ISA.
        mask_padding: keep padding words and missing frames out of levels 2 and 3, and of the selection of patches.
        init_seed: of what starts at random: the selector, and a temporal encoder without CLIP's blocks.

    Raises:
        ValueError: ``levels`` lacks ``video_sentence``, or repeats or misnames one.
    """

    def __init__(
        self,
        max_frames: int = 12,
        max_words: int = 32,
        levels: Sequence[Level] = LEVELS,
        top_k: int = 3,
        samples: int = 500,
        sigma: float = 0.05,
        selector: Literal["video", "frame"] = "video",
        evaluate_by: Literal["hard", "perturbed"] = "hard",
        visual_local_matrix: bool = True,
        temporal: Temporal = "transformer",
        temporal_layers: int = 4,
        isa: Kind = "full",
        temperature: float = 0.01,
        mask_padding: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        if set(levels) - set(LEVELS) or len(set(levels)) < len(levels) or LEVELS[0] not in levels:
            raise ValueError(f"levels={list(levels)} must be {LEVELS[0]} and any of {list(LEVELS[1:])}, each once")
        self.levels = tuple(level for level in LEVELS if level in levels)
        self.max_frames, self.max_words = max_frames, max_words
        self.top_k, self.samples, self.sigma = top_k, samples, sigma
        self.selector, self.evaluate_by, self.visual_local_matrix = selector, evaluate_by, visual_local_matrix
        self.temporal, self.temporal_layers = temporal, temporal_layers
        self.isa, self.temperature = isa, temperature
        self.mask_padding, self.init_seed = mask_padding, init_seed

    @property
    def limits(self) -> dict[str, int]:
        """As in the base."""
        return {"frames": self.max_frames, "words": self.max_words} if self.isa == "full" else {}

    def build(self, towers: TowerFacts) -> None:
        """As in the base; identity matrices, the selector at random, the temporal encoder from the tower for text."""
        width = towers.width
        self.logit_scale = nn.Parameter(torch.tensor([towers.logit_scale]))
        self.sentence_projection = nn.Parameter(torch.eye(width))
        self.video_projection = nn.Parameter(torch.eye(width))
        if "frame_sentence" in self.levels:
            self.frame_matrix = aggregation_matrix(self.isa, self.max_frames)
        if "patch_word" in self.levels:
            self.word_projection = nn.Parameter(torch.eye(width))
            if self.visual_local_matrix:
                self.patch_projection = nn.Parameter(torch.eye(width))
            self.word_matrix = aggregation_matrix(self.isa, self.max_words)
            self.word_matrix_2 = aggregation_matrix(self.isa, self.max_words)
            self.patch_matrix = aggregation_matrix(self.isa, self.max_frames, self.top_k + 1)
            self.patch_matrix_2 = aggregation_matrix(self.isa, self.max_frames, self.top_k + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            self.video_vector = VideoVector(self.temporal, self.temporal_layers, self.max_frames, towers)
            if "patch_word" in self.levels:
                self.patch_selector = PatchSelector(
                    width, variant=self.selector, k=self.top_k, samples=self.samples, sigma=self.sigma
                )

    def embed_text(self, tokens: TextTokens) -> TextFeatures:
        """Sentences, and for level 3 words, (T, W, D) times L1."""
        with without_autocast(tokens.sentence):
            sentence = unit(tokens.sentence.to(self.logit_scale.dtype))
            if "patch_word" not in self.levels:
                return TextFeatures(sentence)
            self._require(tokens.words.shape[1], "words")
            words = unit(tokens.words.to(self.logit_scale.dtype)) @ self.word_projection
        return TextFeatures(sentence, words, tokens.mask if self.mask_padding else None)

    def embed_video(self, tokens: VideoTokens, seeds: Sequence[int] | None = None) -> VideoFeatures:
        """Videos, (V, D) times G2 G1^T, so that a bare sentence compares with them, frames, and patches times L2."""
        count = tokens.tokens.shape[1]
        self._require(count, "frames")
        mask = tokens.mask if self.mask_padding else None
        patches = patch_mask = None
        with without_autocast(tokens.tokens):
            given = tokens.tokens.to(self.logit_scale.dtype)
            frames = given[:, :, 0]
            video = self.video_vector(frames, tokens.mask) @ self.video_projection @ self.sentence_projection.T
            if "patch_word" in self.levels:
                if seeds is None and self.evaluate_by == "perturbed":
                    seeds = [EVALUATION_SEED] * len(given)
                patches = self.patch_selector(given, seeds, mask)
                if self.visual_local_matrix:
                    patches = patches @ self.patch_projection
                patch_mask = None if mask is None else mask.repeat_interleave(self.top_k + 1, dim=1)
            if "frame_sentence" not in self.levels:
                return VideoFeatures(video, patches=patches, patch_mask=patch_mask)
            return VideoFeatures(video, unit(frames), patches, mask, patch_mask)

    def similarity(self, texts: TextFeatures, videos: VideoFeatures, levels: Sequence[str] | None = None) -> Tensor:
        """As in the base; under autocast the products of words and patches are in its precision."""
        return coarse_to_fine_similarity(
            texts,
            videos,
            self._matrix("frame_matrix", videos.frames),
            self._matrix("word_matrix", texts.words),
            self._matrix("word_matrix_2", texts.words),
            self._matrix("patch_matrix", videos.patches, self.top_k + 1),
            self._matrix("patch_matrix_2", videos.patches, self.top_k + 1),
            self.logit_scale.exp(),
            self.temperature,
            self.chosen_levels(levels),
        )

    def _matrix(self, name: str, places: Tensor | None, group: int = 1) -> Tensor:
        """Of a level whose features are absent, an empty one."""
        if places is None:
            return self.logit_scale.new_zeros(0, 0)
        return getattr(self, name)(places.shape[1] // group)

    def _require(self, count: int, kind: Literal["words", "frames"]) -> None:
        if self.isa == "full":
            require_length(count, getattr(self, f"max_{kind}"), kind)
