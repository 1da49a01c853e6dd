"""Batches of several tasks: one task after the other in a drawn order, or all of them in one batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from fulgurite.methods.random import digest_of
from fulgurite.samples.sampler import GlobalBatchSampler


class TaskBatchSampler(GlobalBatchSampler):
    """Every global batch holds samples of one task.

    The tasks take turns in the published order: a list with each task as often as it has batches, shuffled by
    ``random.Random(epoch)`` and taken from its end (VL-Adapter, ``multitask_data.py``). What the batches of a task
    hold depends on (seed, epoch, task) alone. Without ``shuffle`` the tasks follow one another, in the order of the
    data. Ranks share a batch as in the base class.

    Args:
        groups: indices of the samples of each task; a task may have none.
        batch_sizes: samples per step of each task, over all ranks together.
        counts: batches of each task in an epoch; None takes each sample once. A task that needs more begins anew in
            another order; of one that needs fewer, each epoch has others.
        rank: this process.
        world: number of processes that share the data.
        shuffle: False keeps the order of the data set.
        seed: of the samples within a task.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        batch_sizes: Sequence[int],
        counts: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(sum(map(len, groups)), max(batch_sizes), rank, world, shuffle, seed)
        self.groups, self.batch_sizes = groups, list(batch_sizes)
        self.counts = whole_passes(groups, batch_sizes) if counts is None else list(counts)

    @property
    def facts(self) -> dict[str, object]:
        """What a position in an epoch refers to."""
        return {
            "samples": [len(group) for group in self.groups],
            "batch": self.batch_sizes,
            "batches": len(self),
            "tasks": self.counts,
        }

    def __len__(self) -> int:
        return sum(self.counts)

    def turns(self) -> list[int]:
        """The task of every batch of this epoch."""
        turns = [task for task, count in enumerate(self.counts) for _ in range(count)]
        if self.shuffle:
            random.Random(self.epoch).shuffle(turns)
            turns.reverse()
        return turns

    def global_batches(self) -> Iterator[list[int]]:
        """All batches of this epoch, before they are shared out."""
        own = [
            drawn(group, size, self.seed if self.shuffle else None, self.epoch, task)
            for task, (group, size) in enumerate(zip(self.groups, self.batch_sizes))
        ]
        return (next(own[task]) for task in self.turns())


class MixedTaskSampler(GlobalBatchSampler):
    """Global batches of samples of all tasks, of each task a given number in an epoch, in an order by (seed, epoch).

    Args:
        groups: indices of the samples of each task.
        batch_size: samples per step over all ranks together.
        counts: samples of each task in an epoch.
        rank: this process.
        world: number of processes that share the data.
        seed: of the order.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        batch_size: int,
        counts: Sequence[int],
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(sum(map(len, groups)), batch_size, rank, world, shuffle=True, seed=seed)
        self.groups, self.counts = groups, list(counts)

    @property
    def facts(self) -> dict[str, object]:
        """What a position in an epoch refers to."""
        return {**super().facts, "tasks": self.counts}

    def __len__(self) -> int:
        return -(-sum(self.counts) // self.global_batch_size)

    def order(self) -> list[int]:
        """The samples of this epoch, of which one may come twice."""
        chosen = []
        for task, (group, count) in enumerate(zip(self.groups, self.counts)):
            own = drawn(group, 1, self.seed, self.epoch, task)
            chosen += [next(own)[0] for _ in range(count)]
        places = permutation(len(chosen), self.seed, self.epoch, "all")
        return [chosen[place] for place in places]


def whole_passes(groups: Sequence[Sequence[int]], batch_sizes: Sequence[int]) -> list[int]:
    """Batches of each task in which each of its samples comes once."""
    return [-(-len(group) // size) for group, size in zip(groups, batch_sizes)]


def drawn(group: Sequence[int], size: int, seed: int | None, epoch: int, task: int) -> Iterator[list[int]]:
    """Batches of one task without end, pass after pass over its samples, each in an order of its own.

    Args:
        group: its samples.
        size: of a batch; the last one of a pass is shorter where it does not divide.
        seed: of the orders; None keeps that of the data.
        epoch: of the orders too.
        task: its number, of the orders too.
    """
    number = 0
    while group:
        places = range(len(group)) if seed is None else permutation(len(group), seed, epoch, f"{task}/{number}")
        for at in range(0, len(group), size):
            yield [group[place] for place in places[at : at + size]]
        number += 1


def permutation(count: int, seed: int, epoch: int, name: str) -> list[int]:
    """The numbers below ``count`` in an order that depends on (seed, epoch, name) alone."""
    generator = torch.Generator().manual_seed(digest_of(seed, "order", epoch, name) >> 65)
    return torch.randperm(count, generator=generator).tolist()


def shares(sizes: Sequence[int], temperature: float | None) -> list[int]:
    """How many of each task an epoch has, where the whole pass has ``sizes``.

    Args:
        sizes: batches or samples of each task; none of an empty one are asked for.
        temperature: T of shares in proportion to ``size ** (1 / T)`` of as many in total, each at least 1; None gives
            each the mean number, rounded down (VL-Adapter's ``balanced``).
    """
    full = [size for size in sizes if size]
    if temperature is None:
        return [sum(full) // len(full) if size else 0 for size in sizes]
    weights = [size ** (1 / temperature) if size else 0.0 for size in sizes]
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    parts = [max(int(share), 1) if size else 0 for share, size in zip(exact, sizes)]
    # What rounding down leaves goes to the largest remainders, ties to the first task.
    ranked = sorted(range(len(sizes)), key=lambda task: (int(exact[task]) - exact[task], task))
    for task in ranked[: max(sum(sizes) - sum(parts), 0)]:
        parts[task] += 1
    return parts
