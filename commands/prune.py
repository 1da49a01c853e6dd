"""``prune``: set weights of a model to zero, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jsonargparse

from fulgurite.commands import compress

if TYPE_CHECKING:
    from fulgurite.callbacks.prune_step import PruneAtCheckpoint


def run(command: str, argv: list[str]) -> int:
    """Prune, or with ``--dry_run`` say what would be done; returns the exit code. Raises as `compress.run`."""
    return compress.run("prune", argv, add_method, step_of)


def add_method(parser: jsonargparse.ArgumentParser) -> None:
    """Add the pruner, and how sparsity is shared out."""
    from fulgurite.methods.pruning.base import Pruner
    from fulgurite.methods.pruning.ecoflap import Ecoflap
    from fulgurite.methods.pruning.iterative import Iterative

    parser.add_subclass_arguments((Pruner, Iterative), "pruner", required=True, help="how, and how much, as Wanda")
    parser.add_argument(
        "--allocation", type=Ecoflap | None, default=None, help="sparsity of every layer by its importance (Ecoflap)"
    )


def step_of(options: Any, with_data: bool) -> PruneAtCheckpoint:
    """The step; see `compress.run`."""
    from fulgurite.callbacks.prune_step import PruneAtCheckpoint, needs_loss

    pruner, allocation = options.pruner, options.allocation
    measured = pruner.needs != "nothing" or needs_loss(pruner, allocation)
    calibration = compress.calibration_of(options, with_data, measured)
    return PruneAtCheckpoint(pruner, options.layers, options.towers, calibration, allocation=allocation)
