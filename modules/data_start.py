"""Adapters that start from data or from all of the backbone: sparse masks from scores, ladders from pruned blocks.

Data come in as sums of squared gradients of single examples, over all processes, before a strategy wraps the model.

Legend: B examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.ladder_start import copy_pruned
from fulgurite.methods.adapters.mask_scores import data_scores
from fulgurite.methods.adapters.sparse_mask import WITHOUT_DATA, SparseMask
from fulgurite.methods.ranks import Ranks
from fulgurite.methods.statistics.fisher import FisherStatistics
from fulgurite.modules.evaluation import moved
from fulgurite.samples import Batch
from fulgurite.samples.dataset import drawn_samples

Inputs = dict[str, Tensor]


@runtime_checkable
class ByExample(Protocol):
    """A module whose training loss can be taken example by example."""

    backbone: nn.Module
    bank: nn.Module

    def example_inputs(self, batch: Batch) -> Inputs:
        """All that the functions below read of a batch, as tensors with one row per example."""
        ...

    def example_losses(self, inputs: Inputs) -> Tensor:
        """(B,) losses with the data's own labels, with the adapters that are active."""
        ...

    def example_logits(self, inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, C) of an answer, or (B, T, C) of its T labels with a mask (B, T)."""
        ...


def start_from_data(trainer: pl.Trainer, module: ByExample) -> None:
    """Give masks and ladders their start, the same in all sets. Others stay as they are. A collective.

    Args:
        trainer: of the fit, whose DataModule is set up.
        module: not wrapped yet; it goes to its device for that.
    """
    module.to(trainer.strategy.root_device)
    for key, adapter in module.bank.adapters_of("live").items():
        same = [module.bank.adapters_of(name)[key] for name in module.bank.names]
        if isinstance(adapter, SparseMask) and adapter.score not in WITHOUT_DATA:
            scores = scores_of_mask(trainer, module, adapter)
            for each in same:
                each.set_scores(scores)
            rank_zero_info(f"{key}: {len(adapter.positions)} of {adapter.num_total} weights chosen by {adapter.score}")
        elif isinstance(adapter, LadderSide) and adapter.init != "random":
            importance = importance_of(trainer, module, adapter) if adapter.init == "fisher" else None
            for each in same:
                copy_pruned(each, module.backbone, module.backbone.spec, importance)
            by = "magnitude" if importance is None else f"the squared gradients of {adapter.samples} samples"
            rank_zero_info(f"{key}: pruned by {by}")


def scores_of_mask(trainer: pl.Trainer, module: ByExample, mask: SparseMask) -> dict[str, Tensor]:
    """Scores by which ``mask`` is chosen, from as many training samples as it asks for, or all there are."""
    read: Callable[[Inputs], Any] = module.example_losses if "label" in mask.score else module.example_logits
    ranks = Ranks(trainer.global_rank, trainer.world_size)
    one, two = itertools.tee(examples(trainer, module, mask.samples, mask.seed))
    numbers = (inputs["number"] for inputs in two)
    return data_scores(mask, module.backbone, lambda _, inputs: read(inputs), one, numbers, ranks, vectorize=False)


def importance_of(trainer: pl.Trainer, module: ByExample, ladder: LadderSide) -> dict[str, Tensor]:
    """Summed squared gradients of the backbone alone, by its parameters' names. A collective.

    A backbone that sees the text alone beside the ladder sees the text alone here too, as published.
    """

    def losses(_: nn.Module, inputs: Inputs) -> Tensor:
        with module.bank.use(None):
            return module.example_losses(inputs)

    statistic = FisherStatistics(module.backbone, losses, kind="empirical", vectorize=False)
    for inputs in examples(trainer, module, ladder.samples, ladder.seed):
        numbers = inputs.pop("number")
        if ladder.ladder_inputs == "text":
            inputs = {name: value for name, value in inputs.items() if name not in ("features", "picture", "pixels")}
        statistic.update(inputs, numbers)
    statistic.reduce(Ranks(trainer.global_rank, trainer.world_size).total)
    return statistic.sums


def examples(trainer: pl.Trainer, module: ByExample, count: int, seed: int) -> Iterator[Inputs]:
    """Inputs of ``count`` training samples (all where there are fewer), of which each process has a share.

    ``number`` (B,) counts through the samples, whatever the processes.
    """
    data = trainer.datamodule
    samples = drawn_samples(data.samples("train"), count, seed)
    loader = data.loader("val", samples, "examples")
    places = {(sample.domain, sample.id): place for place, sample in enumerate(samples)}
    for batch in moved(trainer, module, loader):
        inputs, counted = module.example_inputs(batch), batch["counted"]
        numbers = counted.new_tensor([places[name] for name in zip(batch["domain"], batch["id"])], dtype=int)
        rows = {key: value[counted.to(value.device)] for key, value in inputs.items()}
        if counted.any():
            yield {**rows, "number": numbers[counted]}
