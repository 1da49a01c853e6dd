"""Batches of the whole run, shared out over ranks: the same samples per step for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch


class GlobalBatchSampler:
    """Batches of indices for one rank out of a stream of global batches.

    The order is a permutation that depends on (seed, epoch) alone. Rank r of W takes items ``r::W`` of every
    global batch. Where a global batch does not divide by W, the shorter ranks get repeats, given as ``index +
    num_samples`` and marked uncounted by the data set, so all ranks run the same number of equally long
    batches. Nothing is dropped.

    Args:
        num_samples: size of the data set.
        batch_size: samples per step over all ranks together.
        rank: this process.
        world: number of processes that share the data.
        shuffle: False keeps the order of the data set.
        seed: of the order.
        repeats: times that each batch comes, in a row.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        repeats: int = 1,
    ) -> None:
        if batch_size < 1 or repeats < 1:
            raise ValueError(f"batch_size={batch_size} and repeats={repeats} must be at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} processes")
        self.num_samples = num_samples
        self.global_batch_size = batch_size
        self.rank = rank
        self.world = world
        self.shuffle = shuffle
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls it at the start of an epoch."""
        self.epoch = epoch

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Itself: the place where Lightning looks for `set_epoch`."""
        return self

    def order(self) -> list[int]:
        """All indices in the order of this epoch, before they are shared out."""
        if not self.shuffle:
            return list(range(self.num_samples))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % (1 << 63))
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def __len__(self) -> int:
        return -(-self.num_samples // self.global_batch_size) * self.repeats

    @property
    def facts(self) -> dict[str, object]:
        """What a position in an epoch refers to."""
        return {"samples": self.num_samples, "batch": self.global_batch_size, "batches": len(self)}

    def global_batches(self) -> Iterator[list[int]]:
        """All batches of this epoch, before they are shared out."""
        order = self.order()
        return (
            order[at : at + self.global_batch_size]
            for at in range(0, len(order), self.global_batch_size)
            for _ in range(self.repeats)
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of this rank, without the first ``skip`` ones; ``skip`` counts for one pass only."""
        skip, self.skip = self.skip, 0
        for batch in islice(self.global_batches(), skip, None):
            share = -(-len(batch) // self.world)
            mine = batch[self.rank :: self.world]
            repeats = [batch[(self.rank + i) % len(batch)] + self.num_samples for i in range(share - len(mine))]
            yield mine + repeats
