"""What a DataModule asks of its trainer: how long a fit is, and which share of the samples this process has."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from fulgurite.samples import DataError, batches_within


def epochs_of(data: LightningDataModule, batches: int) -> int:
    """Epochs of the present fit, of so many batches each; 1 outside of a fit.

    Raises:
        DataError: the fit has no end.
    """
    trainer = data.trainer
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return 1
    if (trainer.max_epochs or 0) > 0:
        return trainer.max_epochs
    if trainer.max_steps <= 0:
        raise DataError(f"{type(data).__name__}: set trainer.max_epochs or trainer.max_steps, to say when a fit ends")
    steps = -(-batches_within(batches, trainer.limit_train_batches) // trainer.accumulate_grad_batches)
    return -(-trainer.max_steps // max(steps, 1))


def rank_and_world(trainer: Trainer | None) -> tuple[int, int]:
    """This process's number among those that share the samples, and their number."""
    if trainer is None or trainer.world_size == 1:
        return 0, 1
    shares = trainer.distributed_sampler_kwargs
    return shares["rank"], shares["num_replicas"]


def check_trainer(trainer: Trainer, batch_size: int) -> None:
    """Raise `DataError` for an option that would spoil the batches."""
    _, world = rank_and_world(trainer)
    if batch_size % world:
        raise DataError(
            f"batch_size={batch_size} is the number of samples per step over all processes together "
            f"and does not divide by {world} of them: set data.batch_size to a multiple of {world}"
        )
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise DataError(
            "The samples are shared out over processes already; Lightning would share them out "
            "once more: set trainer.use_distributed_sampler to false"
        )
