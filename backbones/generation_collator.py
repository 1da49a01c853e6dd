"""From samples to the batch that `backbones.generation` describes.

Legend: B batch, K pictures or frames, N tokens of each, V visual tokens of a sample, f their width, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.backbones.frames import FrameEncoder
from fulgurite.backbones.generation import text_batch
from fulgurite.backbones.visual_embedding import ORDERS, PICTURES, downsampled, numbers_of
from fulgurite.samples import Batch, DataError, Sample, sample_fields
from fulgurite.samples.picture import pixels_of
from fulgurite.samples.sampling import FrameSampling


@dataclass(frozen=True)
class VisualInput:
    """What a model reads of pictures and frames.

    Args:
        features: name of ready features in `Sample.features`; of an encoder, that of what it makes.
        width: f.
        grid: side to which grids of features are pooled; None takes them as they are.
        transform: decoded frames to pixels, where there is an encoder; None where features come with the data.
        tokens: N that the encoder gives per frame.
        sampling: which frames of a video.
    """

    features: str
    width: int
    grid: int | None = None
    transform: Any = None
    tokens: int = 0
    sampling: FrameSampling | None = None

    @classmethod
    def of(cls, encoder: FrameEncoder, grid: int | None, num_frames: int) -> VisualInput:
        """What ``encoder`` makes. Raises ValueError where ``grid`` is larger than what it gives."""
        if grid is not None and grid**2 > encoder.tokens:
            raise ValueError(
                f"backbone.init_args.grid={grid} pools {encoder.name}, which gives {encoder.tokens} tokens of a "
                "picture: raise the encoder's grid, or set it to null"
            )
        sampling = FrameSampling("uniform", num_frames)
        return cls(encoder.name, encoder.width, grid, encoder.transform, encoder.tokens, sampling)

    @property
    def needs(self) -> str:
        """Fields of a sample, see `Sample.has`."""
        return f"features.{self.features}" + ("|images|image|video" if self.transform is not None else "")

    def pooled(self, features: Tensor) -> Tensor:
        """(K, N, f) by ``grid``."""
        return features if self.grid is None else downsampled(features, self.grid)


class GenerationCollator:
    """Token ids of questions, and visual tokens or pixels.

    Args:
        tokenizer: of transformers.
        visual: what is read of pictures; None reads text alone.
        max_tokens: longest text.
        long_text: what happens to a longer one.
        template: text around the question, which takes the place of ``{}``.
        orders: visual tokens of a picture that there are embeddings for, beside those of `PICTURES`; None where
            they need none.
        reserved: what stands for pictures in the template, and so in no question.
    """

    def __init__(
        self,
        tokenizer: Any,
        visual: VisualInput | None,
        max_tokens: int,
        long_text: Literal["error", "cut"],
        template: str = "{}",
        orders: int | None = ORDERS,
        reserved: str | None = None,
    ) -> None:
        self.tokenizer, self.visual, self.max_tokens, self.long_text = tokenizer, visual, max_tokens, long_text
        self.template, self.orders, self.reserved = template, orders, reserved
        self.needs = ("question",) if visual is None else ("question", visual.needs)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch. Raises DataError naming a sample that does not fit."""
        paired = next((sample.id for sample in samples if sample.text_pair is not None), None)
        if paired is not None:
            raise DataError(f"sample {paired!r} has two texts, and this model reads one: set data.form=text")
        marked = next(
            (s.id for s in samples if self.reserved is not None and self.reserved in (s.question or "")), None
        )
        if marked is not None:
            raise DataError(f"the question of sample {marked!r} has {self.reserved}, which stands for its picture")
        texts = [self.template.replace("{}", sample.question or "") for sample in samples]
        cut = self.long_text == "cut"
        batch = sample_fields(samples)
        batch.update(text_batch(self.tokenizer, texts, self.max_tokens, cut, [sample.id for sample in samples]))
        if self.visual is None:
            return batch
        if all(self.visual.features in sample.features for sample in samples):
            rows = [self._stored(sample) for sample in samples]
            batch["features"] = filled([row.flatten(0, 1) for row in rows], 0.0)
            shapes = [row.shape[:2] for row in rows]
        else:
            pixels = [self._pixels(sample) for sample in samples]
            batch["pixels"] = torch.cat(pixels)
            tokens = self.visual.tokens if self.visual.grid is None else self.visual.grid**2
            shapes = [(len(each), tokens) for each in pixels]
        batch["picture"] = filled([self._numbers(s, *shape) for s, shape in zip(samples, shapes)], -1)
        return batch

    def _numbers(self, sample: Sample, frames: int, tokens: int) -> Tensor:
        """(V,) numbers of pictures."""
        picture, order = numbers_of(frames, tokens, sample.num_images)
        if self.orders is not None and sample.num_images > PICTURES:
            raise DataError(
                f"sample {sample.id!r} has {sample.num_images} pictures, and this model has embeddings for {PICTURES}: "
                "leave it out, or take Llava"
            )
        if self.orders is not None and int(order.max()) >= self.orders:
            raise DataError(
                f"sample {sample.id!r} has {int(order.max()) + 1} visual tokens of a picture, and there are embeddings "
                f"for {self.orders}: pool by backbone.init_args.grid, or take fewer frames"
            )
        return picture

    def _stored(self, sample: Sample) -> Tensor:
        """(K, N, f) of ready features: (num_images * N, f), or (K, N, f) of an encoder."""
        visual, images = self.visual, sample.num_images
        features = sample.features[visual.features]
        if (
            features.ndim not in (2, 3)
            or features.shape[-1] != visual.width
            or len(features) % images
            or not len(features)
        ):
            raise DataError(
                f"features {visual.features!r} of sample {sample.id!r} with {images} pictures have shape "
                f"{tuple(features.shape)}, expected (tokens, {visual.width}) with as many tokens of each picture; "
                "see backbone.init_args.features and feature_dim"
            )
        grids = features.unflatten(0, (images, -1)) if features.ndim == 2 else features
        try:
            return visual.pooled(grids.float())
        except ValueError as error:
            raise DataError(
                f"features {visual.features!r} of sample {sample.id!r}: {error}; set backbone.init_args.grid"
            ) from error

    def _pixels(self, sample: Sample) -> Tensor:
        """(K, 3, S, S) of its pictures or frames."""
        visual = self.visual
        if visual.transform is None:
            raise DataError(
                f"sample {sample.id!r} has features {sorted(sample.features)}, not {visual.features!r}: set "
                "backbone.init_args.features, or give an encoder"
            )
        if sample.video is not None:
            return visual.transform(sample.video.frames(visual.sampling.indices(sample.video)))
        images = sample.images or (() if sample.image is None else (sample.image,))
        if len(images) != sample.num_images:
            raise DataError(
                f"sample {sample.id!r} has {len(images)} pictures where it says {sample.num_images}, and other samples "
                "lack features to go without"
            )
        return torch.cat([visual.transform(pixels_of(image)[None]) for image in images])


def filled(rows: Sequence[Tensor], value: float) -> Tensor:
    """Rows (V_i, ...) in one tensor (B, V, ...), filled up by ``value``."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
