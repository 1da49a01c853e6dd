"""Frames in the place of features, for towers that train: a cache then saves decoding and resizing, not encoding.

They are stored as they leave the resize, rounded to 8 bits, as Pillow rounds them; so they differ from frames that are
read anew by up to half a level of 255.

Legend: N frames, S side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fulgurite.backbones.frames import FrameTransform
from fulgurite.checkpoints.digest import digest_of_json


@dataclass(frozen=True)
class EightBits:
    """Decoded frames to those that are stored.

    Args:
        transform: of the tower; what it normalises by is left to the reader.
    """

    transform: FrameTransform

    def __call__(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, 3, S, S) uint8."""
        return self.transform.resized(frames).round().to(torch.uint8)


class StoredPixels(nn.Module):
    """What a feature cache takes for an encoder: it gives the frames themselves.

    Args:
        transform: of the tower.
    """

    def __init__(self, transform: FrameTransform) -> None:
        super().__init__()
        self.transform = EightBits(transform)
        self.name = f"pixels-{transform.size}-{transform.fit}"

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8, unchanged."""
        return pixels

    @property
    def fingerprint(self) -> str:
        """Digest of how frames are resized."""
        return digest_of_json({"pixels": self.name})
