"""The interface of pretrained models with a tower for pictures and one for text, as retrieval uses them.

A batch of such a model holds, beside the fields of `samples.sample_fields`:

    text        (T, W) long, ids of every caption, padded; ``text_mask`` (T, W) True for real ones
    owner       (T,) long, the row of the video that a caption belongs to; captions of a video follow one another
    pixels      (V, F, 3, S, S) float, or ``tokens`` (V, F, N, C) that a feature cache holds
    frame_mask  (V, F) True for the frames that a video has; the others are zero
    video_id    (V,) long, equal for rows of the same video, whatever the rank
    captions    list of tuples, of every video

Legend: T texts, V videos, W words, F frames, S side in pixels, N tokens of a frame, C their width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.methods.retrieval.features import TextTokens, VideoTokens
from fulgurite.methods.retrieval.head import TowerFacts
from fulgurite.samples import Batch, Sample


class VideoTextBackbone(FrozenBackbone):
    """A dual encoder of frames and captions that gives every token of both towers."""

    @property
    @abstractmethod
    def lengths(self) -> dict[str, int]:
        """The most ``frames`` and ``words`` that it gives; those without a limit are left out."""

    @abstractmethod
    def caption_batch(self, captions: Sequence[str], names: Sequence[str] | None = None) -> Batch:
        """``text`` and ``text_mask`` of captions alone.

        Args:
            captions: themselves.
            names: how errors call them; None takes themselves.

        Raises:
            DataError: one is empty, or too long.
        """

    def check_captions(self, samples: Sequence[Sample]) -> None:
        """Raise DataError for a caption that no batch could take; nothing unless a subclass has a limit."""
        return

    @abstractmethod
    def text_tokens(self, batch: Batch) -> TextTokens:
        """Captions of a batch in the width shared with videos."""

    @abstractmethod
    def video_tokens(self, batch: Batch) -> VideoTokens:
        """Videos of a batch in the width shared with texts."""

    @abstractmethod
    def tower_facts(self) -> TowerFacts:
        """What a head is built by."""
