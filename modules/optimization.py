"""Parameter groups and the number of steps: what an optimizer and its schedule are built from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from fulgurite.samples import Stage, batches_within


@dataclass
class ParamGroup:
    """Trained tensors with a learning rate of their own.

    Args:
        pattern: regular expression searched in the names of the live set's tensors.
        lr: their learning rate.
    """

    pattern: str
    lr: float


def grouped(named: Mapping[str, Tensor], groups: Sequence[ParamGroup]) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: a tensor belongs to the first group that matches, the rest comes last.

    Raises:
        LookupError: a pattern matches nothing that is left.
    """
    left, out = dict(named), []
    for group in groups:
        names = [n for n in left if re.search(group.pattern, n)]
        if not names:
            raise LookupError(
                f"model.init_args.param_groups: pattern {group.pattern!r} matches none of the trained tensors; "
                f"they are named like {next(iter(named))!r}"
            )
        out.append({"params": [left.pop(n) for n in names], "lr": group.lr})
    if left:
        out.append({"params": list(left.values())})
    return out


def steps_of_stages(stages: Sequence[Stage], trainer: Trainer) -> list[int]:
    """Optimizer steps of every stage under the trainer's limits and accumulation; one stage ends with ``max_steps``."""
    steps = []
    for stage in stages:
        batches = batches_within(stage.num_batches, trainer.limit_train_batches)
        steps.append(max(-(-batches // trainer.accumulate_grad_batches), 1) * stage.epochs)
    if len(steps) == 1 and trainer.max_steps > 0:
        return [min(steps[0], trainer.max_steps)]
    return steps
