"""What the towers give of texts and videos, and what a head makes of them: tensors that travel together.

Legend: T texts, V videos, W words, F frames, N tokens of a frame, L patches of a video, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Rows:
    """Tensors, some of which may be missing, of which each has a row per text or per video."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, change) -> Self:
        """Each tensor that is there, changed."""
        return type(self)(**{name: change(value) for name, value in self.tensors().items()})

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Some of the rows."""
        return self.map(lambda value: value[rows])

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        return cls(**tensors)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Rows of all ``parts``, which have the same tensors."""
        given = [part.tensors() for part in parts]
        return cls(**{name: torch.cat([each[name] for each in given]) for name in given[0]})


@dataclass(frozen=True)
class TextTokens(_Rows):
    """Texts as their tower gives them, in the width shared with videos.

    Args:
        sentence: (T, D) one vector per text.
        words: (T, W, D) all positions, padding among them.
        mask: (T, W) True for real words.
    """

    sentence: Tensor
    words: Tensor
    mask: Tensor


@dataclass(frozen=True)
class VideoTokens(_Rows):
    """Videos as their tower gives them, in the width shared with texts.

    Args:
        tokens: (V, F, N, D); token 0 of a frame stands for the frame, the others for its patches.
        mask: (V, F) True for frames that the video has.
    """

    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TextFeatures(_Rows):
    """What a head compares of texts.

    Args:
        sentence: (T, D).
        words: (T, W, D), or None.
        word_mask: (T, W) True for the words that count, or None for all.
    """

    sentence: Tensor
    words: Tensor | None = None
    word_mask: Tensor | None = None


@dataclass(frozen=True)
class VideoFeatures(_Rows):
    """What a head compares of videos.

    Args:
        video: (V, D).
        frames: (V, F, D), or None.
        patches: (V, L, D) of all frames, frame by frame, or None.
        frame_mask: (V, F) True for the frames that count, or None for all.
        patch_mask: (V, L) True for the patches that count, or None for all.
    """

    video: Tensor
    frames: Tensor | None = None
    patches: Tensor | None = None
    frame_mask: Tensor | None = None
    patch_mask: Tensor | None = None
