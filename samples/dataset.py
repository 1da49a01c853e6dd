"""Samples as a torch data set: what workers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.utils.data import Dataset

from fulgurite.samples.sample import Sample


class SampleDataset(Dataset):
    """Samples by index; an index beyond the last is a repeat and comes back uncounted.

    Args:
        samples: the samples of one split.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, or the uncounted repeat ``index - len(self)``."""
        repeat, index = divmod(index, len(self.samples))
        return replace(self.samples[index], counted=False) if repeat else self.samples[index]
