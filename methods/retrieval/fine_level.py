"""The finest level of UCoFiA (arXiv 2309.10091): every word against every patch, aggregated in both orders.

    C[t, w, v, p] = <w_tw, p_vp>
    words first     c1[t, v, p] = ISA_w(C, Mw)     b1[t, v] = ISA_p(c1, Mp2)
    patches first   c2[t, w, v] = ISA_p(C, Mp)     b2[t, v] = ISA_w(c2, Mw2)
    S3 = (b1 + b2) / 2

Legend: T texts, V videos, W words, P patches of a video, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.isa import interactive_similarity


def patch_word(
    texts: TextFeatures,
    videos: VideoFeatures,
    word_matrix: Tensor,
    word_matrix_2: Tensor,
    patch_matrix: Tensor,
    patch_matrix_2: Tensor,
    *,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """(T, V) scores, differentiable, with several tensors of T W V P entries: for tiles.

    Args:
        texts: words, and their mask.
        videos: patches, and their mask.
        word_matrix: Mw.
        word_matrix_2: Mw2.
        patch_matrix: Mp.
        patch_matrix_2: Mp2.
        temperature: tau.
        dtype: of the products; all else is in float32 at least.
    """
    (num_texts, num_words), (num_videos, num_patches) = texts.words.shape[:2], videos.patches.shape[:2]
    products = texts.words.flatten(0, 1).to(dtype) @ videos.patches.flatten(0, 1).to(dtype).T
    wide = torch.promote_types(texts.words.dtype, torch.float32)
    products = products.to(wide).view(num_texts, num_words, num_videos, num_patches)
    word_mask = None if texts.word_mask is None else texts.word_mask[:, None]  # (T, 1, W)
    patch_mask = None if videos.patch_mask is None else videos.patch_mask[None]  # (1, V, P)
    each_word_mask = None if word_mask is None else word_mask[:, :, None]
    each_patch_mask = None if patch_mask is None else patch_mask[:, None]
    of_patches = interactive_similarity(products.permute(0, 2, 3, 1), word_matrix, temperature, each_word_mask)
    of_words = interactive_similarity(products, patch_matrix, temperature, each_patch_mask)
    words_first = interactive_similarity(of_patches, patch_matrix_2, temperature, patch_mask)
    patches_first = interactive_similarity(of_words.mT, word_matrix_2, temperature, word_mask)
    return (words_first + patches_first) / 2


def fill_patch_word(
    out: Tensor, texts: TextFeatures, videos: VideoFeatures, *matrices: Tensor, tile, **options
) -> None:
    """Writes the scores of `patch_word` into (T, V)."""
    t, v = tile or (8, 32)
    for i in range(0, len(texts), t):
        for j in range(0, len(videos), v):
            out[i : i + t, j : j + v] = patch_word(texts[i : i + t], videos[j : j + v], *matrices, **options)
