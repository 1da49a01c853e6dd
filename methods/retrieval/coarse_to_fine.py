"""The three similarities of UCoFiA (Wang et al., ICCV 2023, arXiv 2309.10091), from coarse to fine.

    video_sentence   S1[t, v] = scale * <s_t G1, v_v G2>
    frame_sentence   S2[t, v] = scale * ISA_f(<s_t, f_vf>)
    patch_word       S3[t, v] = Bi-ISA(<w_tw L1, p_vp L2>), without the scale

The matrices G and L belong to one text or one video alone, so the features hold their products. Legend: L levels,
T texts, V videos, W words, F frames, P patches of a video, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.fine_level import fill_patch_word, patch_word
from fulgurite.methods.retrieval.isa import interactive_similarity
from fulgurite.methods.retrieval.tiles import Level, tiled_scores

LEVELS = ("video_sentence", "frame_sentence", "patch_word")


def coarse_to_fine_similarity(
    texts: TextFeatures,
    videos: VideoFeatures,
    frame_matrix: Tensor,
    word_matrix: Tensor,
    word_matrix_2: Tensor,
    patch_matrix: Tensor,
    patch_matrix_2: Tensor,
    scale: Tensor | float,
    temperature: float = 0.01,
    levels: Sequence[str] = LEVELS,
    dtype: torch.dtype | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Scores of every text with every video at each level; that of a pair depends on that pair alone.

    Time is that of T W V P D multiply-adds and of four exponentials for each of T W V P entries (patch_word). Peak
    memory beyond features and scores is at most 64 MiB for any T and V; in training it is that of one tile and of the
    features' gradients, since tiles are computed again in the backward pass.

    Args:
        texts: bare normalised sentences s, words w L1; with a mask, other words have no part in patch_word.
        videos: v G2 G1^T, normalised frames f, patches p L2; masked likewise.
        frame_matrix: (F, F) at least, as all matrices: the leading block is used. M of ISA over frames.
        word_matrix: (W, W) over words, before patches.
        word_matrix_2: (W, W) over words, after patches.
        patch_matrix: (P, P) over patches, before words.
        patch_matrix_2: (P, P) over patches, after words.
        scale: factor of the cosines, exp(logit_scale).
        temperature: tau of all aggregations.
        levels: which, of `LEVELS`.
        dtype: of the products of words and patches, nearly all of the cost: torch.bfloat16, or None for that of
            autocast where it is on and of the features otherwise. All else is in float32 at least: softmaxes at
            temperature 0.01 and cosines times 100 need it.
        tile: texts and videos of a tile; None sizes it by the cache.

    Returns:
        (L, T, V), in the order of ``levels``.

    Raises:
        ValueError: an unknown level, features that a level needs are missing, or more words, frames or patches than
            the matrices have rows.
    """
    _check(texts, videos, frame_matrix, (word_matrix, word_matrix_2), (patch_matrix, patch_matrix_2), levels)
    device = texts.sentence.device
    if dtype is None:
        dtype = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else texts.sentence.dtype
        )
    made = {
        "video_sentence": lambda: Level(_video_sentence, entries=1),
        "frame_sentence": lambda: Level(
            functools.partial(_frame_sentence, temperature=temperature), entries=videos.frames.shape[1]
        ),
        "patch_word": lambda: Level(
            functools.partial(_patch_word, temperature=temperature, dtype=dtype),
            entries=texts.words.shape[1] * videos.patches.shape[1],
            fill=functools.partial(_fill_patch_word, temperature=temperature, dtype=dtype),
        ),
    }
    scale = torch.as_tensor(scale, dtype=_wide(texts.sentence).dtype, device=device)
    shared = frame_matrix, word_matrix, word_matrix_2, patch_matrix, patch_matrix_2, scale
    return tiled_scores([made[level]() for level in levels], texts, videos, shared, tile)


def _video_sentence(texts: TextFeatures, videos: VideoFeatures, *shared: Tensor) -> Tensor:
    return shared[-1] * (_wide(texts.sentence) @ _wide(videos.video).T)


def _frame_sentence(texts: TextFeatures, videos: VideoFeatures, *shared: Tensor, temperature: float) -> Tensor:
    num_videos, num_frames = videos.frames.shape[:2]
    cosines = _wide(texts.sentence) @ _wide(videos.frames).flatten(0, 1).T
    cosines = cosines.unflatten(1, (num_videos, num_frames))  # (T, V, F)
    return shared[-1] * interactive_similarity(cosines, shared[0], temperature, videos.frame_mask)


def _patch_word(
    texts: TextFeatures, videos: VideoFeatures, *shared: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    return patch_word(texts, videos, *shared[1:5], temperature=temperature, dtype=dtype)


def _fill_patch_word(out: Tensor, texts: TextFeatures, videos: VideoFeatures, *shared: Tensor, **options) -> None:
    fill_patch_word(out, texts, videos, *shared[1:5], **options)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(
    texts: TextFeatures,
    videos: VideoFeatures,
    frame_matrix: Tensor,
    word_matrices: Sequence[Tensor],
    patch_matrices: Sequence[Tensor],
    levels: Sequence[str],
) -> None:
    """One line for what does not fit."""
    needs = {
        "video_sentence": {},
        "frame_sentence": {"frames": (videos.frames, [frame_matrix])},
        "patch_word": {"words": (texts.words, word_matrices), "patches": (videos.patches, patch_matrices)},
    }
    for level in levels:
        if level not in needs:
            raise ValueError(f"unknown level {level!r}; levels are {', '.join(LEVELS)}")
        for name, (value, matrices) in needs[level].items():
            if value is None:
                raise ValueError(f"level {level} needs {name}, which the features lack; leave the level out of levels")
            limit = min(map(len, matrices))
            if value.shape[1] > limit:
                raise ValueError(
                    f"level {level}: {value.shape[1]} {name}, but the head's matrices are for up to {limit}; "
                    f"give fewer, or build the head for more"
                )
