"""A DataLoader that goes on where it stopped, to the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fulgurite.samples.collator import Batch, Collator
from fulgurite.samples.errors import DataError
from fulgurite.samples.sample import Sample
from fulgurite.samples.sampler import GlobalBatchSampler


@dataclass(frozen=True)
class Failure:
    """The text of a `DataError` on its way out of a worker, which would bury it in a traceback."""

    text: str


@dataclass(frozen=True)
class Guarded:
    """A collator whose `DataError` comes back as a value."""

    collator: Collator

    def __call__(self, samples: Sequence[Sample]) -> Batch | Failure:
        """The batch, or why there is none."""
        try:
            return self.collator(samples)
        except DataError as error:
            return Failure(str(error))


class ResumableLoader(DataLoader):
    """Batches in the order of a `GlobalBatchSampler`, with the position as its state.

    The position counts batches handed out, not batches prefetched by workers. The loader owns its generator,
    seeded per epoch, so neither starting it nor its workers touch the global random state. Nothing starts
    before the first batch is asked for (Lightning calls ``iter`` twice per epoch).

    Args:
        dataset: maps the sampler's indices to samples.
        batch_sampler: the order.
        collate_fn: samples to batch.
        num_workers: worker processes; 0 loads in this process.
        name: what is loaded, e.g. the stage; a state of other data is refused.
        multiprocessing_context: how workers start.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler: GlobalBatchSampler,
        collate_fn: Collator | None = None,
        num_workers: int = 0,
        name: str = "",
        multiprocessing_context: str | None = None,
    ) -> None:
        self.name = name
        self.count = 0
        self.start = 0
        self.start_epoch = 0
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=None if collate_fn is None else Guarded(collate_fn),
            num_workers=num_workers,
            generator=torch.Generator(),
            multiprocessing_context=multiprocessing_context if num_workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position; a generator, so it starts with the first batch asked for."""
        # Where epochs are cut short, a state from the end of one must not shorten the next.
        self.count = self.start if self.batch_sampler.epoch == self.start_epoch else 0
        self.start = 0
        self.batch_sampler.skip = self.count
        self.generator.manual_seed(self.batch_sampler.seed * 7919 + self.batch_sampler.epoch)
        for batch in super().__iter__():
            if isinstance(batch, Failure):
                raise DataError(batch.text)
            self.count += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches handed out in this epoch, the epoch, and what the data were."""
        sampler = self.batch_sampler
        return {"name": self.name, "count": self.count, "epoch": sampler.epoch, **sampler.facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; a finished epoch continues with the next one.

        Raises:
            DataError: the state stands in the middle of an epoch over other data.
        """
        sampler = self.batch_sampler
        now = {"name": self.name, **sampler.facts}
        then = {key: value for key, value in state.items() if key not in ("count", "epoch")}
        finished = state["count"] >= state["batches"]
        if then != now and not finished:
            raise DataError(
                f"The run stopped in the middle of an epoch over {then} and cannot go on with {now}: "
                "resume with the same data and batch_size, or start a new run from the weights (--init_from)."
            )
        self.start = 0 if finished else state["count"]
        self.start_epoch = sampler.epoch = state["epoch"] + int(finished)
