"""One vector for all frames of a video, as CLIP4Clip, X-CLIP and UCoFiA make it.

    v = unit(mean over the video's frames of unit(z)),   unit(x) = x / |x|

z are the frames as CLIP gives them (meanP), or as a `TemporalEncoder` relates them (seqTransf).

Legend: V videos, F frames, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.methods.retrieval.head import TowerFacts
from fulgurite.methods.retrieval.temporal_encoder import encoder_from_text

Temporal = Literal["transformer", "mean"]


def unit(x: Tensor) -> Tensor:
    """``x`` (..., D) divided by its length; zero, which has no direction, stays zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1)


def mean_direction(x: Tensor, mask: Tensor) -> Tensor:
    """Unit vector (V, D) along the mean of the unit vectors of ``x`` (V, F, D) where ``mask`` (V, F) is True."""
    kept = mask.unsqueeze(-1).to(x.dtype)
    return unit((unit(x) * kept).sum(1) / kept.sum(1))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Heads compute in the precision of their parameters: cosines times 100 have no digits to lose."""
    return torch.autocast(x.device.type, enabled=False)


def require_length(count: int, most: int, kind: Literal["words", "frames"]) -> None:
    """Raise ValueError if a text or a video is longer than the head was made for."""
    if count > most:
        raise ValueError(f"{count} {kind}, and the head was made for at most {most}: set max_{kind} to that many")


class VideoVector(nn.Module):
    """Pools frames to one vector.

    Args:
        temporal: ``"transformer"`` relates frames first, ``"mean"`` does not.
        layers: blocks of the temporal encoder.
        max_frames: most frames of a video.
        towers: what the encoder starts from.
    """

    def __init__(self, temporal: Temporal, layers: int, max_frames: int, towers: TowerFacts) -> None:
        super().__init__()
        self.encoder = encoder_from_text(towers, layers, max_frames) if temporal == "transformer" else None

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """(V, D) of ``frames`` (V, F, D); ``mask`` (V, F) is True for frames that a video has."""
        related = frames if self.encoder is None else self.encoder(frames, mask)
        return mean_direction(related, mask)
