"""Samples as a torch data set: what workers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
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


def drawn_samples(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """``count`` of the samples (all where there are fewer) in a random order, the same for the same seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return [samples[place] for place in order[:count].tolist()]
