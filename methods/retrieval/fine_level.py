"""The finest level of UCoFiA (arXiv 2309.10091): every word against every patch, aggregated in both orders.

    C[t, w, v, p] = <w_tw, p_vp>
    words first     c1[t, v, p] = ISA_w(C, Mw)     b1[t, v] = ISA_p(c1, Mp2)
    patches first   c2[t, w, v] = ISA_p(C, Mp)     b2[t, v] = ISA_w(c2, Mw2)
    S3 = (b1 + b2) / 2

Legend: T texts, V videos, W words, P patches of a video, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.isa import interactive_similarity
from fulgurite.methods.retrieval.tiles import tile_shape

# Four buffers of TILE_ENTRIES stay in a cache of some MiB. BLOCK_ENTRIES of patches are converted at once.
TILE_ENTRIES, BLOCK_ENTRIES = 3 * 2**17, 2**22
# exp(-70) is still a normal float32, unlike the subnormal numbers below, with which processors are many times slower; a
# sum of exp(70) x / tau does not overflow. LOW stands for minus infinity where 0 times it must be 0.
SPAN, LOW = 70.0, -1e30


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
    out: Tensor,
    texts: TextFeatures,
    videos: VideoFeatures,
    word_matrix: Tensor,
    word_matrix_2: Tensor,
    patch_matrix: Tensor,
    patch_matrix_2: Tensor,
    *,
    temperature: float,
    dtype: torch.dtype,
    tile: tuple[int, int] | None = None,
) -> None:
    """Writes the scores of `patch_word` into (T, V), without gradients; arguments as there.

    A tile's products lie in buffers that are used again for the next, so that they stay in the processor's cache. They
    are aggregated over the axis that is not the last: then no step reduces within a vector. For patches they are
    transposed, which costs less than computing them again. Neither a search for the largest nor a softmax is spent on
    the second weights, see `_Aggregation`. What is left beside the products in float32 is about as dear as they are.
    """
    (num_texts, num_words), (num_videos, num_patches) = texts.words.shape[:2], videos.patches.shape[:2]
    step, width = tile or tile_shape(num_texts, num_videos, num_words * num_patches, out.device, TILE_ENTRIES)
    by_words = _Aggregation(word_matrix, num_words, temperature, out)
    by_patches = _Aggregation(patch_matrix, num_patches, temperature, out)
    buffers = [out.new_empty(0) for _ in range(4)]
    for columns in _slices(num_videos, max(width, BLOCK_ENTRIES // videos.patches[0].numel())):
        block = videos[columns]
        patches = block.patches.to(dtype)
        for rows in _slices(num_texts, step):
            some = texts[rows]
            words = (some.words.flatten(0, 1).to(out.dtype) / temperature).to(dtype)
            of_patches = out.new_empty(len(some), len(block), num_patches)  # c1
            of_words = out.new_empty(len(block), len(some), num_words)  # c2
            for part in _slices(len(block), width):
                others = block[part]
                products, turned = _products(words, patches[part].flatten(0, 1), *buffers[:2])
                products = products.view(len(some), num_words, len(others), num_patches)
                turned = turned.view(len(others), num_patches, len(some), num_words)
                by_words(products, some.word_mask, buffers[2:], of_patches[:, part])
                by_patches(turned, others.patch_mask, buffers[2:], of_words[part])
            words_first = interactive_similarity(of_patches, patch_matrix_2, temperature, block.patch_mask)
            patches_first = interactive_similarity(of_words, word_matrix_2, temperature, some.word_mask)
            torch.add(words_first, patches_first.T, out=out[rows, columns]).div_(2)


class _Aggregation:
    """tau * ISA(x / tau) over the second axis, in memory that is given.

    Softmax does not change when a constant is added, so every row of M is centred, which adds the same to all
    aggregated values: these then lie within half the widest row / tau, of which the exponential mostly fits float32
    without a search for the largest.
    """

    def __init__(self, matrix: Tensor, size: int, temperature: float, like: Tensor) -> None:
        self.temperature = temperature
        matrix = matrix[:size, :size].to(like) / temperature
        low, high = matrix.aminmax(dim=1, keepdim=True)
        self.bounded = bool(((high - low) / 2).max() <= SPAN)
        self.matrix = (matrix - (low + high) / 2).T.contiguous()

    def __call__(self, x: Tensor, mask: Tensor | None, buffers: Sequence[Tensor], out: Tensor) -> None:
        """Writes into ``out`` (B, ...) what becomes of x (B, n, ...), which is already divided by tau.

        Args:
            x: overwritten where it does not count.
            mask: (B, n).
            buffers: two, which are overwritten.
            out: of the shape of x without its second axis.
        """
        x = x.flatten(2)
        masked = None if mask is None else ~mask[:, :, None]
        if masked is not None:
            x.masked_fill_(masked, LOW)
        first = torch.sub(x, x.amax(1, keepdim=True), out=_take(buffers[0], x.shape)).clamp_min_(-SPAN).exp_()
        second = torch.bmm(self.matrix.expand(len(x), -1, -1), first, out=_take(buffers[1], x.shape))
        second.mul_(first.sum(1, keepdim=True).reciprocal_())
        if not self.bounded:
            if masked is not None:
                second.masked_fill_(masked, LOW)
            second.sub_(second.amax(1, keepdim=True)).clamp_min_(-SPAN)
        second.exp_()
        if masked is not None:
            second.masked_fill_(masked, 0)
        total = second.sum(1)
        mean = second.mul_(x).sum(1).div_(total).mul_(self.temperature)
        out.copy_(mean.view(out.shape))


def _products(words: Tensor, patches: Tensor, buffer: Tensor, second_buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Products of all rows with all, and their transpose, in the type of the buffers that they fill."""
    products = _take(buffer, (len(words), len(patches)))
    if words.dtype == products.dtype:
        source = torch.mm(words, patches.T, out=products)
    else:
        source = words @ patches.T
        products.copy_(source)
    return products, _take(second_buffer, (len(patches), len(words))).copy_(source.T)


def _take(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The start of a buffer, which grows when it is too short."""
    size = math.prod(shape)
    if buffer.numel() < size:
        buffer.resize_(size)
    return buffer[:size].view(shape)


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
