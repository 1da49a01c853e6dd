"""Edits of n items side by side: each item has a slot, a loss and a random stream of its own.

Losses are summed over items and every optimizer step acts entry by entry, so that the result for an item does not
depend on which others are edited with it.

Legend: n items, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fulgurite.methods.schedules import Schedule
from fulgurite.methods.unlearning.edits.base import Edit
from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View
from fulgurite.methods.unlearning.objectives.retain import RetainTerm
from fulgurite.modules.edited_state import EditedState
from fulgurite.samples import Batch, DataError


class Passes(Protocol):
    """What an edit asks of the module."""

    def view(
        self, batch: Batch, labels: Tensor, layers: Sequence[int], state_layer: int | None, needs_logits: bool
    ) -> View:
        """A pass over the rows of ``batch`` with the answers ``labels`` (R, T)."""
        ...


@dataclass
class Asked:
    """Rows of some items, and the answers that are scored on them.

    Args:
        batch: R rows.
        items: (R,) long, the item of each row.
        labels: (R, T) answer ids, one entry per target of the objective.
    """

    batch: Batch
    items: Tensor
    labels: list[Tensor]


@dataclass
class Recipe:
    """How an edit is trained.

    Args:
        objective: what is minimised.
        retain: what keeps the rest; None where nothing does.
        forget_weight: of the objective.
        retain_weight: of the retain term.
        steps: of the optimizer.
        schedule: its factor by step.
        optimizer: made of the edit's parameters.
        enough: an item whose loss is below it takes no step; None goes on.
    """

    objective: Objective
    retain: RetainTerm | None
    forget_weight: float
    retain_weight: float
    steps: int
    schedule: Schedule
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    enough: float | None = None


def by_item(terms: Terms, items: Tensor, number: int) -> Tensor:
    """(n,) the loss of every item: the totals of its rows by their counts; 0 where nothing counts."""
    totals, counts = (torch.zeros(number, device=each.device) for each in (terms.totals, terms.counts))
    totals = totals.index_add(0, items, terms.totals)
    counts = counts.index_add(0, items, terms.counts)
    return totals / counts.clamp(min=1)


def objective_views(passes: Passes, objective: Objective, asked: Asked) -> list[View]:
    """A pass per target."""
    return [
        passes.view(asked.batch, labels, objective.layers, objective.state_layer, objective.needs_logits)
        for labels in asked.labels
    ]


def retain_view(passes: Passes, retain: RetainTerm, asked: Asked) -> View:
    """The pass over what must stay."""
    return passes.view(asked.batch, asked.labels[0], (), retain.state_layer, retain.needs_logits)


def trained(
    passes: Passes, state: EditedState, edit: Edit, recipe: Recipe, forget: Asked, kept: Asked | None, names: list[str]
) -> list[float]:
    """Train ``edit`` in place on top of ``state``; the last loss of every item.

    Args:
        passes: of the model.
        state: what the edit is put on.
        edit: with a slot per item, at its start.
        recipe: how.
        forget: rows of the objective.
        kept: rows of the retain term.
        names: of the items, for messages.

    Raises:
        DataError: a loss is not finite, by the name of the item.
    """
    number, edited = len(names), state.with_edit(edit)
    objective, retain = recipe.objective, recipe.retain
    with torch.no_grad(), state.over(forget.items):
        references: list[View | None] = [None] * len(forget.labels)
        if objective.needs_reference:
            references = list(objective_views(passes, objective, forget))
    kept_reference = None
    if retain is not None and retain.needs_reference:
        with torch.no_grad(), state.over(kept.items):
            kept_reference = retain_view(passes, retain, kept)
    optimizer = recipe.optimizer(list(edit.parameters()))
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = torch.zeros(number)
    edit.train()
    for step in range(recipe.steps):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * recipe.schedule(step, recipe.steps)
        with edited.over(forget.items):
            terms = objective(objective_views(passes, objective, forget), references)
        losses = recipe.forget_weight * by_item(terms, forget.items, number)
        if retain is not None:
            with edited.over(kept.items):
                stays = retain(retain_view(passes, retain, kept), kept_reference)
            losses = losses + recipe.retain_weight * by_item(stays, kept.items, number)
        spoilt = [name for name, loss in zip(names, losses.tolist()) if not math.isfinite(loss)]
        if spoilt:
            raise DataError(
                f"the loss of item {spoilt[0]!r} is not finite in step {step}: lower the learning rate of its edit"
            )
        stepped(edit, optimizer, losses, recipe.enough)
    edit.eval()
    return losses.detach().tolist()


def stepped(edit: Edit, optimizer: torch.optim.Optimizer, losses: Tensor, enough: float | None) -> None:
    """One step for the items whose loss is not yet below ``enough``; the slots of the others stay."""
    going = torch.ones_like(losses, dtype=torch.bool) if enough is None else losses.detach() >= enough
    before = [] if bool(going.all()) else [parameter.detach().clone() for parameter in edit.parameters()]
    losses.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    edit.project()
    with torch.no_grad():
        for parameter, old in zip(edit.parameters(), before):
            parameter[~going] = old[~going]
