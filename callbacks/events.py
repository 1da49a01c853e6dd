"""TensorBoard events in the run folder, and nothing beside them."""

from __future__ import annotations

from lightning.fabric.loggers import TensorBoardLogger as EventWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class Events(TensorBoardLogger):
    """Lightning's logger without its ``hparams.yaml`` where a module saves no hyper-parameters: it would be empty.

    The run's ``config.yaml`` has all settings.
    """

    @rank_zero_only
    def save(self) -> None:
        """Write what has been logged."""
        if self.hparams:
            super().save()
        else:
            EventWriter.save(self)
