"""From samples with captions and a video, a picture or stored tokens to the batch of a `VideoTextBackbone`.

Legend: V videos, F frames, S side in pixels, N tokens of a frame, C their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fulgurite.backbones.caption_tokens import CaptionTokens
from fulgurite.backbones.frames import FrameTransform
from fulgurite.methods.random import digest_of
from fulgurite.samples import Batch, DataError, Sample, sample_fields
from fulgurite.samples.picture import Picture, pixels_of
from fulgurite.samples.sampling import FrameSampling


class VideoTextCollator:
    """The batch that `backbones.video_text` describes, and ``cut`` (T,), True for captions that were cut.

    A picture is a video of one frame. Videos with fewer frames than ``sampling`` counts are filled up by zeros.

    Args:
        tokens: captions to ids.
        sampling: which frames.
        transform: decoded frames (F, 3, H, W) to (F, 3, S, S), and its `FrameTransform.normalised` what is stored.
        encoder: name under which samples may hold what is ``stored`` of their frames; None always decodes.
        stored: ``tokens`` (F, N, C), or ``pixels`` (F, 3, S, S) uint8 that are still to be normalised.
        captions: whether each sample must have some; without, videos can be embedded alone.
    """

    def __init__(
        self,
        tokens: CaptionTokens,
        sampling: FrameSampling,
        transform: FrameTransform,
        encoder: str | None = None,
        captions: bool = True,
        stored: Literal["tokens", "pixels"] = "tokens",
    ) -> None:
        self.tokens, self.sampling, self.transform, self.encoder = tokens, sampling, transform, encoder
        self.stored = stored
        media = "video|image" if encoder is None else f"features.{encoder}|video|image"
        self.needs = ("captions", media) if captions else (media,)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch. Raises DataError naming a sample that lacks something, or has too much of it."""
        owners = [row for row, sample in enumerate(samples) for _ in sample.captions]
        captions = [caption for sample in samples for caption in sample.captions]
        if "captions" in self.needs and (bare := [sample.id for sample in samples if not sample.captions]):
            raise DataError(f"sample {bare[0]!r} has no caption")
        return {
            **sample_fields(samples),
            **self.tokens(captions, [samples[row].id for row in owners]),
            "owner": torch.tensor(owners, dtype=torch.long),
            "captions": [sample.captions for sample in samples],
            "video_id": torch.tensor([video_id(sample) for sample in samples], dtype=torch.long),
            **self._videos(samples),
        }

    def _videos(self, samples: Sequence[Sample]) -> Batch:
        """``pixels``, or ``tokens`` where all samples hold them, and ``frame_mask``."""
        stored = self.encoder is not None and all(self.encoder in sample.features for sample in samples)
        rows = [self._stored(sample) if stored else self._pixels(sample) for sample in samples]
        length = self.sampling.count or max(len(row) for row in rows)
        for sample, row in zip(samples, rows):
            if not 0 < len(row) <= length:
                raise DataError(f"sample {sample.id!r} has {len(row)} frames; 1 to {length} can be taken")
        out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            out[number, : len(row)] = row
            mask[number, : len(row)] = True
        return {self.stored if stored else "pixels": out, "frame_mask": mask}

    def _stored(self, sample: Sample) -> Tensor:
        """(F, N, C), or (F, 3, S, S) as the tower takes them."""
        given = sample.features[self.encoder]
        return given.float() if self.stored == "tokens" else self.transform.normalised(given)

    def _pixels(self, sample: Sample) -> Tensor:
        """(F, 3, S, S) of the frames that there are."""
        if sample.video is not None:
            return self.transform(sample.video.frames(self.sampling.indices(sample.video)))
        if sample.image is None:
            raise DataError(
                f"sample {sample.id!r} has no video or image, and other samples lack features to go without"
            )
        return self.transform(pixels_of(sample.image)[None])


def video_id(sample: Sample) -> int:
    """63 bits that are equal for samples of one video, whatever the process; without a file, those of the sample."""
    if sample.video is not None:
        name = sample.video.name
    else:
        name = str(sample.image.path) if isinstance(sample.image, Picture) else sample.id
    return digest_of(0, "video", 0, f"{sample.domain}/{name}") >> 65
