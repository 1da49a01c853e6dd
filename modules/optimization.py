"""Parameter groups and the number of steps: what an optimizer and its schedule are built from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fulgurite.checkpoints import MismatchError
from fulgurite.samples import Stage, batches_within


@dataclass
class ParamGroup:
    """Trained tensors with a learning rate of their own.

    Args:
        pattern: regular expression searched in the names of the trained tensors.
        lr: their learning rate; None leaves the optimizer's.
        weight_decay: theirs; None leaves the optimizer's.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None

    @property
    def options(self) -> dict[str, float]:
        """What differs from the optimizer's own options."""
        given = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {name: value for name, value in given.items() if value is not None}


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
        out.append({"params": [left.pop(n) for n in names], **group.options})
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


def optimizer_facts(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an optimizer's state belongs to: its class, and the names of the tensors in every group."""
    names = {id(tensor): name for name, tensor in named.items()}
    kind = type(optimizer)
    groups = [[names[id(tensor)] for tensor in group["params"]] for group in optimizer.param_groups]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "groups": groups}


def require_same_optimizer(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `MismatchError` where the state of one optimizer cannot go on in the other."""
    if saved["class"] != now["class"]:
        what = f"optimizer is {now['class']}, and the checkpoint holds the state of {saved['class']}"
    elif saved["groups"] != now["groups"]:
        then, here = ([len(group) for group in facts["groups"]] for facts in (saved, now))
        what = f"param_groups make groups of {here} tensors, and the checkpoint's are of {then}"
    else:
        return
    raise MismatchError(
        f"this run's {what}: resume with the checkpoint's model.init_args.optimizer and param_groups, or start a new "
        "run from its weights (--init_from)"
    )


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of every group, without its tensors."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def apply_options(optimizer: Optimizer, scheduler: LambdaLR, options: Sequence[Mapping[str, Any]]) -> None:
    """Give a resumed optimizer the configured options in place of the checkpoint's, at its place in the schedule."""
    for group, configured in zip(optimizer.param_groups, options, strict=True):
        group.update(configured)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
