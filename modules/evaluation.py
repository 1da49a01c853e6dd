"""Scores of other weights inside a running fit, which goes on as if nothing had happened.

The values are copied into the module, a loop of our own goes over the batches, and the module's values are copied back.
Under FSDP2 both copies are of slices, and all ranks must have the same number of batches, as the loaders of this
project give them. Memory: a second copy of what the checkpoint holds, of this rank's slices where it is sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from fulgurite.checkpoints import MismatchError, read_manifest
from fulgurite.methods.quantization.storage import load_dense
from fulgurite.methods.sharding import reshard
from fulgurite.modules.adapted import BACKBONE_DIGEST, AdaptedModule
from fulgurite.modules.sharding import distribute
from fulgurite.samples import Batch, batches_within


@runtime_checkable
class Scored(Protocol):
    """A module whose weights can be scored within a fit."""

    def scores(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures of the module's present weights by name, equal on all ranks; a collective where there are several.

        Called in evaluation mode and without gradients. Nothing may be logged, and nothing kept.

        Args:
            batches: this rank's share, on the module's device.
        """
        ...


def scores_of(trainer: pl.Trainer, module: Scored, path: str | Path, batches: Iterable[Any], limit: int) -> dict:
    """What `Scored.scores` says of the weights in the checkpoint ``path``, by the first ``limit`` batches.

    Values, gradients, modes, metrics and random states of the running fit are the same after it. All ranks call it.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit the module.
    """
    facts, stage = read_manifest(path).facts, getattr(module, "stage", None)
    with (
        isolate_rng(),
        torch.no_grad(),
        evaluation_mode(module),
        whole_where(module, BACKBONE_DIGEST in facts),
        other_values(module, load_dense(path), str(path)),
    ):
        try:
            if stage is not None:
                module.stage = facts["stage"]
            with trainer.precision_plugin.forward_context():
                return module.scores(moved(trainer, module, islice(batches, limit)))
        finally:
            if stage is not None:
                module.stage = stage


def moved(trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """Each batch as the loops of the trainer hand it to a step."""
    for batch in batches:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)


def limited(trainer: pl.Trainer, split: str, batches: int) -> int:
    """How many of ``batches`` the trainer's own evaluation of ``split`` would see."""
    limit = trainer.limit_val_batches if split == "val" else trainer.limit_test_batches
    return batches_within(batches, limit)


@contextmanager
def other_values(module: nn.Module, values: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """``values`` in the place of the module's own within the block, and its own, to the bit, after it.

    Args:
        module: parameters and buffers keep their identity.
        values: whole tensors by name, all that the module's state dict has.
        where: they come from, for errors.

    Raises:
        MismatchError: other names or shapes than the module's.
    """
    problems = [f"{name} is only in one of them" for name in values.keys() ^ module.state_dict().keys()]
    reshard(module)  # only then are the parameters the slices
    targets = {
        **dict(module.named_parameters(remove_duplicate=False)),  # tied ones by each of their names
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    shapes = {name: (tuple(value.shape), tuple(targets[name].shape)) for name, value in values.items() if not problems}
    problems += [
        f"{name} has shape {there} there, {here} here" for name, (there, here) in shapes.items() if there != here
    ]
    if problems:
        raise MismatchError(
            f"{where} does not fit this {type(module).__name__} in {len(problems)} tensors: {problems[0]}"
        )
    with torch.no_grad():
        own = {name: targets[name].detach().clone() for name in values}
        try:
            for name, value in values.items():
                targets[name].copy_(distribute(value, targets[name], name))
            yield
        finally:
            reshard(module)
            for name, value in own.items():
                targets[name].copy_(value)


@contextmanager
def whole_where(module: nn.Module, self_contained: bool) -> Iterator[None]:
    """The backbone counted among the module's values inside, where others are ``self_contained``."""
    if not isinstance(module, AdaptedModule):
        yield
        return
    own, module.self_contained = module.self_contained, self_contained
    try:
        yield
    finally:
        module.self_contained = own


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode restored after."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
