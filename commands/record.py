"""Data and module of an experiment record, for commands that need no trainer."""

from __future__ import annotations

from typing import Any

from fulgurite.commands.invocation import Invocation
from fulgurite.commands.runs import Plan
from fulgurite.commands.train_cli import TrainCLI


class RecordCLI(TrainCLI):
    """What ``fit`` would build from the same arguments, but for the Trainer.

    Args:
        invocation: of ``fit``.
    """

    def __init__(self, invocation: Invocation) -> None:
        super().__init__(invocation, Plan())

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """There is none."""
