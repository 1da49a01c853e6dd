"""``prune``: set weights of a model to zero, without training."""

from __future__ import annotations

import jsonargparse

from fulgurite.commands import compress


def run(command: str, argv: list[str]) -> int:
    """Prune, or with ``--dry_run`` say what would be done; returns the exit code. Raises as `compress.run`."""
    return compress.run("prune", argv, add_method)


def add_method(parser: jsonargparse.ArgumentParser) -> str:
    """Add the pruner."""
    from fulgurite.methods.pruning.base import Pruner

    parser.add_subclass_arguments(Pruner, "pruner", required=True, help="how, and how much, as Wanda")
    return "pruner"
