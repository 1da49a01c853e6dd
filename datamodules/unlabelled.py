"""Pictures without their labels, one batch of every data set a step: what merging coefficients are adapted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.processes import epochs_of
from fulgurite.samples import Sample, Stage
from fulgurite.samples.loader import ResumableLoader


class UnlabelledTasks(ContinualDataModule):
    """Several data sets side by side. Every training step has one batch of each, by its domain, without answers.

    An epoch is as long as the longest set; the others begin again. Validation and test show all sets, with labels, in
    one loader.

    Args:
        domains: the data sets. The loading options below hold for all of them.
        adapt_to: the split whose pictures train; their labels are taken off. ``"test"`` is what the AdaMerging paper
            does, and says so in the manifest of the result.
        loading: the options of `FulguriteDataModule`; ``batch_size`` is that of each set.
    """

    def __init__(
        self, domains: list[FulguriteDataModule], adapt_to: Literal["train", "val", "test"] = "val", **loading: Any
    ) -> None:
        super().__init__(domains, epochs_per_domain=1, joint=True, **loading)
        self.adapt_to = adapt_to

    def read(self, split: Split) -> list[Sample]:
        """As in the base; the training split is the one that is adapted to, without answers."""
        if split != "train":
            return super().read(split)
        return [replace(sample, answers={}) for sample in super().read(self.adapt_to)]

    def stages(self) -> list[Stage]:
        """One stage, as long as the trainer says."""
        batches = max(self._num_batches(self._of([name], "train")) for name in self.info().domains)
        return [Stage("all", self.info().domains, epochs_of(self, batches), batches)]

    def trainer_options(self) -> dict[str, Any]:
        """As of a single data set: the trainer's steps or epochs say when a fit ends."""
        return FulguriteDataModule.trainer_options(self)

    def train_dataloader(self) -> dict[str, ResumableLoader]:
        """A loader by domain."""
        return {name: self.loader("train", self._of([name], "train"), name) for name in self.info().domains}

    def _check_stages(self) -> None:
        """Nothing changes from stage to stage."""
