"""Several tasks trained together: one task a batch as VL-Adapter does, or all tasks in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.processes import epochs_of, rank_and_world
from fulgurite.samples import DataError, Sample, Stage
from fulgurite.samples.sampler import GlobalBatchSampler
from fulgurite.samples.task_sampler import MixedTaskSampler, TaskBatchSampler, shares, whole_passes


class MultiTask(ContinualDataModule):
    """Data sets of several tasks, each a domain of its own, trained in one stage as long as the trainer says.

    The order depends on the epoch and on ``seed`` alone, is the same on every rank, and a run resumes in the middle of
    it. Batches of validation, test and prediction hold one task each, in the order of the data.

    Args:
        domains: the data sets. The loading options below hold for all of them.
        batches: ``"one_task"`` gives every step a batch of one task, in the published order; ``"mixed"`` draws a
            step's samples from all tasks, for kinds of adapters that route each sample by its task.
        batch_sizes: samples per step of each task, over all processes together, in the order of ``domains``; None takes
            ``batch_size`` for each. For ``batches: one_task``.
        sampling: how much of each task an epoch holds. ``"all"``: each sample once. ``"balanced"``: of each task the
            mean number of batches (of samples where they are mixed). ``"temperature"``: as many in total as ``"all"``,
            in proportion to ``size ** (1 / temperature)``.
        temperature: of ``sampling: temperature``; 1 is ``"all"``, and the larger, the more equal.
        loading: the options of `FulguriteDataModule`.
    """

    def __init__(
        self,
        domains: list[FulguriteDataModule],
        batches: Literal["one_task", "mixed"] = "one_task",
        batch_sizes: list[int] | None = None,
        sampling: Literal["all", "balanced", "temperature"] = "all",
        temperature: float = 2.0,
        **loading: Any,
    ) -> None:
        super().__init__(domains, epochs_per_domain=1, joint=True, **loading)
        if batch_sizes is not None and batches == "mixed":
            raise DataError("data.batch_sizes is for batches of one task: with data.batches=mixed set data.batch_size")
        sizes = [self.batch_size] * len(domains) if batch_sizes is None else batch_sizes
        if len(sizes) != len(domains) or min(sizes) < 1:
            raise DataError(f"data.batch_sizes={sizes} must give at least 1 for each of {len(domains)} data sets")
        if temperature <= 0:
            raise DataError(f"data.temperature={temperature} must be greater than 0")
        self.batches, self.batch_sizes = batches, sizes
        self.sampling, self.temperature = sampling, temperature

    def stages(self) -> list[Stage]:
        """One stage over all tasks, as long as the trainer says."""
        batches = self._num_batches(self.samples("train"))
        return [Stage("all", self.info().domains, epochs_of(self, batches), batches)]

    def trainer_options(self) -> dict[str, Any]:
        """As of a single data set: the trainer's steps or epochs say when a fit ends."""
        return FulguriteDataModule.trainer_options(self)

    def _check_stages(self) -> None:
        """Nothing changes from stage to stage."""

    def _check_trainer(self) -> None:
        super()._check_trainer()
        _, world = rank_and_world(self.trainer)
        if any(size % world for size in self.batch_sizes):
            raise DataError(
                f"data.batch_sizes={self.batch_sizes} are numbers of samples per step over all processes together: "
                f"set each to a multiple of {world}"
            )

    def _num_batches(self, samples: Sequence[Sample]) -> int:
        return len(self._sampler("train", samples))

    def _sampler(self, split: Split, samples: Sequence[Sample]) -> GlobalBatchSampler:
        rank, world = rank_and_world(self.trainer)
        tasks = {name: task for task, data in enumerate(self.domains) for name in data.info().domains}
        groups: list[list[int]] = [[] for _ in self.domains]
        for place, sample in enumerate(samples):
            groups[tasks[sample.domain]].append(place)
        shuffle = self._shuffles(split)
        if not shuffle:
            sizes = self.batch_sizes if split == "train" else [self.eval_batch_size] * len(groups)
            return TaskBatchSampler(groups, sizes, rank=rank, world=world)
        if self.batches == "mixed":
            counts = self._shares([len(group) for group in groups])
            return MixedTaskSampler(groups, self.batch_size, counts, rank, world, self.seed)
        counts = self._shares(whole_passes(groups, self.batch_sizes))
        return TaskBatchSampler(groups, self.batch_sizes, counts, rank, world, shuffle=True, seed=self.seed)

    def _shares(self, sizes: list[int]) -> list[int]:
        if self.sampling == "all":
            return sizes
        return shares(sizes, self.temperature if self.sampling == "temperature" else None)
