"""Samples as a torch data set: what workers hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.utils.data import Dataset

from fulgurite.samples.sample import Sample


class SampleDataset(Dataset):
    """Samples by index; an index beyond the last is a repeat and comes back uncounted.

    Args:
        samples: the samples of one split.
        features: encoder name to (reader, keys): the reader's item ``keys[i]`` becomes ``features[name]`` of
            sample i.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        features: Mapping[str, tuple[Mapping[str, Tensor], Sequence[str | None]]] | None = None,
    ) -> None:
        self.samples = samples
        self.features = features or {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, or the uncounted repeat ``index - len(self)``."""
        repeat, index = divmod(index, len(self.samples))
        sample = self.samples[index]
        added = {
            n: reader[keys[index]] for n, (reader, keys) in self.features.items() if keys[index] is not None
        }
        if added:
            sample = replace(sample, features={**sample.features, **added})
        return replace(sample, counted=False) if repeat else sample
