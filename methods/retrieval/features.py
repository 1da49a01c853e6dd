"""What the towers give of texts and videos, and what a head makes of them: tensors that travel together.

Legend: T texts, V videos, W words, F frames, N tokens of a frame, L patches of a video, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class _Rows:
    """Tensors, some of which may be missing, of which each has a row per text or per video.

    Attributes:
        masks: by the name of a tensor of words, frames or patches, that of its mask.
    """

    masks: ClassVar[dict[str, str]] = {}

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

    def lengths(self) -> dict[str, int]:
        """How many words, frames or patches a row has, by the tensor that a mask belongs to, and of the mask."""
        own = self.tensors()
        pairs = {name: own[name].shape[1] for name in self.masks if name in own}
        return pairs | {self.masks[name]: length for name, length in pairs.items() if self.masks[name] in own}

    def padded(self, lengths: Mapping[str, int]) -> Self:
        """With rows of these `lengths`, at least the own ones, filled up by what the masks leave out.

        Raises:
            ValueError: there is no mask to leave it out.
        """
        more = {name: lengths[name] - length for name, length in self.lengths().items() if lengths[name] > length}
        for name in more:
            if name in self.masks and self.masks[name] not in more:
                raise ValueError(
                    f"texts or videos differ in their number of {name}, and nothing tells padding from the rest: set "
                    "head.init_args.mask_padding to true, or one length for all (backbone.init_args.pad_to: max_words, "
                    "and num_frames above 0)"
                )
        filled = {
            name: functional.pad(value, (*[0] * (2 * value.dim() - 4), 0, more[name])) if name in more else value
            for name, value in self.tensors().items()
        }
        return type(self)(**filled)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Rows of all ``parts``, which have the same tensors, padded to the longest. Raises as `padded`."""
        found = [part.lengths() for part in parts]
        longest = {name: max(each[name] for each in found) for name in found[0]}
        given = [part.padded(longest).tensors() for part in parts]
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

    masks: ClassVar[dict[str, str]] = {"words": "word_mask"}

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

    masks: ClassVar[dict[str, str]] = {"frames": "frame_mask", "patches": "patch_mask"}

    video: Tensor
    frames: Tensor | None = None
    patches: Tensor | None = None
    frame_mask: Tensor | None = None
    patch_mask: Tensor | None = None
