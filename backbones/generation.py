"""The interface of vision-language models that answer by writing text.

A batch of such a model holds, beside the fields of `samples.sample_fields`:

    text       (B, L) long, padded on the right; ``text_mask`` (B, L) True for real tokens
    features   (B, V, f) float, tokens of the pictures or frames; absent where there are none
    picture    (B, V) long, the number of a token's picture, -1 where a sample has fewer tokens than the longest
    pixels     (K, 3, S, S) float, K pictures or frames of all samples, in place of ``features``

Legend: B batch, L text tokens, T target tokens, V visual tokens, f their width, K pictures, S side in pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.samples import Batch, DataError

if TYPE_CHECKING:
    from fulgurite.backbones.generation_collator import VisualInput

IGNORED = -100  # what a target holds where there is no token


class GenerativeBackbone(FrozenBackbone):
    """A frozen model that turns pictures and text into text."""

    tokenizer: Any

    @abstractmethod
    def forward(self, batch: Batch, targets: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of each token of ``targets`` (B, T), from the true ones before it."""

    @abstractmethod
    def generate_ids(self, batch: Batch, num_beams: int = 1, max_new_tokens: int = 20) -> Tensor:
        """What it writes, (B, T) long, without a start token; padded after the end."""

    def generate(self, batch: Batch, num_beams: int = 1, max_new_tokens: int = 20) -> list[str]:
        """What it writes, one text per sample.

        Args:
            num_beams: 1 takes the likeliest token each time.
            max_new_tokens: tokens after which it stops, the end of the text included.
        """
        ids = self.generate_ids(batch, num_beams, max_new_tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def target_batch(self, texts: Sequence[str], max_lengths: Sequence[int | None] | None = None) -> Batch:
        """``targets`` (B, T) long of texts to be written, with `IGNORED` for padding.

        Args:
            texts: themselves.
            max_lengths: after how many tokens each is cut; None takes all of it, or all of each.
        """
        tokens = self.tokenizer(list(texts))["input_ids"]
        tokens = [cut_ids(ids, limit) for ids, limit in zip(tokens, max_lengths or [None] * len(tokens), strict=True)]
        return {"targets": padded(tokens, IGNORED)}


@torch.no_grad()
def encoded_pictures(encoder: nn.Module, visual: VisualInput, pixels: Tensor, real: Tensor) -> Tensor:
    """Features (B, V, f) of the pictures (K, 3, S, S) of all samples in their order, at the places ``real`` (B, V)."""
    grids = visual.pooled(encoder(pixels))
    out = grids.new_zeros(*real.shape, grids.shape[-1])
    out[real] = grids.flatten(0, 1)
    return out


def cut_ids(ids: list[int], limit: int | None) -> list[int]:
    """The first ``limit`` tokens, of which the last stays the end of the text; None takes all."""
    return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """(B, L) long, rows filled up on the right."""
    out = torch.full((len(rows), max(map(len, rows))), value)
    for row, ids in zip(out, rows):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return out


def text_batch(tokenizer: Any, texts: Sequence[str], limit: int, cut: bool, names: Sequence[str]) -> Batch:
    """``text`` (B, L) and ``text_mask`` (B, L), padded on the right.

    Args:
        tokenizer: of transformers.
        texts: themselves.
        limit: tokens that a text may have, those around it included.
        cut: whether a longer one is cut on the right; otherwise it is an error.
        names: how errors call the texts.

    Raises:
        DataError: a text is too long.
    """
    tokens = tokenizer(list(texts))["input_ids"]
    for name, ids in zip(names, tokens):
        if len(ids) > limit and not cut:
            raise DataError(
                f"the text of sample {name!r} has {len(ids)} tokens; raise backbone.init_args.max_tokens={limit}, or "
                "set backbone.init_args.long_text: cut"
            )
    tokens = [cut_ids(ids, limit) for ids in tokens]
    lengths = torch.tensor([len(ids) for ids in tokens])
    text = padded(tokens, tokenizer.pad_token_id)
    return {"text": text, "text_mask": torch.arange(text.shape[1]) < lengths[:, None]}
